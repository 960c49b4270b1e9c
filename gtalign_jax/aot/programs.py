"""Every program that a run would use, made by the functions that the trainer calls, never run.

    programs(config, model, mesh) -> [Program], each of which can be lowered for the mesh's devices

Arguments are abstract (shape, dtype, sharding). Widths are the limits of the config: prompts of
`data.max_prompt_tokens` and completions of `rollout.max_new_tokens`; a run's own data may be
narrower. What lies in a chip's memory beside a program's arguments is derived from the abstract
trees of what the run holds at that moment.

Left out: the advantages, some hundred numbers, and loading a Hugging Face model, which copies
tensor by tensor and computes nothing.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gtalign_jax.aot import roofline
from gtalign_jax.aot.roofline import Work
from gtalign_jax.config import Config
from gtalign_jax.data.batches import WIDTH_MULTIPLE
from gtalign_jax.model import load
from gtalign_jax.model.load import ModelSource
from gtalign_jax.model.sharding import ROLLOUT, TRAIN, Layout, param_shardings, placed
from gtalign_jax.model.spec import ModelConfig, Params, abstract_params
from gtalign_jax.reward import scoring
from gtalign_jax.rollout.sampler import Sampler, make_sampler
from gtalign_jax.training import model_judge
from gtalign_jax.training import sft as sft_lib
from gtalign_jax.training.grpo import Batch
from gtalign_jax.training.learner import Learner, make_reshard
from gtalign_jax.training.micro import piece_count
from gtalign_jax.training.packed import Packed, pack
from gtalign_jax.training.packing import Placed
from gtalign_jax.training.state import (
    OptimizerConfig,
    TrainState,
    abstract_state,
    make_optimizer,
    make_start,
)

STOP_IDS = (0,)  # any will do: they are constants of the decode loop


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of a run.

    stage: "start", "sft", "grpo", "evaluate" or "judge". where: "chip", or "host" for the reward's.
    calls: per GRPO step; 0 for a program that is no part of a step.
    arguments: what it is called with, abstract. lower: makes the program for the mesh, not yet
      compiled.
    resident: bytes per chip of what lies there meanwhile and is no argument, by what it is.
    work: operations and HBM traffic by formula, over all chips; None: it only reads its arguments
      and writes its results.
    weights_cut: a chip reads its part of the weights only, cut over `tensor`, and gathers none.
    loop_steps: iterations of a loop whose length the compiler cannot know (decode), else 1.
    """

    name: str
    stage: str
    calls: int
    lower: Callable[[], jax.stages.Lowered]
    arguments: Any = ()
    resident: Mapping[str, int] = dataclasses.field(default_factory=dict)
    work: Work | None = None
    where: str = "chip"
    weights_cut: bool = False
    loop_steps: int = 1


def bytes_per_chip(tree: Any) -> int:
    """Bytes that abstract arrays with shardings take on one chip, padding of tiles not counted."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


@dataclasses.dataclass(frozen=True)
class _Run:
    """The abstract arrays that a run holds, and the sizes of its batches."""

    config: Config
    model: ModelConfig
    mesh: Mesh

    @property
    def dtype(self) -> Any:
        return jnp.dtype(self.config.model.compute_dtype)

    @functools.cached_property
    def train(self) -> Layout:
        return Layout(self.mesh, TRAIN, self.config.model.attention)

    @functools.cached_property
    def rollout(self) -> Layout:
        return Layout(self.mesh, ROLLOUT, self.config.model.attention)

    @property
    def width(self) -> int:
        """S: the widest prompts, as `PromptSet` pads them."""
        return -(-self.config.data.max_prompt_tokens // WIDTH_MULTIPLE) * WIDTH_MULTIPLE

    def params(self, layout: Layout, dtype: Any) -> Params:
        return placed(abstract_params(self.model, dtype), param_shardings(self.model, layout))

    @functools.cached_property
    def policy(self) -> Params:
        """The float32 weights that a stage starts from, and takes over."""
        return self.params(self.train, jnp.float32)

    @functools.cached_property
    def reference(self) -> Params | None:
        return self.params(self.train, self.dtype) if self.config.grpo.reference else None

    @functools.cached_property
    def sampling(self) -> Params:
        """The rollout's copy of the weights."""
        return self.params(self.rollout, self.dtype)

    def state(self, cfg: OptimizerConfig, updates: int) -> TrainState:
        return abstract_state(self.model, make_optimizer(cfg, updates), self.train)

    @property
    def shards(self) -> int:
        """Parts that a batch is cut into."""
        return self.train.axis_size("prompts")

    @property
    def hosts(self) -> int:
        """Processes: each scores its own completions."""
        return len({device.process_index for device in self.mesh.devices.flat})

    @property
    def updates(self) -> int:
        return self.config.grpo.steps * self.config.grpo.updates_per_step

    def array(self, shape: tuple[int, ...], dtype: Any = jnp.int32,
              layout: Layout | None = None) -> jax.ShapeDtypeStruct:
        """An argument cut by prompt, as the trainer places it."""
        where = (layout or self.train).sharding("prompts")
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    @functools.cached_property
    def key(self) -> jax.ShapeDtypeStruct:
        shape = jax.eval_shape(lambda: jax.random.key(0))
        everywhere = jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec())
        return placed(shape, everywhere)


