"""keep.sh: a command is run again until it has ended well, or cannot."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

KEEP = Path(__file__).resolve().parents[2] / "launch" / "keep.sh"
# Ends with the next of the statuses in a file; without one, when it is told to.
COMMAND = """
import pathlib, signal, sys, time
file = pathlib.Path("statuses")
first, *rest = file.read_text().split() or ["wait"]
file.write_text(" ".join(rest))
if first != "wait":
    sys.exit(int(first))
signal.signal(signal.SIGTERM, lambda *about: sys.exit(75))
signal.signal(signal.SIGINT, lambda *about: sys.exit(130))
print("armed", flush=True)
while True:
    time.sleep(0.02)
"""


def keep(tmp_path, statuses, *options):
    (tmp_path / "statuses").write_text(statuses)
    return subprocess.Popen(
        ["bash", KEEP, "--pause=0", *options, sys.executable, "-c", COMMAND], cwd=tmp_path,
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize(("statuses", "ends", "left"), [
    ("75 70 134 75 0 1", 0, "1"), ("1 2 0", 2, "0"), ("75 130 0", 130, "0"),
    ("1 1 1 0", 1, "0"),  # one more than --restarts
    ("1 1 75 75 0", 0, ""),
])
def test_it_starts_again_what_may_go_well_the_next_time_but_not_for_ever(
    tmp_path, statuses, ends, left
):
    kept = keep(tmp_path, statuses, "--restarts=2")
    kept.communicate(timeout=30)
    assert kept.returncode == ends
    assert (tmp_path / "statuses").read_text() == left


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_who_ends_it_ends_the_command_with_its_own_status(tmp_path, number, status):
    kept = keep(tmp_path, "75")
    assert kept.stdout.readline() == "armed\n"
    kept.send_signal(number)
    kept.communicate(timeout=30)
    assert kept.returncode == status


def test_options_are_checked(tmp_path):
    for option in ("--restart=3", "--pause=1.5"):
        kept = keep(tmp_path, "0", option)
        assert f"error: {option}" in kept.communicate(timeout=30)[1] and kept.returncode == 2
