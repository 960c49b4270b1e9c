"""The TPU chips: one table of what each can hold and how fast it is at most.

Memory is what libtpu's compiler lets one program use, in bytes: a test makes the compiler say it.
Speeds are the published peaks, of one chip (not of one TensorCore), in units per second. They are
upper limits: nobody measured anything here. An interconnect's bandwidth is of one direction, of all
links of a chip together; Google's pages give both directions together, so it is halved here.
"""

import dataclasses
import re

GIB = 2**30


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
        Chip("v4", 275e12, int(30.75 * GIB), 1200e9, 300e9, 6, 6.25e9, 2,
             "cloud.google.com/tpu/docs/v4 (compute, HBM); Jouppi et al., 'TPU v4', ISCA 2023, "
             "arXiv 2304.01433 (6 links of 50 GB/s); DCN: taken to be a v5p's, 50 Gbit/s per chip"),
        Chip("v5e", 197e12, int(15.75 * GIB), 819e9, 200e9, 4, 3.125e9, 1,
             "cloud.google.com/tpu/docs/v5e (ICI 400 GB/s both ways; DCN 2 NICs of 100 Gbit/s per "
             "host of 8 chips)"),
        Chip("v5p", 459e12, int(95.74 * GIB), 2765e9, 600e9, 6, 6.25e9, 2,
             "cloud.google.com/tpu/docs/v5p (ICI 1,200 GB/s both ways; DCN 50 Gbit/s per chip)"),
        Chip("v6e", 918e12, int(31.25 * GIB), 1638e9, 400e9, 4, 12.5e9, 1,
             "cloud.google.com/tpu/docs/v6e (ICI 800 GB/s both ways; DCN 4 NICs of 200 Gbit/s per "
             "host of 8 chips)"),
    )
}

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_AMOUNT = r"([\d.]+)([KMGT]?)i?B?"
_SHORTFALLS = (
    re.compile(rf"Used {_AMOUNT} of {_AMOUNT} hbm"),
    re.compile(rf"\({_AMOUNT}\) exceeds available HBM \({_AMOUNT}\)"),
)


def oom_shortfall(error_text: str) -> tuple[int, int] | None:
    """(bytes that the program needs, bytes that there are) of the compiler's refusal.

    None: the text is another error's. The compiler rounds both to hundredths of their unit.
    """
    for pattern in _SHORTFALLS:
        if match := pattern.search(error_text):
            used, used_unit, there, there_unit = match.groups()
            return int(float(used) * _UNITS[used_unit]), int(float(there) * _UNITS[there_unit])
    return None
