"""Damaged arrays are a clear error or a decode: never a crash, a hang, or an access outside them."""

from dataclasses import replace

import numpy as np
import pytest
from rans_kernels.coder import byte_histogram, decode_tiles, encode_tiles, high_bytes
from rans_kernels.coder.plan import choose_float_layout
from rans_kernels.coder.reference import decode_reference
from rans_kernels.format import FormatError, Split, TileLayout

MUTATIONS = 5000
NAMES = ("heads", "words", "offsets", "freqs")


def encoded(seed: int):
    rng = np.random.default_rng(seed)
    split = (Split(8, 0), Split(4, 2), Split(2, 3), Split(1, 4))[seed % 4]
    shape = ((40, 70), (257, 33), (16, 320), (63, 300))[seed // 4 % 4]
    layout = TileLayout(shape, split, (1, 2, 16)[seed % 3])
    w = np.clip(np.rint(rng.normal(0, -split.low / 4, shape)), split.low, -split.low - 1).astype(np.int8)
    e = encode_tiles(w, layout, workers=1)
    return layout, w, {name: getattr(e, name) for name in NAMES}


def encoded_floats(seed: int):
    rng = np.random.default_rng(seed)
    shape = ((40, 70), (257, 33), (16, 320), (63, 300))[seed % 4]
    w = (rng.normal(0, 0.02, shape).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    layout = choose_float_layout(byte_histogram(high_bytes(w)), shape, ("compact", "fast")[seed // 4 % 2], "bfloat16")
    e = encode_tiles(w, replace(layout, units=(1, 2, 16)[seed % 3]), workers=1)
    return e.layout, w, {name: getattr(e, name) for name in NAMES}


def mutate(rng, arrays):
    """One random change to one of the arrays: bytes replaced, rows cut or grown, a tile's words moved to the next."""
    arrays = {name: a.copy() for name, a in arrays.items()}
    name = ("heads", "words", "words", "offsets", "freqs")[rng.integers(5)]
    a = arrays[name]
    how = rng.integers(5)
    if how == 0 and len(a) > 1:
        a = a[: rng.integers(0, len(a))]
    elif how == 1:
        a = np.concatenate([a, a[-1:]])
    elif how == 2 and name == "offsets" and len(a) > 2:
        a[rng.integers(1, len(a) - 1)] += rng.integers(-2, 3)
    else:
        flat = a.reshape(-1).view(np.uint8)
        for _ in range(rng.integers(1, 9)):
            flat[rng.integers(len(flat))] = rng.integers(256)
    return arrays | {name: a}


def amid(array, poison: int):
    """The array as a view of a larger one that is full of `poison`: an overrun would read that."""
    around = np.full((len(array) + 128, *array.shape[1:]), poison, array.dtype)
    around[64:-64] = array
    return around[64:-64]


def result(decode, layout, arrays, poison=0):
    """What `decode` makes of the arrays: weights, or the message of its error."""
    heads, words = amid(arrays["heads"], poison), amid(arrays["words"], poison)
    try:
        return decode(layout, heads, words, arrays["offsets"], arrays["freqs"])
    except FormatError as error:
        return str(error)


def compiled(*arguments):
    return decode_tiles(*arguments, workers=1)


def test_mutations_never_reach_outside():
    rng = np.random.default_rng(1)
    subjects = [encoded(seed) for seed in range(16)] + [encoded_floats(seed) for seed in range(8)]
    errors = 0
    for i in range(MUTATIONS):
        layout, w, arrays = subjects[i % len(subjects)]
        arrays = mutate(rng, arrays)
        one, other = (result(compiled, layout, arrays, poison) for poison in (0, -1))
        errors += isinstance(one, str)
        assert np.array_equal(one, other)
        assert isinstance(one, str) or (one.shape == w.shape and one.dtype == w.dtype)
    # most mutations are noticed by the coder alone; those in raw bits and padding are the checksum's (test_checkpoint)
    assert errors > MUTATIONS // 2


@pytest.mark.parametrize("make", [encoded, encoded_floats])
@pytest.mark.parametrize("seed", range(4))
def test_reference_and_compiled_decoder_agree_on_damage(seed, make):
    rng = np.random.default_rng(seed)
    layout, _, arrays = make(seed)
    for _ in range(40):
        damaged = mutate(rng, arrays)
        one, other = (result(decode, layout, damaged) for decode in (compiled, decode_reference))
        assert isinstance(one, str) == isinstance(other, str)
        assert isinstance(one, str) or np.array_equal(one, other)


def changed(array, index, value):
    array = array.copy()
    array[index] = value
    return array


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {"offsets": a["offsets"][:-1]}, "offsets for"),
        (lambda a: {"offsets": a["offsets"][::-1].copy()}, "offsets run from"),
        (lambda a: {"offsets": changed(a["offsets"], 1, a["offsets"][2] + 1)}, "they fall"),
        (lambda a: {"offsets": changed(a["offsets"], slice(1, -1), 0)}, "more words than it has symbols"),
        (lambda a: {"freqs": a["freqs"] * 2}, "add up"),
        (lambda a: {"freqs": -a["freqs"]}, "add up"),
        (lambda a: {"freqs": a["freqs"][:255]}, "256 entries"),
        (lambda a: {"heads": a["heads"][:-1]}, "rows of heads"),
        (lambda a: {"heads": a["heads"][:, :16]}, "heads are int32"),
        (lambda a: {"heads": a["heads"].astype(np.int64)}, "heads are int32"),
        (lambda a: {"words": a["words"][:-1]}, "offsets run from"),
        (lambda a: {"words": a["words"][:, :4]}, "words are int16"),
        (lambda a: {"words": a["words"].astype(np.uint16)}, "words are int16"),
        (lambda a: {"words": a["words"][:-1], "offsets": changed(a["offsets"], -1, a["offsets"][-1] - 1)}, "words end"),
        (
            lambda a: {
                "words": np.pad(a["words"], ((0, 1), (0, 0))),
                "offsets": changed(a["offsets"], -1, a["offsets"][-1] + 1),
            },
            "left over",
        ),
    ],
)
def test_each_kind_of_damage_is_named(change, message):
    layout, _, arrays = encoded(9)
    arrays |= change(arrays)
    with pytest.raises(FormatError, match=message):
        decode_tiles(layout, *(arrays[name] for name in NAMES))


def test_a_wrong_state_is_named():
    # of a single symbol a step leaves the state as it is
    layout = TileLayout((20, 20), Split(8, 0))
    e = encode_tiles(np.full((20, 20), 0, np.int8), layout)
    with pytest.raises(FormatError, match="tile 1 is damaged: it does not end in the start state"):
        decode_tiles(layout, changed(e.heads, (1, 31), 1 << 20), e.words, e.offsets, e.freqs)
