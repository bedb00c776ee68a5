"""Decoding ahead: the bits of a layer that decodes for itself, whatever the order, the buffers hold or memory holds."""

import copy

import numpy as np
import pytest
import torch
from rans_kernels.coder import encode_tiles
from rans_kernels.format import Split, TileLayout
from rans_kernels.linear import CompressedLinear
from rans_kernels.staging import DecodeAhead, cut
from torch import nn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float16 if torch.cuda.is_available() else torch.float32
# more than any fused kernel takes
ROWS = 130
SCALE = 16 if torch.cuda.is_available() else 1


def state(rows, columns, seed, fold=1):
    """Buffers of a layer of random weights, and its layout."""
    split = Split(1, 4)
    w = np.random.default_rng(seed).normal(0, -split.low / 3, (rows, columns))
    layout = TileLayout((rows, columns), split, 2 * fold, 10, fold=fold)
    e = encode_tiles(np.clip(np.rint(w), split.low, -split.low - 1).astype(np.int8), layout)
    scale = np.random.default_rng(seed).uniform(0.5, 1, (rows, 1)).astype(np.float32) / columns
    arrays = {"": e.heads, "_words": e.words, "_offsets": e.offsets, "_freqs": e.freqs, "_scale": scale}
    return layout, {f"weight{name}": torch.from_numpy(array) for name, array in arrays.items()}


def layer(rows, columns, seed):
    layout, buffers = state(rows, columns, seed)
    made = CompressedLinear(layout, len(buffers["weight_words"]), (rows, 1), bias=True)
    made.load_state_dict({**buffers, "bias": torch.rand(rows)})
    return made.to(DEVICE)


@pytest.fixture
def model():
    """Layers of several sizes, ragged ones too, that make chunks of one and of several."""
    sizes = [(96, 160), (40, 96), (33, 40), (200, 33), (160, 200), (32, 160), (250, 32), (64, 250)]
    return nn.Sequential(*(layer(n * SCALE, k * SCALE, seed) for seed, (n, k) in enumerate(sizes)))


@pytest.fixture
def x():
    return torch.randn(2, ROWS // 2, 160 * SCALE, device=DEVICE, dtype=DTYPE)


def poison():
    """Fill what the allocator hands out next."""
    if DEVICE == "cuda":
        torch.full((1 << 24,), float("nan"), device=DEVICE)


@torch.inference_mode()
def test_results_are_those_without(model, x):
    expected = model(x)
    ahead = DecodeAhead(model.modules(), DTYPE).enable()
    assert 1 < len(ahead.chunks) < len(ahead.layers)
    for _ in range(3):
        poison()
        assert torch.equal(model(x), expected)
    # a buffer is decoded anew where something wrote over it: none is trusted for longer than what it holds
    ahead.forget()
    for slot in ahead.slots:
        slot.memory.fill_(255)
    assert torch.equal(model(x), expected)
    ahead.disable()
    assert torch.equal(model(x), expected) and all(m.ahead is None for m in model)


@torch.inference_mode()
def test_folded_layers_are_staged_too():
    layers = []
    for seed, (rows, columns, fold) in enumerate([(96, 80, 8), (64, 96, 2), (160, 64, 1), (32, 160, 4)]):
        layout, buffers = state(rows, columns, seed, fold)
        layers.append(CompressedLinear(layout, len(buffers["weight_words"]), (1, 1)))
        layers[-1].load_state_dict({**buffers, "weight_scale": buffers["weight_scale"][:1]})
    folded = nn.Sequential(*layers).to(DEVICE)
    x = torch.randn(ROWS, 80, device=DEVICE, dtype=DTYPE)
    expected = folded(x)
    ahead = DecodeAhead(folded.modules(), DTYPE).enable()
    assert all(ahead.takes(each, torch.empty(ROWS, each.in_features, device=DEVICE, dtype=DTYPE)) for each in folded)
    for _ in range(2):
        poison()
        assert torch.equal(folded(x), expected)


@torch.inference_mode()
def test_any_order_of_layers(model, x):
    inputs = [torch.randn(ROWS, m.in_features, device=DEVICE, dtype=DTYPE) for m in model]
    expected = [m(i) for m, i in zip(model, inputs, strict=True)]
    DecodeAhead(model.modules(), DTYPE).enable()
    for i in torch.randint(len(model), (60,), generator=torch.Generator().manual_seed(0)).tolist():
        poison()
        assert torch.equal(model[i](inputs[i]), expected[i])


@torch.inference_mode()
def test_weights_loaded_again_are_those_decoded(model, x):
    ahead = DecodeAhead(model.modules(), DTYPE).enable()
    for index in (0, 3, 7):
        before = model(x)
        loaded = model[index].state_dict()
        model[index].load_state_dict({**loaded, "weight_scale": 2 * loaded["weight_scale"]})
        found = model(x)
        ahead.disable()
        assert torch.equal(found, model(x)) and not torch.equal(found, before)
        ahead.enable()


def test_what_is_not_staged(model, x):
    ahead = DecodeAhead(model.modules(), DTYPE).enable()
    first = model[0]
    with torch.inference_mode():
        assert ahead.takes(first, x)
        assert not ahead.takes(first, x.double())
        if DEVICE == "cuda":
            assert not ahead.takes(first, x[:, :32])
    assert not ahead.takes(first, x.clone().requires_grad_())


def test_a_copy_is_not_staged(model, x):
    ahead = DecodeAhead(model.modules(), DTYPE).enable()
    twin = copy.deepcopy(model)
    assert all(m.ahead is ahead for m in model) and all(m.ahead is None for m in twin)
    with torch.inference_mode():
        assert torch.equal(twin(x), model(x))


def test_runs_of_layers_are_no_larger_than_the_largest():
    for sizes in ([], [5], [1, 1, 1], [4, 1, 3, 2, 2, 5, 1], [1, 9, 9, 1, 1]):
        chunks = cut(sizes)
        assert [i for chunk in chunks for i in chunk] == list(range(len(sizes)))
        assert all(sum(sizes[i] for i in chunk) <= max(sizes) for chunk in chunks)


@pytest.mark.gpu
@torch.inference_mode()
def test_from_several_streams_at_once(model, x):
    expected = model(x)
    DecodeAhead(model.modules(), DTYPE).enable()
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    found = []
    for repeat in range(12):
        with torch.cuda.stream(streams[repeat % 3]):
            found.append(model(x))
        poison()
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected) for y in found)


@pytest.mark.gpu
@torch.inference_mode()
def test_a_slow_product_is_not_overtaken(x):
    # products much longer than decoding, and decoding much longer than products
    layers = nn.Sequential(*(layer(1024, 1024, seed) for seed in range(6)))
    for rows in (ROWS, 1 << 17):
        x = torch.randn(rows, 1024, device=DEVICE, dtype=DTYPE)
        expected = layers(x)
        ahead = DecodeAhead(layers.modules(), DTYPE).enable()
        for _ in range(5):
            poison()
            assert torch.equal(layers(x), expected)
        ahead.disable()


@pytest.mark.gpu
@torch.inference_mode()
def test_a_captured_graph_decodes_in_line(model, x):
    expected = model(x)
    DecodeAhead(model.modules(), DTYPE).enable()
    model(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = model(x)
    graph.replay()
    assert torch.equal(y, expected)
