"""Every way of running gives what the reference gives in it, and one that does not is told apart."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rans_kernels
import torch
from torch import Tensor
from transformers import PreTrainedModel

import eval.modes
from eval.consistency import consistency
from eval.graph import graph_greedy
from eval.mode_suite import compare_traces
from eval.modes import MODES, Mode, split_layers
from eval.page import write_page
from eval.references import own_integers, round_once
from qat.config import EvalConfig, QuantConfig, ScaleRule
from qat.inference import Trace, fingerprint, read_logits, repeatable_attention, trace_greedy
from qat.model import load_model
from qat.quant import prepare
from tests.export.helpers import run


@pytest.fixture
def prompts() -> Tensor:
    return torch.randint(300, (5, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Nodes of every graph that is compiled, and run as it is: inductor takes half a minute."""
    sizes: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any, **options: Any) -> Callable[..., Any]:
        sizes.append(len(graph.graph.nodes))
        return graph.forward

    monkeypatch.setattr(eval.modes, "COMPILER", backend)
    return sizes


def test_every_mode_that_can_run_here_passes(config: EvalConfig, compiled: list[int]) -> None:
    config.modes = "all"
    report = consistency(config)
    assert report["passed"]
    modes = report["modes"]
    # both models' steps, all of them; what asks for a compiler is a few nodes
    assert len([size for size in compiled if size > 50]) == 2
    assert list(modes) == ["weights", "layers", *MODES]
    skipped = {name: entry["reason"] for name, entry in modes.items() if entry["status"] == "skipped"}
    if not torch.cuda.is_available():
        assert skipped["cuda_graph"] == "needs a CUDA GPU" and skipped["two_gpus"] == "needs two GPUs"
    for name, entry in modes.items():
        if name in MODES and name not in skipped:
            pair = entry["reference"]
            assert (pair["tokens"], pair["divergent_tokens"], pair["unequal_logits"]) == (7 * 13, 0, 0)
            assert ("eager" in entry) == (name != "dynamic") and ("itself" in entry) == (name == "repeat")


def test_a_folder_without_its_origin_is_compared_with_its_own_integers(config: EvalConfig) -> None:
    config.base, config.modes = None, ["weights", "layers", "dynamic", "prefill"]
    report = consistency(config)
    assert report["passed"] and "own" in report and "base" not in report
    assert {entry["status"] for entry in report["modes"].values()} == {"passed"}


def test_a_mode_that_breaks_off_fails_and_the_others_go_on(config: EvalConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*args: Any) -> None:
        raise torch.OutOfMemoryError("out of memory\nand more")

    monkeypatch.setitem(MODES, "static", Mode(no_memory))
    config.base, config.modes = None, ["static", "prefill"]
    report = consistency(config)
    assert report["passed"] is False
    assert report["modes"]["static"]["reason"] == "OutOfMemoryError: out of memory"
    assert report["modes"]["prefill"]["status"] == "passed"


