"""TRL's GRPOTrainer at work: rollout, update and whole iterations of one `train()`.

    /tmp/peers/trl/bin/python -m benchmarks.peers.trl_grpo [--size=small] [--part=update]

One line of JSON. The trainer's own methods are timed where it calls them: the rollout is
tokenising, generation and detokenising, and the update all of an iteration but that and the
reward, which is next to nothing: reference log-probabilities, policy, AdamW.
"""

import sys
import tempfile

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.peers import shapes
from benchmarks.peers.huggingface import make_model


class TimedTrainer(GRPOTrainer):
    """Tells a clock when it generates and when it scores."""

    clock: shapes.Clock

    def _generate(self, *args, **kwargs):
        with self.clock.phase("rollout"):
            return super()._generate(*args, **kwargs)

    def _calculate_rewards(self, *args, **kwargs):
        with self.clock.phase("reward"):
            return super()._calculate_rewards(*args, **kwargs)


class Iterations(TrainerCallback):
    """Tells a clock where iterations begin and end."""

    def __init__(self, clock: shapes.Clock):
        self.clock = clock

    def on_train_begin(self, args, state, control, **kwargs):
        self.clock.start()

    def on_step_end(self, args, state, control, **kwargs):
        self.clock.end()


def make_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """A token is the word of its id; "<end>" pads and ends, and is no token of the model."""
    words = {str(token): token for token in range(vocab)} | {"<end>": vocab}
    tokenizer = Tokenizer(models.WordLevel(words))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>",
                                   pad_token="<end>", padding_side="left")


def make_config(args, micro: int, folder: str) -> GRPOConfig:
    """Float32 without recomputation; the batch is accumulated from micro-batches."""
    return GRPOConfig(
        output_dir=folder, seed=args.seed, bf16=False, activation_checkpointing=False,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=args.prompts * args.samples // micro,
        num_generations=args.samples, max_completion_length=args.new_tokens,
        max_steps=args.warmup + args.repeats, beta=shapes.BETA, temperature=1.0,
        learning_rate=shapes.LEARNING_RATE, lr_scheduler_type="constant", shuffle_dataset=False,
        dataloader_pin_memory=False, logging_strategy="no", save_strategy="no", report_to="none",
        disable_tqdm=True)


def make_trainer(args, micro: int, folder: str, clock: shapes.Clock) -> TimedTrainer:
    size = shapes.SIZES[args.size]
    make_model(size, args.prompt_len + args.new_tokens, args.seed).save_pretrained(folder)
    # From a folder, because TRL reads its reference model from where the policy came from.
    model = Qwen2ForCausalLM.from_pretrained(folder)
    texts = [shapes.to_text(ids) for ids in shapes.prompts_of(args)]

    def rewards(completion_ids, **_):
        return [shapes.reward(ids, args.new_tokens) for ids in completion_ids]

    trainer = TimedTrainer(
        model, rewards, make_config(args, micro, folder),
        train_dataset=Dataset.from_dict({"prompt": texts * (args.warmup + args.repeats)}),
        processing_class=make_tokenizer(size.vocab), callbacks=[Iterations(clock)])
    trainer.clock = clock
    return trainer


def main(argv=None) -> int:
    parser = shapes.make_parser(__doc__)
    shapes.add_micro(parser)
    args = shapes.parse_peer(parser, argv, shapes.PARTS)
    micro = shapes.micro_of(parser, args)
    clock = shapes.Clock()
    with shapes.quiet(), tempfile.TemporaryDirectory() as folder:
        make_trainer(args, micro, folder, clock).train()
    clock.report("trl", args, micro=micro)
    return 0


if __name__ == "__main__":
    sys.exit(main())
