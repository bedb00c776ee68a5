"""The warp-level kernels on a GPU: right, equal to the dense INT8 kernel to the bit, and the same in any batch."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from rans_kernels.coder import byte_histogram, encode_tiles, high_bytes
from rans_kernels.coder.plan import choose_float_layout
from rans_kernels.dense import dequantize
from rans_kernels.format import SPLITS, Split, TileLayout
from rans_kernels.ops.coded import CodedWeight

pytest.importorskip("triton")
from rans_kernels.ops.int8_linear import int8_linear_tiled  # noqa: E402
from rans_kernels.ops.launch import Launch  # noqa: E402
from rans_kernels.ops.rans_decode import DecodePlan, rans_decode, rans_decode_many, rans_dequantize  # noqa: E402
from rans_kernels.ops.rans_linear import rans_linear  # noqa: E402

pytestmark = pytest.mark.gpu
HALVES = (torch.float16, torch.bfloat16)


def random_weights(shape, split, seed=0, spread=0.33):
    """Gaussian weights that reach the ends of the split's range, on the host."""
    w = np.random.default_rng(seed).normal(0, -split.low * spread, shape)
    return np.clip(np.rint(w), split.low, -split.low - 1).astype(np.int8)


def encode(weights, split, units, probability_bits=10):
    layout = TileLayout(weights.shape, split, units, probability_bits)
    e = encode_tiles(weights, layout)
    heads, words, offsets, freqs = (torch.from_numpy(a).cuda() for a in (e.heads, e.words, e.offsets, e.freqs))
    return CodedWeight.check(heads, words, offsets, freqs, layout)


def relative_error(y, x, w, scale, bias=None):
    reference = x.double() @ w.double().T * scale.double().T
    if bias is not None:
        reference += bias.double()
    return ((y.double() - reference).norm() / reference.norm()).item()


def tolerance(dtype):
    """Sums are float32, rounded once to the dtype: half a unit in the last place, in the mean less."""
    return torch.finfo(dtype).eps / 2


def case(shape, split, units, rows, dtype, bias=False, probability_bits=10, seed=0):
    """Coded weight, its integers, activations, scale and bias."""
    w = random_weights(shape, split, seed)
    x = torch.randn(rows, shape[1], device="cuda", dtype=dtype)
    scale = torch.rand(shape[0], 1, device="cuda") + 0.5
    offset = torch.randn(shape[0], device="cuda", dtype=dtype) if bias else None
    return encode(w, split, units, probability_bits), torch.from_numpy(w).cuda(), x, scale, offset


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_every_split_multiplies_and_decodes(split):
    coded, w, x, scale, _ = case((63, 200), split, 2, 3, torch.float16, probability_bits=12)
    y = rans_linear(x, coded, scale)
    assert relative_error(y, x, w, scale) < tolerance(torch.float16)
    assert torch.equal(y, int8_linear_tiled(x, w, scale, None, 2))
    assert torch.equal(rans_decode(coded), w)


# odd shapes, a wider tile than the matrix, many tiles a warp, per panel and batch ragged
CASES = [
    ((1, 1), Split(1, 4), 4, 1, torch.float16, False),
    ((257, 63), Split(4, 3), 1, 1, torch.bfloat16, True),
    ((63, 257), Split(8, 0), 16, 9, torch.float16, True),
    ((40, 5632), Split(1, 7), 11, 8, torch.bfloat16, False),
    ((33, 8192), Split(2, 6), 3, 16, torch.float16, False),
    ((16, 64), Split(1, 3), 1, 33, torch.float16, True),
    ((300, 2048), Split(1, 5), 8, 64, torch.bfloat16, False),
]


