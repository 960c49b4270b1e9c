"""The text of a compiled program, read into computations and instructions.

Only what the counting in `hlo.py` needs: names, shapes, operands, which computation calls which,
and how often a loop runs. libtpu's text does not say the last one, so it is worked out: the state
of a `while` is a tuple; where the condition reads `state[i] < constant`, the body returns
`state[i] + constant` and the loop is entered with a constant there, the number is known.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

_BYTES = {
    "pred": 1, "s2": 0.25, "u2": 0.25, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2,
    "s32": 4, "u32": 4, "s64": 8, "u64": 8, "f4e2m1fn": 0.5, "f8e5m2": 1, "f8e4m3": 1,
    "f8e4m3fn": 1, "f8e4m3fnuz": 1, "f8e5m2fnuz": 1, "f8e3m4": 1, "f8e4m3b11fnuz": 1,
    "f8e8m0fnu": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8,
    "c128": 16, "token": 0,
}
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,<=]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?(\S+) = (.*)$")
_CALLED = re.compile(r"(calls|body|condition|to_apply)=%?([^\s,)}]+)")
_BRANCHES = re.compile(
    r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=(%?[^\s,]+))"
)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `%name = shape op(operands), attributes`."""

    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    argument: str  # what stands in the parentheses: a constant's value, a parameter's number
    attributes: str
    is_root: bool

    def called(self, role: str) -> str | None:
        """The computation named as `calls`, `body`, `condition` or `to_apply`."""
        return dict(_CALLED.findall(self.attributes)).get(role)

    def branches(self) -> list[str]:
        """The computations of a `conditional`."""
        found = [a or b for a, b in _BRANCHES.findall(self.attributes)]
        return [name.strip().lstrip("%") for names in found for name in names.split(",")]

    def attribute(self, name: str) -> str | None:
        """The value of `name="value"`, `name={…}` (without braces) or `name=value`."""
        match = re.search(rf'\b{name}=(?:"([^"]*)"|([^\s,{{}}]+))', self.attributes)
        return match and (match[1] if match[1] is not None else match[2])


@dataclasses.dataclass(frozen=True)
class Computation:
    """A named block of instructions."""

    name: str
    instructions: dict[str, Instruction]

    @property
    def root(self) -> Instruction:
        return next(i for i in self.instructions.values() if i.is_root)

    def operand_bytes(self, instruction: Instruction) -> float:
        """Bytes of all operands, without the padding of their layouts."""
        return sum(shape_bytes(self.instructions[o].shape) for o in instruction.operands)


@dataclasses.dataclass(frozen=True)
class Module:
    """A whole program of one device."""

    entry: str
    computations: dict[str, Computation]
    devices: int


def shape_bytes(shape: str) -> float:
    """Bytes of an array or of all arrays of a tuple: `(bf16[2,3]{1,0}, u32[])` -> 16."""
    total = 0.0
    for dtype, dims in _ARRAY.findall(shape):
        total += _BYTES[dtype] * math.prod(int(d.lstrip("<=")) for d in dims.split(",") if d)
    return total


def _closing(text: str) -> int:
    """Where the parenthesis that opens at 0 closes."""
    depth = 0
    for at, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if depth == 0:
            return at
    raise ValueError(f"unbalanced parentheses in compiled text: {text[:80]!r}")


def _instruction(line: str) -> Instruction | None:
    match = _INSTRUCTION.match(re.sub(r"/\*.*?\*/", "", line))
    if match is None:
        return None
    is_root, name, rest = match.groups()
    end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    op, paren, rest = rest.partition("(")
    end = _closing(paren + rest)
    argument, attributes = rest[: end - 1], rest[end:]
    operands = tuple(re.findall(r"%([^\s,()]+)", argument))
    return Instruction(name, shape, op, operands, argument, attributes, bool(is_root))


