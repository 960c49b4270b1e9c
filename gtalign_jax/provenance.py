"""What a run was made with: versions of packages, and the state of this source tree."""

import subprocess
from pathlib import Path

from gtalign_jax.pod.start import installed

PACKAGES = (
    "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "numpy", "transformers",
    "tokenizers", "safetensors", "datasets", "math-verify", "ml_collections",
)


def git_revision() -> str | None:
    """The commit of this source tree, "+dirty" where tracked files differ; None outside of git."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def versions() -> dict[str, str | None]:
    """The installed version of each of PACKAGES."""
    return {name: installed(name) for name in PACKAGES}
