"""Serve a policy over HTTP, with OpenAI's chat completions and prices that steer it:

    python -m gtalign_jax.serve --model=WHAT [--port=8000] [--host=127.0.0.1] [--name=NAME]
        [--slots=8 --queue=64 --prompt_tokens=N --new_tokens=N --deadline_s=120 --grace_s=30]
        [--max_body_bytes=1048576] [--api_key_env=VARIABLE] [--instruction=…] [--dtype=…]
        [--pricing=POLICY … --rule=RULE --mode=MODE --sensitivity=LLM,USER --usage=JSON]

WHAT is a run's work directory, RUN/checkpoints/STAGE/STEP, or a Hugging Face directory or hub name.
"ready: http://HOST:PORT" on standard output says that it answers (--port=0 takes a free port); the
log goes to standard error and never holds what was asked or answered.

--pricing and what follows it steer requests that say nothing themselves; --pricing may be
repeated, prices then add up. With --api_key_env the key in that environment variable is asked for
in all of /v1. Another --host than loopback lets other machines in: give it a key then.

SIGTERM or SIGINT: nothing new is taken (503), what runs has --grace_s seconds to finish, and the
exit status is 0; a second signal ends at once. The status is 2 where nothing was served because of
a mistake, which one line names, and 1 where the model failed to start.
"""

import argparse
import asyncio
import dataclasses
import ipaddress
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence

import uvicorn
from fastapi import FastAPI

from gtalign_jax.command import CHATTY
from gtalign_jax.data import asking
from gtalign_jax.data.chat import encode_chat
from gtalign_jax.game import pricing, steering
from gtalign_jax.game.decide import RULES
from gtalign_jax.game.steering import SteeringConfig
from gtalign_jax.model.load import COMPUTE_DTYPES
from gtalign_jax.pod.ending import EXIT_MISTAKE, MISTAKES
from gtalign_jax.policies import load_player
from gtalign_jax.rollout.player import Player
from gtalign_jax.serving.api import ApiConfig, create_app
from gtalign_jax.serving.chat import NO_USE, Service
from gtalign_jax.serving.engine import Engine, EngineConfig, EngineError
from gtalign_jax.training.checkpoint import CheckpointError

log = logging.getLogger(__name__)

