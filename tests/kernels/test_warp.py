"""The integer parts of the warp-level kernels, run as Python on numpy: they take tiles apart as the format says."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rans_kernels.coder import encode_tiles
from rans_kernels.format import SPLITS, TileLayout, lane_positions

pytest.importorskip("triton")
from rans_kernels.ops import warp  # noqa: E402
from rans_kernels.ops.table import warp_table  # noqa: E402

ONE = np.uint32(1)


@pytest.fixture(autouse=True)
def on_numpy(monkeypatch):
    """The kernels' functions call each other and Gluon: let them find plain functions and numpy."""
    monkeypatch.setattr(warp, "gl", SimpleNamespace(full_like=np.full_like, static_range=range))
    for name in ("place", "field", "piece", "raw_bits", "codes", "join_bytes"):
        monkeypatch.setattr(warp, name, getattr(warp, name).fn)
    monkeypatch.setattr(warp, "add_constant", lambda word, one, addend: word * one + np.uint32(addend))
    monkeypatch.setattr(warp, "permute", permute)


def permute(a, b, selector):
    """PRMT."""
    source = np.ascontiguousarray(np.stack([a, b], axis=-1)).view(np.uint8)
    chosen = source[..., [selector >> shift & 7 for shift in (0, 4, 8, 12)]]
    return np.ascontiguousarray(chosen).view(np.uint32)[..., 0]


def lane_words(plane, raw_bits):
    """The words of every lane, as `load_raw` gives them: groups of 4, 2 and 1, lane by lane."""
    words, first = [], 0
    for group in (4, 2, 1):
        if raw_bits & group:
            part = plane[32 * first : 32 * (first + group)].reshape(32, group)
            words += [part[:, v] for v in range(group)]
            first += group
    return tuple(words) if words else (np.zeros(32, np.uint32),)


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_weights_come_out_of_raw_and_coded_bits(split):
    w = np.random.default_rng(0).integers(split.low, -split.low, (16, 64)).astype(np.int8)
    encoded = encode_tiles(w, TileLayout(w.shape, split, 1))
    plane = lane_words(encoded.heads[1:].view(np.uint32).reshape(-1), split.raw_bits)
    row, column = np.moveaxis(lane_positions(), -1, 0)
    expected = w[row, column]
    coded = split.parts(expected)[0].astype(np.uint32)
    # the table puts the coded bits of C = 1 below the raw bits' top, others above them
    place = split.raw_bits - (split.coded_bits == 1)
    for j in range(8):
        four = coded[:, 4 * j : 4 * j + 4] << (place + 8 * np.arange(4, dtype=np.uint32))
        raw = warp.raw_bits(plane, j, split.raw_bits)
        u = warp.codes(four.sum(1, dtype=np.uint32), raw, ONE, split.coded_bits, split.raw_bits)
        found = np.ascontiguousarray(u).view(np.uint8).reshape(32, 4) + np.int16(split.low)
        assert np.array_equal(found, expected[:, 4 * j : 4 * j + 4])


@pytest.mark.parametrize("split", [s for s in SPLITS if warp.can_sign(s.coded_bits, s.raw_bits)], ids=str)
def test_weights_come_out_signed_with_the_table_s_own_bits(split):
    w = np.random.default_rng(0).integers(split.low, -split.low, (16, 64)).astype(np.int8)
    layout = TileLayout(w.shape, split, 1)
    encoded = encode_tiles(w, layout)
    plane = lane_words(encoded.heads[1:].view(np.uint32).reshape(-1), split.raw_bits)
    row, column = np.moveaxis(lane_positions(), -1, 0)
    expected = w[row, column]
    coded = split.parts(expected)[0]
    entries = warp_table(torch.from_numpy(encoded.freqs), layout)[:, 1].numpy().view(np.uint32)
    placed = np.zeros(256, np.uint32)
    placed[np.repeat(np.arange(256), encoded.freqs)] = entries
    mask = np.uint32((0x01010101 << split.raw_bits - 1) | 0x80808080)
    for j in range(8):
        symbol = np.packbits(coded[:, j // 2 * 8 : j // 2 * 8 + 8], axis=1, bitorder="little")[:, 0]
        pattern = placed[symbol]
        turned = pattern if j % 2 == 0 else pattern >> np.uint32(1) | pattern << np.uint32(31)
        raw = warp.raw_bits(plane, j, split.raw_bits)
        found = warp.codes(turned & mask, raw, ONE, split.coded_bits, split.raw_bits, False, True)
        assert np.array_equal(found.view(np.int8).reshape(32, 4), expected[:, 4 * j : 4 * j + 4])


@pytest.mark.parametrize("split", [split for split in SPLITS if split.coded_bits > 1], ids=str)
def test_floats_come_out_of_raw_coded_and_low_bits(split, float_case):
    layout, w = float_case((16, 64), split, 1)
    encoded = encode_tiles(w, layout)
    rows = encoded.heads[1:].view(np.uint32)
    plane, low = lane_words(rows[: split.raw_bits].reshape(-1), split.raw_bits), rows[split.raw_bits :].reshape(-1)
    # as `load_unit` gives them: two groups of four, lane by lane
    low = low.reshape(2, 32, 4).transpose(0, 2, 1).reshape(8, 32)
    row, column = np.moveaxis(lane_positions(), -1, 0)
    expected = w[row, column]
    coded = layout.float_codes()[expected >> 8] >> split.raw_bits
    # coded bits as the table places them, a symbol's weights in bytes 0 on
    freqs = torch.from_numpy(encoded.freqs)
    entries = warp_table(freqs, layout)[:, -1].numpy()
    placed = np.zeros(256, np.uint32)
    placed[np.repeat(np.arange(256), encoded.freqs)] = entries.view(np.uint32)
    if split.coded_bits == 8:
        placed &= 0xFF
    per = split.symbol_weights
    for j in range(8):
        four = np.zeros(32, np.uint32)
        for first in range(0, 4, per):
            symbol = sum(coded[:, 4 * j + first + b].astype(int) << b * split.coded_bits for b in range(per))
            four |= placed[symbol] << np.uint32(8 * first)
        raw = warp.raw_bits(plane, j, split.raw_bits, True)
        u = warp.codes(four, raw, ONE, split.coded_bits, split.raw_bits, True)
        pairs = np.stack(warp.join_bytes(u, low[j]), axis=-1)
        assert np.array_equal(np.ascontiguousarray(pairs).view(np.uint16), expected[:, 4 * j : 4 * j + 4])
