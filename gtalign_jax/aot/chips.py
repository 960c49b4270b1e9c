"""The TPU chips: one table of what each can hold and how fast it is at most.

Memory is what libtpu's compiler lets one program use, in bytes: all there is less what it reserves
for itself. A test makes the compiler accept that much and refuse more.
Speeds are the published peaks, of one chip (not of one TensorCore), in units per second. They are
upper limits: nobody measured anything here. An interconnect's bandwidth is of one direction, of all
links of a chip together; Google's pages give both directions together, so it is halved here.
"""

import dataclasses
import math
import re

GIB, MIB = 2**30, 2**20


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of TPU chip.

    generation: as the topology names spell it, "v5p".
    bf16_flops: peak bfloat16 operations per second.
    hbm_bytes: what the compiler lets a program use; less than what is soldered on.
    hbm_bandwidth, ici_bandwidth, dcn_bandwidth: bytes per second and chip; the last two one way.
    ici_links: links of one chip to its neighbours; `ici_bandwidth` is of all of them together.
    cores: TensorCores of one chip, which JAX shows as one device.
    source: where the speeds are published.
    """

    generation: str
    bf16_flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    ici_bandwidth: float
    ici_links: int
    dcn_bandwidth: float
    cores: int
    source: str

    @property
    def link_bandwidth(self) -> float:
        """Bytes per second of one link, one way."""
        return self.ici_bandwidth / self.ici_links


CHIPS = {
    chip.generation: chip
    for chip in (
        Chip("v4", 275e12, 32 * GIB - 1283 * MIB, 1200e9, 300e9, 6, 6.25e9, 2,
             "cloud.google.com/tpu/docs/v4 (compute, HBM); Jouppi et al., 'TPU v4', ISCA 2023, "
             "arXiv 2304.01433 (6 links of 50 GB/s); DCN: taken to be a v5p's, 50 Gbit/s per chip"),
        Chip("v5e", 197e12, 16 * GIB - 258 * MIB, 819e9, 200e9, 4, 3.125e9, 1,
             "cloud.google.com/tpu/docs/v5e (ICI 400 GB/s both ways; DCN 2 NICs of 100 Gbit/s per "
             "host of 8 chips)"),
        Chip("v5p", 459e12, 96 * GIB - 263 * MIB, 2765e9, 600e9, 6, 6.25e9, 2,
             "cloud.google.com/tpu/docs/v5p (ICI 1,200 GB/s both ways; DCN 50 Gbit/s per chip)"),
        Chip("v6e", 918e12, 63 * GIB // 2 - 260 * MIB, 1638e9, 400e9, 4, 12.5e9, 1,
             "cloud.google.com/tpu/docs/v6e (ICI 800 GB/s both ways; DCN 4 NICs of 200 Gbit/s per "
             "host of 8 chips)"),
    )
}

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_AMOUNT = r"([\d.]+)([KMGT]?)i?B?"
_ALL = re.compile(rf"Used {_AMOUNT} of {_AMOUNT} hbm\. Exceeded hbm capacity by {_AMOUNT}")
_PART = re.compile(rf"\({_AMOUNT}\) exceeds available HBM \({_AMOUNT}\)")


def oom_shortfall(error_text: str) -> tuple[int, int] | None:
    """(bytes that are needed, bytes that there are) of the compiler's refusal; None: other errors.

    The compiler has two. "Used … of … hbm" counts all that the program needs. Where arguments or
    temporaries alone are too large it stops before it has placed anything, and they are all that it
    counts. Amounts are rounded to hundredths of their unit; the first always exceeds the second.
    """
    if found := _ALL.search(error_text):
        _, there, over = _amounts(found)
        return there + over, there
    if found := _PART.search(error_text):
        needed, there = _amounts(found)
        return max(needed, there + 1), there
    return None


def _amounts(found: re.Match[str]) -> list[int]:
    """Pairs of a number and a unit, in bytes, rounded up so that an excess is never lost."""
    parts = found.groups()
    return [
        math.ceil(float(number) * _UNITS[unit])
        for number, unit in zip(parts[::2], parts[1::2], strict=True)
    ]
