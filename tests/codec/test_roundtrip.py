"""decode(encode(q)) == q, by the compiled decoder and by the reference, for every split, shape and distribution."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rans_kernels.coder import decode_tiles, encode_tiles
from rans_kernels.coder.reference import decode_reference
from rans_kernels.format import LANES, SPLITS, FormatError, Split, TileLayout


def weights_of(kind: str, shape: tuple[int, int], split: Split, seed: int) -> np.ndarray:
    """Weights within the split's range: uniform, one symbol, extreme skew, all symbols, peaked."""
    rng = np.random.default_rng(seed)
    low, high = split.low, -split.low - 1
    size = shape[0] * shape[1]
    if kind == "one":
        w = np.full(size, rng.integers(low, high + 1))
    elif kind == "skew":
        w = np.where(rng.random(size) < 1e-4, low, high)
    elif kind == "all":
        w = np.resize(np.arange(low, high + 1), size)
    elif kind == "peaked":
        w = np.clip(np.rint(rng.laplace(0, max(1, high / 8), size)), low, high)
    else:
        w = rng.integers(low, high + 1, size)
    return w.astype(np.int8).reshape(shape)


KINDS = ("uniform", "one", "skew", "all", "peaked")


@settings(max_examples=150, deadline=None)
@given(
    st.tuples(st.integers(0, 520), st.integers(0, 300)),
    st.sampled_from(SPLITS),
    st.sampled_from(LANES),
    st.sampled_from((10, 11, 12)),
    st.sampled_from(KINDS),
    st.integers(0, 2**32 - 1),
)
def test_compiled_decoder_inverts_encoder(shape, split, lanes, probability_bits, kind, seed):
    layout = TileLayout(shape, split, lanes, probability_bits)
    w = weights_of(kind, shape, split, seed)
    e = encode_tiles(w, layout, workers=1)
    assert np.array_equal(decode_tiles(layout, e.stream, e.offsets, e.freqs, workers=1), w)


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_reference_decoder_inverts_encoder_for_every_split(split):
    for lanes, shape, kind in ((1024, (63, 257), "uniform"), (64, (17, 40), "peaked"), (512, (1, 1), "all")):
        layout = TileLayout(shape, split, lanes, 11)
        w = weights_of(kind, shape, split, 7)
        e = encode_tiles(w, layout)
        assert np.array_equal(decode_reference(layout, e.stream, e.offsets, e.freqs), w)


@pytest.mark.parametrize("lanes", LANES)
def test_reference_decoder_inverts_encoder_for_every_lane_count(lanes):
    layout = TileLayout((70, 33), Split(4, 3), lanes)
    w = weights_of("peaked", (70, 33), Split(4, 3), 3)
    e = encode_tiles(w, layout)
    assert np.array_equal(decode_reference(layout, e.stream, e.offsets, e.freqs), w)


def test_threads_do_not_change_the_stream():
    w = weights_of("peaked", (2100, 1030), Split(8, 0), 5)
    layout = TileLayout(w.shape, Split(8, 0))
    one, many = encode_tiles(w, layout, workers=1), encode_tiles(w, layout, workers=4)
    assert np.array_equal(one.stream, many.stream)
    assert np.array_equal(one.offsets, many.offsets)


def test_units_outside_the_matrix_cost_nothing():
    split = Split(8, 0)
    rng = np.random.default_rng(0)
    full, ragged = ((256, 256), (512, 256)), ((256, 288), (512, 288))
    for a, b in zip(full, ragged, strict=True):
        small, large = rng.integers(-128, 128, a).astype(np.int8), rng.integers(-128, 128, b).astype(np.int8)
        bytes_small = encode_tiles(small, TileLayout(a, split)).nbytes
        bytes_large = encode_tiles(large, TileLayout(b, split)).nbytes
        extra = b[0] * b[1] - a[0] * a[1]
        # a byte of entropy a weight, and a little for the states and padding of the narrow tiles
        assert extra < bytes_large - bytes_small < 1.35 * extra


def test_non_contiguous_weights_are_coded_by_value():
    w = weights_of("peaked", (100, 64), Split(8, 0), 1)
    layout = TileLayout((64, 100), Split(8, 0))
    e = encode_tiles(w.T, layout)
    assert np.array_equal(decode_tiles(layout, e.stream, e.offsets, e.freqs), w.T)


@pytest.mark.parametrize("bad", [np.int16, np.uint8, np.float32])
def test_other_dtypes_are_refused(bad):
    with pytest.raises(FormatError, match="int8"):
        encode_tiles(np.zeros((4, 4), bad), TileLayout((4, 4), Split(8, 0)))


def test_weights_out_of_range_are_refused():
    with pytest.raises(FormatError, match="do not fit split c4r0"):
        encode_tiles(np.full((4, 4), 8, np.int8), TileLayout((4, 4), Split(4, 0)))


def test_other_shapes_are_refused():
    with pytest.raises(FormatError, match="shape"):
        encode_tiles(np.zeros((4, 5), np.int8), TileLayout((5, 4), Split(8, 0)))
