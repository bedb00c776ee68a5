"""16-bit floats come back to the bit: every pattern, shape and split, by the compiled decoder and by the reference."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rans_kernels.coder import byte_histogram, decode_tiles, encode_tiles, entropy, high_bytes
from rans_kernels.coder.plan import choose_float_layout
from rans_kernels.coder.reference import decode_reference
from rans_kernels.format import FLOATS, SPLITS, FormatError, Split, TileLayout

FLOAT_SPLITS = [split for split in SPLITS if split.coded_bits > 1]
SHAPES = [(0, 5), (5, 0), (1, 1), (1, 63), (63, 257), (257, 63), (40, 1100)]
PROFILES = ("compact", "auto", "fast")


def decoded(e, decode=decode_tiles, **options):
    return decode(e.layout, e.heads, e.words, e.offsets, e.freqs, **options)


def bits_of(shape, split, base, seed=0):
    """Bits whose high bytes, without their signs, fill the split's range from base on, the common ones first."""
    rng = np.random.default_rng(seed)
    q = np.minimum(rng.geometric(0.4, shape) - 1, min(-split.low, 128 - base) - 1)
    return ((base + q) << 8 | rng.integers(0, 2, shape) << 15 | rng.integers(0, 256, shape)).astype(np.uint16)


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
def test_odd_shapes_survive_both_decoders(shape, split):
    w = bits_of(shape, split, 30)
    e = encode_tiles(w, TileLayout(shape, split, 2, 11, "bfloat16", 30))
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


@pytest.mark.parametrize("value", [0, 0x8000, 0x7FC1, 0x3F80])
def test_one_value_is_stored_without_a_word(value):
    w = np.full((20, 130), value, np.uint16)
    layout = choose_float_layout(byte_histogram(high_bytes(w)), w.shape, "compact", "bfloat16")
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
    whole = TileLayout(
        (16, 128), *(getattr(layout, f) for f in ("split", "units", "probability_bits", "dtype", "base"))
    )
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


def test_planning_prefers_the_base_that_costs_least():
    w = gaussian((512, 512), 0.03)
    counts = byte_histogram(high_bytes(w))
    layout = choose_float_layout(counts, w.shape, "fast", "bfloat16")
    exponents = np.flatnonzero(counts.reshape(2, 128).any(0))

    def size(base):
        changed = replace(layout, base=base)
        return encode_tiles(w, changed).nbytes if changed.holds_floats(exponents[0], exponents[-1]) else w.nbytes

    assert size(layout.base) < 1.001 * min(size(base) for base in range(exponents[-1] + 1))


def test_an_entry_keeps_dtype_and_base_and_integers_need_neither():
    layout = TileLayout((3, 5), Split(2, 3), 4, 10, "float16", 17)
    assert TileLayout.from_json(layout.to_json()) == layout
    integers = TileLayout((3, 5), Split(2, 3))
    assert "dtype" not in integers.to_json() and TileLayout.from_json(integers.to_json()) == integers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float32"}, "no weights of dtype 'float32'"),
        ({"dtype": "bfloat16", "base": 128}, "base 128"),
        ({"dtype": "int8", "base": 1}, "base 1"),
        ({"dtype": "bfloat16", "split": Split(1, 3)}, "no split c1r3"),
    ],
)
def test_impossible_layouts_are_refused(changes, message):
    with pytest.raises(FormatError, match=message):
        TileLayout(**({"shape": (3, 5), "split": Split(4, 1)} | changes))


def test_floats_out_of_range_are_refused():
    layout = TileLayout((4, 4), Split(4, 0), 1, 10, "bfloat16", 60)
    for value in (0x3B00, 0x4400):
        with pytest.raises(FormatError, match="do not fit split c4r0 from base 60"):
            encode_tiles(np.full((4, 4), value, np.uint16), layout)
    with pytest.raises(FormatError, match="uint16"):
        encode_tiles(np.zeros((4, 4), np.float16), layout)
