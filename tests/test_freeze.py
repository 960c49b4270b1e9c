"""ConfigDicts into frozen dataclasses, and the errors on the way."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import pytest
from ml_collections import config_dict

from gtalign_jax.freeze import (
    ConfigError,
    check_key,
    check_overrides,
    freeze,
    to_config_dict,
    to_dict,
)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    learning_rate: float = 1e-3
    kind: Literal["adam", "sgd"] = "adam"
    clip: float | None = None

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate={self.learning_rate}: must be > 0")


@dataclasses.dataclass(frozen=True)
class Run:
    name: str
    steps: int = 10
    debug: bool = False
    files: tuple[str, ...] = ()
    shape: tuple[int, int] = (1, 1)
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    optimizer: Optimizer = Optimizer()
    second: Optimizer | None = None


def test_a_config_becomes_nested_frozen_dataclasses_with_the_declared_types():
    config = to_config_dict(Run("a", files=("x",)))
    config.optimizer.learning_rate = 2e-3
    config.optimizer.clip = 1.5
    run = freeze(Run, config)
    assert run == Run("a", files=("x",), optimizer=Optimizer(2e-3, clip=1.5))
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.steps = 3


def test_freezing_and_thawing_are_inverse_also_through_json_types():
    run = Run("a", shape=(2, 3), extra={"k": [1]}, second=Optimizer(1.0, "sgd"))
    assert freeze(Run, to_config_dict(run)) == run
    assert freeze(Run, to_dict(run)) == run
    assert to_dict(run)["shape"] == [2, 3]


def test_whole_numbers_are_taken_for_floats_and_become_floats():
    run = freeze(Run, {"name": "a", "optimizer": {"learning_rate": 1}})
    assert run.optimizer.learning_rate == 1.0 and type(run.optimizer.learning_rate) is float


@pytest.mark.parametrize("values,message", [
    ({"name": "a", "stepz": 3},
     "unknown key 'stepz'; did you mean 'steps'? (keys of the config: debug, extra, files, name, "
     "optimizer, second, shape, steps)"),
    ({"name": "a", "optimizer": {"learning_rat": 3}},
     "unknown key 'optimizer.learning_rat'; did you mean 'optimizer.learning_rate'? "
     "(keys of 'optimizer': clip, kind, learning_rate)"),
    ({"name": "a", "steps": 2.5}, "steps=2.5: expected int, got float"),
    ({"name": "a", "steps": True}, "steps=True: expected int, got bool"),
    ({"name": "a", "debug": 1}, "debug=1: expected bool, got int"),
    ({"name": 3}, "name=3: expected str, got int"),
    ({"name": "a", "files": "x"}, "files='x': expected tuple of str, got str"),
    ({"name": "a", "files": ("x", 1)}, "files=('x', 1): expected tuple of str, got tuple"),
    ({"name": "a", "shape": (1, 2, 3)}, "shape=(1, 2, 3): expected tuple of (int, int), got tuple"),
    ({"name": "a", "optimizer": {"kind": "adm"}},
     "optimizer.kind='adm': expected one of 'adam', 'sgd'; did you mean 'adam'?"),
    ({"name": "a", "optimizer": {"clip": "x"}},
     "optimizer.clip='x': expected float or None, got str"),
    ({"name": "a", "optimizer": 3}, "optimizer=3: expected Optimizer, got int"),
    ({"name": "a", "optimizer": None}, "optimizer=None: expected Optimizer, got NoneType"),
    ({"name": "a", "optimizer": {"learning_rate": -1.0}},
     "optimizer: learning_rate=-1.0: must be > 0"),
    ({}, "name: missing, and it has no default (str)"),
])
def test_a_mistake_is_an_error_that_names_key_value_and_what_is_allowed(values, message):
    with pytest.raises(ConfigError) as caught:
        freeze(Run, config_dict.ConfigDict(values))
    assert str(caught.value) == message


def test_all_mistakes_are_reported_at_once():
    with pytest.raises(ConfigError) as caught:
        freeze(Run, {"steps": "x", "optimizer": {"kind": 1, "momentum": 0.9}})
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    for key in ("name: missing", "steps='x'", "optimizer.kind=1", "'optimizer.momentum'"):
        assert sum(key in line for line in lines) == 1


def test_an_absent_optional_value_can_be_set_later_and_keeps_its_type():
    config = to_config_dict(Optimizer())
    config.clip = 2.0
    assert freeze(Optimizer, config).clip == 2.0
    with pytest.raises(TypeError):
        config.clip = "x"


def test_a_config_file_cannot_add_a_key():
    config = to_config_dict(Run("a"))
    with pytest.raises((AttributeError, KeyError), match="learning_rate"):
        config.optimizer.learning_rat = 1.0


def test_a_key_in_the_wrong_section_is_found_where_it_belongs():
    with pytest.raises(ConfigError, match="'learning_rate'; did you mean 'optimizer.learning_r"):
        check_key(Run, "learning_rate")


def test_overrides_of_existing_keys_pass():
    check_overrides(Run, [
        "--config=x.py:arg", "--config.optimizer.clip=1", "--noconfig.debug", "-config.steps=2",
        "--config.files[0]=y", "--config.extra.anything=1", "--config.second.clip=1", "--other.x=1",
    ])


@pytest.mark.parametrize("flag,message", [
    ("--config.optimizer.learning_rat=1",
     "--config.optimizer.learning_rat: unknown key 'optimizer.learning_rat'; "
     "did you mean 'optimizer.learning_rate'?"),
    ("--config.optimiser.clip=1", "did you mean 'optimizer'?"),
    ("--config.steps.x=1", "'steps' is of type int, it has no keys of its own"),
    ("--noconfig.debugg", "did you mean 'debug'?"),
])
def test_an_override_of_an_unknown_key_is_refused_with_the_nearest_one(flag, message):
    with pytest.raises(ConfigError) as caught:
        check_overrides(Run, ["--config=x.py", flag])
    assert message in str(caught.value)
