"""The layers under torch.compile, in a Hugging Face model, and over two processes."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from qat.config import Granularity, QuantConfig, ScaleRule
from qat.model import compile_layers, hidden_states
from qat.quant import convert, freeze, prepare, set_fake_quant


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def outputs_and_gradients(model, x):
    model.zero_grad()
    out = model(x)
    out.float().square().sum().backward()
    return out.detach(), {name.removeprefix("_orig_mod."): p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("rule", ScaleRule)
def test_compiled_in_one_graph_it_follows_toggle_and_autocast(tiny, ids, rule):
    config = QuantConfig(bits=3, scale=rule, granularity=Granularity.per_group, group_size=32, lm_head=True)
    model = prepare(tiny(True), config)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for enabled in (True, False, True):
        set_fake_quant(model, enabled)
        for bfloat16 in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                stock = tiny(True)(ids)
                expected, wanted = outputs_and_gradients(model, ids)
                got, gradients = outputs_and_gradients(compiled, ids)
            assert got.dtype is expected.dtype
            assert torch.equal(got, expected), (enabled, bfloat16)
            assert torch.equal(got, stock) is not enabled
            for name, gradient in gradients.items():
                assert torch.equal(gradient, wanted[name]), (enabled, bfloat16, name)
                assert gradient.any() or (name.endswith("log2_scale") and not enabled)


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_inductor_agrees_on_a_ragged_last_group(device):
    config = QuantConfig(scale=ScaleRule.learned, granularity=Granularity.per_group, group_size=32)
    layer = prepare(nn.Linear(63, 129, device=device), config)
    # no weight just at the clip: compilers round a division differently, and the gradient jumps there
    layer.weight_log2_scale.data -= 0.1
    x = torch.randn(5, 63, device=device)
    expected, wanted = outputs_and_gradients(layer, x)
    got, gradients = outputs_and_gradients(torch.compile(layer, fullgraph=True), x)
    for one, other in [(expected, got)] + [(wanted[name], gradients[name]) for name in wanted]:
        assert (one - other).norm() <= 1e-5 * one.norm()


def test_a_hugging_face_model_generates_the_same_tokens_after_convert():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 63, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=97, **shape, tie_word_embeddings=True)).eval()
    prepare(model, QuantConfig(bits=3, scale=ScaleRule.learned, lm_head=True))
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    prompt = torch.randint(97, (3, 5))
    greedy = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected, logits = model.generate(prompt, **greedy), model(prompt).logits
    dense = convert(model)
    assert torch.equal(dense(prompt).logits, logits)
    assert torch.equal(dense.generate(prompt, **greedy), expected)


@pytest.mark.parametrize("granularity", [Granularity.per_tensor, Granularity.per_channel])
def test_decoder_layers_are_compiled_once_for_all(granularity):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 63, "num_hidden_layers": 5, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=97, **shape)).train()
    prepare(model, QuantConfig(bits=3, scale=ScaleRule.learned, granularity=granularity))
    ids = torch.randint(97, (3, 5))

    def run():
        model.zero_grad()
        out = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        out.square().sum().backward()
        return out.detach(), [p.grad for p in model.base_model.parameters()]

    expected, wanted = run()
    compile_layers(model, "aot_eager")
    torch._dynamo.utils.counters.clear()
    got, gradients = run()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert torch.equal(got, expected)
    assert all(map(torch.equal, gradients, wanted))
    # hooks are none of the compiler's business
    assert len(hidden_states(model, ids, layers=True)) == 5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def train(rank: int, world: int, x: torch.Tensor, model: nn.Module) -> None:
    """Two steps without and two with fake quantisation, on this rank's share of x."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(4):
        set_fake_quant(model, step >= 2)
        optimizer.zero_grad()
        model(x[rank::world]).square().mean().backward()
        optimizer.step()


def ddp_worker(rank: int, folder: str, model: nn.Module, x: torch.Tensor) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    # what arrives lies in memory that the processes share
    model = copy.deepcopy(model)
    train(rank, 2, x, DistributedDataParallel(model))
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ddp_processes_train_like_one(tmp_path):
    torch.manual_seed(0)
    model = prepare(nn.Sequential(nn.Linear(7, 33), nn.Linear(33, 3)), QuantConfig(bits=3, scale=ScaleRule.learned))
    x = torch.randn(6, 7)
    mp.spawn(ddp_worker, (str(tmp_path), model, x), nprocs=2)
    train(0, 1, x, model)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name, expected in model.state_dict().items():
        assert torch.equal(ranks[0][name], ranks[1][name])
        torch.testing.assert_close(ranks[0][name], expected, rtol=1e-4, atol=1e-6)


def test_a_compiled_model_follows_when_its_integers_freeze(tiny, ids):
    model = prepare(tiny(True), QuantConfig(scale=ScaleRule.learned, lm_head=True))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    outputs_and_gradients(compiled, ids)
    freeze(model)
    with torch.no_grad():
        # what only frozen integers do not follow
        for parameter in model.parameters():
            parameter *= 1.5
    expected, wanted = outputs_and_gradients(model, ids)
    got, gradients = outputs_and_gradients(compiled, ids)
    assert torch.equal(got, expected)
    assert not any(gradients[f"{name}.weight"].any() for name in ("up", "down", "embed"))
    for name, gradient in gradients.items():
        assert torch.equal(gradient, wanted[name]), name
