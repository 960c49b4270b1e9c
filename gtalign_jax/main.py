"""The command: `python -m gtalign_jax.main --config=configs/demo_cpu.py [--config.key=value …]`.

Flags become a frozen Config, and `run.run` does the rest. How it ends: command.py.
"""

from absl import app

from gtalign_jax.command import carry_out
from gtalign_jax.config import define_flag, parse_flags
from gtalign_jax.run import run

_CONFIG = define_flag()


def main(argv: list[str]) -> None:
    del argv
    carry_out(_CONFIG, run)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
