"""A judge on the run's own devices: taught ones that grade, random ones that babble, bad ones."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pods
import pytest
import runs

from gtalign_jax import judging
from gtalign_jax.data.chat import decode, encode_chats, encode_completion, load_tokenizer
from gtalign_jax.data.sources import DataConfig, load_prompts
from gtalign_jax.data.tokenizer import CHAT_TEMPLATE, train_tokenizer
from gtalign_jax.model import forward, hf
from gtalign_jax.model.sharding import (
    ROLLOUT,
    TRAIN,
    Layout,
    MeshConfig,
    make_mesh,
    param_shardings,
)
from gtalign_jax.model.spec import ModelConfig, init_params
from gtalign_jax.reward import preflight, prompts
from gtalign_jax.reward.judge_config import JudgeConfig
from gtalign_jax.reward.judges import JudgeError, JudgeRequest
from gtalign_jax.reward.store import JudgementStore, remembering
from gtalign_jax.reward.tasks import TASKS
from gtalign_jax.rollout.state import Rollout
from gtalign_jax.training import model_judge, sft
from gtalign_jax.training.model_judge import make
from gtalign_jax.training.sft import ExampleSet, SFTConfig
from gtalign_jax.training.state import make_optimizer, make_state

STEPS = 80
GRADES = {"builtin-arithmetic": 0.25, "builtin-ambiguity": 1.0, "builtin-safety": 0.5,
          "builtin-writing": 3.0}
CONFIG = JudgeConfig(kind="jax", model="(a directory)", prompt_tokens=448, max_tokens=16,
                     batch_size=8)


def requests(split: str, count: int) -> list[JudgeRequest]:
    """Of the built-in tasks in turn; every fifth asks about consistency."""
    data = DataConfig(source="builtin", train_size=count, test_size=count)
    return [
        JudgeRequest("consistency", p.data_source, p.question, p.ground_truth, "It is so.",
                     f"VQ_CQ is best for: {p.question}", ("VQ_CQ", "DQ_DA"))
        if i % 5 == 4 else
        JudgeRequest("quality", p.data_source, p.question, p.ground_truth, "It is so.")
        for i, p in enumerate(load_prompts(data, split))
    ]


def grade(request: JudgeRequest) -> float:
    """What the taught judge gives: a grade of the request's own scale."""
    return 0.0 if request.kind == "consistency" else GRADES[request.data_source]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What the models below lie in, and their tokenizer."""
    made = tmp_path_factory.mktemp("judges")
    texts = ["\n".join(m["content"] for m in prompts.messages(r)) for r in requests("train", 200)]
    train_tokenizer([*texts, "So be it.\n<verdict></verdict>"] * 2, 1600, made / "tokenizer",
                    chain_pieces=False)
    return made


def sizes(folder: Path, **changed) -> ModelConfig:
    tokens = len(load_tokenizer(folder / "tokenizer"))
    return ModelConfig(**{
        "family": "llama", "vocab_size": tokens, "d_model": 32, "d_ff": 64, "num_layers": 1,
        "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "max_position": 1024, "init_scale": 0.4,
        **changed})


def teach(folder: Path, cfg: ModelConfig) -> str:
    """A cold start by the project's own code, on the judge's prompts; where the model lies."""
    tokenizer = load_tokenizer(folder / "tokenizer")
    golden = preflight.golden([TASKS[name] for name in GRADES], consistency=False)
    examples = requests("train", 200) + 10 * golden
    asked = encode_chats(tokenizer, map(prompts.messages, examples))
    answers = [[*encode_completion(tokenizer, f"So be it.\n<verdict>{grade(r):g}</verdict>"),
                tokenizer.eos_token_id] for r in examples]
    rows = ExampleSet(asked, answers, max(map(len, asked)), max(map(len, answers)))
    settings = SFTConfig(steps=STEPS, learning_rate=2e-2, batch_size=8, decay="cosine")
    optimizer = make_optimizer(settings, STEPS)
    where = Layout(make_mesh(MeshConfig(), jax.devices()[:1]), TRAIN)
    params = jax.device_put(init_params(cfg, jax.random.key(0)), param_shardings(cfg, where))
    state = make_state(params, cfg, optimizer, where)
    update = sft.make_update(cfg, settings, optimizer, layout=where)
    for step in range(STEPS):
        batch = rows.batch(step, batch_size=8, seed=0)
        state, _ = update(state, jax.device_put(batch, where.sharding("prompts")))
    hf.save_pretrained(state.params, cfg, folder / "grader", tokenizer_dir=folder / "tokenizer")
    return str(folder / "grader")


@pytest.fixture(scope="module")
def babbler(folder) -> str:
    """A Llama with random weights."""
    hf.save_pretrained(init_params(sizes(folder), jax.random.key(1)), sizes(folder),
                       folder / "babbler", tokenizer_dir=folder / "tokenizer")
    return str(folder / "babbler")


@pytest.fixture(scope="module")
def grader(folder) -> str:
    """A Qwen3 that was taught to grade."""
    return teach(folder, sizes(folder, family="qwen3", qk_norm=True, init_scale=0.1))


def layout(**sizes: int) -> Layout:
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    return Layout(make_mesh(MeshConfig(**sizes), devices), ROLLOUT)


def judge_of(directory: str, where: Layout, **changed):
    return make(dataclasses.replace(CONFIG, model=directory, **changed), where, jnp.float32)


@pytest.fixture(scope="module")
def eight(grader):
    """The taught judge over eight devices, its weights cut in two."""
    return judge_of(grader, layout(data=2, fsdp=2, tensor=2))


@pytest.mark.slow
def test_a_taught_model_judges_the_built_in_tasks_over_eight_devices(eight):
    asked, heard = requests("test", 20), {}
    found = eight(asked, heard.__setitem__)
    assert [judgement.score for judgement in found] == [grade(request) for request in asked]
    assert {judgement.reply for judgement in found} >= {"So be it.\n<verdict>3</verdict>"}
    assert [heard[i] for i in range(20)] == found
    assert all(judgement.attempts == 1 and judgement.seconds > 0 for judgement in found)
    q_LDNH = eight.params.layers.q_LDNH
    assert q_LDNH.sharding == eight.layout.sharding(None, None, "heads", None)
    assert [shard.data.shape for shard in q_LDNH.addressable_shards] == [(1, 32, 2, 8)] * 8


@pytest.mark.slow
def test_what_cannot_be_judged_is_missing_with_its_cause_and_the_rest_is_not(eight, monkeypatch):
    """One call for each cause: the programs are those of the other tests, nothing recompiles."""
    short, *_, other = requests("test", 20)
    long, longer = (dataclasses.replace(short, response="word " * n) for n in (600, 100_000))
    heard = {}
    found = eight([long, short, longer], heard.__setitem__)
    assert [heard[i] for i in range(3)] == found
    for judgement, why in ((found[0], "judge.prompt_tokens=448"), (found[2], "32000")):
        assert (judgement.score, judgement.cause) == (None, "too_long") and why in judgement.error
    assert found[1].score == grade(short)

    hasty = dataclasses.replace(eight, config=dataclasses.replace(eight.config, max_tokens=3))
    cut, = hasty([short])
    assert (cut.score, cut.cause) == (None, "truncated")
    assert cut.reply and found[1].reply.startswith(cut.reply) and "judge.max_tokens=3" in cut.error

    for said, cause in (("<grade>", "unparsable"), ("<verdict>7", "off_scale")):
        with monkeypatch.context() as patch:
            patch.setattr(model_judge, "decode", lambda tokenizer, ids, said=said: decode(
                tokenizer, ids).replace("<verdict>", said, 1))
            bad, = eight([other])
        assert (bad.score, bad.cause) == (None, cause), bad


def plain(folder: Path, judge, request: JudgeRequest) -> str:
    """The reply by the plain forward pass, one token at a time, the whole row anew each time."""
    cfg, (ids,) = sizes(folder), encode_chats(judge.tokenizer, [prompts.messages(request)])
    params, begun = hf.load_params(judge.config.model, cfg), len(ids)
    for _ in range(judge.config.max_tokens):
        row = np.zeros((1, 640), np.int32)
        row[0, : len(ids)] = ids
        logits = _logits(params, cfg, row, np.array([len(ids)]))
        ids.append(int(logits[0, len(ids) - 1].argmax()))
        if ids[-1] == judge.tokenizer.eos_token_id:
            break
    return decode(judge.tokenizer, ids[begun:])


_logits = jax.jit(forward.full_logits, static_argnums=1)


@pytest.mark.slow
def test_replies_are_those_of_a_plain_greedy_loop_on_any_devices_in_any_order(folder, babbler):
    """A random model's words hang on every position: a cache or a prefix that is a token off, or
    a row that is mixed up, changes them."""
    asked = requests("test", 12)
    over_eight = judge_of(babbler, layout(data=4, fsdp=1, tensor=2))
    assert over_eight.prefix, "the instruction is computed once"
    replies = [judgement.reply for judgement in over_eight(asked)]
    assert len(set(replies)) > 6
    for i in (0, 4, 11):
        assert replies[i] == plain(folder, over_eight, asked[i])
    on_one = judge_of(babbler, layout(data=1, fsdp=1, tensor=1), batch_size=5)
    assert [judgement.reply for judgement in on_one(asked[::-1])] == replies[::-1]
    # Without the common prefix the words are the same.
    whole = dataclasses.replace(on_one, prefix=(-1,))
    assert [judgement.reply for judgement in whole(asked[:5])] == replies[:5]


@pytest.mark.slow
def test_what_is_drawn_hangs_on_the_request_not_on_its_company(folder, babbler):
    judge = judge_of(babbler, layout(data=1, fsdp=1, tensor=1), batch_size=5,
                     temperature=1.0)
    asked = requests("test", 7)
    replies = [judgement.reply for judgement in judge(asked)]
    assert [judgement.reply for judgement in judge(asked[::-3])] == replies[::-3]
    assert replies[0] != plain(folder, judge, asked[0])
    assert len(set(replies)) == 7


# ---- what happens on the host: with a sampler that says the same to all -------------------------


class Parrot:
    """In place of a sampler: writes its rows down, and says one thing."""

    def __init__(self, tokenizer, said: str):
        self.ids = [*encode_completion(tokenizer, said), tokenizer.eos_token_id]
        self.rows: list[tuple[int, ...]] = []
        self.shapes: list[tuple[int, ...]] = []
        self.limits: list[list[int]] = []

    def __call__(self, params, tokens_QS, lengths_Q, index_Q, key, limit_QG):
        del params, index_Q, key
        Q, n = len(lengths_Q), len(self.ids)
        self.shapes.append(tokens_QS.shape)
        self.limits.append(np.asarray(limit_QG)[:, 0].tolist())
        self.rows += [tuple(np.asarray(row)[:length].tolist())
                      for row, length in zip(tokens_QS, lengths_Q, strict=True)]
        return Rollout(jnp.tile(jnp.array(self.ids)[None, None], (Q, 1, 1)), jnp.zeros((Q, 1, n)),
                       jnp.full((Q, 1), n), jnp.ones((Q, 1), bool), jnp.zeros((), int))


@pytest.fixture
def parroting(babbler):
    """(judge, its sampler), for changed settings."""
    def one(**changed):
        judge = judge_of(babbler, layout(data=2, fsdp=1, tensor=1), **changed)
        parrot = Parrot(judge.tokenizer, "<verdict>1</verdict>")
        return dataclasses.replace(judge, sample=parrot, sample_any=parrot), parrot

    return one


def test_equal_requests_are_judged_once_and_batches_have_few_shapes(parroting):
    judge, parrot = parroting()
    asked = [r for r in requests("test", 20) if r.kind == "quality"]
    short = [dataclasses.replace(asked[0], response="yes " * n) for n in (1, 20, 40)]
    asked = [*asked, *short, asked[0], asked[3]]
    found = judge(asked)
    assert [judgement.score for judgement in found] == [1.0] * len(asked)
    real = [row for limits, at in zip(parrot.limits, range(0, 99, 8), strict=False)
            for row, limit in zip(parrot.rows[at : at + 8], limits, strict=True) if limit == 16]
    assert len(real) == len(set(real)) == len(asked) - 2
    # 19 rows in batches of eight; the last is filled up with rows that end after a token.
    assert [limits.count(1) for limits in parrot.limits] == [0, 0, 5]
    assert {shape[0] for shape in parrot.shapes} == {8}
    assert judge.widths == (64, 112, 224, 448)
    assert {shape[1] for shape in parrot.shapes} <= set(judge.widths)
    assert judge([]) == [] and len(parrot.shapes) == 3


def test_thinking_is_switched_in_the_template(parroting):
    template = CHAT_TEMPLATE + "{% if not enable_thinking %}<think></think>{% endif %}"
    for thinking in ("on", "off"):
        judge, parrot = parroting(thinking=thinking)
        judge.tokenizer.chat_template = template
        judge(requests("test", 1))
        shown = decode(judge.tokenizer, parrot.rows[0])
        assert shown.endswith("<think></think>") == (thinking == "off")


def test_prompts_that_begin_otherwise_are_not_given_the_common_prefix(parroting):
    """A template that writes the date begins otherwise after midnight."""
    judge, parrot = parroting()
    other = Parrot(judge.tokenizer, "<verdict>0</verdict>")
    judge = dataclasses.replace(judge, sample_any=other)
    request = requests("test", 1)[0]
    assert judge([request])[0].score == 1.0 and not other.rows
    judge.tokenizer.chat_template = "Tuesday. " + CHAT_TEMPLATE
    assert judge([request])[0].score == 0.0 and len(parrot.shapes) == 1


def test_a_store_keeps_what_the_judge_tells_and_asks_it_no_more(parroting, tmp_path):
    judge, parrot = parroting()
    ask = remembering(judge.config, JudgementStore(tmp_path), judge)
    asked = requests("test", 6)
    assert [judgement.score for judgement in ask(asked)] == [1.0] * 6
    rows = len(parrot.shapes)
    again = remembering(judge.config, JudgementStore(tmp_path), judge)(asked)
    assert [judgement.stored for judgement in again] == [True] * 6 and len(parrot.shapes) == rows


# ---- what is refused before anything is compiled ------------------------------------------------


@pytest.mark.parametrize("changed, message", [
    ({"batch_size": 6}, "judge.batch_size=6 must be a multiple of 4.*: for example 4 or 8"),
    ({"batch_size": 3}, "judge.batch_size=3 .*for example 4$"),
    ({"top_p": 0.0}, "judge.top_p=0.0.*> 0"),
    ({"reasoning_effort": "high"}, "judge.reasoning_effort='high'.*judge.thinking"),
    ({"extra_body": '{"seed": 1}'}, "judge.extra_body=.*chat_template_kwargs alone, not seed"),
    ({"prompt_tokens": 200}, "judge.prompt_tokens=200: the rubric alone takes up to 2.. tokens"),
    ({"max_tokens": 600}, "prompt_tokens=448 . judge.max_tokens=600 may be at most 1024"),
    ({"model": "/no/such"}, "judge.model='/no/such': there is no such directory; allowed"),
])
def test_settings_that_cannot_work_are_named_with_what_is_allowed(babbler, changed, message):
    with pytest.raises(ValueError, match=message):
        judge_of(**{"directory": changed.pop("model", babbler),
                    "where": layout(data=4, fsdp=1, tensor=2)}, **changed)


def test_a_mesh_that_does_not_divide_the_judge_is_named(babbler):
    with pytest.raises(ValueError, match="judge.model=.*mesh.tensor=4 does not divide.*num_kv"):
        judge_of(babbler, layout(data=1, fsdp=1, tensor=4))


SYSTEMLESS = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"


@pytest.mark.parametrize("change, message", [
    ({"chat_template": None}, "has no chat template"),
    ({"chat_template": "{{ messages[-1]['content'] }}"}, "leaves out a part of a prompt"),
    ({"chat_template": SYSTEMLESS}, "takes no system and user message: .* no system"),
    ({"chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
      "eos_token": None}, "no EOS token"),
    ({"more": 40}, "its tokenizer has .* the model knows"),
    ({"gone": "config.json"}, "has no config.json; allowed: a local directory"),
    ({"gone": "tokenizer.json"}, "judge.model="),
    ({"gone": "model.safetensors"}, "judge.model=.*safetensors"),
])
def test_a_directory_that_cannot_judge_is_named_with_the_reason(babbler, tmp_path, change, message):
    directory = shutil.copytree(babbler, tmp_path / "judge")
    tokenizer = load_tokenizer(directory)
    if "gone" in change:
        (directory / change["gone"]).unlink()
    else:
        for name in ("chat_template", "eos_token"):
            setattr(tokenizer, name, change.get(name, getattr(tokenizer, name)))
        tokenizer.add_tokens([f"word{i}" for i in range(change.get("more", 0))])
        shutil.rmtree(directory)
        shutil.copytree(babbler, directory)
        (directory / "chat_template.jinja").unlink()
        tokenizer.save_pretrained(directory)
    with pytest.raises(ValueError, match=message):
        judge_of(str(directory), layout(data=1, fsdp=1, tensor=1))


# ---- several processes --------------------------------------------------------------------------

CHILD = """
import json, sys
sys.path.insert(0, {tests!r})
import test_model_judge as test
from gtalign_jax.model.sharding import ROLLOUT, Layout, MeshConfig, make_mesh
from gtalign_jax.pod import exchange
from gtalign_jax.pod.start import PodConfig, start
from gtalign_jax.training.model_judge import ModelJudge

