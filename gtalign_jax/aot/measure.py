"""One program through the compiler: memory per chip, traffic, and a lower bound of its time.

    peak = arguments + outputs - aliased + temporaries + code + resident

The first five are from the compiler's own figures for one chip; `resident` is what the run holds
there meanwhile. A program that the compiler refuses for its memory is a result like any other.
"""

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import jax

from gtalign_jax.aot import hlo, roofline
from gtalign_jax.aot.chips import oom_shortfall
from gtalign_jax.aot.programs import Program, bytes_per_chip
from gtalign_jax.aot.roofline import Times, Work
from gtalign_jax.aot.topology import Topology


@dataclasses.dataclass(frozen=True)
class Row:
    """The figures of one program; bytes are of one chip.

    stage, calls, where: see `Program`. capacity: what one chip lets programs use; None on the host.
    arguments … code: by the compiler. resident: what else lies there, by what it is.
    refused: the compiler's words where it found no way to fit the program; `temporaries` is then
      what it says it would have needed.
    flops, useful_flops (without what is repeated to save memory), hbm_bytes: of one call, of one
      chip, by formula. collectives, times: of one call. loop_steps: see `Program`.
    kernels: Pallas kernels by name and how often they stand in the program.
    """

    name: str
    stage: str
    where: str
    calls: int
    capacity: int | None
    arguments: int = 0
    outputs: int = 0
    aliased: int = 0
    temporaries: int = 0
    code: int = 0
    resident: Mapping[str, int] = dataclasses.field(default_factory=dict)
    refused: str = ""
    flops: float = 0.0
    useful_flops: float = 0.0
    hbm_bytes: float = 0.0
    collectives: tuple[hlo.Collective, ...] = ()
    kernels: Mapping[str, int] = dataclasses.field(default_factory=dict)
    times: Times | None = None
    loop_steps: int = 1
    compile_s: float = 0.0

    @property
    def held(self) -> int:
        """Bytes that no size of micro-batch changes."""
        return self.arguments + self.outputs - self.aliased + sum(self.resident.values())

    @property
    def peak(self) -> int:
        return self.held + self.temporaries + self.code

    @property
    def shortfall(self) -> int:
        """Bytes that are missing on each chip; 0 where the program fits."""
        return 0 if self.capacity is None else max(0, self.peak - self.capacity)

    @property
    def fits(self) -> bool:
        return self.shortfall == 0 and not self.refused


def _temporaries(memory: Any) -> int:
    """What a program allocates beyond its arguments and results, by its buffer assignment.

    Not `temp_size_in_bytes`: that counts results which take over an argument's place once more, 7
    GiB too much for a 7B update that the compiler accepts.
    """
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return max(memory.peak_memory_in_bytes - held + memory.alias_size_in_bytes, 0)


def measure(program: Program, topology: Topology, tensor: int = 1) -> Row:
    """Compiles `program` and reads off its figures; `tensor` chips share one copy of the weights.

    Raises what the compiler raises, except where it says that memory does not suffice.
    """
    began = time.perf_counter()
    row = Row(
        program.name, program.stage, program.where, program.calls,
        capacity=topology.chip.hbm_bytes if program.where == "chip" else None,
        resident=dict(program.resident), loop_steps=program.loop_steps,
    )
    if program.work is not None:
        row = _with_work(row, program.work, topology, tensor)
    lowered = program.lower()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if (found := oom_shortfall(str(error))) is None:
            raise
        spent = time.perf_counter() - began
        return _refused(row, bytes_per_chip(program.arguments), found[0], str(error), spent)
    memory = compiled.memory_analysis()
    row = dataclasses.replace(
        row,
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=_temporaries(memory),
        code=memory.generated_code_size_in_bytes,
        compile_s=time.perf_counter() - began,
    )
    if program.where == "host":
        return row
    work = program.work or Work(0.0, 0.0, float(topology.chips * (row.arguments + row.outputs)))
    text = compiled.as_text()
    found = tuple(hlo.collectives(text))
    return dataclasses.replace(
        _with_work(row, work, topology, tensor), collectives=found, kernels=hlo.kernels(text),
        times=roofline.seconds(work, found, topology, tensor=tensor, iterations=row.loop_steps),
    )


def _with_work(row: Row, work: Work, topology: Topology, tensor: int) -> Row:
    return dataclasses.replace(
        row, flops=work.flops / topology.chips, useful_flops=work.useful_flops / topology.chips,
        hbm_bytes=work.hbm_bytes_per_chip(topology.chips, tensor),
    )


def _refused(row: Row, arguments: int, needed: int, words: str, spent: float) -> Row:
    """What the compiler counted until it gave up: the arguments, the temporaries, or everything."""
    if "HLO arguments" in words:
        arguments, temporaries = needed, 0
    elif "HLO temporaries" in words:
        temporaries = needed
    else:
        temporaries = max(0, needed - arguments)
    return dataclasses.replace(
        row, arguments=arguments, temporaries=temporaries, compile_s=spent,
        refused=words.strip().splitlines()[0],
    )
