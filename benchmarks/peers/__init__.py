"""What users would pick instead: Hugging Face, TRL and Tunix, on the shapes of our benchmarks."""
