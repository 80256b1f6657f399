"""Benchmarks: how fast a training step and its operations are, beside plain PyTorch. `python -m benchmarks --help`."""
