"""decode(encode(q)) == q, by the compiled decoder and by the reference, for every split, shape and distribution."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rans_kernels.coder import EncodedTensor, decode_tiles, encode_tiles
from rans_kernels.coder.reference import decode_reference
from rans_kernels.format import SPLITS, FormatError, Split, TileLayout


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
UNITS = (1, 2, 5, 16, 10**12)


def decoded(e: EncodedTensor, decode=decode_tiles, **options) -> np.ndarray:
    return decode(e.layout, e.heads, e.words, e.offsets, e.freqs, **options)


@settings(max_examples=150, deadline=None)
@given(
    st.tuples(st.integers(0, 70), st.integers(0, 700)),
    st.sampled_from((1, 2, 7)),
    st.sampled_from(SPLITS),
    st.sampled_from(UNITS),
    st.sampled_from((10, 11, 12)),
    st.sampled_from(KINDS),
    st.integers(0, 2**32 - 1),
)
def test_compiled_decoder_inverts_encoder(coded_shape, fold, split, units, probability_bits, kind, seed):
    # a matrix without rows is not folded
    fold = fold if coded_shape[0] else 1
    shape = fold * coded_shape[0], coded_shape[1]
    layout = TileLayout(shape, split, units, probability_bits, fold=fold)
    w = weights_of(kind, shape, split, seed)
    e = encode_tiles(w, layout, workers=1)
    layout.check(len(e.heads), len(e.words), e.offsets, e.freqs)
    assert np.array_equal(decoded(e, workers=1), w)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (1, 1), (1, 63), (63, 257), (257, 63), (257, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_odd_shapes_survive_both_decoders(shape, kind):
    w = weights_of(kind, shape, Split(8, 0), 9)
    e = encode_tiles(w, TileLayout(shape, Split(8, 0), 2))
    assert np.array_equal(decoded(e), w)
    assert np.array_equal(decoded(e, decode_reference), w)


@pytest.mark.parametrize(
    ("shape", "fold"), [((16, 65), 2), ((64, 257), 8), ((16, 1), 16), ((34, 100), 1), ((9, 63), 3)]
)
@pytest.mark.parametrize("kind", ["uniform", "one", "peaked"])
@pytest.mark.parametrize("split", [Split(8, 0), Split(4, 2), Split(2, 3), Split(1, 4)], ids=str)
def test_a_folded_weight_is_coded_as_its_reshape_and_survives_both_decoders(shape, fold, kind, split):
    w = weights_of(kind, shape, split, 3)
    coded = w.reshape(shape[0] // fold, -1)
    e = encode_tiles(w, TileLayout(shape, split, 3, fold=fold))
    plain = encode_tiles(coded, TileLayout(coded.shape, split, 3))
    for name in ("heads", "words", "offsets", "freqs"):
        assert np.array_equal(getattr(e, name), getattr(plain, name))
    assert np.array_equal(decoded(e), w)
    assert np.array_equal(decoded(e, decode_reference), w)
    # whatever the order in memory
    f = encode_tiles(np.asfortranarray(w), e.layout)
    assert np.array_equal(f.heads, e.heads) and np.array_equal(f.words, e.words)


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_reference_decoder_inverts_encoder_for_every_split(split):
    for units, shape, kind in ((1, (63, 257), "uniform"), (2, (17, 160), "peaked"), (16, (1, 1), "all")):
        e = encode_tiles(weights_of(kind, shape, split, 7), TileLayout(shape, split, units, 11))
        assert np.array_equal(decoded(e, decode_reference), weights_of(kind, shape, split, 7))


def test_threads_do_not_change_what_is_stored():
    w = weights_of("peaked", (2100, 1030), Split(4, 4), 5)
    layout = TileLayout(w.shape, Split(4, 4))
    one, many = encode_tiles(w, layout, workers=1), encode_tiles(w, layout, workers=4)
    for name in ("heads", "words", "offsets", "freqs"):
        assert np.array_equal(getattr(one, name), getattr(many, name))
    assert np.array_equal(decoded(many, workers=4), w)


@pytest.mark.parametrize("split", [Split(8, 0), Split(4, 3), Split(1, 2)], ids=str)
def test_a_ragged_matrix_is_stored_as_if_zeros_stood_around_it(split):
    w = weights_of("uniform", (63, 257), split, 2)
    padded = np.pad(w, ((0, 1), (0, 63)))
    ragged, whole = (encode_tiles(m, TileLayout(m.shape, split, 2)) for m in (w, padded))
    for name in ("heads", "words", "offsets", "freqs"):
        assert np.array_equal(getattr(ragged, name), getattr(whole, name))


def test_a_tile_of_rare_symbols_takes_more_words_than_bytes():
    w = np.zeros((4096, 640), np.int8)
    w[:16] = 100
    w[16:32] = np.arange(16 * 640).reshape(16, 640) % 251 - 125
    e = encode_tiles(w, TileLayout(w.shape, Split(8, 0), 10, 12))
    assert np.diff(e.offsets)[1] * 16 > 16 * 640
    assert np.array_equal(decoded(e), w)
    one_rare = np.zeros((64 * 256, 64), np.int8)
    one_rare[-16:, :] = -128
    assert np.array_equal(decoded(encode_tiles(one_rare, TileLayout(one_rare.shape, Split(8, 0), 1))), one_rare)


def test_non_contiguous_weights_are_coded_by_value():
    w = weights_of("peaked", (100, 64), Split(8, 0), 1)
    layout = TileLayout((64, 100), Split(8, 0))
    assert np.array_equal(decoded(encode_tiles(w.T, layout)), w.T)


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
