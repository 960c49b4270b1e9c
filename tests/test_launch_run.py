"""tpu.sh and worker.sh: whole runs against a stand-in for gcloud.

The stand-in keeps a "queued resource" as a folder: a home directory for each worker, in which it
runs what is sent over ssh, with no variable of this process but HOME and PATH.
"""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RUN = ["--config=configs/tpu_v4.py:all", "--config.workdir=gs://bucket/exp"]

FAKE_GCLOUD = r"""#!/usr/bin/env bash
set -eu
printf '%s\n' "$*" >>"$CLOUD/calls"
verb=$4 name=$5
kill_workers() {
  for pid in "$CLOUD"/worker-*/gtalign/pid; do
    [[ ! -e "$pid" ]] || kill -KILL -- "-$(cat "$pid")" 2>/dev/null || true
  done
}
case "$verb" in
  create)
    for ((i = 0; i < WORKERS; i++)); do mkdir -p "$CLOUD/worker-$i"; done
    echo ACTIVE >"$CLOUD/state"
    ;;
  describe)
    if [[ -s "$CLOUD/script" ]]; then # what it is to say first
      said=$(head -n 1 "$CLOUD/script")
      sed -i 1d "$CLOUD/script"
      if [[ "$said" == ERROR* ]]; then echo "$said" >&2 && exit 1; fi
      echo "$said"
    elif [[ -e "$CLOUD/state" ]]; then
      cat "$CLOUD/state"
    else
      echo "ERROR: (gcloud) NOT_FOUND: Resource $name was not found" >&2 && exit 1
    fi
    ;;
  delete)
    kill_workers
    rm -rf "$CLOUD"/worker-* "$CLOUD/state"
    ;;
  scp)
    for worker in "$CLOUD"/worker-*; do
      [[ -e "$CLOUD/unreachable-${worker##*-}" ]] || cp -p "$5" "$6" "$worker/"
    done
    ;;
  ssh)
    for flag in "$@"; do [[ "$flag" != --command=* ]] || command=${flag#*=}; done
    for worker in "$CLOUD"/worker-*; do
      [[ ! -e "$CLOUD/unreachable-${worker##*-}" ]] || continue
      (cd "$worker" && env -i HOME="$worker" PATH="$PATH" bash -c "$command") </dev/null
    done
    ;;
esac
"""

# The workers' python3: makes an environment of itself, and runs the test's "program" as training.
FAKE_PYTHON = r"""#!/usr/bin/env bash
case "$*" in
  "-c import sys"*) [[ "$0" != */bin/python3 || ! -e CLOUD/old ]] ;;
  "--version") echo "Python 3.12" ;;
  "-m venv --clear "*) mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python" ;;
  "-m pip install"*--target*)
    mkdir -p "$HOME/gtalign/uv/bin" && cp CLOUD/uv "$HOME/gtalign/uv/bin/uv" ;;
  "-m gtalign_jax.main"*)
    shift 2
    exec bash CLOUD/program "$@" ;;
esac
"""
FAKE_UV = r"""#!/usr/bin/env bash
echo "$* in $UV_PYTHON_INSTALL_DIR" >>"$HOME/uv-calls"
if [[ "$2" == find ]]; then echo CLOUD/python3.12; fi
"""


@pytest.fixture
def cloud(tmp_path):
    """The folder that plays the cloud; `project` in it is the user's copy of the repository."""
    (tmp_path / "bin").mkdir()
    shutil.copytree(ROOT / "launch", tmp_path / "project" / "launch")
    for name in ("requirements.txt", "requirements-tpu.txt"):
        shutil.copy(ROOT / name, tmp_path / "project" / name)
    for name, text in (("bin/gcloud", FAKE_GCLOUD), ("bin/python3", FAKE_PYTHON),
                       ("python3.12", FAKE_PYTHON), ("uv", FAKE_UV)):
        (tmp_path / name).write_text(text.replace(" CLOUD/", f" {tmp_path}/"))
        (tmp_path / name).chmod(0o755)
    yield tmp_path
    for pid in tmp_path.glob("worker-*/gtalign/pid"):
        try:
            os.killpg(int(pid.read_text()), signal.SIGKILL)
        except ProcessLookupError:
            pass


