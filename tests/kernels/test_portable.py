"""The portable Triton kernels: same integers as the CPU decoder, same products as float64, on a GPU or interpreted."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rans_kernels.coder import encode_tiles
from rans_kernels.dense import dequantize
from rans_kernels.format import SPLITS, Split, TileLayout
from rans_kernels.ops.coded import CodedWeight
from rans_kernels.ops.table import slot_table

triton = pytest.importorskip("triton")
from rans_kernels.ops.rans_decode.naive import rans_decode_naive  # noqa: E402
from rans_kernels.ops.rans_decode.triton import rans_decode_triton  # noqa: E402
from rans_kernels.ops.rans_linear.triton import rans_linear_triton  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random_weights(shape, split, seed=0, spread=0.33):
    """Gaussian weights that reach the ends of the split's range."""
    w = np.random.default_rng(seed).normal(0, -split.low * spread, shape)
    return np.clip(np.rint(w), split.low, -split.low - 1).astype(np.int8)


def encode(weights, split, units, probability_bits=12):
    """What the kernels take: heads, words, offsets, table, layout."""
    layout = TileLayout(weights.shape, split, units, probability_bits)
    e = encode_tiles(weights, layout)
    heads, words, offsets, freqs = (torch.from_numpy(a).to(DEVICE) for a in (e.heads, e.words, e.offsets, e.freqs))
    return heads, words, offsets, slot_table(freqs, layout), layout


def decodes_to(weights, *coded):
    return torch.equal(rans_decode_triton(*coded).cpu(), torch.from_numpy(weights))


