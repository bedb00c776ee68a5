"""Measured launches; written by `python -m benchmarks.tune`."""

TUNED: dict[tuple[str, int, int, int], tuple[int, int]] = {}
"""(device, N, K, blocks of 8 rows of x) -> (warps, stages)."""
