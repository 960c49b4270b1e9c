"""Sampling groups of completions, on device."""
