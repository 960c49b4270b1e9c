"""The compile command: its verdict, its figures, its mistakes, and real compilations for each TPU.

The compilations are libtpu's own, for chips that are not there; the models are of one layer.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gtalign_jax import compile as command
from gtalign_jax.aot import fit, knobs, report
from gtalign_jax.aot.chips import GIB
from gtalign_jax.aot.hlo import Collective
from gtalign_jax.aot.knobs import put
from gtalign_jax.aot.measure import Row, measure
from gtalign_jax.aot.programs import programs
from gtalign_jax.aot.roofline import Times
from gtalign_jax.aot.topology import describe
from gtalign_jax.config import Config
from gtalign_jax.model.load import model_sizes
from gtalign_jax.model.sharding import make_mesh

ROOT = Path(__file__).resolve().parent.parent
SMALL = {
    "model.num_layers": 1, "model.d_model": 128, "model.d_ff": 256, "model.num_heads": 2,
    "model.num_kv_heads": 2, "model.head_dim": 64, "data.max_prompt_tokens": 128,
    "rollout.max_new_tokens": 128, "sft.max_completion_tokens": 128, "sft.batch_size": 8,
    "grpo.prompts_per_step": 16, "grpo.samples_per_prompt": 2, "evaluate.batch_size": 8,
}


def small(stages=("grpo",), **changes) -> Config:
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    return put(Config(stages=stages), SMALL | changes)


def row(name="update", **figures) -> Row:
    """A program on a v4 chip of 30.75 GiB, with sizes given in GiB."""
    sizes = {k: int(v * GIB) for k, v in figures.items() if k in ("arguments", "temporaries")}
    resident = {k: int(v * GIB) for k, v in figures.get("resident", {}).items()}
    rest = {k: v for k, v in figures.items() if k not in ("arguments", "temporaries", "resident")}
    return Row(name, "grpo", "chip", calls=rest.pop("calls", 1), capacity=int(30.75 * GIB),
               resident=resident, **sizes, **rest)


def judged(rows, config=None, topology="v4-8"):
    config = config or small()
    return report.verdict(rows, config, model_sizes(config.model), describe(topology))


def test_peak_counts_arguments_results_temporaries_and_residents_and_aliased_ones_once():
    found = dataclasses.replace(
        row(arguments=8, temporaries=3, resident={"reference": 2, "initial policy": 1}),
        outputs=9 * GIB, aliased=7 * GIB, code=GIB // 2,
    )
    assert found.held == (8 + 9 - 7 + 2 + 1) * GIB
    assert found.peak == (8 + 9 - 7 + 3 + 2 + 1 + 0.5) * GIB
    assert found.fits and found.shortfall == 0


def test_a_run_fits_if_its_fullest_program_does():
    rows = [row("decode", arguments=10), row(arguments=20, temporaries=10.75)]
    assert judged(rows) == report.Verdict(True, "update", ())


def test_residents_count_against_the_capacity_and_the_shortfall_is_what_is_missing():
    rows = [row("decode", arguments=10), row(arguments=20, temporaries=10, resident={"r": 2})]
    verdict = judged(rows)
    assert not verdict.fits and verdict.tightest == "update"
    problem, = verdict.problems
    assert (problem.program, problem.at_least) == ("update", False)
    assert problem.shortfall == int(1.25 * GIB)


def test_a_program_that_the_compiler_refuses_does_not_fit_whatever_it_counted():
    verdict = judged([row(arguments=8, temporaries=30, refused="Ran out of memory")])
    assert not verdict.fits and verdict.problems[0].at_least
    assert verdict.problems[0].shortfall == int(7.25 * GIB)


def test_too_many_activations_are_mended_by_smaller_pieces_recomputation_or_more_chips():
    """Room for 10 of 40 GiB: a quarter of the 4 prompts that each chip has."""
    config = small(grpo__micro_batch_prompts=4)
    problem, = judged([row(arguments=20.75, temporaries=40)], config).problems
    advice = "; ".join(problem.knobs)
    assert problem.knobs[0] == "--config.grpo.micro_batch_prompts=1 (now 4)"
    assert "--config.grpo.remat=full" in advice and "--topology=v4-16" in advice
    assert "--config.mesh.tensor=2 --config.grpo.micro_batch_prompts=1" in advice
    # Nothing to cut any more, and all recomputed: only the mesh and the machine are left.
    config = small(grpo__micro_batch_prompts=1, grpo__remat="full")
    problem, = judged([row(arguments=20.75, temporaries=40)], config).problems
    assert not any(k.startswith("--config.grpo") for k in problem.knobs)


def test_too_many_weights_are_not_mended_by_smaller_pieces():
    config = small(grpo__micro_batch_prompts=4, mesh__data=2)
    fills = row(arguments=31, temporaries=1, resident={"reference": 2})
    problem, = judged([fills], config).problems
    advice = "; ".join(problem.knobs)
    assert "remat" not in advice and "(now 4)" not in advice
    assert problem.knobs[0].startswith("--config.mesh.data=1 --config.mesh.fsdp=-1")
    assert "--config.grpo.reference=False --config.grpo.beta=0.0" in advice


@pytest.mark.parametrize("name, expected", [
    ("decode", "--config.rollout.micro_batch_prompts=1 (now 4)"),
    ("sft update", "--config.sft.micro_batch_size=1 (now 2)"),
    ("evaluate decode", "--config.evaluate.batch_size=4 (now 8)"),
])
def test_each_program_is_cut_by_its_own_key(name, expected):
    config = small(stages=("sft", "grpo", "evaluate"))
    config_row = row(name, arguments=20.75, temporaries=35)
    assert expected in knobs.advice(
        config_row, config, model_sizes(config.model), describe("v4-8")
    )


def test_a_judge_that_takes_too_much_is_cut_by_its_own_keys():
    config = small()
    found = dataclasses.replace(row("judge decode", arguments=20, temporaries=35), stage="judge")
    advice = knobs.advice(found, config, model_sizes(config.model), describe("v4-8"))
    for key in ("batch_size below 64", "prompt_tokens below 4096", "max_tokens below 1024"):
        assert f"judge.{key}" in advice
    assert not [words for words in advice if "rollout." in words or "grpo." in words]


def test_a_steps_time_is_the_sum_of_its_calls_and_mfu_counts_no_recomputation():
    """Two decodes of 3 s and one update of 4 s; the chips could do 275 TFLOPs each in a second."""
    times = lambda s: Times(s, 0.0, 0.0, 0.0, s)  # noqa: E731
    rows = [
        row("decode", calls=2, useful_flops=55e12, flops=55e12, times=times(3.0)),
        row("update", useful_flops=165e12, flops=999e12, times=times(4.0)),
        row("grpo start", calls=0, times=times(100.0)),
        Row("reward", "grpo", "host", 1, None),
    ]
    modelled = report.step(rows, small(), describe("v4-8"))
    assert modelled.seconds == pytest.approx(10.0)
    assert modelled.by_program == {"decode": 6.0, "update": 4.0}
    assert modelled.mfu == pytest.approx((2 * 55 + 165) / (275 * 10))
    # 16 prompts x 2 completions x 128 tokens on 4 chips
    assert modelled.tokens_per_s_per_chip == pytest.approx(16 * 2 * 128 / 10 / 4)
    refused = [*rows, row("reference logp", refused="no")]
    assert report.step(refused, small(), describe("v4-8")) is None


def test_collectives_are_summed_by_kind_and_those_of_the_decode_loop_run_once_a_token():
    def one(kind, size, count, in_loop=False, dcn=False):
        return Collective(kind, size, "", count, 4, in_loop, dcn, True, "", "")

    found = row(loop_steps=100, collectives=(
        one("all-reduce", 5.0, 2, in_loop=True), one("all-reduce", 7.0, 3),
        one("all-gather", 1.0, 1, dcn=True),
    ))
    assert report.traffic(found) == {
        ("all-reduce", False): (203, 1021.0), ("all-gather", True): (1, 1.0),
    }


def test_the_largest_size_that_fits_is_found_in_few_tries():
    for limit in range(0, 10):
        tried = []
        sizes = [1, 2, 3, 4, 6, 8]

        def fits(size, limit=limit, tried=tried):
            tried.append(size)
            return size <= limit

        assert fit.largest(sizes, fits) == max((n for n in sizes if n <= limit), default=None)
        assert len(tried) <= 3 and len(set(tried)) == len(tried)


def test_fit_takes_the_fastest_policy_whose_programs_all_fit():
    """Memory by hand: a prompt costs a chip 10 GiB kept whole, 3 to 7 recomputed; the rollout's own
    4 in all 8 GiB of decode and 40 of prefill. Each chip has 4 prompts, and room for 30.75 GiB."""
    cost = {"none": 10.0, "dots": 8.0, "attention": 7.0, "full": 3.0}
    speed = {"none": 1.0, "dots": 3.0, "attention": 2.0, "full": 4.0}

    def compile_one(config, name):
        prompts, remat = config.grpo.micro_batch_prompts, config.grpo.remat
        drawn = config.rollout.micro_batch_prompts
        if name == "old logp":
            return None
        memory, seconds = {
            "update": (cost[remat] * prompts, speed[remat] + 4 / prompts),
            "reference logp": (0.1, 1.0),
            "decode": (2.0 * drawn, 1.0),
            "prefill": (10.0 * drawn, 1.0),
        }[name]
        return row(name, temporaries=memory, times=Times(0, 0, 0, 0, seconds))

    config = small()
    found = fit.search(config, model_sizes(config.model), describe("v4-8"), compile_one)
    # none: 2 prompts (4 take 40 GiB) in 1 + 2 s; dots: 2 in 3 + 2; attention: 4 in 2 + 1, as fast
    # as none and larger; full: 4 in 4 + 1.
    assert found.values == {
        "grpo.micro_batch_prompts": 4, "grpo.remat": "attention", "rollout.micro_batch_prompts": 2,
    }
    assert found.flags.split() == [
        "--config.grpo.micro_batch_prompts=4", "--config.grpo.remat=attention",
        "--config.rollout.micro_batch_prompts=2",
    ]


def test_fit_says_for_which_key_nothing_fits():
    config = small()
    full = lambda config, name: row(name, temporaries=31)  # noqa: E731
    found = fit.search(config, model_sizes(config.model), describe("v4-8"), full)
    assert found == fit.Found({}, ("grpo.micro_batch_prompts", "rollout.micro_batch_prompts"))


def test_what_the_search_compiles_is_compiled_once_for_each_setting():
    seen = []
    config = small(grpo__prompts_per_step=4)

    def measured(program, tried):
        seen.append((program.name, fit.tried(tried, program.name)))
        return row(program.name, temporaries=1, times=Times(0, 0, 0, 0, 1.0))

    model, topology = model_sizes(config.model), describe("v4-8")
    found = fit.search(config, model, topology, fit.compiler(model, topology, measured))
    assert found.values["grpo.micro_batch_prompts"] == 1 and not found.missing
    policies = ("none", "full", "dots", "attention")
    assert [text for name, text in seen if name == "update"] == [
        f"grpo.micro_batch_prompts=1, grpo.remat={policy}" for policy in policies
    ]
    assert len(seen) == len(set(seen)) == 2 * len(policies) + 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v4-8", "v5e-8", "v5p-8", "v6e-8"])
@pytest.mark.long
def test_update_and_decode_compile_for_every_generation(name):
    config, topology = small(), describe(name)
    mesh = make_mesh(config.mesh, topology.devices)
    made = {p.name: p for p in programs(config, model_sizes(config.model), mesh)}
    for program in ("update", "decode"):
        found = measure(made[program], topology)
        assert found.fits and 0 < found.times.total < 1
        assert found.arguments > 0 and found.collectives and found.flops > 0
    assert made["decode"].loop_steps == 128


@pytest.mark.slow
def test_the_command_says_that_a_run_fits_in_a_table_and_in_json(tmp_path, capsys):
    path = tmp_path / "figures.json"
    config = small(stages=("sft", "grpo", "evaluate"), data__source="builtin")
    status = command.run(config, "v5e-4", 1, wants_fit=False, json_path=str(path))
    out, err = capsys.readouterr()
    found = json.loads(path.read_text())
    names = [p["name"] for p in found["programs"]]
    assert status == 0 and found["fits"] is True and found["problems"] == []
    assert all(f"{name} " in out and f"{name} " in err for name in names)
    assert "fits v5e-4" in out and "MFU" in out and "…" not in out
    assert {"update", "decode", "prefill", "reshard", "reference logp", "sft update", "reward",
            "initialise"} <= set(names)
    for program in found["programs"]:
        parts = program["arguments"] + program["outputs"] - program["aliased"]
        parts += program["temporaries"] + program["code"] + sum(program["resident"].values())
        assert program["peak"] == parts and program["fits"] and program["compile_s"] > 0
        assert (program["capacity"] is None) == (program["where"] == "host")
        if program["where"] == "chip":
            assert set(program["seconds"]) == {"compute", "hbm", "ici", "dcn", "total"}
    assert found["topology"]["chips"] == 4 and found["topology"]["chip"]["generation"] == "v5e"
    assert found["config"]["model"]["d_model"] == 128 and found["versions"]["jax"]
    parts = found["step"]["by_program"].values()
    assert found["step"]["seconds"] == pytest.approx(sum(parts)) and found["step"]["seconds"] > 0


@pytest.mark.slow
def test_a_run_that_cannot_fit_is_refused_with_the_shortfall(tmp_path, capsys):
    """A chip's 1,024 of 512 x 8 rows: 2 x 16 heads x 128 numbers x 2 bytes x 2,048 tokens are
    16 GiB of keys and values, where there are 15.75."""
    config = small(
        stages=("evaluate",), model__num_heads=16, model__num_kv_heads=16, model__head_dim=128,
        evaluate__batch_size=512, evaluate__samples=8, rollout__max_new_tokens=2048,
    )
    path = tmp_path / "figures.json"
    assert command.run(config, "v5e-4", 1, wants_fit=False, json_path=str(path)) == 1
    assert "does not fit v5e-4: evaluate decode lacks" in capsys.readouterr().out
    found = json.loads(path.read_text())
    decode = next(p for p in found["programs"] if p["name"] == "evaluate decode")
    assert not found["fits"] and not decode["fits"] and decode["peak"] > 16 * GIB
    assert decode["shortfall"] == decode["peak"] - decode["capacity"]
    problem, = found["problems"]
    assert problem["shortfall"] == decode["shortfall"]
    assert "--config.evaluate.batch_size=256 (now 512)" in problem["knobs"]


@pytest.mark.parametrize("changes, words", [
    ({"grpo__prompts_per_step": 10}, "grpo.prompts_per_step=10 must be a multiple of 4"),
    ({"mesh__tensor": 4}, "does not divide the model's num_heads=2"),
    ({"mesh__fsdp": 3}, "does not fit 4 devices"),
    ({"model__path": "./nowhere"}, "there is no such directory"),
])
def test_a_config_that_a_run_would_refuse_is_refused_before_anything_is_compiled(changes, words):
    with pytest.raises(ValueError, match=words):
        command.prepare(small(**changes), "v4-8", 1)


def in_own_process(before: str, *arguments: str) -> subprocess.CompletedProcess:
    """The command, after a line of Python; libtpu stays loaded once it is, so not in this one."""
    code = (
        f"import runpy, sys; {before}; sys.argv = ['compile', *{arguments!r}]; "
        "runpy.run_module('gtalign_jax.compile', run_name='__main__')"
    )
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, timeout=120,
        env={k: v for k, v in os.environ.items() if "TPU" not in k},
    )


@pytest.mark.slow
@pytest.mark.parametrize("before, arguments, words", [
    ("pass", ["--topology=v4-9"], "topology 'v4-9' is not known"),
    ("pass", ["--topology=v4-8", "--config.grpo.micro_batch=4"], "grpo.micro_batch_prompts"),
    ("sys.modules['libtpu'] = None", ["--topology=v4-8"], "pip install libtpu"),
])
def test_a_mistake_ends_with_status_2_and_says_what_is_wrong(before, arguments, words):
    done = in_own_process(before, "--config=configs/demo_cpu.py", *arguments)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ")
