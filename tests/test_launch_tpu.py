"""tpu.sh: the commands that it prints, and whole runs against a stand-in for gcloud.

The stand-in keeps a "queued resource" as a folder: a home directory for each worker, in which it
runs what is sent over ssh, with no variable of this process but HOME and PATH.
"""

import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from gtalign_jax.aot import topology

ROOT = Path(__file__).resolve().parent.parent
GCLOUD = "gcloud compute tpus queued-resources"
WHERE = "--zone=us-central2-b --quiet"
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
  describe) cat "$CLOUD/state" 2>/dev/null || { echo "ERROR: NOT_FOUND: no $name" >&2; exit 1; } ;;
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


def dry(command: str, *words: str, **env: str) -> list[str]:
    """The lines of a dry run in the repository, without gcloud; the revision written as REV."""
    done = subprocess.run(
        ["bash", "launch/tpu.sh", command, "--dry-run", *words], cwd=ROOT, capture_output=True,
        text=True, timeout=60, env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", **env},
    )
    assert done.returncode == 0, done.stderr
    return re.sub(r"source-[0-9a-f]{12}", "source-REV", done.stdout).splitlines()


def refused(*words: str) -> str:
    done = subprocess.run(["bash", "launch/tpu.sh", *words], cwd=ROOT, capture_output=True,
                          text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == "", done.stdout
    return done.stderr


SETUP = [
    "tar -czf runs/launch/exp/gtalign.tar.gz -T runs/launch/exp/files",
    f"{GCLOUD} scp runs/launch/exp/gtalign.tar.gz runs/launch/exp/gtalign-env exp: --node=all "
    f"--worker=all {WHERE}",
    f"{GCLOUD} ssh exp --node=all --worker=all '--command=mkdir -p gtalign/source-REV && tar -xzf "
    "gtalign.tar.gz -C gtalign/source-REV && bash gtalign/source-REV/launch/worker.sh setup' "
    f"{WHERE}",
]


def to_all(what: str) -> str:
    return f"{GCLOUD} ssh exp --node=all --worker=all '--command=bash gtalign/{what}' {WHERE}"


def test_a_first_run_prints_create_wait_setup_start_and_watch():
    assert dry("run", "exp", "--zone=us-central2-b", "--type=v4-32", "--", *RUN) == [
        f"{GCLOUD} create exp --accelerator-type=v4-32 --runtime-version=tpu-ubuntu2204-base "
        f"--node-id=exp {WHERE}",
        f"{GCLOUD} describe exp '--format=value(state.state)' {WHERE}",
        *SETUP,
        to_all("source-REV/launch/worker.sh start --config=configs/tpu_v4.py:all "
               "--config.workdir=gs://bucket/exp --config.pod.device_count=16"),
        to_all("source/launch/worker.sh status"),
    ]


@pytest.mark.parametrize("kind, flags", [
    ("v4-8", "--accelerator-type=v4-8 --runtime-version=tpu-ubuntu2204-base"),
    ("v5e-256", "--accelerator-type=v5litepod-256 --runtime-version=v2-alpha-tpuv5-lite"),
    ("v5litepod-8", "--accelerator-type=v5litepod-8 --runtime-version=v2-alpha-tpuv5-lite"),
    ("v5p-64", "--accelerator-type=v5p-64 --runtime-version=v2-alpha-tpuv5"),
    ("v6e-16", "--accelerator-type=v6e-16 --runtime-version=v2-alpha-tpuv6e"),
])
def test_create_names_the_accelerator_and_its_image(kind, flags):
    assert dry("create", "exp", "--zone=us-central2-b", f"--type={kind}") == [
        f"{GCLOUD} create exp {flags} --node-id=exp {WHERE}"
    ]


def test_spot_several_slices_and_a_users_own_flags_are_passed_to_create():
    assert dry("create", "exp", "--zone=us-central2-b", "--type=v5e-256", "--slices=2", "--spot",
               "--project=mine", "--runtime=special", "--create-flag=--network=lan") == [
        f"{GCLOUD} create exp --accelerator-type=v5litepod-256 --runtime-version=special "
        f"--node-count=2 --node-prefix=exp --spot --network=lan {WHERE} --project=mine"
    ]


@pytest.mark.parametrize("command, lines", [
    ("delete", [f"{GCLOUD} delete exp --force {WHERE}"]),
    ("wait", [f"{GCLOUD} describe exp '--format=value(state.state)' {WHERE}"]),
    ("stop", [to_all("source/launch/worker.sh stop")]),
    ("status", [f"{GCLOUD} describe exp '--format=value(state.state)' {WHERE}",
                to_all("source/launch/worker.sh status")]),
    ("logs", [f"{GCLOUD} ssh exp --node=0 --worker=0 "
              f"'--command=bash gtalign/source/launch/worker.sh logs' {WHERE}"]),
])
def test_a_running_slice_needs_only_its_name_and_zone(command, lines):
    assert dry(command, "exp", "--zone=us-central2-b") == lines


def test_set_up_alone_packs_copies_and_installs():
    assert dry("setup", "exp", "--zone=us-central2-b", "--type=v4-8") == SETUP


def test_resume_deletes_and_then_does_what_run_does():
    words = ("exp", "--zone=us-central2-b", "--type=v4-8", "--", *RUN)
    assert dry("resume", *words) == [f"{GCLOUD} delete exp --force {WHERE}", *dry("run", *words)]


def test_an_argument_with_quotes_and_spaces_arrives_as_it_was_given():
    stages = """--config.stages=('sft', "grpo")"""
    lines = dry("start", "exp", "--zone=us-central2-b", "--type=v4-8", "--", "--config=x", stages)
    command = next(word for word in shlex.split(lines[0]) if word.startswith("--command="))
    assert shlex.split(command.removeprefix("--command="))[2:] == [
        "start", "--config=x", stages, "--config.pod.device_count=4"]


def test_no_secret_stands_in_a_dry_run():
    lines = dry("run", "exp", "--zone=us-central2-b", "--type=v4-8", "--", *RUN,
                OPENAI_API_KEY="sk-hush", GTALIGN_JUDGE_URL="http://user:hush@host")
    assert "hush" not in "\n".join(lines)


@pytest.mark.parametrize("words, said", [
    (["fly", "exp"], "'fly' is none of: run create"),
    (["run", "Exp"], "NAME 'Exp'"),
    (["delete", "exp"], "--zone=: the zone"),
    (["delete", "exp", "--zone=here"], "--zone=here"),
    (["create", "exp", "--zone=us-central2-b"], "--type is required"),
    (["create", "exp", "--zone=us-central2-b", "--type=v3-8"], "kinds are v4, v5e, v5p and v6e"),
    (["create", "exp", "--zone=us-central2-b", "--type=v5e-12"], "there are v5e-1 v5e-4 v5e-8"),
    (["create", "exp", "--zone=us-central2-b", "--slices=none"], "--slices=none"),
    (["delete", "exp", "--zone=us-central2-b", "--force"], "--force: unknown option"),
    (["delete", "exp", "two", "--zone=us-central2-b"], "two: a second name"),
    (["run", "exp", "--zone=us-central2-b", "--type=v4-8"], "--config=configs/tpu_v4.py"),
    (["run", "exp", "--zone=us-central2-b", "--type=v4-16", "--", "--config=x"],
     "--config.workdir=: would lie on each worker's own disk"),
    (["run", "exp", "--zone=us-central2-b", "--type=v4-8", "--spot", "--", "--config=x",
      "--config.workdir=runs/x"], "give --config.workdir=gs://"),
])
def test_an_error_names_the_flag_its_value_and_what_is_allowed(words, said):
    assert said in refused(*words)


def machine(*kinds: str) -> list[dict[str, str]]:
    """What machines.sh knows of each kind."""
    keys = ("TYPE", "CHIPS", "HOSTS", "TOPOLOGY")
    shown = " ".join(f"$TPU_{key}" for key in keys)
    script = f'source launch/machines.sh; for kind; do machine "$kind"; echo "{shown}"; done'
    done = subprocess.run(["bash", "-c", script, "-", *kinds], cwd=ROOT, capture_output=True,
                          text=True, check=True)
    return [dict(zip(keys, line.split(), strict=True)) for line in done.stdout.splitlines()]


def test_every_topology_that_can_be_compiled_for_can_be_created():
    names = [name for row in topology.names().values() for name in row]
    for name, told in zip(names, machine(*names), strict=True):
        _, shape = topology._find(name)
        assert told["TOPOLOGY"] == "x".join(map(str, shape)), name
        assert int(told["CHIPS"]) == math.prod(shape), name


def test_a_host_has_four_chips_unless_a_slice_is_one_host():
    hosts = {"v4-8": 1, "v4-32": 4, "v5p-64": 8, "v5e-1": 1, "v5e-8": 1, "v5e-16": 4, "v6e-4": 1,
             "v6e-256": 64}
    assert [int(told["HOSTS"]) for told in machine(*hosts)] == list(hosts.values())


def test_a_run_gives_every_worker_the_same_command_tree_and_variables(cloud):
    key = "sk-it's a \"secret\""
    done, calls = run_exp(
        cloud, 'printf "%s\\n" "$@" >~/seen; printf "%s" "$OPENAI_API_KEY" >~/key; pwd >~/where',
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
    assert len(trees) == 1
    assert "secret" not in "".join(calls) + done.stdout + done.stderr
    assert not list((cloud / "project").rglob("gtalign-env"))


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
    assert done.returncode != 0 and "crashed 3 times" in done.stderr
    assert verbs(calls) == ["create"] + ["setup", "start"] * 3


def test_refused_arguments_end_the_run_at_once(cloud):
    done, calls = run_exp(cloud, 'if [[ $HOME == *worker-1 ]]; then exit 2; fi; exit 70')
    assert done.returncode != 0 and "refused its arguments" in done.stderr
    assert verbs(calls) == ["create", "setup", "start"]


def test_a_worker_that_cannot_be_reached_is_missed(cloud):
    """gcloud ends with status 0 although a slice was left out; the answers are counted."""
    (cloud / "unreachable-1").touch()
    done, calls = run_exp(cloud, "exit 0")
    assert done.returncode != 0 and "1 of 2 workers: ready" in done.stderr
    assert "start" not in verbs(calls)


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
    assert done.stdout.count(" exit 143 | ") == 2


def test_a_program_that_ends_by_its_own_status_on_sigterm_keeps_it(cloud):
    (cloud / "program").write_text("trap 'exit 7' TERM; echo armed; while :; do sleep 0.05; done")
    for command in ("create", "setup", "start"):
        assert tpu(cloud, command, "--type=v4-8", arguments=RUN, workers=1)[0].returncode == 0
    log = cloud / "worker-0" / "gtalign" / "log"
    while "armed" not in log.read_text():
        time.sleep(0.05)
    tpu(cloud, "stop")
    assert " exit 7 | " in tpu(cloud, "status")[0].stdout


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
