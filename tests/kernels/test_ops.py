"""The operators on the CPU: what they compute, in any shape of x, and that torch.compile can take them as they are."""

import numpy as np
import pytest
import torch
from rans_kernels.coder import encode_tiles
from rans_kernels.dense import Int8Linear, dequantize, int8_linear
from rans_kernels.format import FormatError, Split, TileLayout
from rans_kernels.linear import CompressedLinear
from rans_kernels.ops.coded import CodedWeight
from rans_kernels.ops.fold import gather_rows, place_rows
from rans_kernels.ops.int8_linear import int8_linear_tiled
from rans_kernels.ops.rans_decode import rans_decode, rans_decode_many, rans_dequantize
from rans_kernels.ops.rans_linear import rans_linear
from torch.nn import functional as F

LAYOUT = TileLayout((33, 200), Split(4, 1), 2)


def coded_weight(layout=LAYOUT):
    """Random integers of a layout, coded and plain."""
    w = np.random.default_rng(0).integers(layout.split.low, -layout.split.low, layout.shape).astype(np.int8)
    e = encode_tiles(w, layout)
    arrays = (torch.from_numpy(a) for a in (e.heads, e.words, e.offsets, e.freqs))
    return CodedWeight.check(*arrays, layout), torch.from_numpy(w)


@pytest.mark.parametrize("shape", [(200,), (3, 200), (2, 0, 200), (2, 3, 200)])
@pytest.mark.parametrize("group_size", [None, 64])
def test_product_is_that_of_the_integers_in_any_shape(shape, group_size):
    coded, w = coded_weight()
    scale = torch.rand(33, 1 if group_size is None else 4)
    x, bias = torch.randn(shape), torch.randn(33)
    expected = int8_linear(x, w, scale, bias, group_size)
    assert torch.equal(rans_linear(x, coded, scale, bias, group_size), expected)
    assert torch.equal(int8_linear_tiled(x, w, scale, bias, 2, group_size), expected)


def test_a_bias_of_another_dtype_is_cast():
    coded, w = coded_weight()
    scale, x, bias = torch.rand(33, 1), torch.randn(3, 200, dtype=torch.bfloat16), torch.randn(33)
    assert torch.equal(rans_linear(x, coded, scale, bias), int8_linear(x, w, scale, bias))


def test_decoded_and_dequantised_weights():
    coded, w = coded_weight()
    scale = torch.rand(33, 1)
    assert torch.equal(rans_decode(coded), w)
    assert torch.equal(rans_dequantize(coded, scale, torch.bfloat16), (w * scale).to(torch.bfloat16))


def test_decoded_into_buffers_one_by_one_and_together():
    coded, w = coded_weight()
    other, v = coded_weight(TileLayout((7, 96), Split(1, 4), 1, 10))
    scale, out = torch.rand(33, 1), torch.empty(33, 200, dtype=torch.int8)
    half = (w * scale).to(torch.bfloat16)
    assert rans_decode(coded, out) is out and torch.equal(out, w)
    assert torch.equal(rans_dequantize(coded, scale, torch.bfloat16, None, torch.empty_like(half)), half)
    found = rans_decode_many([coded, other], out=[out.zero_(), torch.empty_like(v)])
    assert found[0] is out and torch.equal(out, w) and torch.equal(found[1], v)
    scaled = rans_decode_many([coded, other], [scale, torch.ones(1, 1)], torch.bfloat16)
    assert torch.equal(scaled[0], half) and torch.equal(scaled[1], v.to(torch.bfloat16))
    assert rans_decode_many([]) == []
    with pytest.raises(ValueError, match="contiguous"):
        rans_decode_many([other], out=[out])


FOLDED = [TileLayout(shape, Split(4, 1), 3, fold=fold) for shape, fold in (((64, 65), 2), ((32, 200), 8), ((9, 33), 9))]