start(PodConfig(start_s=60))
judged = []

class Noting(ModelJudge):
    def _batches(self, own):
        batches = super()._batches(own)
        judged.append(sum(map(len, batches)))
        return batches

where = Layout(make_mesh(MeshConfig(data=2, fsdp=1)), ROLLOUT)
judge = Noting(**vars(test.judge_of({directory!r}, where)))
asked, first = test.requests("test", 12), exchange.is_first()
mine = (asked[:9] if first else asked[8:], [] if first else asked[2:4], [])
replies = [[judgement.reply for judgement in judge(part)] for part in mine]
print("found", json.dumps([replies, judged]))
"""


@pytest.mark.slow
def test_processes_with_unequal_numbers_of_requests_share_the_work_and_get_their_own(babbler):
    script = CHILD.format(tests=str(pods.ROOT / "tests"), directory=babbler)
    results = pods.ended(pods.spawn(script, 2), within=120)
    assert [result.status for result in results] == [0, 0], results
    told = [json.loads(result.text.rpartition("found ")[2]) for result in results]
    alone = judge_of(babbler, layout(data=1, fsdp=1, tensor=1))
    replies = [judgement.reply for judgement in alone(requests("test", 12))]
    assert [found for found, _ in told] == [
        [replies[:9], [], []], [replies[8:], replies[2:4], []]]
    assert [judged for _, judged in told] == [[12, 2, 0]] * 2  # request 8, of both, is judged once


def opened(folder: Path, directory: str, **changed):
    """The judge of a run in `folder`, over eight devices."""
    settings = {"judge__kind": "jax", "judge__rules": False, "judge__model": directory,
                "judge__prompt_tokens": 448, "judge__max_tokens": 16, "judge__batch_size": 8}
    sources = tuple(GRADES)
    return judging.open_judge(runs.config(folder, **settings | changed), sources,
                              layout(data=2, fsdp=2, tensor=2), jnp.float32)


@pytest.mark.slow
def test_a_run_tries_its_judge_asks_it_and_can_be_scored_again_without_it(grader, tmp_path):
    asked = requests("test", 10)
    assert [j.score for j in opened(tmp_path, grader)(asked)] == [grade(r) for r in asked]
    again = opened(tmp_path, "no such directory", judge__mode="replay")
    assert {j.cause for j in again(asked)} == {"not_stored"}  # another judge's grades
    again = opened(tmp_path, grader, judge__mode="replay")
    assert all(j.stored and j.score == grade(r) for j, r in zip(again(asked), asked, strict=True))


@pytest.mark.slow
def test_a_model_that_babbles_is_found_out_before_the_run(babbler, tmp_path):
    with pytest.raises(JudgeError, match=r"golden sample of 'builtin-\w+' got no grade"):
        opened(tmp_path, babbler)
