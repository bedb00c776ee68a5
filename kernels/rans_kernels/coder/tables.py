"""Frequency tables: 256 integers that add up to 2 ** probability_bits, shared by the tiles of a layer."""

import heapq

import numpy as np
from numpy.typing import NDArray


def normalise_frequencies(counts: NDArray[np.int64], probability_bits: int) -> NDArray[np.int16]:
    """Frequencies of the shortest code among those that give every symbol that occurs at least 1.

    Starts from the rounded shares and moves single slots, always the one that costs least: a slot more for symbol s
    saves counts[s] * log2((f + 1) / f) bits, one fewer costs counts[s] * log2(f / (f - 1)).

    Args:
        counts: occurrences of each symbol, [256]; all zero gives symbol 0 every slot.
        probability_bits: 10 to 12.

    Returns:
        int16 [256].
    """
    slots = 1 << probability_bits
    total = int(counts.sum())
    if total == 0:
        counts, total = np.eye(1, 256, dtype=np.int64)[0], 1
    freqs = np.where(counts > 0, np.maximum(np.rint(counts * (slots / total)), 1), 0).astype(np.int64)
    step = 1 if freqs.sum() < slots else -1

    def cost(symbol: int) -> float:
        f = freqs[symbol]
        # log2(f / (f - 1)) for a slot fewer, minus log2((f + 1) / f) for one more
        return float("inf") if f + step < 1 else -counts[symbol] * np.log2((f + step) / f)

    heap = [(cost(s), s) for s in np.flatnonzero(counts).tolist()]
    heapq.heapify(heap)
    for _ in range(abs(slots - int(freqs.sum()))):
        _, symbol = heapq.heappop(heap)
        freqs[symbol] += step
        heapq.heappush(heap, (cost(symbol), symbol))
    return freqs.astype(np.int16)


def cumulative(freqs: NDArray[np.integer]) -> NDArray[np.int64]:
    """First slot of every symbol, and the end: [257]."""
    return np.concatenate([[0], np.cumsum(freqs, dtype=np.int64)])


def entropy(counts: NDArray[np.integer]) -> float:
    """Empirical entropy of a histogram, in bits a symbol; 0 for an empty one."""
    p = counts[counts > 0] / max(1, counts.sum())
    return float(-(p * np.log2(p)).sum()) if len(p) else 0.0


def byte_histogram(values: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Occurrences of every byte: [256]."""
    values = values.reshape(-1)
    # in pairs, which halves the work; bincount makes an int64 copy: keep it small
    pairs, counts = values[: values.size // 2 * 2].view(np.uint16), np.zeros(1 << 16, np.int64)
    for block in np.array_split(pairs, max(1, pairs.size >> 20)):
        counts += np.bincount(block, minlength=1 << 16)
    square = counts.reshape(256, 256)
    return square.sum(0) + square.sum(1) + np.bincount(values[pairs.size * 2 :], minlength=256)


def weight_histogram(weights: NDArray[np.int8]) -> NDArray[np.int64]:
    """Occurrences of every integer from -128 to 127: [256]."""
    return np.roll(byte_histogram(weights.reshape(-1).view(np.uint8)), 128)


def high_bytes(bits: NDArray[np.integer]) -> NDArray[np.uint8]:
    """The high byte of every 16-bit float: uint8 [N, K]."""
    return np.ascontiguousarray(np.ascontiguousarray(bits).view(np.uint8).reshape(*bits.shape, 2)[..., 1])
