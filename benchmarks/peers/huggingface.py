"""Hugging Face's `generate` as a rollout: every prompt `samples` times, at temperature 1.

    /tmp/peers/trl/bin/python -m benchmarks.peers.huggingface [--size=small] [--compile]

One line of JSON. --compile decodes with torch.compile and a static cache, which takes a C++
compiler and, the first time, a minute.
"""

import sys
import time

import torch
from transformers import CompileConfig, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from benchmarks.peers import shapes


def make_model(size: shapes.Size, max_length: int, seed: int) -> Qwen2ForCausalLM:
    """Random weights in float32."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=size.vocab, hidden_size=size.d_model, intermediate_size=size.d_ff,
        num_hidden_layers=size.layers, num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads, head_dim=size.head_dim, tie_word_embeddings=True,
        max_position_embeddings=max_length, initializer_range=shapes.DEVIATION,
        bos_token_id=None, eos_token_id=None, dtype=torch.float32)
    return Qwen2ForCausalLM(config)


def make_generation(args, end: int) -> GenerationConfig:
    """Plain sampling; `end` is an id that the model cannot draw."""
    config = GenerationConfig(
        max_new_tokens=args.new_tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        eos_token_id=end, pad_token_id=end, disable_compile=not args.compile,
        cache_implementation="static" if args.compile else None)
    if args.compile:
        config.compile_config = CompileConfig(mode="default")
        # Without it, transformers compiles on accelerators only.
        config.compile_config._compile_all_devices = True
    return config


def main(argv=None) -> int:
    parser = shapes.make_parser(__doc__)
    parser.add_argument("--compile", action="store_true", help="torch.compile the decoding")
    args = shapes.parse_peer(parser, argv, ("rollout",))
    size = shapes.SIZES[args.size]
    seconds = []
    with shapes.quiet(), torch.no_grad():
        model = make_model(size, args.prompt_len + args.new_tokens, args.seed).eval()
        rows = torch.tensor(shapes.prompts_of(args)).repeat_interleave(args.samples, 0)
        generation = make_generation(args, end=size.vocab)
        for _ in range(args.warmup + args.repeats):
            began = time.perf_counter()
            found = model.generate(rows, attention_mask=torch.ones_like(rows),
                                   generation_config=generation)
            completions = found[:, args.prompt_len:].tolist()
            seconds.append(time.perf_counter() - began)
            for completion in completions:
                shapes.reward(completion, args.new_tokens)
        if args.compile and not hasattr(model, "_compiled_call"):
            raise RuntimeError("transformers did not compile the decoding")
    shapes.report("huggingface", args, seconds[args.warmup:], compile=args.compile)
    return 0


if __name__ == "__main__":
    sys.exit(main())
