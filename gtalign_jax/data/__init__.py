"""Prompts: where they come from, how they become tokens, and which batch holds which of them."""
