"""The launch scripts, against stand-ins for python, pip and the commands they end in."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Plays python3, and the interpreter of the environment that it "creates".
FAKE_PYTHON = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >> "$LOG"
case "$*" in
  "-c import sys"*) [[ "$FAKE_VERSION" -ge 311 ]] ;;
  "--version") echo "Python $FAKE_VERSION" ;;
  "-m venv --clear "*) mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python" ;;
  "-m pip install"*) [[ -z "${FAIL_PIP:-}" ]] ;;
  "-m gtalign_jax.main"*) mkdir -p "$WORKDIR" ;;
esac
"""


@pytest.fixture
def project(tmp_path):
    """A copy of the scripts, with only stand-ins and the shell's own tools on PATH."""
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    for name in ("bash", "basename", "cat", "cmp", "cp", "dirname", "mkdir", "rm"):
        (bin_dir / name).symlink_to(shutil.which(name))
    (bin_dir / "python3").write_text(FAKE_PYTHON)
    (bin_dir / "python3").chmod(0o755)
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    for name in ("requirements.txt", "requirements-test.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def launch(project: Path, script: str, *arguments: str, **env: str):
    log = project / "log"
    log.write_text("")
    done = subprocess.run(
        [str(project / "bin" / "bash"), f"launch/{script}", *arguments],
        cwd=project, capture_output=True, text=True, timeout=60,
        env={"PATH": str(project / "bin"), "LOG": str(log), "FAKE_VERSION": "312",
             "WORKDIR": str(project / "work"), **env},
    )
    return done, log.read_text().splitlines()


def installs(calls: list[str]) -> list[str]:
    return [call.split()[-1] for call in calls if "pip install" in call]


def test_the_demo_installs_once_then_trains_and_exports_in_the_same_work_directory(project):
    done, calls = launch(project, "demo.sh", "--config.seed=1")
    assert done.returncode == 0, done.stderr
    assert installs(calls) == ["requirements.txt"]
    work = project / "work"
    assert calls[-2:] == [
        f"python -m gtalign_jax.main --config=configs/demo_cpu.py --config.workdir={work} "
        "--config.seed=1",
        f"python -m gtalign_jax.export --workdir={work} --out={work}/hf",
    ]

    done, calls = launch(project, "demo.sh")
    assert installs(calls) == [] and "continuing the run in" in done.stdout


def test_a_changed_requirement_is_installed_again(project):
    launch(project, "demo.sh")
    with (project / "requirements.txt").open("a") as file:
        file.write("another\n")
    _, calls = launch(project, "demo.sh")
    assert installs(calls) == ["requirements.txt"]
    assert not any("-m venv" in call for call in calls)


def test_an_install_that_failed_is_tried_again(project):
    done, calls = launch(project, "demo.sh", FAIL_PIP="1")
    assert done.returncode != 0 and not any("gtalign_jax" in call for call in calls)
    _, calls = launch(project, "demo.sh")
    assert installs(calls) == ["requirements.txt"]


def test_the_tests_need_their_own_requirements_and_the_demo_then_needs_none(project):
    (project / "bin" / "ruff").symlink_to(shutil.which("true"))
    done, calls = launch(project, "test.sh", "-k", "one")
    assert done.returncode == 0, done.stderr
    assert installs(calls) == ["requirements-test.txt"]
    assert calls[-1] == "python -m pytest -n 2 -k one"
    _, calls = launch(project, "demo.sh")
    assert installs(calls) == []


def test_an_old_python_is_an_error_that_says_what_is_needed(project):
    done, calls = launch(project, "demo.sh", FAKE_VERSION="310")
    assert done.returncode != 0
    assert "needs Python 3.11 or newer; python3 is Python 310" in done.stderr
    assert installs(calls) == []


def test_a_failing_lint_ends_the_test_script_before_the_tests(project):
    (project / "bin" / "ruff").symlink_to(shutil.which("false"))
    done, calls = launch(project, "test.sh")
    assert done.returncode != 0 and not any("-m pytest" in call for call in calls)


def test_the_scripts_pass_shellcheck():
    # The one of requirements-test.txt, next to this interpreter, whatever the machine has.
    beside = Path(sys.executable).parent / "shellcheck"
    scripts = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / ".ci" / "run"]
    done = subprocess.run(
        [beside if beside.exists() else "shellcheck", "-x", *map(str, scripts)],
        capture_output=True, text=True, cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_scripts_can_be_executed():
    sourced = {"setup.sh", "machines.sh", "pack.sh"}
    scripts = {script.name for script in (ROOT / "launch").glob("*.sh")} - sourced
    assert {"demo.sh", "test.sh", "tpu.sh", "worker.sh", "gke.sh", "local_pod.sh"} <= scripts
    for script in (*(f"launch/{name}" for name in sorted(scripts)), ".ci/run"):
        assert os.access(ROOT / script, os.X_OK), script