def programs(config: Config, model: ModelConfig, mesh: Mesh) -> list[Program]:
    """The programs of the stages that `config` names, in the order in which a run needs them."""
    run = _Run(config, model, mesh)
    out = []
    if not config.model.path:
        out.append(_initialise(run))
    if "sft" in config.stages:
        out += _sft(run)
    if "evaluate" in config.stages:
        out += _evaluate(run)
    if "grpo" in config.stages:
        out += _grpo(run)
    judges = config.judge.kind == "jax" and config.judge.mode == "live"
    return _with_judge(run, out) if judges else out


def _program(name: str, stage: str, calls: int, function: Callable, arguments: tuple,
             resident: Mapping[str, int], static: Mapping[str, Any] = MappingProxyType({}),
             **more: Any) -> Program:
    """The program that `function(*arguments, **static)` is."""
    return Program(name, stage, calls, lambda: function.lower(*arguments, **static), arguments,
                   resident, **more)


def _initialise(run: _Run) -> Program:
    init = load.make_init(run.model, run.train)
    return Program("initialise", "start", 0, lambda: init.lower(run.model, run.key), (run.key,))


def _start(run: _Run, stage: str, cfg: OptimizerConfig, updates: int,
           resident: Mapping[str, int]) -> Program:
    """The optimizer's state, and a copy of the weights that may be donated."""
    start = make_start(run.model, make_optimizer(cfg, updates), run.train)
    return _program(f"{stage} start", stage, 0, start, (run.policy,), resident)


