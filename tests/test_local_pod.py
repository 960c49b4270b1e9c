"""local_pod.sh: real processes, each a shell script in place of `python -m gtalign_jax.main`."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

FAKE_PYTHON = r"""#!/usr/bin/env bash
case "$1 $2" in
  "-c import sys"*) exit 0 ;;
  "-m venv") mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
  "-m gtalign_jax.main")
    shift 2
    echo $$ >"$PROJECT/pid-$GTALIGN_PROCESS_INDEX"
    source "$PROJECT/program"
    ;;
  "-c import socket"*) exec "$REAL_PYTHON" "$@" ;;
esac
"""


@pytest.fixture
def project(tmp_path):
    """A copy of the scripts, and a python that runs the test's "program" as one process."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").write_text(FAKE_PYTHON)
    (tmp_path / "bin" / "python3").chmod(0o755)
    yield tmp_path
    for process in processes(tmp_path).values():
        if alive(process):
            os.kill(process, signal.SIGKILL)


def start(project: Path, program: str, *words: str) -> subprocess.Popen:
    (project / "program").write_text(program)
    python = shutil.which("python3")
    # Tests started in the background inherit "ignore" for Ctrl-C, which a shell cannot trap.
    heard = ("import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
             "os.execvp(sys.argv[1], sys.argv[1:])")
    return subprocess.Popen(
        [sys.executable, "-S", "-c", heard, "bash", "launch/local_pod.sh", *words], cwd=project,
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={"PATH": f"{project / 'bin'}:/usr/bin:/bin", "PROJECT": str(project),
             "REAL_PYTHON": python, "HOME": str(project)},
    )


def pod(project: Path, program: str, *words: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a pod that ends."""
    running = start(project, program, *words)
    out, err = running.communicate(timeout=50)
    return running.returncode, out, err


def processes(project: Path) -> dict[int, int]:
    """Process index -> process id, of those that began."""
    files = sorted(project.glob("pid-*"))
    return {int(file.name[4:]): int(text) for file in files if (text := file.read_text())}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(project: Path, count: int) -> list[int]:
    until = time.monotonic() + 20
    while len(processes(project)) < count:
        assert time.monotonic() < until, "the processes did not begin"
        time.sleep(0.05)
    return list(processes(project).values())


SHOW = """
    env | grep -E "^(GTALIGN_|XLA_FLAGS|JAX_PLATFORMS)" >"$PROJECT/env-$GTALIGN_PROCESS_INDEX"
    printf "%s\\n" "$@" >"$PROJECT/args-$GTALIGN_PROCESS_INDEX"
    echo "I am $GTALIGN_PROCESS_INDEX"
"""


def test_all_processes_get_the_same_arguments_and_each_its_index(project):
    status, out, err = pod(project, SHOW, "3", "--devices=2", "--", "--config=x.py", "--a='b c'")
    assert (status, err) == (0, "")
    environments = []
    for index in range(3):
        arguments = (project / f"args-{index}").read_text().splitlines()
        assert arguments == ["--config=x.py", "--a='b c'"]
        lines = (project / f"env-{index}").read_text().splitlines()
        environments.append(dict(line.split("=", 1) for line in lines))
    assert [env.pop("GTALIGN_PROCESS_INDEX") for env in environments] == ["0", "1", "2"]
    assert environments[0] == environments[1] == environments[2]
    env = environments[0]
    assert env["GTALIGN_PROCESS_COUNT"] == "3" and env["JAX_PLATFORMS"] == "cpu"
    assert env["XLA_FLAGS"].split() == ["--xla_force_host_platform_device_count=2"]
    host, port = env["GTALIGN_COORDINATOR"].split(":")
    assert host == "127.0.0.1" and int(port) > 0


def test_process_0_speaks_on_the_terminal_and_the_others_in_their_logs(project):
    _, out, _ = pod(project, SHOW, "2", "--logs=here")
    assert "I am 0" in out and "I am 1" not in out
    assert (project / "here" / "process-1.log").read_text() == "I am 1\n"


def test_without_a_config_the_demo_runs_and_overrides_are_kept(project):
    pod(project, SHOW, "1", "--", "--config.seed=3")
    assert (project / "args-0").read_text().splitlines() == [
        "--config=configs/demo_cpu.py", "--config.workdir=runs/local_pod", "--config.seed=3"]


def test_a_failing_process_ends_the_rest_with_its_status_and_shows_its_last_words(project):
    program = """
        if [[ $GTALIGN_PROCESS_INDEX == 1 ]]; then echo "my last words"; sleep 0.5; exit 7; fi
        exec sleep 60
    """
    status, _, err = pod(project, program, "3", "--grace=1")
    assert status == 7
    assert "process 1 ended with status 7" in err and "my last words" in err
    assert len(processes(project)) == 3
    assert not [pid for pid in processes(project).values() if alive(pid)]


def test_a_process_that_ends_by_itself_in_the_grace_period_is_not_signalled(project):
    program = """
        trap 'touch "$PROJECT/signalled"' TERM
        if [[ $GTALIGN_PROCESS_INDEX == 1 ]]; then exit 3; fi
        sleep 1
        touch "$PROJECT/ended"
        exit 70
    """
    status, _, _ = pod(project, program, "2", "--grace=20")
    assert status == 3  # of the first that failed, not of the one that missed it
    assert (project / "ended").exists() and not (project / "signalled").exists()


def test_a_process_killed_by_a_signal_counts_as_failed(project):
    running = start(project, "exec sleep 60", "2", "--grace=0")
    os.kill(wait_for(project, 2)[1], signal.SIGKILL)
    running.communicate(timeout=30)
    assert running.returncode == 128 + signal.SIGKILL
    assert not [pid for pid in processes(project).values() if alive(pid)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ending_the_script_ends_all_processes(project, number):
    running = start(project, "exec sleep 60", "2")
    wait_for(project, 2)
    running.send_signal(number)
    running.communicate(timeout=30)
    assert running.returncode == 128 + number
    assert not [pid for pid in processes(project).values() if alive(pid)]


@pytest.mark.parametrize("words, said", [
    ([], "N='', expected the number of processes"),
    (["0"], "N='0'"),
    (["2", "--devices=many"], "--devices=many: expected a number"),
    (["2", "--grace=-1"], "--grace=-1: expected seconds"),
    (["2", "--config=x"], "--config=x: unknown option"),
    (["2", "3"], "3: the number of processes is 2 already"),
])
def test_a_mistake_starts_nothing(project, words, said):
    status, _, err = pod(project, SHOW, *words)
    assert status != 0 and said in err
    assert not processes(project)
