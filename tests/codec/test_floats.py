"""16-bit floats come back to the bit: every pattern, shape and split, by the compiled decoder and by the reference."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rans_kernels.coder import byte_histogram, decode_tiles, encode_tiles, entropy, high_bytes
from rans_kernels.coder.plan import choose_float_layout, choose_windows, float_bits
from rans_kernels.coder.reference import decode_reference
from rans_kernels.format import FLOATS, SPLITS, FormatError, Split, TileLayout

FLOAT_SPLITS = [split for split in SPLITS if split.coded_bits > 1]
SHAPES = [(0, 5), (5, 0), (1, 1), (1, 63), (63, 257), (257, 63), (40, 1100)]
PROFILES = ("compact", "auto", "fast")


def decoded(e, decode=decode_tiles, **options):
    return decode(e.layout, e.heads, e.words, e.offsets, e.freqs, **options)


def gaussian(shape, sigma=0.02, seed=0):
    """Gaussian weights as bfloat16, rounded towards zero."""
    w = np.random.default_rng(seed).normal(0, sigma, shape).astype(np.float32)
    return (w.view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("profile", PROFILES)
def test_every_pattern_survives(dtype, profile):
    w = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    layout = choose_float_layout(byte_histogram(high_bytes(w)), w.shape, profile, dtype)
    e = encode_tiles(w, layout)
    assert np.array_equal(decoded(e), w)
    assert np.array_equal(decoded(e, decode_reference), w)


@pytest.mark.parametrize("split", FLOAT_SPLITS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_odd_shapes_survive_both_decoders(shape, split, float_case):
    layout, w = float_case(shape, split, 2, probability_bits=11)
    e = encode_tiles(w, layout)
    assert np.array_equal(decoded(e), w)
    assert np.array_equal(decoded(e, decode_reference), w)


@settings(max_examples=100, deadline=None)
@given(
    st.tuples(st.integers(0, 70), st.integers(0, 700)),
    st.sampled_from(tuple(FLOATS)),
    st.sampled_from(PROFILES),
    st.integers(0, 127),
    st.integers(1, 128),
    st.integers(0, 2**32 - 1),
)
def test_whatever_is_planned_holds_random_bits(shape, dtype, profile, lowest, spread, seed):
    rng = np.random.default_rng(seed)
    high = rng.integers(lowest, min(128, lowest + spread), shape)
    w = (high << 8 | rng.integers(0, 256, shape) | rng.integers(0, 2, shape) << 15).astype(np.uint16)
    layout = choose_float_layout(byte_histogram(high_bytes(w)), shape, profile, dtype)
    assert np.array_equal(decoded(encode_tiles(w, layout, workers=1), workers=1), w)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [0, 0x8000, 0x7FC1, 0x3F80])
def test_one_value_is_stored_without_a_word(value, dtype):
    w = np.full((20, 130), value, np.uint16)
    layout = choose_float_layout(byte_histogram(high_bytes(w)), w.shape, "compact", dtype)
    e = encode_tiles(w, layout)
    assert e.words.size == 0
    assert np.array_equal(decoded(e), w)


@pytest.mark.parametrize("dtype", FLOATS)
def test_what_stands_around_the_matrix_is_finite(dtype):
    # kernels multiply what is beyond the last column by 0; with a low byte of 0 the high one of a NaN may be finite
    w = np.full((3, 70), 0x7FFF, np.uint16)
    w[0, :5] = 0x3C00
    layout = choose_float_layout(byte_histogram(high_bytes(w)), w.shape, "auto", dtype)
    e = encode_tiles(w, layout)
    whole = replace(layout, shape=(16, 128))
    around = decode_tiles(whole, e.heads, e.words, e.offsets, e.freqs)
    assert np.array_equal(around[:3, :70], w)
    expected = {"bfloat16": 0x7F00, "float16": 0x3C00}[dtype]
    assert (around[3:] == expected).all() and (around[:, 70:] == expected).all()


def test_threads_do_not_change_what_is_stored():
    w = gaussian((2100, 1030))
    layout = choose_float_layout(byte_histogram(high_bytes(w)), w.shape, "compact", "bfloat16")
    one, many = encode_tiles(w, layout, workers=1), encode_tiles(w, layout, workers=4)
    for name in ("heads", "words", "offsets", "freqs"):
        assert np.array_equal(getattr(one, name), getattr(many, name))
    assert np.array_equal(decoded(many, workers=4), w)


def test_bits_that_are_not_contiguous_are_coded_by_value():
    w = gaussian((100, 64))
    e = encode_tiles(w.T, choose_float_layout(byte_histogram(high_bytes(w)), (64, 100), "fast", "bfloat16"))
    assert np.array_equal(decoded(e), w.T)


@pytest.mark.parametrize(("profile", "most"), [("compact", 10.8), ("auto", 10.85), ("fast", 11.3)])
def test_gaussian_weights_take_eleven_bits(profile, most):
    w = gaussian((2048, 4096))
    layout = choose_float_layout(byte_histogram(high_bytes(w)), w.shape, profile, "bfloat16")
    bits = 8 * encode_tiles(w, layout).nbytes / w.size
    assert entropy(byte_histogram(high_bytes(w))) + 8 < bits < most


def test_some_zeros_cost_little_and_need_no_wider_split():
    w = gaussian((512, 1024))
    w[::64, ::64] = 0
    layout = choose_float_layout(byte_histogram(high_bytes(w)), w.shape, "compact", "bfloat16")
    assert layout.split == Split(4, 1) and layout.windows[0] == 0 and layout.windows[1] > 40
    assert np.array_equal(decoded(encode_tiles(w, layout)), w)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(st.integers(0, 40), st.integers(1, 1000), min_size=1, max_size=9),
    st.sampled_from([Split(2, 2), Split(2, 3), Split(2, 4), Split(4, 1), Split(4, 2)]),
)
def test_windows_cover_all_at_the_least_cost(found, split):
    counts = np.zeros(128, np.int64)
    counts[list(found)] = list(found.values())
    width, most = 1 << split.raw_bits - 1, 1 << split.coded_bits
    # windows need only begin at a value
    sets = [s for r in range(1, most + 1) for s in combinations(sorted(found), r)]
    layouts = [TileLayout((1, 1), split, 1, 10, "bfloat16", windows) for windows in sets]
    able = [layout for layout in layouts if (layout.float_codes()[sorted(found)] >= 0).all()]
    windows = choose_windows(counts, split)
    assert (windows is None) == (not able)
    if windows is not None:
        assert max(np.diff([*windows, windows[-1] + width])) >= 1
        sizes = [float_bits(np.tile(counts, 2), layout) for layout in able]
        assert float_bits(np.tile(counts, 2), replace(able[0], windows=windows)) <= min(sizes) + 0.01


@pytest.mark.parametrize("split", FLOAT_SPLITS, ids=str)
def test_codes_and_high_bytes_are_inverse(split, float_case):
    layout, _ = float_case((1, 1), split)
    codes, back = layout.float_codes(), layout.float_bytes()
    held = np.flatnonzero(codes >= 0)
    assert len(held) >= 2 * len(layout.windows)
    assert codes[held].max() < 1 << (split.coded_bits + split.raw_bits)
    assert np.array_equal(back[codes[held]], held)


def test_an_entry_keeps_dtype_and_windows_and_integers_need_neither():
    layout = TileLayout((3, 5), Split(2, 3), 4, 10, "float16", (17, 40))
    assert TileLayout.from_json(layout.to_json()) == layout
    integers = TileLayout((3, 5), Split(2, 3))
    assert "dtype" not in integers.to_json() and TileLayout.from_json(integers.to_json()) == integers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float32"}, "no weights of dtype 'float32'"),
        ({"dtype": "bfloat16"}, "windows"),
        ({"dtype": "bfloat16", "windows": (128,)}, "windows"),
        ({"dtype": "bfloat16", "windows": (7, 7)}, "windows"),
        ({"dtype": "bfloat16", "windows": tuple(range(17))}, "up to 16"),
        ({"dtype": "bfloat16", "windows": tuple(range(9)), "split": Split(4, 0)}, "up to 8"),
        ({"windows": (1,)}, "windows"),
        ({"dtype": "bfloat16", "windows": (1,), "split": Split(1, 3)}, "no split c1r3"),
    ],
)
def test_impossible_layouts_are_refused(changes, message):
    with pytest.raises(FormatError, match=message):
        TileLayout(**({"shape": (3, 5), "split": Split(4, 1)} | changes))


def test_floats_in_no_window_are_refused():
    layout = TileLayout((4, 4), Split(2, 2), 1, 10, "bfloat16", (60, 64))
    for value in (0x3B00, 0x3E00, 0x4200):
        with pytest.raises(FormatError, match=f"high byte {value >> 8} are in none of the windows"):
            encode_tiles(np.full((4, 4), value, np.uint16), layout)
    with pytest.raises(FormatError, match="uint16"):
        encode_tiles(np.zeros((4, 4), np.float16), layout)
