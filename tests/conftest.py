"""Test set-up: eight CPU devices, explicit broadcasting, and the folder of reference data.

The environment is set before anything imports jax: XLA reads it once, when the backend starts.
"""

import os
import signal
import tempfile
from pathlib import Path

import compiler

# Started in the background, tests and their children would be deaf to Ctrl-C and to hang-ups.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.environ["XLA_FLAGS"] = compiler.flags(8, os.environ.get("XLA_FLAGS", ""))
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Commands that tests start compile the same programs again and again: once in a session is enough.
# The process that starts the workers makes the folder, and removes it when it ends.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    COMPILED = tempfile.TemporaryDirectory(prefix="gtalign-compiled-", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
# A property's first example may compile: no deadline. In CI its examples are always the same.
hypothesis.settings.register_profile(
    "project", deadline=None, derandomize=bool(os.environ.get("CI")), print_blob=True
)
hypothesis.settings.load_profile("project")

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


def pytest_configure(config):
    """What tests start has no torch; pytest-xdist's workers, which tests run in, have it."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        path = (str(ROOT / "tests" / "torch_free"), os.environ.get("PYTHONPATH", ""))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of reference data beside the repository; absent on a user's machine."""
    if SHARED.is_dir():
        return SHARED
    if os.environ.get("CI"):
        pytest.fail(f"CI must run the tests that read {SHARED}, but the folder does not exist")
    pytest.skip(f"needs the reference data in {SHARED}, which is not part of the repository")
