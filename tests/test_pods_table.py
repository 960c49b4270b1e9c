"""The script behind docs/pods.md: its rows, from hand-made figures, and where they go."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SPEC = importlib.util.spec_from_file_location("pods_table", ROOT / "benchmarks" / "pods.py")
pods = importlib.util.module_from_spec(SPEC)
sys.modules["pods_table"] = pods
SPEC.loader.exec_module(pods)

FIGURES = {
    "fits": False, "tightest": "update",
    "problems": [{"shortfall": 2**30}, {"shortfall": 3 * 2**30}],
    "step": {"seconds": 1234.4, "mfu": 0.326, "tokens_per_s_per_chip": 1699.7},
    "programs": [
        {"name": "decode", "peak": 2**30, "capacity": 30.75 * 2**30, "compile_s": 30.0},
        {"name": "update", "peak": 33.75 * 2**30, "capacity": 30.75 * 2**30, "compile_s": 90.0},
    ],
    "topology": {"chips": 512}, "config": {"mesh": {"tensor": 2}},
}


def test_a_row_says_the_fullest_program_and_the_largest_shortfall():
    row = pods.cells(pods.Case("v5e", "3b", "v5e-256", 2), FIGURES)
    assert row == [
        "Qwen2.5-3B", "2 x v5e-256", "512", "2", "update", "33.75", "30.75",
        "no: 3.00 GiB short", "1,234", "33 %", "1,700", "2.0",
    ]
    assert pods.cells(pods.Case("v4", "3b", "v4-8"), FIGURES | {"fits": True, "step": None})[7:11] \
        == ["yes", "–", "–", "–"]


def test_the_table_takes_the_place_of_the_old_one_and_of_nothing_else():
    before = f"text\n\n{pods.BEGIN}\nold\n{pods.END}\n\nmore"
    once = pods.put_table(before, pods.table([["a"] * len(pods.HEADER)]))
    assert once.startswith("text\n\n") and once.endswith("\n\nmore") and "old" not in once
    assert once.count("\n| a | a |") == 1 and pods.put_table(once, "new").count(pods.BEGIN) == 1
    with pytest.raises(ValueError, match="the document has no"):
        pods.put_table("nothing", "new")
    assert pods.BEGIN in (ROOT / "docs" / "pods.md").read_text(encoding="utf-8")


def test_more_chips_get_more_prompts_and_as_many_each():
    """3b on v4: 4 chips, 2 of them to a prompt, 64 prompts; 512 chips take 128 times as many."""
    large = pods.scaled("v4", "3b", "v4-1024", 1, 512)
    small = pods.scaled("v4", "3b", "v4-16", 1, 8)
    assert "--config.grpo.prompts_per_step=8192" in large.overrides
    assert "--config.grpo.prompts_per_step=128" in small.overrides
    assert large.command(Path("out.json"))[2:6] == [
        "gtalign_jax.compile", "--config=configs/tpu_v4.py:3b", "--topology=v4-1024", "--slices=1",
    ]
    names = [case.name for case in pods.cases()]
    assert len(set(names)) == len(names) >= 22


def test_figures_that_are_there_are_not_compiled_again(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(pods.subprocess, "run", lambda command, cwd: calls.append(command))
    case = pods.Case("v4", "3b", "v4-8")
    (tmp_path / f"{case.name}.json").write_text("{}")
    pods.compile_case(case, tmp_path)
    assert calls == []
