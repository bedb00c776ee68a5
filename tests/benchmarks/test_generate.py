"""The generation benchmark on a CPU: its loop is transformers' own, and to the compiler all layers are one kind."""

import pytest
import torch

pytest.importorskip("triton")
import rans_kernels.grouping as grouping  # noqa: E402
import rans_kernels.linear as linear  # noqa: E402
from rans_kernels.ops.rans_linear import rans_linear  # noqa: E402

from benchmarks import generate  # noqa: E402
from qat.inference import generate_greedy  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture
def model():
    return generate.build("tiny", CPU)


@pytest.fixture
def prompts():
    return torch.randint(512, (2, generate.PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))


def test_every_kind_gives_the_tokens_of_the_stock_loop(model, prompts):
    network, masters = model
    found = []
    for kind in generate.KINDS:
        generate.fill(network, masters, kind)
        # as it is without the harness
        network.config._attn_implementation = "sdpa"
        for index, layer in enumerate(network.model.layers):
            layer.self_attn.layer_idx = index
        expected, _ = generate_greedy(network, prompts, 12)
        found.append(generate.Generator(network, 2, 12, False).generate(prompts)[0])
        assert torch.equal(found[-1], expected)
    assert torch.equal(found[1], found[2])
    assert len(found[2].unique()) > 4


def test_weights_are_a_sixth_of_float32(model):
    network, masters = model
    size = {kind: generate.fill(network, masters, kind) for kind in generate.KINDS}
    assert size["int8"] < 0.27 * size["fp16"]
    assert size["compressed"] < 0.18 * size["fp16"]


def test_layers_are_compiled_once_and_share_launches(model, prompts, monkeypatch):
    torch._dynamo.reset()
    network, _ = model
    # other weights in every layer, of another entropy, so that words differ in length; through the operator on the CPU
    monkeypatch.setattr(
        linear, "linear_from", lambda w, x, bias: rans_linear(x, w.prepare(), w.weight_scale, bias, w.group_size)
    )
    joined, join = [], grouping.join
    monkeypatch.setattr(grouping, "join", lambda graph, nodes: (joined.append(len(nodes)), join(graph, nodes)))
    for factor, layer in enumerate(network.model.layers, start=2):
        monkeypatch.setattr(generate, "SIGMA", 2.0 + factor)
        for name, master in generate.encode_layer(layer, CPU).items():
            scale = torch.full((master.layout.shape[0], 1), 0.01)
            new, _ = generate.make_linear("compressed", master, scale, torch.float32)
            parent, _, child = name.rpartition(".")
            setattr(layer.get_submodule(parent), child, new)
    sizes = {len(layer.mlp.up_proj.weight_words) for layer in network.model.layers}
    assert len(sizes) == len(network.model.layers)
    expected, _ = generate.Generator(network, 2, 6, False).generate(prompts)
    torch._dynamo.utils.counters.clear()
    # without its cache, which would hide what the pass does
    with torch._inductor.config.patch(force_disable_caches=True):
        found, _ = generate.Generator(network, 2, 6, True).generate(prompts)
    assert torch.equal(found, expected)
    assert sorted(joined) == [2, 3]
    # what is before the layers, a layer, what is behind
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
