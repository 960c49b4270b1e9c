"""Training: the state, SFT and GRPO updates, the loop, checkpoints, metrics and their plots."""
