"""What a compiled TPU program sends over the interconnect, and what stands inside its loops.

    collectives(compiled.as_text())   -> every collective with its bytes and how often it runs
    while_bodies(compiled.as_text())  -> per loop: its collectives, custom calls, host transfers
    kernels(compiled.as_text())       -> the Pallas kernels, by name

Bytes are those that arrive at one chip in one execution, in a group of n chips whose members each
give an operand of b bytes:

    all-gather (n - 1) b          all-reduce 2 (n - 1) b / n       collective-permute b
    reduce-scatter, all-to-all (n - 1) b / n

The forms that libtpu gives them: one instruction; a `-start` and `-done` pair; a fusion of an
all-reduce and the slice of it that a chip keeps, which is a reduce-scatter; a chain of fusions that
each carry a part of one all-gather beside a matrix product, known by its chain's number; a loop of
permutations around a matrix product. What crosses slices (over DCN) is a pair of host transfers to
libtpu's "megascale" runtime, and device numbers in the groups count within one slice.
"""

import dataclasses
import re
from collections.abc import Iterator

from gtalign_jax.aot import hlo_text
from gtalign_jax.aot.hlo_text import Computation, Instruction, Module, State

KINDS = {  # kind -> bytes that arrive, in operand sizes, by group size n
    "all-gather": lambda n: n - 1,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
    "collective-broadcast": lambda n: 1,
}
_MEGASCALE = "xla_megascale_runtime"


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program.

    kind: a key of `KINDS`, also where the compiler wrote it in another form.
    bytes: arriving at one chip, per execution. shape: what each chip gives, "bf16[1,256,8192]".
    count: executions per run of the program; `in_loop`: per iteration of the loop around it whose
      number of iterations only the data decides (the decode loop).
    group_size: chips (over DCN: slices) that take part. over_dcn: crosses slices.
    blocking: a chip does nothing else meanwhile. Not so: what has a start and a done, links of a
      chain, what crosses slices.
    op_name: the JAX operation it comes from, as far as the text says.
    """

    kind: str
    bytes: float
    shape: str
    count: int
    group_size: int
    in_loop: bool
    over_dcn: bool
    blocking: bool
    name: str
    op_name: str

    def total_bytes(self, iterations: int = 1) -> float:
        """Bytes per run, if the loop of unknown length runs `iterations` times."""
        return self.bytes * self.count * (iterations if self.in_loop else 1)


@dataclasses.dataclass(frozen=True)
class WhileBody:
    """What one loop holds, loops inside included.

    trips: iterations, None where only the data can say. depth: loops around it.
    collectives: `count` per iteration of this loop; those in the loop's condition too.
    custom_calls: targets, Pallas kernels as "tpu_custom_call". host: transfers from or to the host
      that the program waits for (callbacks, infeed, outfeed), by instruction name.
    """

    name: str
    trips: int | None
    depth: int
    collectives: tuple[Collective, ...]
    custom_calls: tuple[str, ...]
    host: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Place:
    """An instruction, where it stands, how often it runs and whether started to run beside others.
    """

    at: Instruction
    where: Computation
    count: int
    in_loop: bool
    outside: State
    depth: int
    started: bool


def _walk(module: Module, name: str, count: int = 1, in_loop: bool = False,
          outside: State = lambda i: None, depth: int = 0, started: bool = False
          ) -> Iterator[_Place]:
    """Every instruction that runs, those of called computations too. Both sides of a branch."""
    where = module.computations[name]
    for at in where.instructions.values():
        yield _Place(at, where, count, in_loop, outside, depth, started)
        if at.op == "while":
            trips = hlo_text.trips(module, where, at, outside)
            inner = hlo_text.entered_with(module, where, at, outside)
            times, unknown = (count, True) if trips is None else (count * trips, in_loop)
            for part, extra in (("body", 0), ("condition", 0 if trips is None else count)):
                yield from _walk(module, at.called(part), times + extra, unknown, inner, depth + 1)
        elif at.op in ("fusion", "call", "async-start"):
            called = at.called("calls") or at.called("to_apply")
            yield from _walk(module, called, count, in_loop, lambda i: None, depth,
                             started or at.op == "async-start")
        elif at.op == "conditional":
            for branch in at.branches():
                yield from _walk(module, branch, count, in_loop, lambda i: None, depth)


def _group_size(module: Module, attributes: str) -> int:
    """Members of one group, from the three forms of `replica_groups`; none given: all chips."""
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", match[1]))
        size = 1
        for axis, part in re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", match[2]):
            size *= int(part or sizes[axis])
        return size
    return module.devices


def _slices(target: str) -> int:
    """Slices that take part in a transfer of the megascale runtime.

    `{1,2}x{0:3}` is slices 1 and 2, each with chips 0 to 3; `{{100000,200000},…}` are groups.
    """
    group = re.search(r"\{([^{}]*)\}", target)[1]
    members = 0
    for part in group.split(","):
        first, _, last = part.partition(":")
        members += int(last) - int(first) + 1 if last else 1
    return members


def _collective(module: Module, place: _Place) -> Collective | None:
    """The collective that an instruction is, if it is one."""
    at, attributes = place.at, place.at.attributes
    over_dcn = at.op == "send" and _MEGASCALE in attributes
    if over_dcn:
        kind = at.attribute("_xla_megascale_transfer_type").lower().replace("_", "-")
        kind = kind if kind in KINDS else "collective-permute"
        target = re.search(r'_xla_megascale_target=("[^"]*"|\{\{[^}]*\})', attributes)[1]
        size = 2 if "->" in target else _slices(target)
        given = (at.operands[0],)
    else:
        kind = at.op.removesuffix("-start")
        if kind not in KINDS or at.op.endswith("-done"):
            return None
        size = 2 if kind == "collective-permute" else _group_size(module, attributes)
        given = at.operands
        root = place.where.root
        if kind == "all-reduce" and root.op == "dynamic-slice" and root.operands[0] == at.name:
            kind = "reduce-scatter"
    shapes = [place.where.instructions[name].shape for name in given]
    arrive = sum(hlo_text.shape_bytes(shape) for shape in shapes) * KINDS[kind](size)
    shown = ", ".join(re.sub(r"\{[^}]*\}", "", shape) for shape in shapes)
    blocking = not (over_dcn or place.started or at.op.endswith("-start")
                    or at.attribute("chain_id") is not None)
    return Collective(kind, arrive, shown, place.count, size, place.in_loop, over_dcn, blocking,
                      at.name, at.attribute("op_name") or "")


def _collectives(module: Module, places: Iterator[_Place]) -> list[Collective]:
    found, chains = [], set()
    for place in places:
        collective = _collective(module, place)
        if collective is None or collective.group_size == 1:
            continue
        chain = place.at.attribute("chain_id")
        if chain is not None:
            # The links of a chain are fusions that carry one collective on; the first stands for
            # all of them.
            link = (chain, collective.kind, place.at.attribute("channel_id"))
            if link in chains:
                continue
            chains.add(link)
        found.append(collective)
    return found


def collectives(text: str) -> list[Collective]:
    """Every collective of a compiled program (`compiled.as_text()`), in the order of the text."""
    module = hlo_text.parse(text)
    return _collectives(module, _walk(module, module.entry))


def total_bytes(found: list[Collective], *, over_dcn: bool, iterations: int = 1) -> float:
    """Bytes that arrive at one chip per run over ICI (or DCN), all collectives together."""
    return sum(c.total_bytes(iterations) for c in found if c.over_dcn == over_dcn)


def _body(module: Module, place: _Place) -> WhileBody:
    loop = place.at
    inner = hlo_text.entered_with(module, place.where, loop, place.outside)
    inside = [
        found
        for part in ("body", "condition")
        for found in _walk(module, loop.called(part), outside=inner)
    ]
    calls = [p.at.attribute("custom_call_target") for p in inside if p.at.op == "custom-call"]
    host = [
        p.at.name
        for p in inside
        if p.at.op in ("infeed", "outfeed")
        or p.at.op in ("send", "recv")
        and "is_host_transfer=true" in p.at.attributes
        and _MEGASCALE not in p.at.attributes
    ]
    return WhileBody(
        loop.name, hlo_text.trips(module, place.where, loop, place.outside), place.depth,
        tuple(_collectives(module, iter(inside))), tuple(c for c in calls if c), tuple(host),
    )


def while_bodies(text: str) -> list[WhileBody]:
    """The loops of a compiled program, outer ones before those inside them."""
    module = hlo_text.parse(text)
    return [_body(module, p) for p in _walk(module, module.entry) if p.at.op == "while"]


def kernels(text: str) -> dict[str, int]:
    """Names of the Pallas (Mosaic) kernels -> how often they stand in the program's text."""
    found: dict[str, int] = {}
    module = hlo_text.parse(text)
    for computation in module.computations.values():
        for at in computation.instructions.values():
            if at.op == "custom-call" and at.attribute("custom_call_target") == "tpu_custom_call":
                name = re.sub(r"(\.\d+|\.clone)+$", "", at.name)
                found[name] = found.get(name, 0) + 1
    return found