@pytest.mark.parametrize(("shape", "split", "units", "rows", "dtype", "bias"), CASES, ids=str)
def test_product_is_right_equal_to_the_dense_kernel_and_the_same_in_any_batch(shape, split, units, rows, dtype, bias):
    coded, w, x, scale, offset = case(shape, split, units, rows, dtype, bias)
    # poison what the allocator hands out next
    torch.full((1 << 22,), float("nan"), device="cuda")
    y = rans_linear(x, coded, scale, offset)
    assert relative_error(y, x, w, scale, offset) < tolerance(dtype)
    assert torch.equal(y, int8_linear_tiled(x, w, scale, offset, units))
    for begin, end in {(0, 1), (rows // 2, rows), (rows - 1, rows)}:
        assert torch.equal(rans_linear(x[begin:end], coded, scale, offset), y[begin:end])


# words through a ring, coded rows that end within a unit, many rows in one, several tiles a panel
FOLDED = [
    ((384, 384), Split(4, 1), 8, 48), ((64, 65), Split(8, 0), 2, 3), ((384, 1024), Split(2, 2), 2, 32),
    ((256, 48), Split(1, 4), 16, 12), ((96, 200), Split(1, 5), 3, 4),
]  # fmt: skip


def folded_case(shape, split, fold, units, rows, dtype):
    """Coded weight, its integers, activations and the one scale."""
    w = random_weights(shape, split)
    layout = TileLayout(shape, split, units, 10, fold=fold)
    e = encode_tiles(w, layout)
    arrays = (torch.from_numpy(a).cuda() for a in (e.heads, e.words, e.offsets, e.freqs))
    x = torch.randn(rows, shape[1], device="cuda", dtype=dtype)
    return CodedWeight.check(*arrays, layout), torch.from_numpy(w).cuda(), x, torch.rand(1, 1, device="cuda") + 0.5


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rows", [1, 3, 8, 40, 150])
@pytest.mark.parametrize(("shape", "split", "fold", "units"), FOLDED, ids=str)
def test_a_folded_weight_multiplies_as_the_dense_kernel_and_the_same_in_any_batch(
    shape, split, fold, units, rows, dtype
):
    from rans_kernels.ops.rans_linear.op import uses_fused_kernel

    coded, w, x, scale = folded_case(shape, split, fold, units, rows, dtype)
    # poison what the allocator hands out next
    torch.full((1 << 22,), float("nan"), device="cuda")
    y = rans_linear(x, coded, scale)
    assert torch.equal(y, int8_linear_tiled(x, w, scale, None, units, None, fold))
    fused = uses_fused_kernel(rows, x.device, dtype)
    # the library multiplies by weights that are rounded once more
    assert relative_error(y, x, w, scale) < (1 if fused else 2) * tolerance(dtype)
    if fused:
        for begin, end in {(0, 1), (rows // 2, rows), (rows - 1, rows)}:
            assert torch.equal(rans_linear(x[begin:end], coded, scale), y[begin:end])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("shape", "split", "fold", "units"), FOLDED, ids=str)
def test_a_folded_weight_decodes_and_takes_any_scale(shape, split, fold, units, dtype):
    coded, w, x, scale = folded_case(shape, split, fold, units, 3, dtype)
    assert torch.equal(rans_decode(coded), w)
    out = torch.empty_like(w, dtype=dtype)
    rows = torch.rand(shape[0], 1, device="cuda") + 0.5
    for scales in (scale, rows):
        expected = dequantize(w, scales, dtype)
        assert torch.equal(rans_dequantize(coded, scales, dtype), expected)
        assert rans_dequantize(coded, scales, dtype, None, out) is out and torch.equal(out, expected)
        for found in rans_decode_many([coded, coded], [scales] * 2, dtype):
            assert torch.equal(found, expected)
    bias = torch.randn(shape[0], device="cuda", dtype=dtype)
    for scales, offset in ((rows, None), (scale, bias)):
        y = rans_linear(x, coded, scales, offset)
        assert relative_error(y, x, w, scales, offset) < 2 * tolerance(dtype)
        assert torch.equal(y, int8_linear_tiled(x, w, scales, offset, units, None, fold))


@pytest.mark.parametrize(("warps", "stages"), [(1, 2), (2, 3), (4, 1), (8, 4), (16, 2)])
def test_the_launch_changes_no_bit(warps, stages):
    from rans_kernels.ops.rans_linear.gluon import rans_linear_gluon

    coded, _, x, scale, _ = case((48, 4096), Split(1, 4), 4, 5, torch.float16)
    expected = rans_linear(x, coded, scale)
    for overlap in (False, True):
        launch = Launch(warps, stages, overlap)
        assert torch.equal(rans_linear_gluon(x, coded, scale, None, launch), expected)


# a panel's batch, and one that on Hopper takes the wide kernel
@pytest.mark.parametrize("rows", [8, 64])
def test_a_thousand_launches_give_one_result(rows):
    coded, _, x, scale, _ = case((512, 4096), Split(1, 4), 8, rows, torch.float16)
    expected = rans_linear(x, coded, scale)
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        differing += (rans_linear(x, coded, scale) != expected).sum()
    assert differing.item() == 0


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("shape", "split", "units"), [((63, 257), Split(8, 0), 2), ((300, 2048), Split(1, 4), 5)])
def test_decoded_weights_are_those_of_the_dense_layer(shape, split, units, dtype):
    coded, w, _, scale, _ = case(shape, split, units, 1, dtype)
    assert torch.equal(rans_decode(coded), w)
    assert torch.equal(rans_dequantize(coded, scale, dtype), dequantize(w, scale, dtype))
    per_tensor = scale[:1]
    assert torch.equal(rans_dequantize(coded, per_tensor, dtype), dequantize(w, per_tensor, dtype))


# ragged rows and columns, an odd number of units, one tile and many
DECODED = [
    ((63, 257), Split(8, 0), 2), ((300, 2048), Split(1, 4), 5), ((33, 208), Split(1, 3), 3), ((16, 64), Split(1, 5), 1),
    ((40, 1000), Split(4, 2), 4), ((257, 16), Split(2, 4), 1), ((1, 1), Split(1, 7), 4), ((520, 4096), Split(1, 6), 16),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "split", "units"), DECODED, ids=str)
def test_the_launch_changes_no_decoded_weight(shape, split, units):
    from rans_kernels.ops.rans_decode.gluon import DecodeLaunch, rans_decode_gluon

    coded, w, _, scale, _ = case(shape, split, units, 1, torch.float16)
    half = dequantize(w, scale, torch.float16)
    launches = [(1, 1, 2), (1, 3, 4), (2, 2, 4), (4, 3, 2), (8, 1, 4), (4, 3, 0), (16, 1, 0)]
    for launch in [DecodeLaunch(*each) for each in launches] + [DecodeLaunch(4, 3, 4, ".cs"), None]:
        # poison what the allocator hands out next
        torch.full((2 * w.numel(),), 77, dtype=torch.int8, device="cuda")
        assert torch.equal(rans_decode_gluon(coded, launch=launch), w)
        assert torch.equal(rans_decode_gluon(coded, scale, torch.float16, launch=launch), half)


@pytest.mark.parametrize(("shape", "split", "units"), DECODED, ids=str)
def test_decoded_into_a_buffer_and_nowhere_else(shape, split, units):
    coded, w, _, scale, _ = case(shape, split, units, 1, torch.float16)
    for dtype, expected in ((torch.int8, w), (torch.bfloat16, dequantize(w, scale, torch.bfloat16))):
        for shift in (0, 16, 3):
            memory = torch.full((w.numel() + 64,), 77, dtype=dtype, device="cuda")
            out = memory[shift : shift + w.numel()].view(shape)
            found = rans_decode(coded, out) if dtype is torch.int8 else rans_dequantize(coded, scale, dtype, None, out)
            assert found.data_ptr() == out.data_ptr() and torch.equal(out, expected)
            assert (memory[:shift] == 77).all() and (memory[shift + w.numel() :] == 77).all()


@pytest.mark.parametrize("dtype", [torch.int8, *HALVES])
def test_many_weights_in_one_launch_are_those_of_one_each(dtype):
    cases = [case(*each, 1, torch.float16, seed=i) for i, each in enumerate(DECODED)]
    # several of one split
    cases += [case((rows, 512), Split(1, 4), 3, 1, torch.float16, seed=rows) for rows in (16, 250, 2048)]
    scales = None if dtype is torch.int8 else [scale for *_, scale, _ in cases]
    found = rans_decode_many([coded for coded, *_ in cases], scales, dtype)
    for y, (_, w, _, scale, _) in zip(found, cases, strict=True):
        assert torch.equal(y, w if dtype is torch.int8 else dequantize(w, scale, dtype))


def test_a_plan_runs_again_in_a_cuda_graph():
    cases = [case((rows, 512), Split(1, 4), 3, 1, torch.float16, seed=rows) for rows in (16, 250)]
    plan = DecodePlan([coded for coded, *_ in cases])
    plan.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan.run()
    for out in plan.out:
        out.zero_()
    graph.replay()
    for out, (_, w, *_) in zip(plan.out, cases, strict=True):
        assert torch.equal(out, w)


FLOAT_SPLITS = [split for split in SPLITS if split.coded_bits > 1]


def on_gpu(layout, bits):
    """Coded floats on the GPU, and plain ones."""
    e = encode_tiles(bits, layout)
    arrays = (torch.from_numpy(a).cuda() for a in (e.heads, e.words, e.offsets, e.freqs))
    return CodedWeight.check(*arrays, layout), torch.from_numpy(bits).cuda().view(getattr(torch, layout.dtype))


def same_bits(a, b):
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("split", FLOAT_SPLITS, ids=str)
def test_floats_of_every_split_multiply_and_decode(split, dtype, float_case):
    coded, w = on_gpu(*float_case((63, 200), split, 2, dtype))
    x, one = torch.randn(3, 200, device="cuda", dtype=w.dtype), torch.ones(1, 1, device="cuda")
    assert same_bits(rans_decode(coded), w)
    assert relative_error(rans_linear(x, coded, one), x, w, one) < tolerance(w.dtype)
    # activations of another dtype: decoded and cast
    wide = rans_linear(x.float(), coded, one)
    assert wide.dtype == torch.float32 and relative_error(wide, x, w, one) < 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_pattern_is_decoded(dtype):
    bits = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    for profile in ("compact", "auto", "fast"):
        layout = choose_float_layout(byte_histogram(high_bytes(bits)), bits.shape, profile, dtype)
        coded, w = on_gpu(layout, bits)
        assert same_bits(rans_decode(coded), w)


# a ragged last tile, a ragged panel, one tile, many tiles a warp
FLOAT_CASES = [
    ((1, 1), Split(4, 1), 4, 1), ((257, 63), Split(2, 3), 1, 7), ((63, 257), Split(8, 0), 3, 8),
    ((40, 5632), Split(2, 3), 11, 8), ((33, 8192), Split(4, 1), 3, 16), ((300, 2048), Split(2, 3), 6, 64),
]  # fmt: skip


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("shape", "split", "units", "rows"), FLOAT_CASES, ids=str)
def test_float_product_is_right_and_the_same_in_any_batch_and_launch(shape, split, units, rows, dtype, float_case):
    from rans_kernels.ops.rans_linear.gluon import rans_linear_gluon

    coded, w = on_gpu(*float_case(shape, split, units, dtype, 10))
    x, one = torch.randn(rows, shape[1], device="cuda", dtype=w.dtype), torch.ones(1, 1, device="cuda")
    bias = torch.randn(shape[0], device="cuda", dtype=w.dtype)
    # poison what the allocator hands out next
    torch.full((1 << 22,), float("nan"), device="cuda")
    y = rans_linear(x, coded, one, bias)
    assert relative_error(y, x, w, one, bias) < tolerance(w.dtype)
    for begin, end in {(0, 1), (rows // 2, rows), (rows - 1, rows)}:
        assert torch.equal(rans_linear(x[begin:end], coded, one, bias), y[begin:end])
    for warps, stages in ((1, 2), (2, 3), (4, 1), (8, 4)):
        assert torch.equal(rans_linear_gluon(x, coded, one, bias, Launch(warps, stages, True)), y)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_floats_decoded_together_beside_integers_are_those_of_one_each(dtype, float_case):
    cases = [
        on_gpu(*float_case(shape, split, 3, dtype))
        for shape in ((63, 256), (33, 200), (300, 2048))
        for split in (Split(2, 3), Split(4, 1), Split(8, 0))
    ]
    integers, w, _, scale, _ = case((40, 512), Split(2, 3), 3, 1, torch.float16, probability_bits=12)
    weights, scales = (
        [coded for coded, _ in cases] + [integers],
        [torch.ones(1, 1, device="cuda")] * len(cases) + [scale],
    )
    *found, last = rans_decode_many(weights, scales, getattr(torch, dtype))
    assert all(same_bits(y, plain) for y, (_, plain) in zip(found, cases, strict=True))
    assert torch.equal(last, dequantize(w, scale, getattr(torch, dtype)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_floats_in_one_launch_give_what_each_gives(dtype, float_case):
    from rans_kernels.ops.rans_linear import rans_linear_grouped

    cases = [on_gpu(*float_case((rows, 512), Split(2, 3), 3, dtype)) for rows in (64, 33, 16)]
    x, one = torch.randn(3, 512, device="cuda", dtype=cases[0][1].dtype), torch.ones(1, 1, device="cuda")
    found = rans_linear_grouped(x, [coded for coded, _ in cases], [one] * 3)
    assert all(torch.equal(y, rans_linear(x, coded, one)) for y, (coded, _) in zip(found, cases, strict=True))


def test_what_is_not_finite_stays_in_its_row():
    bits = np.full((32, 200), 0x3C00, np.uint16)
    # the rest of the last unit and of the last tile is multiplied by 0, and is no part of any row
    bits[3, 5], bits[20, 7] = 0x7C00, 0x7E00
    layout = choose_float_layout(byte_histogram(high_bytes(bits)), bits.shape, "fast", "float16")
    coded, w = on_gpu(replace(layout, units=3), bits)
    y = rans_linear(torch.ones(1, 200, device="cuda", dtype=w.dtype), coded, torch.ones(1, 1, device="cuda"))
    assert y[0, 3].isinf() and y[0, 20].isnan()
    assert (y[0, [n for n in range(32) if n not in (3, 20)]] == 200).all()


@pytest.mark.parametrize("value", [-3, 0])
def test_one_symbol_has_no_words(value):
    w = np.full((20, 130), value, np.int8)
    for split in (Split(8, 0), Split(1, 4)):
        for probability_bits in (10, 12):
            coded = encode(w, split, 2, probability_bits)
            assert torch.equal(rans_decode(coded).cpu(), torch.from_numpy(w))


def test_damaged_arrays_neither_crash_nor_change_other_tiles():
    coded, w, x, scale, _ = case((64, 1024), Split(4, 2), 4, 2, torch.float16)
    rng = torch.Generator(device="cuda").manual_seed(0)
    begin, end = (int(coded.offsets[tile]) for tile in (5, 6))
    for _ in range(20):
        noise = torch.randint(-(2**15), 2**15, (end - begin, 8), device="cuda", generator=rng).to(torch.int16)
        words = coded.words.clone()
        words[begin:end] = noise
        damaged = CodedWeight(coded.heads, words, coded.offsets, coded.table, coded.layout, coded.word_rows)
        decoded = rans_decode(damaged)
        rans_linear(x, damaged, scale)
        # tile 5 is the second of panel 1
        other = torch.ones_like(w, dtype=torch.bool)
        other[16:32, 256:512] = False
        assert torch.equal(decoded[other], w[other])
    states = torch.randint_like(coded.heads, -(2**31), 2**31 - 1)
    damaged = CodedWeight(states, coded.words, coded.offsets, coded.table, coded.layout, coded.word_rows)
    rans_decode(damaged)
    rans_linear(x, damaged, scale)
    torch.cuda.synchronize()


@pytest.mark.parametrize("rows", [1, 17, 100])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_module_and_its_dense_twin(rows, dtype):
    from rans_kernels.checkpoint import LayerEntry
    from rans_kernels.linear import CompressedLinear

    w = torch.randint(-4, 4, (700, 300), dtype=torch.int8)
    layout = TileLayout((700, 300), Split(4, 0), 2)
    e = encode_tiles(w.numpy(), layout)
    module = CompressedLinear(layout, len(e.words), (700, 1), bias=True)
    _, buffers = LayerEntry.describe("linear", e, torch.rand(700, 1), None, True)
    module.load_state_dict({**buffers, "bias": torch.rand(700)})
    module.cuda()
    module.bias.data = module.bias.data.to(dtype)
    x = torch.randn(rows, 300, device="cuda", dtype=dtype)
    y = module(x)
    assert relative_error(y, x, w.cuda(), module.weight_scale, module.bias) < max(1e-5, 2 * tolerance(dtype))
    assert torch.equal(module.to_int8()(x), y)
    assert "gluon-fused" in repr(module)


def test_compiled_whole_and_in_a_cuda_graph_it_gives_the_same():
    coded, _, x, scale, bias = case((96, 512), Split(1, 4), 4, 3, torch.float16, True)

    def layer(x):
        return torch.relu(rans_linear(x, coded, scale, bias)) * 2

    expected = layer(x)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)


def test_the_operators_are_well_formed():
    coded, w, x, scale, bias = case((33, 200), Split(1, 4), 2, 3, torch.float16, True)
    checks = ("test_schema", "test_faketensor")
    arrays = (coded.heads, coded.words, coded.offsets, coded.table)
    linear = torch.ops.rans_kernels.rans_linear.default
    torch.library.opcheck(linear, (x, *arrays, scale, bias, coded.numbers, None), test_utils=checks)
    torch.library.opcheck(torch.ops.rans_kernels.int8_linear.default, (x, w, scale, bias, 2), test_utils=checks)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_weight_on_another_gpu_than_the_current_one():
    coded, w, x, scale, bias = case((33, 200), Split(1, 4), 2, 3, torch.float16, True)
    expected = rans_linear(x, coded, scale, bias)
    arrays = (a.to("cuda:1") for a in (coded.heads, coded.words, coded.offsets, coded.table))
    there = CodedWeight(*arrays, coded.layout, coded.word_rows)
    y = rans_linear(x.to("cuda:1"), there, scale.to("cuda:1"), bias.to("cuda:1"))
    assert torch.equal(y.cpu(), expected.cpu())
    assert torch.equal(rans_decode(there).cpu(), w.cpu())


hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)
WIDE_CASES = [
    # one panel and one unit; ragged; a span of several tiles; words through a ring; more panels than a block has
    ((1, 64), Split(1, 4), 1, 17, False),
    ((257, 63), Split(4, 3), 1, 33, True),
    ((700, 1500), Split(1, 7), 3, 128, True),
    ((8192, 1024), Split(1, 4), 2, 65, False),
    ((130, 4096), Split(8, 0), 16, 64, True),
    ((5000, 2048), Split(2, 4), 2, 100, False),
]


@hopper
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("shape", "split", "units", "rows", "bias"), WIDE_CASES, ids=str)
def test_wide_product_is_the_dense_kernels_and_the_panel_kernels_to_the_bit(shape, split, units, rows, bias, dtype):
    from rans_kernels.ops.rans_linear.gluon import rans_linear_gluon
    from rans_kernels.ops.rans_linear.hopper import rans_linear_hopper

    coded, w, x, scale, offset = case(shape, split, units, rows, dtype, bias)
    # poison what the allocator hands out next
    torch.full((1 << 22,), float("nan"), device="cuda")
    y = rans_linear_hopper(x, coded, scale, offset)
    assert relative_error(y, x, w, scale, offset) < tolerance(dtype)
    assert torch.equal(y, int8_linear_tiled(x, w, scale, offset, units))
    assert torch.equal(y, rans_linear_gluon(x, coded, scale, offset))
    assert torch.equal(y, rans_linear(x, coded, scale, offset))


@hopper
@pytest.mark.parametrize(
    "launch",
    [(16, 4, None), (32, 8, 128), (64, 4, None), (128, 16, 128), (256, 8, None)],
    ids=str,
)
def test_the_launch_changes_no_bit_of_a_wide_product(launch):
    from rans_kernels.ops.launch import WideLaunch
    from rans_kernels.ops.rans_linear.hopper import rans_linear_hopper

    coded, w, x, scale, _ = case((1200, 4096), Split(1, 4), 4, 70, torch.float16)
    expected = int8_linear_tiled(x, w, scale, None, 4)
    if launch[0] < 256:
        assert torch.equal(rans_linear_hopper(x, coded, scale, None, WideLaunch(*launch, False)), expected)
    # all tiles in one chain: the same product in another order, whatever the launch
    chained = rans_linear_hopper(x, coded, scale, None, WideLaunch(*launch, True))
    assert relative_error(chained, x, w, scale) < tolerance(torch.float16)
    assert torch.equal(chained, rans_linear_hopper(x, coded, scale, None, WideLaunch(64, 8, None, True)))


@hopper
def test_damaged_words_leave_a_wide_product_inside_the_tensors():
    coded, _, x, scale, _ = case((64, 1024), Split(4, 2), 4, 40, torch.float16)
    states = torch.randint_like(coded.heads, -(2**31), 2**31 - 1)
    words = torch.randint(-(2**15), 2**15, coded.words.shape, device="cuda").to(torch.int16)
    damaged = CodedWeight(states, words, coded.offsets, coded.table, coded.layout, coded.word_rows)
    rans_linear(x, damaged, scale)
    torch.cuda.synchronize()
    # nothing that is left over disturbs the next product
    expected = rans_linear(x[:8], coded, scale)
    assert torch.equal(rans_linear(x, coded, scale)[:8], expected)
