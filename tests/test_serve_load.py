"""The load benchmark counts what happens: answers, refusals that are waited out, faults."""

import argparse
import asyncio
import dataclasses
import importlib.util
from pathlib import Path

import pytest
import scripted
from scripted import Script, serving

from gtalign_jax.serving.api import ApiConfig
from gtalign_jax.serving.engine import EngineError, Overloaded

FILE = Path(__file__).resolve().parent.parent / "benchmarks" / "serve.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmarks_serve", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def loaded(benchmark, *scripts: Script) -> dict:
    service = scripted.service(scripted.Engine(*scripts))
    args = argparse.Namespace(clients=3, seconds=0.2, seed=0)
    with serving(dataclasses.replace(service, name="served"), ApiConfig()) as server:
        return benchmark.summary(*asyncio.run(benchmark.load(server.url, args)))


def test_refusals_are_waited_out_and_every_request_is_accounted_for(benchmark):
    found = loaded(benchmark, Script(refuse=Overloaded(0.1)), Script())
    assert found["refused"] == 1 and found["errors"] == found["lost"] == 0
    assert found["asked"] == found["answered"] + found["hung_up"] >= 3
    assert found["steered"] + found["plain"] == found["streamed"] + found["whole"] == found["asked"]
    assert found["tokens_per_s"] > 0 and found["seconds"] >= 1  # as Retry-After says


def test_faults_are_counted_as_errors_by_their_kind(benchmark):
    held = Script(fault=EngineError("gone"))
    found = loaded(benchmark, held)
    assert found["errors"] + found["hung_up"] == found["asked"] >= 3 and found["errors"] > 0
    assert found["answered"] == 0
    assert all("could not answer" in kind for kind in found["errors_by_kind"])
