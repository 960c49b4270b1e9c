"""The command that says before you pay whether a run fits a TPU, and how fast it could be.

    python -m gtalign_jax.compile --config=configs/tpu_v4.py --topology=v4-32
        [--slices=2] [--json=FILE] [--fit] [--config.key=value …]

Every program of the run goes through libtpu's own compiler, for chips that need not exist: no TPU,
no weights, no tokenizer and no prompts are loaded. Memory and collectives are what the compiler
says; times are a roofline, that is a lower bound. `--fit` searches the micro-batches and the remat
policy. Exit status: 0 fits, 1 does not fit, 2 a mistake in the command, or no libtpu.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from rich.console import Console
from rich.measure import Measurement

from gtalign_jax.aot import fit, report
from gtalign_jax.aot.knobs import put
from gtalign_jax.aot.measure import Row, measure
from gtalign_jax.aot.programs import Program, programs
from gtalign_jax.aot.topology import Topology, describe
from gtalign_jax.config import (
    Config,
    ConfigError,
    check,
    define_flag,
    from_flag,
    parse_flags,
)
from gtalign_jax.freeze import to_dict
from gtalign_jax.model import load
from gtalign_jax.model.sharding import check_model_fits, make_mesh, mesh_shape
from gtalign_jax.model.spec import ModelConfig, num_params
from gtalign_jax.provenance import versions
from gtalign_jax.redact import redact

FITS, DOES_NOT_FIT, MISTAKE = 0, 1, 2


def prepare(config: Config, topology: str, slices: int) -> tuple[ModelConfig, Topology]:
    """The model's sizes, and the devices to compile for.

    Raises ValueError (ConfigError among them) for a mistake, RuntimeError without libtpu.
    """
    devices = describe(topology, slices)
    check(config, devices.chips, slices, "tpu")
    model = load.model_sizes(config.model)
    check_model_fits(model, make_mesh(config.mesh, devices.devices))
    return model, devices


def compile_all(config: Config, model: ModelConfig, topology: Topology,
                say: Callable[[str], None]) -> list[Row]:
    """One row per program; `say` gets a line when it starts and when it is done."""
    mesh = make_mesh(config.mesh, topology.devices)
    todo = programs(config, model, mesh)
    return [
        _compile(program, config, topology, say, f"{n}/{len(todo)} ")
        for n, program in enumerate(todo, 1)
    ]


def _compile(program: Program, config: Config, topology: Topology, say: Callable[[str], None],
             place: str = "") -> Row:
    tensor = mesh_shape(config.mesh, topology.chips, topology.slices)[-1]
    row = measure(program, topology, tensor if program.weights_cut else 1)
    used = "" if row.capacity is None else (
        f"  {report.gib(row.peak)} of {report.gib(row.capacity)} GiB"
        + ("" if row.fits else ": does not fit")
    )
    say(f"{place}{row.name:<18}{row.compile_s:6.1f} s{used}")
    return row


def search(config: Config, model: ModelConfig, topology: Topology,
           say: Callable[[str], None]) -> Config:
    """The config with the largest micro-batches that fit; prints the flags that set them."""
    def one(program: Program, tried: Config) -> Row:
        return _compile(program, tried, topology, say, f"{fit.tried(tried, program.name)}: ")

    found = fit.search(config, model, topology, fit.compiler(model, topology, one))
    for key in found.missing:
        say(f"--fit: no value of {key} fits")
    say(f"--fit: {found.flags or 'nothing to change'}")
    return put(config, found.values)


def save(path: str, config: Config, model: ModelConfig, topology: Topology,
         figures: dict[str, Any]) -> None:
    """Everything as JSON."""
    whole = figures | {
        "topology": {
            "name": topology.name, "slices": topology.slices, "chips": topology.chips,
            "hosts": topology.hosts, "shape": topology.shape,
            "chip": dataclasses.asdict(topology.chip),
        },
        "model": {"parameters": num_params(model), **dataclasses.asdict(model)},
        "config": redact(to_dict(config)),
        "versions": versions(),
    }
    Path(path).write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")


def run(config: Config, name: str, slices: int, *, wants_fit: bool, json_path: str | None) -> int:
    """The command behind its flags; returns the exit status."""
    began = time.perf_counter()
    progress, out = Console(stderr=True, highlight=False), Console(highlight=False)
    say = lambda text: progress.print(text, markup=False, soft_wrap=True)  # noqa: E731
    model, topology = prepare(config, name, slices)
    mesh = make_mesh(config.mesh, topology.devices)
    say(
        f"{model.family} with {num_params(model) / 1e9:.2f}e9 parameters for {topology.chips} "
        f"{topology.chip.generation} chips, mesh {dict(mesh.shape)}"
    )
    if wants_fit:
        config = search(config, model, topology, say)
    rows = compile_all(config, model, topology, say)
    found = report.verdict(rows, config, model, topology)
    modelled = report.step(rows, config, topology)
    figures = report.table(rows, topology)
    wide = out.options.update(max_width=1000)  # nothing of it is ever cut off
    out.width = max(out.width, Measurement.get(out, wide, figures).maximum)
    out.print(figures)
    out.print(report.summary(rows, found, modelled, topology), markup=False, soft_wrap=True)
    say(f"{time.perf_counter() - began:.0f} s")
    if json_path:
        save(json_path, config, model, topology, report.as_json(rows, found, modelled))
    return FITS if found.fits else DOES_NOT_FIT


def main(argv: list[str]) -> None:
    """The command. A mistake ends in one line that names it."""
    del argv
    # The host's processor traces, and compiles the reward; a TPU that may be here is left alone.
    jax.config.update("jax_platforms", "cpu")
    try:
        if not _TOPOLOGY.value:
            raise ConfigError("--topology=NAME is required, for example --topology=v4-32")
        status = run(from_flag(_CONFIG), _TOPOLOGY.value, _SLICES.value, wants_fit=_FIT.value,
                     json_path=_JSON.value)
    except (ConfigError, ValueError, TypeError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        status = MISTAKE
    sys.exit(status)


if __name__ == "__main__":
    _CONFIG = define_flag()
    _TOPOLOGY = flags.DEFINE_string("topology", None, "Cloud TPU slice, as in --topology=v4-32")
    _SLICES = flags.DEFINE_integer("slices", 1, "how many of these slices", lower_bound=1)
    _FIT = flags.DEFINE_boolean("fit", False, "search the micro-batches and the remat policy")
    _JSON = flags.DEFINE_string("json", None, "write all figures to this file")
    app.run(main, flags_parser=parse_flags)
