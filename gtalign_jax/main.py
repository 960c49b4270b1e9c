"""The command: `python -m gtalign_jax.main --config=configs/demo_cpu.py [--config.key=value …]`.

Flags become a frozen Config, the processes of a pod become one run, and `run.run` does the rest. A
mistake of the user's ends in one line that names it and exit status 2; a run that diverges, cannot
save or loses a process ends in one line and status 1. (On a pod the watch ends it: pod/watch.py.)
SIGTERM saves the step at hand and ends the run with status 75.
"""

import hashlib
import logging
import sys

from absl import app

from gtalign_jax.config import define_flag, from_flag, parse_flags, resolved_json
from gtalign_jax.pod.ending import EXIT_MISTAKE, MISTAKES
from gtalign_jax.pod.exchange import PodError, is_first
from gtalign_jax.pod.notice import EXIT_PREEMPTED, Preempted
from gtalign_jax.pod.start import start
from gtalign_jax.run import run
from gtalign_jax.training.checkpoint import CheckpointError

_CONFIG = define_flag()


def main(argv: list[str]) -> None:
    del argv
    for name in ("absl", "httpx", "httpx2", "jax"):  # the judge's client reports each request
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        config = from_flag(_CONFIG)
        start(config.pod, {"config": hashlib.sha256(resolved_json(config).encode()).hexdigest()})
        if not is_first():  # what all of them would say, process 0 says
            logging.getLogger("gtalign_jax").setLevel(logging.ERROR)
        run(config)
    except MISTAKES as error:  # ConfigError is a ValueError
        sys.exit(_fail(error, EXIT_MISTAKE))
    except Preempted as told:
        print(f"{told}; the same command goes on from there", file=sys.stderr)
        sys.exit(EXIT_PREEMPTED)
    except (CheckpointError, FloatingPointError, PodError) as error:
        sys.exit(_fail(error, 1))


def _fail(error: Exception, status: int) -> int:
    if logging.getLogger().isEnabledFor(logging.DEBUG):
        logging.exception("the run ended")
    print(f"error: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