def tpu(cloud: Path, command: str, *options: str, arguments=(), workers=2, **env: str):
    """Runs tpu.sh in the user's copy. Returns (process, all of gcloud's calls so far)."""
    done = subprocess.run(
        ["bash", "launch/tpu.sh", command, "exp", "--zone=us-central2-b", *options,
         *(["--", *arguments] if arguments else [])],
        cwd=cloud / "project", capture_output=True, text=True, timeout=60,
        env={"PATH": f"{cloud / 'bin'}:/usr/bin:/bin", "HOME": str(cloud), "CLOUD": str(cloud),
             "WORKERS": str(workers), **env},
    )
    calls = (cloud / "calls").read_text().splitlines() if (cloud / "calls").exists() else []
    return done, calls


def run_exp(cloud: Path, program: str, *options: str, **kwargs):
    (cloud / "program").write_text(program)
    return tpu(cloud, "run", "--type=v4-16", "--poll=0.1", *options, arguments=RUN, **kwargs)


def alive(pid: int) -> bool:
    """Does it live? One that has ended, but that nobody has waited for, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def verbs(calls: list[str]) -> list[str]:
    """create, delete, and of what is sent to the workers: setup, start."""
    sent = [re.search(r"worker\.sh (\w+)", call) for call in calls]
    names = [match[1] if match else call.split()[3]
             for call, match in zip(calls, sent, strict=True)]
    return [name for name in names if name not in ("describe", "scp", "status")]


def test_a_run_gives_every_worker_the_same_command_tree_and_variables(cloud):
    key = "sk-it's a \"secret\""
    done, calls = run_exp(
        cloud, f"""
            printf "%s\\n" "$@" >~/seen
            printf "%s" "$OPENAI_API_KEY" >~/key
            pwd >~/where
            find {cloud}/project ~/gtalign-env -name gtalign-env >~/left 2>/dev/null || true
        """,
        "--slices=2", "--env=EXTRA", workers=4, OPENAI_API_KEY=key, EXTRA="more",
        GTALIGN_DATA="gs://bucket/data", GTALIGN_PROCESS_INDEX="3",
    )
    assert done.returncode == 0, done.stderr
    assert verbs(calls) == ["create", "setup", "start"]
    assert "the run has ended well" in done.stderr and "tpu.sh delete exp" in done.stderr
    trees = set()
    for worker in range(4):
        home = cloud / f"worker-{worker}"
        assert (home / "seen").read_text().splitlines() == [*RUN, "--config.pod.device_count=16"]
        assert (home / "key").read_text() == key
        trees.add((home / "where").read_text().split("source-")[1])
        env = home / "gtalign" / "env"
        assert env.stat().st_mode & 0o777 == 0o600
        assert [line.split("=")[0] for line in env.read_text().splitlines()] == [
            "export GTALIGN_DATA", "export OPENAI_API_KEY", "export EXTRA"]
        assert "secret" not in (home / "gtalign" / "log").read_text()
        assert (home / "left").read_text() == ""  # no other copy, while the program runs
    assert len(trees) == 1
    assert "secret" not in "".join(calls) + done.stdout + done.stderr


def test_a_preempted_run_is_created_again_and_gets_the_same_command(cloud):
    """The first life writes a "checkpoint" and is preempted; the second finds it and ends."""
    done, calls = run_exp(cloud, f"""
        if [[ -e {cloud}/checkpoint ]]; then exit 0; fi
        touch {cloud}/checkpoint
        echo SUSPENDED >{cloud}/state
        sleep 60
    """, "--spot", workers=2)
    assert done.returncode == 0, done.stderr
    assert verbs(calls) == ["create", "setup", "start", "delete", "create", "setup", "start"]
    starts = [call for call in calls if "worker.sh start" in call]
    assert len(set(starts)) == 1
    assert all("--spot" in call for call in calls if " create " in call)


def test_a_crashed_run_is_started_again_on_the_same_machines_but_not_for_ever(cloud):
    done, calls = run_exp(cloud, "exit 70", "--restarts=2")
    assert done.returncode == 1 and "crashed 3 times" in done.stderr
    assert verbs(calls) == ["create"] + ["setup", "start"] * 3


def test_refused_arguments_end_the_run_at_once(cloud):
    done, calls = run_exp(cloud, 'if [[ $HOME == *worker-1 ]]; then exit 2; fi; exit 70')
    assert done.returncode == 1 and "refused its arguments" in done.stderr
    assert verbs(calls) == ["create", "setup", "start"]


def test_the_machines_are_deleted_after_a_good_end_where_asked_for(cloud):
    done, calls = run_exp(cloud, "exit 0", "--delete-after")
    assert done.returncode == 0 and verbs(calls) == ["create", "setup", "start", "delete"]


def test_machines_that_are_taken_while_waited_for_are_asked_for_again(cloud):
    (cloud / "script").write_text("SUSPENDING\nSUSPENDING\nSUSPENDED\nSUSPENDED\n")
    done, calls = run_exp(cloud, "exit 0")
    assert done.returncode == 0, done.stderr
    assert verbs(calls) == ["delete", "create", "setup", "start"]


def test_a_request_that_cannot_be_granted_is_shown_and_not_repeated(cloud):
    (cloud / "script").write_text("NONE\nPROVISIONING\nFAILED\nstate: quota exceeded\n")
    done, calls = run_exp(cloud, "exit 0")
    assert done.returncode == 1 and "quota exceeded" in done.stderr
    assert verbs(calls) == ["create"]


def test_an_outage_of_the_cloud_s_api_is_waited_out(cloud):
    outage = "ERROR: UNAVAILABLE\n"
    (cloud / "script").write_text(outage + "NONE\n" + outage + "ACTIVE\n" + 3 * outage)
    done, calls = run_exp(cloud, "exit 0")
    assert done.returncode == 0 and "cannot look: ERROR: UNAVAILABLE" in done.stderr
    assert verbs(calls) == ["create", "setup", "start"]


def test_machines_that_somebody_deleted_are_not_created_again(cloud):
    done, calls = run_exp(cloud, f"rm -f {cloud}/state; sleep 60")
    assert done.returncode == 1 and "was deleted meanwhile" in done.stderr
    assert verbs(calls) == ["create", "setup", "start"]


def test_a_worker_that_cannot_be_reached_is_missed(cloud):
    """gcloud ends with status 0 although a slice was left out; the answers are counted."""
    (cloud / "unreachable-1").touch()
    done, calls = run_exp(cloud, "exit 0")
    assert done.returncode == 1 and "1 of 2 workers: ready" in done.stderr
    assert verbs(calls) == ["create"] + ["setup"] * 6


def test_the_same_run_again_takes_up_the_watch_and_stop_ends_the_program(cloud):
    (cloud / "program").write_text("sleep 60")
    steps = ("--type=v4-16", "--poll=0.1")
    for command in ("create", "setup", "start", "start"):
        done, _ = tpu(cloud, command, *steps, arguments=RUN)
        assert done.returncode == 0, done.stderr
    pids = [int((cloud / f"worker-{i}/gtalign/pid").read_text()) for i in range(2)]
    done, _ = tpu(cloud, "start", *steps, arguments=[*RUN, "--config.seed=1"])
    assert done.returncode != 0 and "running another command" in done.stderr
    done, _ = tpu(cloud, "status")
    assert done.stdout.count(" running | ") == 2
    done, _ = tpu(cloud, "stop")
    assert done.returncode == 0 and done.stdout.count("stopped") == 2
    assert not [pid for pid in pids if alive(pid)]
    done, _ = tpu(cloud, "status")
    assert done.stdout.count(" stopped 143 | ") == 2


def test_a_program_that_ends_by_its_own_status_on_sigterm_keeps_it(cloud):
    (cloud / "program").write_text("trap 'exit 7' TERM; echo armed; while :; do sleep 0.05; done")
    for command in ("create", "setup", "start"):
        assert tpu(cloud, command, "--type=v4-8", arguments=RUN, workers=1)[0].returncode == 0
    log = cloud / "worker-0" / "gtalign" / "log"
    while "armed" not in log.read_text():
        time.sleep(0.05)
    tpu(cloud, "stop")
    assert " stopped 7 | " in tpu(cloud, "status")[0].stdout


def test_a_worker_with_an_old_python_gets_a_newer_one_without_root(cloud):
    (cloud / "old").touch()
    for minor in range(11, 15):  # hide the machine's own
        (cloud / "bin" / f"python3.{minor}").write_text("#!/bin/sh\nexit 1\n")
        (cloud / "bin" / f"python3.{minor}").chmod(0o755)
    done, _ = run_exp(cloud, "exit 0", workers=2)
    assert done.returncode == 0, done.stderr
    home = cloud / "worker-0"
    assert (home / "uv-calls").read_text().splitlines() == [
        f"python install --quiet 3.12 in {home}/gtalign/python",
        f"python find --managed-python 3.12 in {home}/gtalign/python"]
