"""From a run's checkpoint to a directory that transformers loads."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from gtalign_jax import export
from gtalign_jax.config import Config, save_run_info
from gtalign_jax.data.chat import load_tokenizer
from gtalign_jax.data.tokenizer import train_tokenizer
from gtalign_jax.freeze import freeze, to_config_dict
from gtalign_jax.model import load
from gtalign_jax.model.forward import full_logits
from gtalign_jax.model.spec import init_params
from gtalign_jax.training.checkpoint import CheckpointConfig, Checkpointer
from gtalign_jax.training.state import OptimizerConfig, make_optimizer, new_state

TEXTS = ["What is the tide at 7? It depends on the harbour, so which one do you mean?"] * 3


def make_run(workdir, family: str, chain_pieces: bool, *stages_and_steps: tuple[str, int]):
    """A work directory as a training run leaves it; returns (params of the last save, config)."""
    values = to_config_dict(Config())
    values.workdir = str(workdir)
    for key, value in (("family", family), ("vocab_size", 320), ("d_model", 32), ("d_ff", 48),
                       ("num_layers", 2), ("num_heads", 4), ("num_kv_heads", 2),
                       ("head_dim", 8), ("max_position", 64), ("qkv_bias", family == "qwen2"),
                       ("qk_norm", family == "qwen3")):
        values.model[key] = value
    config = freeze(Config, values)
    save_run_info(workdir, config)
    train_tokenizer(TEXTS, 320, workdir / "tokenizer", chain_pieces=chain_pieces)
    model = load.model_config(config.model, len(load_tokenizer(workdir / "tokenizer")))
    params = None
    for stage, step in stages_and_steps:
        params = init_params(model, jax.random.key(step))
        state = new_state(params, make_optimizer(OptimizerConfig(), 10))
        checkpoints = Checkpointer(
            export.checkpoint_dir(workdir, stage), CheckpointConfig(keep=5), {"any": "run"}
        )
        checkpoints.save(step, {"state": state, "key": jax.random.key(0)})
        checkpoints.close()
    return params, model


@pytest.mark.hf
@pytest.mark.slow
@pytest.mark.parametrize("family,chain_pieces", [("qwen3", True), ("llama", True),
                                                 ("qwen2", False)])
def test_an_exported_checkpoint_loads_with_transformers_and_gives_the_same_logits(
    tmp_path, family, chain_pieces, capsys
):
    params, model = make_run(tmp_path / "run", family, chain_pieces, ("sft", 3), ("grpo", 4))
    out = tmp_path / "out"
    assert export.main(["--workdir", str(tmp_path / "run"), "--out", str(out)]) == 0
    assert "exported grpo step 4" in capsys.readouterr().out

    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="float32").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    ids = tokenizer(TEXTS[0], return_tensors="pt", add_special_tokens=False).input_ids
    expected = theirs(ids).logits.detach().numpy()
    tokens_BT = jnp.asarray(ids.numpy(), jnp.int32)
    logits = full_logits(params, model, tokens_BT, jnp.array([tokens_BT.shape[1]]))
    np.testing.assert_allclose(
        np.asarray(logits)[..., : model.vocab_size], expected, atol=1e-4, rtol=0
    )
    generation = json.loads((out / "generation_config.json").read_text())
    assert tokenizer.eos_token_id in np.atleast_1d(generation["eos_token_id"])


@pytest.mark.hf
def test_a_stage_and_a_step_can_be_chosen(tmp_path, capsys):
    make_run(tmp_path, "llama", True, ("sft", 3), ("grpo", 4), ("grpo", 5))
    arguments = ["--workdir", str(tmp_path), "--out", str(tmp_path / "out")]
    assert export.main([*arguments, "--stage=grpo", "--step=4"]) == 0
    assert export.main([*arguments, "--stage=sft"]) == 0
    out = capsys.readouterr().out
    assert "exported grpo step 4" in out and "exported sft step 3" in out


def test_a_stage_killed_before_its_first_save_leaves_the_one_before_to_export(tmp_path):
    params, _ = make_run(tmp_path, "llama", True, ("sft", 3))
    config = export.load_run_config(tmp_path)
    Checkpointer(export.checkpoint_dir(tmp_path, "grpo"), CheckpointConfig(), {}).close()
    restored, _, what = export.restore_policy(tmp_path, config)
    assert what == "sft step 3"
    np.testing.assert_array_equal(restored.embed_VD, params.embed_VD)


def test_what_is_missing_is_named_and_the_exit_status_is_1(tmp_path, capsys):
    assert export.main(["--workdir", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "is not a run's work directory" in capsys.readouterr().err
    make_run(tmp_path, "llama", True)
    assert export.main(["--workdir", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "holds no checkpoint of grpo or sft" in capsys.readouterr().err
    make_run(tmp_path, "llama", True, ("sft", 3))
    command = ["--workdir", str(tmp_path), "--out", str(tmp_path / "out"), "--step", "9"]
    assert export.main(command) == 1
    assert "no checkpoint of step 9" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_transformers_would_read_otherwise_is_refused(tmp_path, capsys):
    make_run(tmp_path, "qwen2", True, ("sft", 1))  # transformers cuts Qwen2 text its own way
    assert export.main(["--workdir", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "differ from those the model was trained on" in capsys.readouterr().err


def test_the_command_explains_itself(capsys):
    with pytest.raises(SystemExit) as done:
        export.main(["--help"])
    assert done.value.code == 0
    assert "python -m gtalign_jax.export --workdir=runs/demo --out=DIR" in capsys.readouterr().out


@pytest.mark.parametrize("given,expected", [
    (None, {"eos_token_id": [2], "pad_token_id": 0}),  # the tokenizer's own
    ({"eos_token_id": 2, "top_k": 20}, {"eos_token_id": 2, "top_k": 20}),
    ({"eos_token_id": 7, "pad_token_id": 7}, {"eos_token_id": [2, 7], "pad_token_id": 7}),
    ({"top_k": 20}, {"pad_token_id": 0, "top_k": 20, "eos_token_id": [2]}),
])
def test_generation_stops_where_sampling_stopped_and_keeps_the_models_settings(
    tmp_path, given, expected
):
    tokenizer, file = train_tokenizer([], 300), tmp_path / "generation_config.json"
    if given is not None:
        file.write_text(json.dumps(given))
    export._write_generation_config(file, tokenizer)
    assert json.loads(file.read_text()) == expected
