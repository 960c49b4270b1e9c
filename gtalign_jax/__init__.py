"""gtalign_jax: game-theoretic alignment of language models, in JAX, on TPU pods.

The map (imports point down this list, never up):

    main, serve, steer, …   commands
    serving                 OpenAI's protocol, the game and the page over HTTP
    config                  one frozen Config, made of each part's own dataclass
    evaluation              held-out prompts -> welfare, format, action tables
    training                state, SFT, GRPO, the loop, checkpoints, metrics
    rollout                 prompts_QS -> completions_QGT, on device
    reward                  text -> factors -> mutual welfare
    data                    prompts, tokenizer, batches, built-in tasks
    game, model             the paper's mathematics; the transformer. Neither imports ours.

The only legend of dimension letters. Arrays in jitted code end in theirs (`logits_BTV`):

    B rows (= Q*G)        Q prompts             G samples per prompt    T completion time
    S prompt/cache time   V vocabulary          L layers                D model width
    F feed-forward width  N query heads         K key/value heads       R = N / K
    H head size           U user actions (VQ, DQ)                       A LLM actions (DA, CQ, AQ)
    P players (LLM, user)                       C reward factors

Inside the model, rollout and update, where nobody plays or scores:

    P prefix that all prompts share             C keys attended to, or positions of a cache
    W positions of a group, or of a bin         M rows of a matrix: whatever else is joined
    X batch shards        N bins of one shard   m groups in one bin
"""

import os

# transformers would say with each command that it misses PyTorch; its tokenizers are all we use.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

__version__ = "0.1.0"
