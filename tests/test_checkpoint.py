"""Checkpoints: bit-exact, whole or absent, and refused by another run."""

import os
import signal
import subprocess
import sys
import textwrap

import compiler
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pods
import pytest
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gtalign_jax.training.checkpoint import CheckpointConfig, Checkpointer, CheckpointError

RUN = {"model": {"family": "qwen2", "d_model": 8}, "data": {"train": ["a.parquet"]}}


@struct.dataclass
class State:
    step: jax.Array
    params: dict
    opt_state: optax.OptState
    key: jax.Array


def make_state(seed: int = 0) -> State:
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(0.0, 1e-2, 3))
    )
    key = jax.random.key(seed)
    params = {
        "w": jax.random.normal(key, (8, 8)),
        "half": jax.random.normal(key, (16,), jnp.bfloat16),
        "no_bias": None,
    }
    opt_state = tx.init(params)
    for _ in range(2):
        grads = jax.tree.map(lambda x: x * 0.1, params)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    return State(jnp.int32(2), params, opt_state, jax.random.fold_in(key, 7))


def bits(tree) -> list[bytes]:
    raw = jax.tree.map(
        lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x,
        tree,
    )
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(raw)]


@pytest.fixture
def open_run(tmp_path):
    """Checkpointers on one directory; each is closed before the next one opens."""
    opened = []

    def make(fingerprint=RUN, **cfg) -> Checkpointer:
        if opened:
            opened[-1].close()
        opened.append(Checkpointer(tmp_path / "ckpt", CheckpointConfig(**cfg), fingerprint))
        return opened[-1]

    yield make
    opened[-1].close()


def test_a_state_comes_back_bit_for_bit_with_its_optimizer_key_and_extra(open_run):
    state = make_state()
    extra = {"stage": "grpo", "loss": 0.1 + 0.2, "best": None}
    first = open_run()
    assert first.latest() is None
    first.save(2, state, extra)

    second = open_run()
    restored, restored_extra = second.restore(jax.eval_shape(lambda: make_state(1)))
    assert second.latest() == 2
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert bits(restored) == bits(state)
    assert restored_extra == extra
    assert restored.params["half"].dtype == jnp.bfloat16
    assert jax.random.uniform(restored.key) == jax.random.uniform(state.key)


def test_arrays_may_be_donated_while_their_save_is_still_being_written(open_run):
    step = jax.jit(lambda x: x + 1.0, donate_argnums=0)
    x = jnp.zeros((512, 1024))
    checkpointer = open_run(keep=3)
    for number in (1, 2, 3):
        checkpointer.save(number, {"x": x})
        x = step(x)
    for number in (1, 2, 3):
        restored, _ = checkpointer.restore({"x": jax.ShapeDtypeStruct(x.shape, x.dtype)}, number)
        np.testing.assert_array_equal(restored["x"], np.full(x.shape, number - 1.0))


@pytest.mark.parametrize("shape,spec", [((8,), ("d",)), ((2,), ("d",)), ((1,), (None,))])
def test_a_checkpoint_is_restored_onto_another_number_of_devices(open_run, shape, spec):
    devices = np.asarray(jax.devices())
    four = NamedSharding(Mesh(devices[:4], ("d",)), PartitionSpec("d"))
    values = np.arange(64, dtype=np.float32).reshape(8, 8)
    open_run().save(1, {"w": jax.device_put(values, four)})

    other = NamedSharding(Mesh(devices[: shape[0]], ("d",)), PartitionSpec(None, *spec))
    wanted = {"w": jax.ShapeDtypeStruct((8, 8), np.float32, sharding=other)}
    checkpointer = open_run()
    restored, _ = checkpointer.restore(wanted, 1)
    assert restored["w"].sharding.is_equivalent_to(other, 2)
    assert len(restored["w"].addressable_shards) == shape[0]
    np.testing.assert_array_equal(restored["w"], values)


def test_only_the_newest_checkpoints_are_kept(open_run):
    checkpointer = open_run(keep=2)
    for step in (1, 2, 3, 4):
        checkpointer.save(step, {"x": jnp.float32(step)})
    checkpointer.wait()
    assert checkpointer.steps() == [3, 4]


def test_saving_a_saved_step_again_leaves_it_as_it_is(open_run):
    checkpointer = open_run()
    checkpointer.save(5, {"x": jnp.float32(1)})
    checkpointer.save(5, {"x": jnp.float32(2)})
    restored, _ = checkpointer.restore({"x": jax.ShapeDtypeStruct((), jnp.float32)})
    assert restored["x"] == 1


def test_another_run_is_refused_with_every_difference_named(open_run):
    open_run().save(1, {"x": jnp.zeros(3)})
    other = {"model": {"family": "llama", "d_model": 8}, "data": {"train": ["a.parquet"]}, "new": 1}
    checkpointer = open_run(other)
    with pytest.raises(CheckpointError) as caught:
        checkpointer.restore({"x": jax.ShapeDtypeStruct((3,), jnp.float32)}, 1)
    text = str(caught.value)
    assert "model.family: saved 'qwen2', now 'llama'" in text
    assert "new: saved '(absent)', now 1" in text
    assert "d_model" not in text and "data.train" not in text
    assert "checkpoint.force=True" in text


def test_force_restores_another_runs_checkpoint(open_run):
    open_run().save(1, {"x": jnp.ones(3)})
    restored, _ = open_run({"model": "other"}, force=True).restore(
        {"x": jax.ShapeDtypeStruct((3,), jnp.float32)}, 1
    )
    np.testing.assert_array_equal(restored["x"], np.ones(3))


