"""gke.sh: the manifest that it makes of launch/jobset.yaml."""

import json
import math
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
RUN = ["--config=configs/tpu_v4.py:all", "--config.workdir=gs://bucket/exp"]


def script(*words: str) -> subprocess.CompletedProcess:
    """gke.sh without kubectl."""
    return subprocess.run(["bash", "launch/gke.sh", *words], cwd=ROOT, capture_output=True,
                          text=True, timeout=60, env={"PATH": "/usr/bin:/bin"})


def gke(*words: str) -> dict:
    done = script("render", "exp", "--image=host/repo:1", *words)
    assert done.returncode == 0, done.stderr
    assert "${" not in done.stdout
    return yaml.safe_load(done.stdout)


@pytest.mark.parametrize("kind, slices, hosts, chips, accelerator, shape", [
    ("v4-32", 1, 4, 4, "tpu-v4-podslice", "2x2x4"),
    ("v5e-256", 2, 64, 4, "tpu-v5-lite-podslice", "16x16"),
    ("v5e-8", 1, 1, 8, "tpu-v5-lite-podslice", "2x4"),
    ("v5p-256", 3, 32, 4, "tpu-v5p-slice", "4x4x8"),
    ("v6e-16", 1, 4, 4, "tpu-v6e-slice", "4x4"),
])
def test_the_manifest_asks_for_each_slices_machines(kind, slices, hosts, chips, accelerator, shape):
    spec = gke(f"--type={kind}", f"--slices={slices}", "--", *RUN)["spec"]
    (jobs,) = spec["replicatedJobs"]
    job = jobs["template"]["spec"]
    assert jobs["replicas"] == slices
    assert job["parallelism"] == job["completions"] == hosts
    assert job["backoffLimit"] == 0 and job["completionMode"] == "Indexed"
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {"cloud.google.com/gke-tpu-accelerator": accelerator,
                                   "cloud.google.com/gke-tpu-topology": shape}
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": chips}
    assert container["resources"]["requests"] == {"google.com/tpu": chips}
    total = math.prod(map(int, shape.split("x")))
    assert total == hosts * chips
    assert container["args"][-1] == f"--config.pod.device_count={total * slices}"


def test_the_manifest_restarts_all_slices_but_not_after_refused_arguments():
    manifest = gke("--type=v4-32", "--restarts=4", "--", *RUN, """--config.x=('a', "b\\c")""")
    spec = manifest["spec"]
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert manifest["metadata"]["name"] == "exp"
    assert spec["network"]["enableDNSHostnames"] is True
    assert spec["failurePolicy"]["maxRestarts"] == 4
    assert spec["failurePolicy"]["rules"] == [
        {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {
        "containerName": container["name"], "operator": "In", "values": [2]}
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    assert container["args"][:3] == [*RUN, """--config.x=('a', "b\\c")"""]
    assert "KEY" not in json.dumps(container)


def test_spot_nodes_are_selected_and_tolerated_only_where_asked_for():
    def pod(*flags):
        spec = gke("--type=v4-32", *flags, "--", *RUN)["spec"]
        return spec["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]

    spot, plain = pod("--spot"), pod()
    assert spot["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert [toleration["key"] for toleration in spot["tolerations"]] == [
        "google.com/tpu", "cloud.google.com/gke-spot"]
    assert "gke-spot" not in json.dumps(plain)


@pytest.mark.parametrize("words, said", [
    (["render", "exp", "--type=v5e-8", "--slices=2", "--image=i", "--", *RUN], "two or more"),
    (["render", "exp", "--type=v4-32", "--", *RUN], "--image=: expected"),
    (["render", "exp", "--type=v4-32", "--image=i", "--", "--config=x"], "--config.workdir must"),
    (["render", "exp", "--type=v4-32", "--image=i"], "needs the program's arguments"),
    (["launch", "exp"], "'launch' is none of: render apply delete"),
])
def test_an_error_names_what_is_wrong(words, said):
    done = script(*words)
    assert done.returncode == 2 and said in done.stderr and done.stdout == ""


def test_a_dry_run_applies_and_deletes_nothing():
    words = ("exp", "--type=v4-32", "--image=host/repo:1")
    assert script("apply", *words, "--dry-run", "--", *RUN).stdout == (
        script("render", *words, "--", *RUN).stdout)
    assert script("delete", "exp", "--dry-run").stdout == "kubectl delete jobset exp\n"
