"""ConfigDicts at the door, frozen dataclasses inside.

A config file builds a `ConfigDict` (it can be overridden from the command line); `freeze` turns it
into nested frozen dataclasses and refuses whatever those do not declare: an unknown key, a value of
another type, a value outside a `Literal`. All mistakes of a config are reported at once, each with
its key, its value and what is allowed. This module knows no key of this project.
"""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import config_dict

T = typing.TypeVar("T")


class ConfigError(ValueError):
    """A config that cannot be run; the text names key, value and what is allowed."""


def freeze(cls: type[T], values: config_dict.ConfigDict | Mapping[str, Any]) -> T:
    """`values` as a `cls`, its fields checked against their annotations, nested ones included.

    A key that is absent takes the field's default. Integers are accepted for floats, lists for
    tuples. Raises ConfigError with one line per mistake.
    """
    problems: list[str] = []
    frozen = _build(cls, _plain(values), "", problems)
    if problems:
        raise ConfigError("\n".join(problems))
    return frozen


def to_config_dict(config: Any) -> config_dict.ConfigDict:
    """A dataclass instance as a locked, type-safe `ConfigDict`, the start of every config file.

    An optional field that is None becomes a typed placeholder, so that the command line can set it.
    """

    def convert(node: Any) -> config_dict.ConfigDict:
        out = config_dict.ConfigDict()
        hints = typing.get_type_hints(type(node))
        for field in dataclasses.fields(node):
            value = getattr(node, field.name)
            if dataclasses.is_dataclass(value):
                value = convert(value)
            elif value is None:
                value = _placeholder(hints[field.name])
            elif isinstance(value, Mapping):
                value = config_dict.ConfigDict(dict(value))
            out[field.name] = value
        return out.lock()

    return convert(config)


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass instance as nested plain dicts and lists, as JSON would hold it."""

    def convert(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): convert(item) for key, item in value.items()}
        if isinstance(value, tuple | list):
            return [convert(item) for item in value]
        return value

    return convert(dataclasses.asdict(config))


def check_key(cls: type, path: str) -> None:
    """Raises ConfigError where the dotted `path` names no field of the dataclass `cls`."""
    hint: Any = cls
    parent = ""
    for part in path.split("."):
        section = _dataclass_of(hint)
        if section is None:
            if _is_mapping(hint) or hint is Any:
                return
            raise ConfigError(
                f"unknown key {path!r}: {parent!r} is of type {_show(hint)}, it has no keys of its "
                "own"
            )
        names = [field.name for field in dataclasses.fields(section)]
        if part not in names:
            raise ConfigError(_unknown(part, parent, names, cls))
        hint = typing.get_type_hints(section)[part]
        parent = f"{parent}.{part}" if parent else part


def check_overrides(cls: type, argv: Sequence[str], flag: str = "config") -> None:
    """Raises ConfigError for each `--flag.key=value` of a command line whose key does not exist.

    ml_collections would end such a command line with a stack trace out of absl.
    """
    problems = []
    for arg in argv:
        match = re.match(rf"--?(?:no)?{re.escape(flag)}\.([^=\s]+)", arg)
        if match:
            try:
                check_key(cls, re.sub(r"\[\d+\]", "", match[1]))
            except ConfigError as error:
                problems.append(f"{arg.split('=')[0]}: {error}")
    if problems:
        raise ConfigError("\n".join(problems))


def _plain(values: Any) -> dict[str, Any]:
    if isinstance(values, config_dict.ConfigDict):
        return values.to_dict(preserve_field_references=False)
    return dict(values)


def _build(cls: type, values: Mapping[str, Any], path: str, problems: list[str]) -> Any:
    """One dataclass; None where one of its own fields is wrong (already in `problems`)."""
    known = len(problems)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            problems.append(_unknown(str(key), path, list(fields), None))
    arguments = {}
    for name, field in fields.items():
        where = f"{path}.{name}" if path else name
        required = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if name in values:
            arguments[name] = _convert(hints[name], values[name], where, problems)
        elif required:
            problems.append(f"{where}: missing, and it has no default ({_show(hints[name])})")
    if len(problems) > known:
        return None
    try:
        return cls(**arguments)
    except ValueError as error:  # the dataclass's own checks, in __post_init__
        text = str(error)
        problems.append(text if not path or text.startswith(path) else f"{path}: {text}")
        return None


def _convert(hint: Any, value: Any, where: str, problems: list[str]) -> Any:
    """`value` as the annotation `hint` asks; a mistake is appended to `problems`."""
    section = _dataclass_of(hint)
    optional = type(None) in typing.get_args(hint)
    if value is None and (optional or hint is type(None)):
        return None
    if section is not None and isinstance(value, Mapping):
        return _build(section, value, where, problems)
    if section is not None and isinstance(value, section):
        return value
    for candidate in typing.get_args(hint) if _is_union(hint) else (hint,):
        found, converted = _match(candidate, value)
        if found:
            return converted
    problems.append(f"{where}={value!r}: expected {_show(hint)}, got {type(value).__name__}")
    if typing.get_origin(hint) is typing.Literal:
        problems[-1] = f"{where}={value!r}: expected {_show(hint)}"
        guess = difflib.get_close_matches(str(value), map(str, typing.get_args(hint)), n=1)
        problems[-1] += f"; did you mean {guess[0]!r}?" if guess else ""
    return None


def _match(hint: Any, value: Any) -> tuple[bool, Any]:
    """(whether `value` has the type `hint`, the value in that type); no nested dataclasses."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True, value
    if origin is typing.Literal:
        return value in args and type(value) in {type(a) for a in args}, value
    if hint is float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number, float(value) if is_number else value
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    if origin is tuple and isinstance(value, tuple | list):
        if len(args) == 2 and args[1] is Ellipsis:
            args = (args[0],) * len(value)
        results = [_match(h, v) for h, v in zip(args, value, strict=False)]
        fits = len(args) == len(value) and all(found for found, _ in results)
        return fits, tuple(item for _, item in results)
    if _is_mapping(hint):
        return isinstance(value, Mapping), value
    return isinstance(hint, type) and isinstance(value, hint), value