def test_a_tuple_in_the_fingerprint_equals_the_list_that_json_returns(open_run):
    open_run({"stages": ("sft", "grpo")}).save(1, {"x": jnp.ones(3)})
    restored, _ = open_run({"stages": ("sft", "grpo")}).restore(
        {"x": jax.ShapeDtypeStruct((3,), jnp.float32)}
    )
    np.testing.assert_array_equal(restored["x"], np.ones(3))


def test_arrays_of_another_shape_are_refused_and_named(open_run):
    open_run().save(1, {"w": jnp.ones((3, 2)), "old": jnp.ones(1)})
    with pytest.raises(CheckpointError) as caught:
        open_run().restore(
            {"w": jax.ShapeDtypeStruct((4, 2), jnp.float32), "b": jnp.zeros(5)}
        )
    text = str(caught.value)
    assert "w: saved (3, 2) float32, now (4, 2) float32" in text
    assert "b: saved nothing, now (5,) float32" in text
    assert "old: saved (1,) float32, now nothing" in text


def test_a_key_of_another_algorithm_comes_back_as_one(open_run):
    key = jax.random.key(3, impl="rbg")
    open_run().save(1, {"key": key})
    restored, _ = open_run().restore({"key": jax.eval_shape(lambda: key)})
    assert restored["key"].dtype == key.dtype
    assert bits(restored) == bits({"key": key})


def test_a_part_of_the_state_can_be_restored_alone(open_run):
    state = make_state()
    open_run().save(1, state)
    wanted = {"params": jax.eval_shape(lambda: make_state().params)}
    restored, _ = open_run().restore(wanted, partial=True)
    assert bits(restored["params"]) == bits(state.params)


def test_a_reader_of_a_running_directory_leaves_its_save_in_flight_alone(tmp_path):
    writer = Checkpointer(tmp_path, CheckpointConfig(), RUN)
    writer.save(1, {"x": jnp.ones(4)})
    writer.wait()
    writer.save(2, {"x": jnp.ones((2048, 2048))})
    reader = Checkpointer(tmp_path, CheckpointConfig(), None, read_only=True)
    restored, _ = reader.restore({"x": jax.ShapeDtypeStruct((4,), jnp.float32)}, 1)
    np.testing.assert_array_equal(restored["x"], np.ones(4))
    with pytest.raises(CheckpointError, match="opened to read only"):
        reader.save(3, {"x": jnp.ones(4)})
    reader.close()
    writer.close()
    assert writer.steps() == [1, 2]


def test_restoring_without_a_checkpoint_says_which_there_are(open_run):
    checkpointer = open_run()
    with pytest.raises(FileNotFoundError, match="no checkpoint of step None .*: none"):
        checkpointer.restore({"x": jnp.zeros(1)})
    checkpointer.save(4, {"x": jnp.zeros(1)})
    checkpointer.wait()
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 3 .*: \[4\]"):
        checkpointer.restore({"x": jnp.zeros(1)}, 3)


@pytest.mark.parametrize("key", ["every", "keep"])
def test_a_checkpoint_setting_below_one_is_refused(key):
    with pytest.raises(ValueError, match=f"checkpoint.{key}=0: expected an integer >= 1"):
        CheckpointConfig(**{key: 0})


CHILD = textwrap.dedent("""
    import os, resource, signal, sys
    import jax, jax.numpy as jnp
    from gtalign_jax.training.checkpoint import CheckpointConfig, Checkpointer, CheckpointError
    directory, how = sys.argv[1:]
    checkpointer = Checkpointer(directory, CheckpointConfig(keep=2), {"run": 1})
    x = jax.random.normal(jax.random.key(0), (4096, 4096))  # 64 MiB: takes a while to write
    checkpointer.save(1, {"x": jnp.ones(4)})
    checkpointer.wait()
    if how == "kill":
        checkpointer.save(2, {"x": x})
        os.kill(os.getpid(), signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))  # as a full disk would do
    try:
        checkpointer.save(2, {"x": x})
        checkpointer.save(3, {"x": x})
    except CheckpointError as error:
        print("surfaced:", error, flush=True)
        os._exit(7)
""")


def run_child(directory, how: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "XLA_FLAGS": compiler.flags(), "PYTHONPATH": pods.PATH}
    return subprocess.run(
        [sys.executable, "-c", CHILD, str(directory), how],
        env=env, capture_output=True, text=True, timeout=120,
    )


@pytest.mark.slow
def test_a_process_killed_during_a_save_leaves_the_previous_checkpoint_selected(tmp_path):
    done = run_child(tmp_path, "kill")
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = sorted(path.name for path in tmp_path.iterdir())
    assert any(name.startswith("2.") for name in left), f"the save was not cut short: {left}"

    checkpointer = Checkpointer(tmp_path, CheckpointConfig(), {"run": 1})
    assert checkpointer.latest() == 1 and checkpointer.steps() == [1]
    restored, _ = checkpointer.restore({"x": jax.ShapeDtypeStruct((4,), jnp.float32)})
    np.testing.assert_array_equal(restored["x"], np.ones(4))
    checkpointer.save(2, {"x": 2 * jnp.ones(4)})
    checkpointer.close()
    assert checkpointer.latest() == 2


@pytest.mark.slow
def test_a_background_save_that_fails_is_raised_by_the_next_call_and_never_selected(tmp_path):
    done = run_child(tmp_path, "full")
    assert done.returncode == 7, done.stderr
    assert f"surfaced: saving to {tmp_path} failed" in done.stdout
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(), {"run": 1})
    assert checkpointer.latest() == 1
    checkpointer.close()
