"""How a command with `--config=FILE` begins and ends, the same for all of them.

    flags -> Config -> the processes of a pod become one -> the command's own work

A mistake of the user's ends in one line that names it and exit status 2, and so does a run whose
work directory another one has; a run that diverges,
cannot save or write a file, has no judge or no memory, or loses a process ends in one line and
status 1. (On a pod the watch ends it: pod/watch.py.) SIGTERM and Ctrl-C save what is done and end
with status 75 and 130.
"""

import hashlib
import logging
import sys
from collections.abc import Callable
from typing import Any

from absl import flags

from gtalign_jax.config import Config, from_flag, resolved_json
from gtalign_jax.pod.ending import EXIT_MISTAKE, MISTAKES, OutOfMemory
from gtalign_jax.pod.exchange import PodError, is_first
from gtalign_jax.pod.notice import Notice, Preempted
from gtalign_jax.pod.start import start
from gtalign_jax.redact import redact_text
from gtalign_jax.reward.judges import JudgeError
from gtalign_jax.training.checkpoint import CheckpointError
from gtalign_jax.training.claim import TakenError
from gtalign_jax.training.files import explained

# The judge's client reports each request; orbax warns of each look at a checkpoint, and of each
# array that a full disk did not take, with a trace, besides the error that it raises.
CHATTY = {
    "httpx": logging.WARNING, "httpx2": logging.WARNING, "jax": logging.WARNING,
    "absl": logging.CRITICAL, "asyncio": logging.CRITICAL,
}  # fmt: skip


def carry_out(
    flag: flags.FlagHolder, work: Callable[[Any], object], *words: str, cls: type = Config,
    common: Callable[[Any], Config] = lambda config: config,
) -> None:
    """`work(config)` in every process; `words` are what else the command line must agree on.

    `cls`: what the flag's file describes. `common`: the Config in it that says how processes meet.
    """
    for name, level in CHATTY.items():
        logging.getLogger(name).setLevel(level)
    try:
        with Notice():
            config = from_flag(flag, cls)
            said = "\0".join((resolved_json(common(config)), *words))
            start(common(config).pod, {"config": hashlib.sha256(said.encode()).hexdigest()})
            if not is_first():  # what all of them would say, process 0 says
                logging.getLogger("gtalign_jax").setLevel(logging.ERROR)
            work(config)
    except (*MISTAKES, TakenError) as error:  # ConfigError is a ValueError
        sys.exit(_fail(error, EXIT_MISTAKE))
    except Preempted as told:
        print(told, file=sys.stderr)
        sys.exit(told.status)
    except (CheckpointError, FloatingPointError, JudgeError, OutOfMemory, PodError) as error:
        sys.exit(_fail(error, 1))
    except OSError as error:
        sys.exit(_fail(explained(error), 1))


def _fail(what: Exception | str, status: int) -> int:
    if logging.getLogger().isEnabledFor(logging.DEBUG):
        logging.exception("the run ended")
    print(f"error: {redact_text(str(what))}", file=sys.stderr)
    return status
