"""A damaged stream is a clear error or a correct decode: never a crash, a hang, or an access outside its arrays."""

import numpy as np
import pytest
from rans_kernels.coder import decode_tiles, encode_tiles
from rans_kernels.coder.reference import decode_reference
from rans_kernels.format import FormatError, Split, TileLayout

MUTATIONS = 5000


def encoded(seed: int):
    rng = np.random.default_rng(seed)
    split = (Split(8, 0), Split(4, 2), Split(2, 3), Split(1, 4))[seed % 4]
    shape = ((40, 70), (257, 33), (16, 32), (63, 300))[seed // 4 % 4]
    layout = TileLayout(shape, split, (32, 256, 1024)[seed % 3])
    w = np.clip(np.rint(rng.normal(0, -split.low / 4, shape)), split.low, -split.low - 1).astype(np.int8)
    return layout, w, encode_tiles(w, layout, workers=1)


def mutate(rng, e):
    """One random change to stream, offsets or table: bits flipped, entries replaced, arrays cut or grown."""
    arrays = {"stream": e.stream.copy(), "offsets": e.offsets.copy(), "freqs": e.freqs.copy()}
    name = ("stream", "stream", "offsets", "freqs")[rng.integers(4)]
    a = arrays[name]
    how = rng.integers(4)
    if how == 0 and len(a) > 1:
        a = a[: rng.integers(0, len(a))]
    elif how == 1:
        a = np.concatenate([a, a[-1:]])
    else:
        flat = a.reshape(-1).view(np.uint8)
        for _ in range(rng.integers(1, 9)):
            flat[rng.integers(len(flat))] = rng.integers(256)
    arrays[name] = a
    return arrays


def test_mutated_streams_never_reach_outside():
    rng = np.random.default_rng(1)
    subjects = [encoded(seed) for seed in range(16)]
    errors = 0
    for i in range(MUTATIONS):
        layout, w, e = subjects[i % len(subjects)]
        a = mutate(rng, e)
        # a copy behind which the pages of a large allocation do not lie: an overrun would read poison, not the stream
        stream = np.full((len(a["stream"]) + 64, 16), -1, np.int32)
        stream[: len(a["stream"])] = a["stream"]
        try:
            out = decode_tiles(layout, stream[: len(a["stream"])], a["offsets"], a["freqs"], workers=1)
        except FormatError:
            errors += 1
        else:
            assert out.shape == w.shape and out.dtype == np.int8
    # most mutations are noticed by the coder alone; those in raw bits and padding are the checksum's (test_checkpoint)
    assert errors > MUTATIONS // 2


def test_reference_and_compiled_decoder_agree_on_damage():
    rng = np.random.default_rng(2)
    layout, _, e = encoded(2)
    agreed = 0
    for _ in range(60):
        a = mutate(rng, e)
        results = []
        for decode in (decode_reference, decode_tiles):
            try:
                results.append(decode(layout, a["stream"], a["offsets"], a["freqs"]))
            except FormatError:
                results.append(None)
        compiled, reference = results[1], results[0]
        assert (compiled is None) == (reference is None)
        assert compiled is None or np.array_equal(compiled, reference)
        agreed += 1
    assert agreed == 60


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"offsets": a["offsets"][:-1]}, "offsets for"),
        (lambda a: a | {"offsets": a["offsets"][::-1].copy()}, "offsets run from"),
        (lambda a: a | {"freqs": a["freqs"] * 2}, "add up"),
        (lambda a: a | {"freqs": -a["freqs"]}, "add up"),
        (lambda a: a | {"freqs": a["freqs"][:255]}, "256 entries"),
        (lambda a: a | {"stream": a["stream"][:-1]}, "offsets run from"),
        (lambda a: a | {"stream": a["stream"][:, :8]}, "stream is int32"),
        (lambda a: a | {"stream": a["stream"].astype(np.int64)}, "stream is int32"),
        (lambda a: a | {"stream": np.where(np.arange(len(a["stream"]))[:, None] < 2, 0, a["stream"])}, "damaged"),
    ],
)
def test_each_kind_of_damage_is_named(change, message):
    layout, _, e = encoded(0)
    a = change({"stream": e.stream, "offsets": e.offsets, "freqs": e.freqs})
    with pytest.raises(FormatError, match=message):
        decode_tiles(layout, a["stream"].astype(a["stream"].dtype), a["offsets"], a["freqs"])