def parse(text: str) -> Module:
    """Reads `compiled.as_text()`.

    Raises:
      ValueError: no ENTRY computation, so this is not the text of a compiled program.
    """
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = Computation(header[2], {})
            computations[current.name] = current
            entry = current.name if header[1] else entry
        elif line == "}" or line.startswith("} "):  # a kernel's metadata has lines of "}}"
            current = None
        elif current is not None and (instruction := _instruction(line)):
            current.instructions[instruction.name] = instruction
    if entry is None:
        raise ValueError("no ENTRY computation: expected the text of a compiled program")
    sizes = re.findall(r"(?:num_partitions|replica_count)=(\d+)", text.split("\n", 1)[0])
    return Module(entry, computations, math.prod(map(int, sizes)))


@dataclasses.dataclass(frozen=True)
class _Slot:
    """Element `index` of a loop's state, `plus` a constant."""

    index: int
    plus: int = 0


State = Callable[[int], Any]  # element of the state -> int, _Slot, or None (unknown)
_SAME = ("copy", "bitcast", "convert", "copy-start", "copy-done", "reshape")


def _value(module: Module, where: Computation, name: str, state: State, arguments: list | None
           ) -> Any:
    """What an instruction is, as far as loop counters go: int, _Slot, comparison, or None.

    `arguments` are the values given to a fusion's parameters; None where the only parameter is
    the state.
    """
    at = where.instructions[name]

    def operand(i: int) -> Any:
        return _value(module, where, at.operands[i], state, arguments)

    if at.op == "constant":
        return int(at.argument) if re.fullmatch(r"-?\d+", at.argument) else None
    if at.op == "parameter" and arguments is not None:
        return arguments[int(at.argument)]
    if at.op == "get-tuple-element":
        source = where.instructions[at.operands[0]]
        return state(int(at.attribute("index"))) if source.op == "parameter" else None
    if at.op in _SAME:
        return operand(0)
    if at.op == "add":
        terms = operand(0), operand(1)
        for one, other in (terms, terms[::-1]):
            if isinstance(one, _Slot) and isinstance(other, int):
                return _Slot(one.index, one.plus + other)
    if at.op == "compare":
        return at.attribute("direction"), operand(0), operand(1)
    if at.op == "fusion":
        inner = module.computations[at.called("calls")]
        given = [operand(i) for i in range(len(at.operands))]
        return _value(module, inner, inner.root.name, lambda i: None, given)
    return None


def _element(module: Module, where: Computation, tuple_name: str, index: int, state: State) -> Any:
    made = where.instructions[tuple_name]
    if made.op != "tuple":
        return None
    return _value(module, where, made.operands[index], state, None)


def entered_with(module: Module, where: Computation, loop: Instruction, outside: State) -> State:
    """The constants in the state of a loop: those it is entered with and never changes."""
    body = module.computations[loop.called("body")]

    def state(index: int) -> int | None:
        if _element(module, body, body.root.name, index, _Slot) != _Slot(index):
            return None
        value = _element(module, where, loop.operands[0], index, outside)
        return value if isinstance(value, int) else None

    return state


def trips(module: Module, where: Computation, loop: Instruction, outside: State) -> int | None:
    """How often a `while` in the computation `where` runs; None: only the data can say.

    `outside` gives the constants of the loop that `where` is the body of.
    """
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
        return int(known[1])
    condition = module.computations[loop.called("condition")]
    body = module.computations[loop.called("body")]
    test = _value(module, condition, condition.root.name, _Slot, None)
    if not isinstance(test, tuple) or not isinstance(test[1], _Slot) or test[1].plus:
        return None
    direction, counter, bound = test
    if isinstance(bound, _Slot):
        bound = entered_with(module, where, loop, outside)(bound.index)
    first = _element(module, where, loop.operands[0], counter.index, outside)
    after = _element(module, body, body.root.name, counter.index, _Slot)
    if not isinstance(bound, int) or not isinstance(first, int) or not isinstance(after, _Slot):
        return None
    step = after.plus if after.index == counter.index else 0
    match direction:
        case "LT" if step > 0:
            return max(0, -(-(bound - first) // step))
        case "LE" if step > 0:
            return max(0, (bound - first) // step + 1)
        case "GT" if step < 0:
            return max(0, -(-(first - bound) // -step))
        case "NE" if step and (bound - first) % step == 0:
            return (bound - first) // step
    return None
