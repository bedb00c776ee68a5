"""One launch for several weights of one x: the results of separate ones."""

import numpy as np
import pytest
import torch
from rans_kernels.coder import encode_tiles
from rans_kernels.format import Split, TileLayout
from rans_kernels.ops.coded import CodedWeight

pytest.importorskip("triton")
from rans_kernels.ops.rans_linear import rans_linear, rans_linear_grouped  # noqa: E402

SPLIT = Split(1, 4)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.float16 if torch.cuda.is_available() else torch.float32


def coded_weight(rows, columns, split=SPLIT, units=2, seed=0, fold=1):
    """Random integers, coded."""
    w = np.random.default_rng(seed).normal(0, -split.low / 3, (rows, columns))
    layout = TileLayout((rows, columns), split, units, 10, fold=fold)
    e = encode_tiles(np.clip(np.rint(w), split.low, -split.low - 1).astype(np.int8), layout)
    arrays = (torch.from_numpy(a).to(DEVICE) for a in (e.heads, e.words, e.offsets, e.freqs))
    return CodedWeight.check(*arrays, layout)


def scales_of(weights, per_tensor=False):
    return [torch.rand(1 if per_tensor else w.layout.shape[0], 1, device=DEVICE) + 0.5 for w in weights]


def agree(x, weights, scales, biases=None):
    """Each result is, to the bit, that of its weight alone."""
    found = rans_linear_grouped(x, weights, scales, biases)
    expected = [rans_linear(x, *each) for each in zip(weights, scales, biases or [None] * len(weights), strict=True)]
    return len(found) == len(weights) and all(map(torch.equal, found, expected))


@pytest.mark.parametrize("shape", [(200,), (3, 200), (2, 0, 200), (2, 2, 200)])
@pytest.mark.parametrize("bias", [False, True])
def test_results_are_those_of_separate_products_in_any_shape(shape, bias):
    weights = [coded_weight(rows, 200, seed=rows) for rows in (33, 16, 1)]
    biases = [torch.randn(w.layout.shape[0], device=DEVICE, dtype=HALF) for w in weights] if bias else None
    x = torch.randn(shape, device=DEVICE, dtype=HALF)
    assert agree(x, weights, scales_of(weights), biases)
    assert agree(x, weights[:2], scales_of(weights[:2], True), biases and biases[:2])
    assert agree(x, weights[:1], scales_of(weights[:1]), biases and biases[:1])


def test_weights_that_share_no_launch_are_multiplied_all_the_same():
    x = torch.randn(3, 200, device=DEVICE, dtype=HALF)
    unlike = [coded_weight(33, 200), coded_weight(16, 200, Split(4, 2)), coded_weight(8, 200, units=3)]
    assert agree(x, unlike, scales_of(unlike))
    many = [coded_weight(16 * n, 200, seed=n) for n in range(1, 6)]
    assert agree(x, many, scales_of(many))
    mixed = [scales_of(many[:1], True)[0], scales_of(many[1:2])[0]]
    assert agree(x, many[:2], mixed)
    folded = [coded_weight(32, 200, units=7, fold=2), coded_weight(16, 200, units=7, fold=2)]
    assert agree(x, folded, scales_of(folded, True))
    assert agree(x, [folded[0], many[0]], scales_of(folded, True))


def test_the_operator_is_well_formed():
    weights = [coded_weight(33, 200), coded_weight(16, 200, seed=1)]
    arrays = [[getattr(w, name) for w in weights] for name in ("heads", "words", "offsets", "table")]
    numbers = [number for w in weights for number in w.numbers]
    x = torch.randn(3, 200, device=DEVICE, dtype=HALF)
    operator = torch.ops.rans_kernels.rans_linear_grouped.default
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(operator, (x, *arrays, scales_of(weights), [], numbers), test_utils=checks)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 8, 33, 64, 65])
@pytest.mark.parametrize("split", [Split(1, 4), Split(2, 3), Split(8, 0)], ids=str)
def test_large_weights_on_a_gpu(rows, split):
    weights = [coded_weight(n, 2048, split, 6, seed=n) for n in (2048, 256, 250)]
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.randn(rows, 2048, device=DEVICE, dtype=dtype)
        biases = [torch.randn(w.layout.shape[0], device=DEVICE, dtype=dtype) for w in weights]
        assert agree(x, weights, scales_of(weights))
        assert agree(x, weights[:2], scales_of(weights[:2]), biases[:2])
        assert agree(x, weights, scales_of(weights, True), biases)


@pytest.mark.gpu
def test_weights_whose_sums_have_other_spans():
    from rans_kernels.ops.panel import span_tiles

    weights = [coded_weight(rows, 8192, units=1, seed=rows) for rows in (128, 512)]
    assert len({span_tiles(w.layout.shape[0], w.layout.grid[1]) for w in weights}) == 2
    x = torch.randn(3, 8192, device=DEVICE, dtype=HALF)
    assert agree(x, weights, scales_of(weights))


@pytest.mark.gpu
def test_in_a_cuda_graph():
    weights = [coded_weight(n, 512, seed=n) for n in (64, 32)]
    scales, x = scales_of(weights), torch.randn(2, 512, device=DEVICE, dtype=HALF)
    expected = rans_linear_grouped(x, weights, scales)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = rans_linear_grouped(x, weights, scales)
    for y in found:
        y.zero_()
    graph.replay()
    assert all(map(torch.equal, found, expected))
