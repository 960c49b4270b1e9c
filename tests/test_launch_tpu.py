"""tpu.sh and machines.sh: the commands that a dry run prints, to the letter, and the errors."""

import math
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from gtalign_jax.aot import topology

ROOT = Path(__file__).resolve().parent.parent
GCLOUD = "gcloud compute tpus queued-resources"
WHERE = "--zone=us-central2-b --quiet"
RUN = ["--config=configs/tpu_v4.py:all", "--config.workdir=gs://bucket/exp"]


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