def _sft(run: _Run) -> list[Program]:
    cfg = run.config.sft
    update = sft_lib.make_update(
        run.model, cfg, make_optimizer(cfg, cfg.steps), layout=run.train, dtype=run.dtype
    )
    B, S = cfg.batch_size, run.width
    T = -(-cfg.max_completion_tokens // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
    batch = sft_lib.SFTBatch(
        run.array((B, S)), run.array((B,)), run.array((B, T)), run.array((B,))
    )
    return [
        _start(run, "sft", cfg, cfg.steps, {}),
        _program("sft update", "sft", 0, update, (run.state(cfg, cfg.steps), batch),
                 {}, work=_sft_work(run, T)),
    ]


def _sizes(held: Mapping[str, Any]) -> dict[str, int]:
    """Bytes per chip of each tree; those that are None are left out."""
    return {name: bytes_per_chip(tree) for name, tree in held.items() if tree is not None}


def _evaluate(run: _Run) -> list[Program]:
    """Sampling for held-out prompts, in the middle of GRPO if that happens, else between stages."""
    config, cfg = run.config, run.config.evaluate
    held = {"policy": run.policy}
    if "grpo" in config.stages and cfg.every_steps:
        held = {"state": run.state(config.grpo, run.updates), "reference": run.reference}
    settings = dataclasses.replace(
        config.rollout, temperature=cfg.temperature, top_k=0, top_p=1.0
    )
    sampler = make_sampler(run.model, settings, cfg.samples, STOP_IDS, run.rollout)
    return _sampling(run, sampler, "evaluate", (cfg.batch_size, cfg.samples), 0, _sizes(held))


def _sampling(run: _Run, sampler: Sampler, stage: str, shape: tuple[int, int], calls: int,
              resident: Mapping[str, int]) -> list[Program]:
    """Prefill and decode of `shape` = (prompts, samples)."""
    (Q, G), S, T = shape, run.width, run.config.rollout.max_new_tokens
    prefix = "" if stage == "grpo" else f"{stage} "
    here = functools.partial(run.array, layout=run.rollout)
    prompts = (run.sampling, here((Q, S)), here((Q,)))
    cache, last_Q = jax.eval_shape(sampler.prefill, *prompts)  # with prefill's shardings
    return [
        _program(f"{prefix}prefill", stage, calls, sampler.prefill, prompts, resident,
                 work=roofline.prefill_work(run.model, Q, S)),
        # The first size of batches, which is the largest.
        _program(f"{prefix}decode", stage, calls, sampler.first,
                 (run.sampling, cache, last_Q, here((Q,)), run.key), resident,
                 {"until": (*sampler.sizes(Q), 0)[1]},
                 work=roofline.decode_work(run.model, Q, G, S, T), loop_steps=T, weights_cut=True),
    ]


def _grpo(run: _Run) -> list[Program]:
    config, cfg = run.config, run.config.grpo
    Q, G = cfg.prompts_per_step, cfg.samples_per_prompt
    state = run.state(cfg, run.updates)
    sampler = make_sampler(run.model, config.rollout, G, STOP_IDS, run.rollout)
    learner = Learner.make(run.model, cfg, run.train, run.rollout,
                           filters=config.rollout.filters, dtype=run.dtype, steps=cfg.steps)
    pieces = piece_count(Q, config.rollout.micro_batch_prompts, run.shards)
    held = {"reference": run.reference}
    out = []
    if cfg.reference:
        cast = make_reshard(run.model, run.train, run.dtype)
        out.append(_program("reference", "grpo", 0, cast, (run.policy,), {}))
    return [
        *out,
        _start(run, "grpo", cfg, run.updates, _sizes({"reference": run.reference})),
        _program("reshard", "grpo", 1, learner.reshard, (state.params,),
                 _sizes(held | {"optimizer": state.opt_state}),
                 work=roofline.reshard_work(run.model), weights_cut=True),
        *_sampling(run, sampler, "grpo", (Q // pieces, G), pieces,
                   _sizes(held | {"state": state})),
        *_rewards(run, Q * G // run.hosts),
        *_learning(run, learner, state),
    ]


def _with_judge(run: _Run, others: list[Program]) -> list[Program]:
    """The judge's programs, and its weights beside all others: they stay on the devices.

    Calls per step if every completion goes to it; fewer where rules or algebra judge.
    """
    config, cfg, grpo = run.config, run.config.judge, run.config.grpo
    model_judge.check_settings(cfg, run.rollout)
    try:
        sizes = load.model_sizes(ModelSource(path=cfg.model))
        model = model_judge.fitted(sizes, run.rollout)
    except ValueError as error:
        raise ValueError(f"judge.model={cfg.model!r}: {error}") from error
    rollout = model_judge.settings(cfg)
    data = dataclasses.replace(config.data, max_prompt_tokens=cfg.prompt_tokens)
    judge = _Run(dataclasses.replace(config, data=data, rollout=rollout), model, run.mesh)
    weights = {"judge": bytes_per_chip(judge.sampling)}
    out = [p if p.where == "host" else
           dataclasses.replace(p, resident={**p.resident, **weights}) for p in others]
    situations, calls = [], 0
    if "evaluate" in config.stages:
        situations.append({"policy": run.policy, "rollout's copy": run.sampling})
    if "grpo" in config.stages:
        asked = grpo.prompts_per_step * grpo.samples_per_prompt
        calls = -(-asked * (1 + (config.reward.consistency == "judge")) // cfg.batch_size)
        situations.append({"state": run.state(grpo, run.updates), "reference": run.reference,
                           "batch": _batch(run, grpo.prompts_per_step)})
        if "evaluate" in config.stages and config.evaluate.every_steps:
            situations[1]["rollout's copy"] = run.sampling
    if not situations:
        return out
    held = max(map(_sizes, situations), key=lambda held: sum(held.values()))
    sampler = make_sampler(model, rollout, 1, STOP_IDS, run.rollout)
    return out + _sampling(judge, sampler, "judge", (cfg.batch_size, 1), calls, held)


def _batch(run: _Run, Q: int) -> Batch:
    """A step's batch, or one of its minibatches, without the other policies' log-probabilities."""
    cfg, S, T = run.config.grpo, run.width, run.config.rollout.max_new_tokens
    G, f32 = cfg.samples_per_prompt, jnp.float32
    return Batch(
        prompt_QS=run.array((Q, S)),
        prompt_lengths_Q=run.array((Q,)),
        tokens_QGT=run.array((Q, G, T)),
        lengths_QG=run.array((Q, G)),
        adv_QG=run.array((Q, G), f32),
        valid_QG=run.array((Q, G), jnp.bool_),
        sampler_logp_QGT=run.array((Q, G, T), f32),
    )


def _packed(run: _Run, batch: Batch) -> Packed:
    """The same in bins, as many as it could need."""
    cfg, (Q, G, T) = run.config.grpo, batch.tokens_QGT.shape
    N = -(-Q * G // run.shards // cfg.pack_rows) * cfg.pack_rows
    of_bins = run.array((run.shards, N, T))
    laid = Placed(of_bins, of_bins, of_bins, run.array((run.shards, N, cfg.pack)))
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=run.train.sharding())
    shapes = jax.eval_shape(functools.partial(pack, grpo=cfg), batch, laid, number)
    packed = jax.tree.map(lambda s: run.array(s.shape, s.dtype), shapes.replace(pieces=None))
    return packed.replace(pieces=number)


def _learning(run: _Run, learner: Learner, state: TrainState) -> list[Program]:
    """Log-probabilities of the old policy and of the reference, and the update itself.

    Work is that of the padded batch: how much less it is in bins, only completions tell.
    """
    cfg, Q = run.config.grpo, run.config.grpo.prompts_per_step
    whole, part = _batch(run, Q), _batch(run, Q // cfg.minibatches)
    batch, times, held = whole, 1, {}  # what has log-probabilities computed at once, and how often
    if cfg.pack:
        batch = part = _packed(run, part)
        times, held = cfg.minibatches, {"whole batch": whole}
    has_old, work = cfg.old_logp == "sampler" or cfg.needs_old_logp, _logp_work(run, Q // times)

    def known(of: Batch | Packed, ref: bool) -> Batch | Packed:
        logp = of.logps[0]
        return of.with_logps(logp if has_old else None, logp if ref else None)

    reference, out = {"reference": run.reference}, []
    if cfg.needs_old_logp:
        out.append(_program(
            "old logp", "grpo", times, learner.logps, (state.params, batch),
            _sizes(reference | held | {"optimizer": state.opt_state}), work=work,
        ))
    if cfg.reference:
        out.append(_program(
            "reference logp", "grpo", times, learner.logps, (run.reference, known(batch, False)),
            _sizes(held | {"state": state}), work=work,
        ))
    part = known(part, cfg.reference)
    if cfg.minibatches > 1 and not cfg.pack:
        held = {"whole batch": known(batch, cfg.reference)}
    out.append(_program(
        "update", "grpo", cfg.updates_per_step, learner.one_update, (state, part),
        _sizes(reference | held), work=_update_work(run, Q // cfg.minibatches),
    ))
    return out


def _logp_work(run: _Run, Q: int) -> Work:
    cfg, T = run.config.grpo, run.config.rollout.max_new_tokens
    return roofline.forward_work(run.model, Q, cfg.samples_per_prompt, run.width, T)


def _update_work(run: _Run, Q: int) -> Work:
    cfg, T = run.config.grpo, run.config.rollout.max_new_tokens
    return roofline.update_work(
        run.model, Q, cfg.samples_per_prompt, run.width, T, remat=cfg.remat,
        micro_batches=piece_count(Q, cfg.micro_batch_prompts, run.shards),
    )


def _sft_work(run: _Run, T: int) -> Work:
    cfg = run.config.sft
    B = cfg.batch_size
    return roofline.update_work(run.model, B, 1, run.width, T, remat=cfg.remat,
                                micro_batches=piece_count(B, cfg.micro_batch_size, run.shards))


def _rewards(run: _Run, rows: int) -> list[Program]:
    lowered = functools.cache(lambda: scoring.lower(run.config.reward, rows))
    return [
        Program(name, "grpo", 1, lambda name=name: lowered()[name], where="host")
        for name in ("games", "reward")
    ]