def test_ctrl_c_keeps_what_was_found(config: EvalConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    config.modes = ["weights", "dynamic", "static"]
    report = Path(config.output) / "report.json"
    monkeypatch.setitem(MODES, "static", Mode(stop))
    with pytest.raises(KeyboardInterrupt):
        consistency(config)
    found = json.loads(report.read_text())["consistency"]
    assert found["unfinished"] and found["passed"] is None and list(found["modes"]) == ["weights", "dynamic"]
    assert found["fake_quant"]["generation"]["divergent_tokens"] == 0
    write_page(report.parent)
    # where nothing has been compared yet it stays
    monkeypatch.setattr(eval.consistency, "_compare_logits", stop)
    with pytest.raises(KeyboardInterrupt):
        consistency(config)
    assert json.loads(report.read_text())["consistency"] == found


def test_what_is_loaded_with_a_budget_is_compared_with_the_resident_model(
    config: EvalConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, budgets = rans_kernels.load, []

    def streaming(folder: Any, device: Any = "cpu", dtype: Any = None, budget: float | None = None) -> Any:
        budgets.append(budget)
        model: Any = load(folder, device, dtype)
        if budget is not None:
            # one that does not stream right
            model.get_submodule("model.layers.0.mlp.up_proj").weight_scale.mul_(2)
        return model

    monkeypatch.setattr(rans_kernels, "load", streaming)
    config.modes = ["dynamic", "streamed"]
    report = consistency(config)
    assert report["modes"]["dynamic"]["status"] == "passed"
    assert report["modes"]["streamed"]["status"] == "failed" and report["passed"] is False
    assert report["modes"]["streamed"]["eager"]["divergent_tokens"] > 0
    stored = sum(f.stat().st_size for f in Path(config.compressed).glob("*.safetensors"))
    assert budgets[0] is None and 0 < budgets[-1] * 1e9 < stored


@pytest.mark.parametrize("batch_size", [1, 5])
def test_the_recorded_loop_is_generation_with_a_static_cache(base: Path, prompts: Tensor, batch_size: int) -> None:
    model = load_model(base)
    expected = trace_greedy(model, prompts, 7, batch_size, cache_implementation="static", disable_compile=True)
    found = graph_greedy(model, prompts, 7, batch_size)
    assert torch.equal(found.tokens, expected.tokens)
    # of another length, a cache gives other last bits
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)


def test_a_fingerprint_sees_every_bit_but_the_sign_of_zero() -> None:
    logits = torch.randn(3, 300, generator=torch.Generator().manual_seed(0))
    logits[:, 7] = 0.0
    prints = fingerprint(logits)
    for at in (0, 150, 299):
        changed = logits.clone()
        changed.view(torch.int32)[1, at] ^= 1
        assert (fingerprint(changed) != prints).tolist() == [False, True, False]
    logits[:, 7] = -0.0
    assert torch.equal(fingerprint(logits), prints)
    # two small changes that plain factors would let cancel
    many = logits[:1].repeat(200, 1)
    many.view(torch.int32)[torch.arange(200), torch.arange(200)] += 3
    many.view(torch.int32)[torch.arange(200), torch.arange(200) + 1] -= 1
    assert len(fingerprint(many).unique()) == 200


def test_a_divergence_is_told_where_and_by_how_much() -> None:
    logits = torch.zeros(2, 3, 10)
    logits[..., 4], logits[..., 5], logits[..., 6] = 2.0, 1.5, 1.0
    other = logits.clone()
    other[1, 1, 5] = 2.25
    # behind the first divergence nothing counts
    other[1, 2] = 100.0
    other[0, 2, 4] = 2.125
    found = compare_traces(read_logits(logits), read_logits(other))
    (divergence,) = found["divergences"]
    assert (divergence["prompt"], divergence["position"], divergence["difference"]) == (1, 1, 0.75)
    assert found["divergent_tokens"] == 2 and found["unequal_logits"] == 2
    assert found["max_logit_difference"] == 0.75


def test_where_no_likely_token_is_shared_the_difference_is_unknown() -> None:
    p, q = torch.arange(12.0)[None, None], torch.arange(12.0).flip(0)[None, None]
    found = compare_traces(read_logits(p), read_logits(q))
    assert found["divergences"][0]["difference"] is None and found["max_logit_difference"] == 0


def test_the_first_of_equal_logits_is_the_token() -> None:
    logits = torch.ones(1, 1, 5000)
    assert read_logits(logits).tokens.item() == 0


@pytest.mark.parametrize("scale", [ScaleRule.std, ScaleRule.learned])
@torch.no_grad()
def test_weights_rounded_once_give_the_same_bits(
    tiny_llama: Callable[..., Path], prompts: Tensor, scale: ScaleRule
) -> None:
    # head and embedding share a weight, of which rounding twice would make another
    model: Any = load_model(tiny_llama(tie_word_embeddings=True))
    prepare(model, QuantConfig(bits=4, scale=scale, embeddings=True)).eval()
    expected = model(prompts).logits
    assert torch.equal(round_once(model)(prompts).logits, expected)


def test_two_devices_share_the_layers_and_every_weight_has_one(base: Path) -> None:
    model: PreTrainedModel = load_model(base)
    chosen = split_layers(model)
    assert {name: device for name, device in chosen.items() if "layers" in name} == {
        "model.layers.0": 0,
        "model.layers.1": 1,
    }
    for name, _ in (*model.named_parameters(), *model.named_buffers()):
        assert sum(name.startswith(f"{key}.") for key in chosen) == 1


@pytest.mark.gpu
def test_every_mode_passes_on_a_gpu(config: EvalConfig) -> None:
    config.device, config.modes = "cuda", "all"
    report = consistency(config)
    assert report["passed"], {name: entry for name, entry in report["modes"].items() if entry["status"] == "failed"}
    assert report["library"]["logits"]["tokens"] == report["fake_quant"]["logits"]["tokens"]
    assert report["modes"]["cuda_graph"]["status"] == "passed"


@pytest.mark.gpu
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_recorded_step_gives_the_tokens_of_one_that_is_not(base: Path, prompts: Tensor, batch_size: int) -> None:
    model: Any = load_model(base).to("cuda")
    full = prompts[:3]
    expected = trace_greedy(model, full, 7, batch_size, cache_implementation="static", disable_compile=True)
    found: Trace = graph_greedy(model, full, 7, batch_size)
    assert torch.equal(found.tokens, expected.tokens)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static", "disable_compile": True}], ids=str)
@pytest.mark.parametrize("kind", ["base", "compressed", "dense"])
def test_generating_twice_gives_the_same_bits(
    tiny_llama: Callable[..., Path], tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    """Of shapes that cuBLAS and attention have more than one kernel for."""
    source = tiny_llama(
        hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6, initializer_range=0.1
    )
    folder = run(source, tmp_path / "compressed", quant=QuantConfig(scale=ScaleRule.std, k=0.3))
    device, dtype = torch.device("cuda"), torch.bfloat16
    model: Any
    if kind == "base":
        model = load_model(source, dtype).to(device)
    else:
        model = {"compressed": rans_kernels.load, "dense": own_integers}[kind](folder, device, dtype)
    ids = torch.randint(300, (32, 16), generator=torch.Generator().manual_seed(0))
    with repeatable_attention():
        first, *others = (trace_greedy(model, ids, 96, 16, **options) for _ in range(4))
    assert all(torch.equal(first.prints, other.prints) for other in others)