def make_scale(rows, columns, group_size, per_tensor=False):
    groups = 1 if group_size is None else -(-columns // group_size)
    return torch.rand(1 if per_tensor else rows, groups, device=DEVICE) + 0.5


def multiply(x, coded, scale, group_size=None):
    heads, words, offsets, table, layout = coded
    return rans_linear_triton(x, heads, words, offsets, table, scale, layout, group_size)


def relative_error(y, x, weights, scale, group_size=None):
    w = dequantize(torch.from_numpy(weights).to(DEVICE), scale, torch.float32, group_size)
    reference = x.double() @ w.double().T
    return ((y.double() - reference).norm() / reference.norm()).item()


# a ragged last unit, tile and panel; one tile; a tile wider than the matrix
SMALL = [((33, 200), Split(8, 0), 2), ((1, 1), Split(4, 2), 1), ((63, 257), Split(2, 3), 3)]
SMALL += [((20, 70), Split(1, 7), 16), ((16, 64), Split(1, 1), 1), ((17, 129), Split(4, 1), 1)]


@pytest.mark.parametrize(("shape", "split", "units"), SMALL, ids=str)
def test_decode_kernel_equals_the_weights(shape, split, units):
    w = random_weights(shape, split)
    coded = encode(w, split, units)
    assert decodes_to(w, *coded)
    heads, words, offsets, table, layout = coded
    freqs = torch.bincount(table & 0xFF, minlength=256).to(torch.int16)
    assert torch.equal(rans_decode_naive(heads, words, offsets, freqs, layout), torch.from_numpy(w))


@given(
    rows=st.integers(1, 40), columns=st.integers(1, 200), split=st.sampled_from(SPLITS), units=st.integers(1, 4),
    probability_bits=st.sampled_from([10, 11, 12]), spread=st.sampled_from([0.001, 0.05, 0.3, 10]),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=15, deadline=None)
def test_decode_kernel_equals_any_weights(rows, columns, split, units, probability_bits, spread, seed):
    w = random_weights((rows, columns), split, seed, spread)
    assert decodes_to(w, *encode(w, split, units, probability_bits))


def test_one_symbol_has_no_words_and_256_symbols_need_them():
    for w in (np.full((16, 128), -5, np.int8), np.arange(-128, 128, dtype=np.int8).repeat(8).reshape(16, 128)):
        coded = encode(w, Split(8, 0), 1)
        assert (len(coded[1]) == 0) == (w.min() == w.max())
        assert decodes_to(w, *coded)


def test_an_empty_matrix_decodes_to_nothing():
    for shape in ((0, 5), (5, 0), (0, 0)):
        assert decodes_to(np.empty(shape, np.int8), *encode(np.empty(shape, np.int8), Split(4, 0), 1))


def test_no_word_is_read_beyond_the_end_of_its_tile():
    w = random_weights((16, 256), Split(4, 2))
    heads, words, offsets, table, layout = encode(w, Split(4, 2), 2)
    # the second tile loses all but one row of its words, so that it runs out of them
    offsets[2] = offsets[1] + 1
    decoded = []
    for beyond in (0, -1):
        words[offsets[2] :] = beyond
        decoded.append(rans_decode_triton(heads, words, offsets, table, layout))
    assert torch.equal(*decoded)


def test_damaged_words_change_their_own_tile_alone():
    w = random_weights((32, 256), Split(4, 2))
    heads, words, offsets, table, layout = encode(w, Split(4, 2), 2)
    words[offsets[1] : offsets[2]] = -1
    tile = torch.zeros(w.shape, dtype=torch.bool)
    tile[:16, 128:] = True
    differs = rans_decode_triton(heads, words, offsets, table, layout).cpu() != torch.from_numpy(w)
    assert differs[tile].any() and not differs[~tile].any()


@pytest.mark.parametrize(("shape", "split", "units"), SMALL[:4], ids=str)
@pytest.mark.parametrize(("rows", "group_size", "per_tensor"), [(1, None, False), (5, 32, False), (2, None, True)])
def test_fused_kernel_equals_the_product(shape, split, units, rows, group_size, per_tensor):
    w = random_weights(shape, split)
    scale, x = make_scale(*shape, group_size, per_tensor), torch.randn(rows, shape[1], device=DEVICE)
    y = multiply(x, encode(w, split, units), scale, group_size)
    assert relative_error(y, x, w, scale, group_size) < 1e-6


@pytest.mark.parametrize(("shape", "fold"), [((32, 65), 2), ((24, 16), 8)])
def test_a_folded_weight_decodes_and_multiplies_in_the_operator(shape, fold, monkeypatch):
    from rans_kernels.ops.rans_linear import op

    w = random_weights(shape, Split(4, 1))
    layout = TileLayout(shape, Split(4, 1), 4, fold=fold)
    e = encode_tiles(w, layout)
    heads, words, offsets, freqs = (torch.from_numpy(a).to(DEVICE) for a in (e.heads, e.words, e.offsets, e.freqs))
    coded = CodedWeight(heads, words, offsets, slot_table(freqs, layout), layout, 0)
    assert decodes_to(w, heads, words, offsets, coded.table, layout)
    assert torch.equal(rans_decode_naive(heads, words, offsets, freqs, layout), torch.from_numpy(w))
    monkeypatch.setattr(op, "backend_of", lambda device: "triton")
    # one row more than are multiplied at once, and in the same order
    x, scale = torch.randn(16 // fold + 1, shape[1], device=DEVICE), make_scale(*shape, None, per_tensor=True)
    y = op.rans_linear(x, coded, scale)
    assert relative_error(y, x, w, scale) < 1e-6
    assert torch.equal(op.rans_linear(x[1:], coded, scale), y[1:])
    # in the order of the coded matrix: x in the second place of its rows, zeros beside it
    placed = torch.zeros(len(x), fold * shape[1], device=DEVICE)
    placed[:, shape[1] : 2 * shape[1]] = x
    plain = encode(w.reshape(shape[0] // fold, -1), Split(4, 1), 4)
    assert torch.equal(multiply(placed, plain, scale), y[:, 1::fold])


@pytest.mark.parametrize("group_size", [None, 64])
def test_a_row_does_not_depend_on_the_rows_beside_it(group_size):
    w = random_weights((33, 200), Split(4, 1))
    coded, scale, x = encode(w, Split(4, 1), 2), make_scale(33, 200, group_size), torch.randn(7, 200, device=DEVICE)
    y = multiply(x, coded, scale, group_size)
    for begin, end in ((0, 1), (3, 5), (4, 7)):
        assert torch.equal(multiply(x[begin:end], coded, scale, group_size), y[begin:end])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "split", [Split(8, 0), Split(4, 0), Split(4, 1), Split(4, 3), Split(2, 3), Split(2, 5)], ids=str
)
def test_decode_kernel_equals_the_floats(split, dtype, float_case):
    layout, w = float_case((33, 200), split, 2, str(dtype).removeprefix("torch."))
    e = encode_tiles(w, layout)
    heads, words, offsets, freqs = (torch.from_numpy(a).to(DEVICE) for a in (e.heads, e.words, e.offsets, e.freqs))
    decoded = rans_decode_triton(heads, words, offsets, slot_table(freqs, layout), layout)
    assert decoded.dtype == dtype
    assert torch.equal(decoded.cpu().view(torch.int16), torch.from_numpy(w).view(torch.int16))
    assert torch.equal(
        rans_decode_naive(heads, words, offsets, freqs, layout).view(torch.int16), decoded.cpu().view(torch.int16)
    )


@pytest.mark.gpu
class TestOnGpu:
    SHAPE = (573, 1801)

    # every combination is compiled: each split once, few widths of tiles
    @pytest.mark.parametrize(
        ("split", "units"), [(split, 5) for split in SPLITS] + [(Split(4, 3), units) for units in (1, 16, 64)], ids=str
    )
    def test_decode(self, split, units):
        w = random_weights(self.SHAPE, split)
        assert decodes_to(w, *encode(w, split, units))

    @pytest.mark.parametrize(
        ("split", "units", "rows", "group_size", "dtypes"),
        [
            (Split(8, 0), 16, 1, None, (torch.float32, torch.float16, torch.bfloat16)),
            (Split(8, 0), 3, 5, 64, (torch.bfloat16,)),
            (Split(4, 3), 1, 3, None, (torch.bfloat16,)),
            (Split(4, 0), 4, 16, 32, (torch.float16,)),
            (Split(2, 4), 7, 16, None, (torch.float32,)),
            (Split(1, 5), 29, 2, 96, (torch.bfloat16,)),
        ],
        ids=str,
    )
    def test_fused(self, split, units, rows, group_size, dtypes):
        w = random_weights(self.SHAPE, split)
        coded, scale = encode(w, split, units), make_scale(*self.SHAPE, group_size)
        for dtype in dtypes:
            x = torch.randn(rows, self.SHAPE[1], device=DEVICE, dtype=dtype)
            y = multiply(x, coded, scale, group_size)
            assert y.dtype == dtype
            # sums are float32, rounded once
            assert relative_error(y, x, w, scale, group_size) < max(1e-6, torch.finfo(dtype).eps / 2)
            for row in range(rows):
                assert torch.equal(multiply(x[row : row + 1], coded, scale, group_size), y[row : row + 1])