def _unknown(part: str, parent: str, names: list[str], root: type | None) -> str:
    """The sentence about a key that does not exist: nearest name, then all of its section's."""
    prefix = f"{parent}." if parent else ""
    guess = difflib.get_close_matches(part, names, n=1, cutoff=0.5)
    text = f"unknown key {prefix + part!r}"
    if guess:
        text += f"; did you mean {prefix + guess[0]!r}?"
    elif root is not None:
        elsewhere = [p for p in _all_paths(root) if p.split(".")[-1] == part]
        text += f"; did you mean {elsewhere[0]!r}?" if elsewhere else ""
    place = f"{parent!r}" if parent else "the config"
    return f"{text} (keys of {place}: {', '.join(sorted(names))})"


def _all_paths(cls: type, prefix: str = "") -> list[str]:
    paths = []
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        paths.append(prefix + field.name)
        section = _dataclass_of(hints[field.name])
        if section is not None:
            paths += _all_paths(section, f"{prefix}{field.name}.")
    return paths


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _is_mapping(hint: Any) -> bool:
    origin = typing.get_origin(hint) or hint
    return isinstance(origin, type) and issubclass(origin, Mapping)


def _dataclass_of(hint: Any) -> type | None:
    """The dataclass that `hint` is, or that it is optionally; else None."""
    for candidate in typing.get_args(hint) if _is_union(hint) else (hint,):
        if isinstance(candidate, type) and dataclasses.is_dataclass(candidate):
            return candidate
    return None


def _placeholder(hint: Any) -> Any:
    for candidate in typing.get_args(hint):
        if candidate in (bool, int, float, str):
            return config_dict.placeholder(candidate)
    return None


def _show(hint: Any) -> str:
    """An annotation as a person would say it: `tuple of str`, `one of 'a', 'b'`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return "one of " + ", ".join(repr(a) for a in args)
    if origin is tuple and len(args) == 2 and args[1] is Ellipsis:
        return f"tuple of {_show(args[0])}"
    if origin is tuple:
        return f"tuple of ({', '.join(map(_show, args))})"
    if _is_union(hint):
        return " or ".join(map(_show, args))
    if hint is type(None):
        return "None"
    return hint.__name__ if isinstance(hint, type) else str(hint)