INTERRUPTED = 130  # exit status after Ctrl-C before anything was served
CLOSE_S = 5  # for connections to close when all replies are out


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    args = _arguments(argv)
    try:
        api, steered = _api_config(args), _steering(args)
        with _listen(args.host, args.port) as listener:
            player = load_player(args.model, instruction=args.instruction, dtype=args.dtype)
            sizes = _engine_config(args, player)
            _check_prompt(player, sizes.prompt_tokens)
            engine = Engine(player, sizes)
            service = _service(args, player, engine, steered)
            app = create_app(service, api)
            _warn(listener, api)
            log.info("%s: compiling for %d slots", player.name, sizes.slots)
            engine.start()
            asyncio.run(Server(app, engine, listener, args.grace_s).run())
    except MISTAKES as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_MISTAKE
    except (CheckpointError, EngineError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before anything was served
        return INTERRUPTED
    return 0


class Server(uvicorn.Server):
    """uvicorn with an orderly end: it refuses, lets finish, stops the engine, then closes."""

    def __init__(self, app: FastAPI, engine: Engine, listener: socket.socket, grace_s: float):
        super().__init__(uvicorn.Config(
            app, loop="asyncio", http="h11", ws="none", lifespan="off", log_config=None,
            server_header=False, timeout_graceful_shutdown=CLOSE_S,
        ))  # fmt: skip
        self._app, self.engine, self._grace_s = app, engine, grace_s
        self._listener, self._address = listener, listener.getsockname()[:2]
        self._ending: asyncio.Task | None = None
        self.loop: asyncio.AbstractEventLoop | None = None

    @property
    def address(self) -> tuple[str, int]:
        return self._address  # uvicorn closes the socket

    @property
    def url(self) -> str:
        host, port = self.address
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def run(self) -> None:
        """Serves until it is told to end, and prints where as soon as it answers."""
        self.loop = asyncio.get_running_loop()
        serving = asyncio.create_task(self.serve(sockets=[self._listener]))
        while not (self.started or serving.done()):
            await asyncio.sleep(0.01)
        if not serving.done():
            print(f"ready: {self.url}", flush=True)
        try:
            await serving
        finally:
            await self.engine.stop(0)

    def handle_exit(self, sig: int, frame: object) -> None:
        """uvicorn calls this for SIGTERM and SIGINT; its own would end a process by that signal."""
        log.info("%s: ending", signal.Signals(sig).name)
        self.loop.call_soon_threadsafe(self.end)

    def end(self) -> None:
        """The orderly end; called again, the quick one. On the event loop's thread."""
        if self._ending is None:
            self._ending = asyncio.create_task(self._end())
        else:
            self.should_exit = self.force_exit = True

    async def _end(self) -> None:
        if not await self._app.state.traffic.drain(self._grace_s):
            log.warning("requests still run after %g s: they are given up", self._grace_s)
        await self.engine.stop(0)
        await self._app.state.traffic.drain(CLOSE_S)  # those given up are told so
        self.should_exit = True


class _OneLine(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(EXIT_MISTAKE, f"error: {message} (see --help)\n")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _OneLine(
        prog="python -m gtalign_jax.serve", description=__doc__.partition(":")[0],
        allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add("--model", required=True, help="run, checkpoint, Hugging Face directory or hub name")
    add("--name", default="", help="the model's id for clients; default: from --model")
    add("--host", default="127.0.0.1", help="address to listen at (%(default)s)")
    add("--port", type=int, default=8000, help="0 takes a free one (%(default)s)")
    add("--slots", type=int, default=EngineConfig.slots, help="replies in the making (%(default)s)")
    add("--queue", type=int, default=EngineConfig.queue, help="requests that wait (%(default)s)")
    add("--prompt_tokens", type=int, help="longest prompt; default: 1,024, less in a small model")
    add("--new_tokens", type=int, help="longest completion; default: 512, less in a small model")
    add("--deadline_s", type=float, default=EngineConfig.deadline_s,
        help="from a request to its last token (%(default)g)")
    add("--grace_s", type=float, default=30.0, help="to finish on SIGTERM (%(default)g)")
    add("--max_body_bytes", type=int, default=ApiConfig.max_body_bytes, help="(%(default)s)")
    add("--api_key_env", default="", help="environment variable that holds the key to ask for")
    add("--instruction", default="", choices=["", *asking.INSTRUCTIONS],
        help="how the model is asked; default: as it was taught")
    add("--dtype", default="", choices=["", *COMPUTE_DTYPES], help="to compute in; default: by "
        "device")
    add("--pricing", action="append", default=[], metavar="POLICY[:key=dollars,…]",
        help=f"of {', '.join(pricing.POLICIES)}; tokens by the million, as in per_token:output=30")
    add("--rule", choices=list(RULES), help=f"that chooses the cell ({steering.DEFAULT_RULE})")
    add("--mode", choices=list(steering.MODES), default=SteeringConfig.mode,
        help="force matrix and solved action, or the matrix alone (%(default)s)")
    add("--rows", choices=list(steering.ROWS), default=SteeringConfig.rows,
        help="cells that are open to choice (%(default)s)")
    add("--floor", type=float, default=SteeringConfig.floor,
        help="no price chooses a cell with LLM + user below it; a request may only raise it")
    add("--sensitivity", default="", metavar="LLM,USER", help="payoff points per US dollar "
        f"({','.join(f'{s:g}' for s in pricing.SENSITIVITY)})")
    add("--usage", default="", help='{"input": [DA, CQ, AQ], "output": …}: expected tokens')
    return parser.parse_args(argv)


def _api_config(args: argparse.Namespace) -> ApiConfig:
    key = None
    if args.api_key_env:
        key = os.environ.get(args.api_key_env, "")
        if not key:
            raise ValueError(f"--api_key_env={args.api_key_env}: that variable is not set or empty")
    if args.grace_s < 0:
        raise ValueError(f"--grace_s={args.grace_s:g}: must be >= 0")
    return ApiConfig(key=key, max_body_bytes=args.max_body_bytes)


def _steering(args: argparse.Namespace) -> SteeringConfig:
    """What the flags say; its usage is NO_USE without --usage."""
    settings: dict = {"mode": args.mode, "rows": args.rows, "floor": args.floor}
    if args.rule:
        settings["rule"] = args.rule
    if args.sensitivity:
        try:
            settings["sensitivity"] = tuple(map(float, args.sensitivity.split(",")))
        except ValueError:
            raise ValueError(f"--sensitivity={args.sensitivity}: allowed: two numbers, LLM,USER") \
                from None
    usage = NO_USE
    if args.usage:
        try:
            usage = pricing.read_usage(json.loads(args.usage))
        except ValueError as error:
            raise ValueError(f"--usage={args.usage[:60]}: {error}") from error
    try:
        return SteeringConfig(
            pricing=pricing.read(args.pricing or "none"), usage=usage, **settings
        )
    except ValueError as error:
        raise ValueError(f"--pricing, --rule, --floor, --sensitivity: {error}") from error


def _engine_config(args: argparse.Namespace, player: Player) -> EngineConfig:
    """Sizes by default as large as a small model allows."""
    positions = player.model.max_position
    new = args.new_tokens
    prompt = args.prompt_tokens
    if prompt is None:
        prompt = min(EngineConfig.prompt_tokens, positions - (new or positions // 2))
    if new is None:
        new = min(EngineConfig.new_tokens, positions - prompt)
    return EngineConfig(
        slots=args.slots, queue=args.queue, prompt_tokens=prompt, new_tokens=new,
        deadline_s=args.deadline_s,
    )  # fmt: skip


def _check_prompt(player: Player, longest: int) -> None:
    """Raises ValueError where no request could be answered, so that clients are not told why."""
    try:
        asked = asking.ask([{"role": "user", "content": "?"}], player.instruction)
        tokens = len(encode_chat(player.tokenizer, asked))
    except ValueError as error:  # of the model's chat template
        raise ValueError(f"--instruction={player.instruction}: {error}") from error
    if tokens > longest:
        raise ValueError(f"--prompt_tokens={longest}: the shortest question is {tokens} tokens "
                         f"with --instruction={player.instruction}")


def _service(
    args: argparse.Namespace, player: Player, engine: Engine, config: SteeringConfig
) -> Service:
    if config.usage is NO_USE and player.usage is not None:
        config = dataclasses.replace(config, usage=player.usage)
    if config.usage is NO_USE and config.pricing.rates_XP.any():
        raise ValueError(
            f"--pricing={' '.join(args.pricing)}: how much each action of this model uses is not "
            'known; give --usage=\'{"input": [DA, CQ, AQ], "output": [DA, CQ, AQ]}\''
        )
    steered = bool(args.pricing or args.rule)
    return Service(player, engine, args.name or player.name, config, steered)


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket, before anything is loaded. Raises ValueError where that fails."""
    if not 0 <= port < 2**16:  # the resolver would take it modulo that
        raise ValueError(f"--port={port}: allowed are 0 to 65535")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ValueError(f"--host={host} --port={port}: {error}") from error
    return listener


def _warn(listener: socket.socket, api: ApiConfig) -> None:
    host = listener.getsockname()[0]
    if api.key is None and not ipaddress.ip_address(host.partition("%")[0]).is_loopback:
        log.warning("listening at %s without a key: whoever reaches this machine can use the "
                    "model; give --api_key_env", host)


def log_to_stderr() -> None:
    """For a process that is this command and nothing else."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, force=True,  # absl was there first
                        format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for name, level in CHATTY.items():
        logging.getLogger(name).setLevel(level)


if __name__ == "__main__":
    log_to_stderr()
    status = main()
    if status == INTERRUPTED:  # the engine may compile still, and nothing ends that but this
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