@pytest.mark.parametrize("layout", FOLDED, ids=str)
def test_a_folded_weight_is_the_weight_to_all_that_use_it(layout):
    coded, w = coded_weight(layout)
    (n, k), scale, half = layout.shape, torch.rand(1, 1), torch.bfloat16
    assert torch.equal(rans_decode(coded), w)
    assert torch.equal(rans_dequantize(coded, scale, half), (w * scale).to(half))
    out = torch.empty(n, k, dtype=torch.int8)
    assert rans_decode_many([coded], out=[out])[0] is out and torch.equal(out, w)
    assert torch.equal(rans_decode_many([coded, coded], [scale] * 2, half)[1], (w * scale).to(half))
    # scales of rows or of groups, or a bias, of another program's file
    for scales, bias, group_size in (
        (scale, None, None), (torch.rand(n, 1), torch.randn(n), None), (torch.rand(n, -(-k // 32)), None, 32)
    ):  # fmt: skip
        assert torch.equal(rans_dequantize(coded, scales, half, group_size), dequantize(w, scales, half, group_size))
        for shape in ((k,), (2, 0, k), (2, 3, k)):
            x = torch.randn(shape)
            expected = int8_linear(x, w, scales, bias, group_size)
            assert torch.equal(rans_linear(x, coded, scales, bias, group_size), expected)
            assert torch.equal(int8_linear_tiled(x, w, scales, bias, 3, group_size, layout.fold), expected)


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize(("shape", "fold"), [((8, 7), 1), ((8, 7), 4), ((6, 65), 6)])
def test_placed_rows_times_the_coded_matrix_is_the_product(rows, shape, fold):
    w = torch.randint(-8, 8, shape).double()
    x = torch.randint(-8, 8, (rows, shape[1])).double()
    placed = place_rows(x, fold)
    assert placed.shape == (fold * rows, fold * shape[1])
    assert torch.equal(placed, torch.kron(torch.eye(fold, dtype=torch.double), x))
    if rows:
        assert torch.equal(gather_rows(placed @ w.reshape(shape[0] // fold, -1).T, fold), x @ w.T)
        # what is not finite stays in its own row
        x[0] = float("inf")
        assert torch.equal(place_rows(x, fold).isinf().sum(1) > 0, (torch.arange(fold * rows) % rows) == 0)


def test_a_folded_layer_compiles_and_has_a_dense_twin():
    layout = FOLDED[0]
    coded, w = coded_weight(layout)
    layer = CompressedLinear(layout, len(coded.words), (1, 1))
    names = ("weight", "weight_words", "weight_offsets", "weight_freqs", "weight_scale")
    arrays = (coded.heads, coded.words, coded.offsets, coded.table, torch.rand(1, 1))
    layer.load_state_dict(dict(zip(names, arrays, strict=True)))
    layer.prepare()
    assert "in_features=65, out_features=64" in repr(layer) and "fold=2" in repr(layer)
    twin, x = layer.to_int8(), torch.randn(4, 65)
    assert twin.fold == 2 and torch.equal(twin.weight_int8, w) and torch.equal(twin(x), layer(x))

    def operator(x):
        return torch.relu(rans_linear(x, coded, layer.weight_scale))

    assert torch.equal(torch.compile(operator, fullgraph=True, backend="aot_eager")(x), operator(x))
    checks = ("test_schema", "test_faketensor")
    linear, dense = torch.ops.rans_kernels.rans_linear.default, torch.ops.rans_kernels.int8_linear.default
    arrays = (coded.heads, coded.words, coded.offsets, coded.table, layer.weight_scale, None, coded.numbers, None)
    torch.library.opcheck(linear, (x, *arrays), test_utils=checks)
    torch.library.opcheck(dense, (x, w, layer.weight_scale, None, 3, None, 2), test_utils=checks)


def test_the_operators_are_well_formed():
    coded, w = coded_weight()
    scale, x = torch.rand(33, 1), torch.randn(3, 200)
    checks = ("test_schema", "test_faketensor")
    arrays = (coded.heads, coded.words, coded.offsets, coded.table)
    linear, dense = torch.ops.rans_kernels.rans_linear.default, torch.ops.rans_kernels.int8_linear.default
    torch.library.opcheck(linear, (x, *arrays, scale, None, coded.numbers, None), test_utils=checks)
    torch.library.opcheck(dense, (x, w, scale, None, 2), test_utils=checks)


def test_arrays_that_a_decoder_would_leave_are_refused():
    coded, _ = coded_weight()
    freqs = coded.table
    with pytest.raises(FormatError, match="offsets"):
        CodedWeight.check(coded.heads, coded.words, coded.offsets + 1, freqs, LAYOUT)
    with pytest.raises(FormatError, match="rows of heads"):
        CodedWeight.check(coded.heads[1:], coded.words, coded.offsets, freqs, LAYOUT)
    with pytest.raises(FormatError, match="frequencies"):
        CodedWeight.check(coded.heads, coded.words, coded.offsets, freqs + 1, LAYOUT)


def state_of(coded):
    """State of a layer that holds a coded weight."""
    state = {"weight": coded.heads, "weight_words": coded.words, "weight_offsets": coded.offsets}
    return state | {"weight_freqs": coded.table, "weight_scale": torch.rand(33, 1), "bias": torch.rand(33)}


def test_a_layer_that_is_loaded_again_computes_with_what_it_was_given_last():
    # without padding, so that either has one symbol and no words
    layout = TileLayout((32, 256), Split(4, 1), 4)
    layer = CompressedLinear(layout, 0, (32, 1))
    for value in (0, 3):
        e = encode_tiles(np.full(layout.shape, value, np.int8), layout)
        coded = CodedWeight.check(*(torch.from_numpy(a) for a in (e.heads, e.words, e.offsets, e.freqs)), layout)
        state = state_of(coded)
        del state["bias"]
        layer.load_state_dict({**state, "weight_scale": torch.ones(32, 1)})
        assert (layer.weight_int8 == value).all()


def test_a_layer_and_its_dense_twin_agree():
    coded, w = coded_weight()
    layer = CompressedLinear(LAYOUT, len(coded.words), (33, 1), bias=True)
    layer.load_state_dict(state_of(coded))
    twin, x = layer.to_int8(), torch.randn(4, 200)
    assert isinstance(twin, Int8Linear) and twin.units == LAYOUT.units
    assert torch.equal(twin.weight_int8, w)
    assert torch.equal(twin(x), layer(x))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_floats_multiply_as_the_plain_weight(dtype, float_case):
    layout, bits = float_case((33, 200), Split(2, 3), 2, dtype)
    w = torch.from_numpy(bits).view(getattr(torch, dtype))
    e = encode_tiles(bits, layout)
    coded = CodedWeight.check(*(torch.from_numpy(a) for a in (e.heads, e.words, e.offsets, e.freqs)), layout)
    one, bias = torch.ones(1, 1), torch.randn(33).to(w.dtype)
    assert torch.equal(rans_decode(coded), w)
    for x_dtype in (w.dtype, torch.float32):
        x = torch.randn(3, 200).to(x_dtype)
        assert torch.equal(rans_linear(x, coded, one, bias), F.linear(x, w.to(x_dtype), bias.to(x_dtype)))
    x = torch.randn(3, 200, requires_grad=True)
    rans_linear(x, coded, one).sum().backward()
    torch.testing.assert_close(x.grad, w.float().sum(0).expand(3, 200))
    arrays = (coded.heads, coded.words, coded.offsets, coded.table)
    torch.library.opcheck(
        torch.ops.rans_kernels.rans_linear.default, (x, *arrays, one, None, coded.numbers, None),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


@pytest.mark.parametrize(("windows", "fold"), [((), 1), ((), 3), ((0, 60), 1)])
def test_what_operators_are_given_becomes_the_layout_again(windows, fold):
    dtype = "bfloat16" if windows else "int8"
    layout = TileLayout((33, 200), Split(4, 1), 2, 10, dtype, windows, fold)
    coded = CodedWeight(*[torch.empty(0)] * 4, layout, 7)
    again = CodedWeight.of(*[torch.empty(0)] * 4, coded.numbers)
    assert again.layout == layout and again.word_rows == 7
