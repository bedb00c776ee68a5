"""LoRA on a compressed model is LoRA on the weights it stands for: same logits, same gradients, same adapter."""

import copy
import importlib
import sys
import warnings

import pytest
import rans_kernels
import torch
from rans_kernels.placement import BudgetError
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from qat.config import Granularity, Lossless, QuantConfig
from qat.interop import to_plain
from tests.export.helpers import logits, run

peft = pytest.importorskip("peft", reason="peft is not installed (pip install -e .[dev])")

TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def folders(tiny_llama, tmp_path_factory):
    """A compressed model with biases, and the plain one of the same weights."""
    root = tmp_path_factory.mktemp("lora")
    source = tiny_llama(attention_bias=True, mlp_bias=True)
    folder = run(source, root / "compressed", quant=QuantConfig(bits=4))
    return folder, to_plain(folder, root / "plain", "float32")


@pytest.fixture
def compressed(folders):
    return rans_kernels.load(folders[0], dtype=torch.float32)


def plain(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def adapt(model, seed=0, **changes):
    """With an adapter that does something: peft's own begins as zero."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(**({"r": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | changes))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        adapted = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return adapted


def batch(rows=3, device="cpu"):
    return torch.randint(0, 300, (rows, 17), generator=torch.Generator().manual_seed(1)).to(device)


def gradients(model, ids):
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("options", [{}, {"bias": "all"}, {"target_modules": "all-linear", "use_rslora": True}])
def test_logits_and_gradients_are_those_over_the_plain_weights_to_the_bit(options, compressed, folders):
    over, under = adapt(compressed, **options), adapt(plain(folders[1]), **options)
    assert torch.equal(logits(over), logits(under))
    found, expected = gradients(over, batch()), gradients(under, batch())
    # biases of 14 layers more; all-linear is every layer but the head
    assert len(found) == {"bias": 26, "target_modules": 28}.get(next(iter(options), ""), 12)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(found[name].abs().max() > 0 for name in found)


@pytest.mark.parametrize(
    "settings",
    [
        {"quant": QuantConfig(granularity=Granularity.per_group, group_size=32)},
        {"quant": QuantConfig(embeddings=True, granularity=Granularity.per_tensor)},
        {"quant": QuantConfig(enabled=False), "lossless": Lossless.all, "dtype": "bfloat16"},
    ],
    ids=["groups", "tied", "lossless"],
)
def test_gradients_for_every_way_of_coding(settings, tiny_llama, tmp_path):
    folder = run(tiny_llama(tie_word_embeddings=True), tmp_path / "out", **settings)
    reference = plain(to_plain(folder, tmp_path / "plain", "float32"))
    found = gradients(adapt(rans_kernels.load(folder, dtype=torch.float32)), batch())
    expected = gradients(adapt(reference), batch())
    assert len(found) == 12
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_checkpointed_activations_give_the_same_gradients(compressed):
    expected = gradients(adapt(copy.deepcopy(compressed)), batch())
    model = adapt(compressed)
    model.gradient_checkpointing_enable()
    found = gradients(model, batch())
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_twenty_steps_of_training_lower_the_loss_and_leave_the_weights(compressed):
    before = {name: buffer.clone() for name, buffer in compressed.named_buffers() if "weight" in name}
    model, ids = adapt(compressed).train(), batch()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        losses.append(model(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] / 2
    after = {name.replace(".base_layer", ""): buffer for name, buffer in model.base_model.model.named_buffers()}
    assert len(before) == 70
    assert all(torch.equal(after[name], buffer) for name, buffer in before.items())


def test_an_adapter_saved_and_loaded_gives_equal_logits_on_either_model(compressed, folders, tmp_path):
    model = adapt(compressed)
    base, expected = logits(rans_kernels.load(folders[0], dtype=torch.float32)), logits(model)
    model.save_pretrained(tmp_path / "adapter")
    (stored,) = (tmp_path / "adapter").glob("*.safetensors")
    assert stored.stat().st_size < 30_000
    again = peft.PeftModel.from_pretrained(rans_kernels.load(folders[0], dtype=torch.float32), tmp_path / "adapter")
    assert torch.equal(logits(again), expected)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(plain(folders[1]), tmp_path / "adapter")), expected)
    with again.disable_adapter():
        assert torch.equal(logits(again), base)
    assert not torch.equal(expected, base)
    # by transformers alone
    native = plain(folders[0])
    native.load_adapter(tmp_path / "adapter")
    assert torch.equal(logits(native), expected)
    assert torch.equal(logits(again.unload()), base)


def test_two_adapters_on_one_base_change_places(compressed, tmp_path):
    first = logits(adapt(copy.deepcopy(compressed)))
    second = adapt(copy.deepcopy(compressed), seed=1)
    second.save_pretrained(tmp_path / "second")
    model = adapt(compressed)
    model.load_adapter(tmp_path / "second", "second")
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(second))
    assert not torch.equal(logits(second), first)


def test_the_trainer_of_transformers_takes_it(compressed, tmp_path):
    options = {"report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    arguments = TrainingArguments(str(tmp_path / "out"), max_steps=3, learning_rate=1e-2, **options)
    rows = [{"input_ids": row, "labels": row} for row in batch(8)]
    model = adapt(compressed)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    Trainer(model, arguments, train_dataset=rows).train()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


def test_bfloat16_trains_an_adapter_in_float32(folders):
    model = adapt(rans_kernels.load(folders[0], dtype=torch.bfloat16))
    found = gradients(model, batch())
    assert len(found) == 12
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() and grad.any() for grad in found.values())
    assert logits(model).dtype == torch.bfloat16


def test_a_streamed_base_runs_with_an_adapter_and_does_not_train_it(compressed, folders):
    with pytest.raises(BudgetError) as told:
        rans_kernels.load(folders[0], dtype=torch.float32, budget=0)
    streamed = rans_kernels.load(folders[0], dtype=torch.float32, budget=told.value.least / 1e9)
    assert len(streamed.streamer.placement.chunks) > 1
    over = adapt(streamed)
    assert torch.equal(logits(over), logits(adapt(compressed)))
    with pytest.raises(RuntimeError, match="no gradient passes a streamed layer"):
        gradients(over, batch())


def test_all_linear_means_the_same_layers_the_second_time(compressed):
    model = adapt(compressed, target_modules="all-linear")
    model.add_adapter("second", peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    first, second = (
        {name for name, _ in model.named_parameters() if f".{adapter}." in name} for adapter in ("default", "second")
    )
    assert len(first) == 28
    assert {name.replace(".default.", ".second.") for name in first} == second
    assert model.peft_config["second"].target_modules == model.peft_config["default"].target_modules


@pytest.mark.parametrize("merge", ["merge_and_unload", "merge_adapter"])
def test_merging_is_refused_in_one_line_and_changes_nothing(merge, compressed):
    model = adapt(compressed)
    expected = logits(model)
    with pytest.raises(ValueError, match="cannot be merged into compressed weights.*--to plain") as error:
        getattr(model, merge)()
    assert "\n" not in str(error.value)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "plain LoRA alone.*use_dora"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' works on float weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora' works on float weights"),
    ],
)
def test_what_needs_float_weights_is_refused_in_one_line(options, message, compressed):
    config = peft.LoraConfig(target_modules=TARGETS, **options)
    with pytest.raises(ValueError, match=message) as error:
        peft.get_peft_model(compressed, config)
    assert "\n" not in str(error.value)


def test_peft_that_was_there_before_learns_of_compressed_layers_too(monkeypatch):
    # as if ours had not been: peft's own hook, and rans_kernels imported anew
    monkeypatch.setattr(peft.LoraModel, "_prepare_model", lambda *arguments: None)
    monkeypatch.delitem(sys.modules, "rans_kernels.lora")
    importlib.reload(rans_kernels)
    assert peft.LoraModel._prepare_model.__module__ == "rans_kernels.lora"


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [2, 12], ids=["fused", "decoded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_on_a_gpu_are_as_good_as_those_over_plain_weights(rows, dtype, folders):
    ids = batch(rows, "cuda")
    found = gradients(adapt(rans_kernels.load(folders[0], device="cuda", dtype=dtype)), ids)
    plainly, truth = (gradients(adapt(plain(folders[1], kind).to("cuda")), ids) for kind in (dtype, torch.float32))
    assert len(found) == 12
    for name, exact in truth.items():
        bound = 2 * (plainly[name] - exact).norm() + 1e-4 * exact.norm()
        assert (found[name] - exact).norm() <= bound, name


@pytest.mark.gpu
def test_an_adapter_learns_on_a_gpu(folders):
    model = adapt(rans_kernels.load(folders[0], device="cuda", dtype=torch.bfloat16)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids, losses = batch(8, "cuda"), []
    for _ in range(20):
        losses.append(model(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] * 0.9
