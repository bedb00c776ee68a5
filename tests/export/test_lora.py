"""LoRA adapters of peft are trained on compressed models as on any other; the compressed weights stay what they are."""

import importlib
import sys

import pytest
import rans_kernels
import torch

from qat.config import QuantConfig
from tests.export.helpers import logits, run

peft = pytest.importorskip("peft", reason="peft is not installed (pip install -e .[dev])")


@pytest.fixture(scope="module")
def folder(tiny_llama, tmp_path_factory):
    source = tiny_llama(tie_word_embeddings=True, attention_bias=True)
    return run(source, tmp_path_factory.mktemp("lora") / "model", quant=QuantConfig(bits=4, embeddings=True))


def adapted(folder, device="cpu", **changes):
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", **({"target_modules": ["q_proj", "down_proj"]} | changes))
    return peft.get_peft_model(rans_kernels.load(folder, device), config)


def losses(model, steps=20):
    """Of so many steps on one batch."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-2)
    ids = torch.randint(0, 300, (4, 24), generator=torch.Generator().manual_seed(0)).to(model.device)
    found = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        found.append(loss.item())
    return found


def test_an_adapter_learns_is_saved_and_is_loaded_again(folder, tmp_path):
    model = adapted(folder)
    base = {name: value.clone() for name, value in rans_kernels.load(folder).state_dict().items()}
    trained = {name.partition(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 4 and all(name.endswith(("q_proj", "down_proj")) for name in trained)
    assert torch.equal(logits(model), logits(rans_kernels.load(folder)))
    found = losses(model)
    assert found[-1] < 0.7 * found[0]
    stored = {name.replace(".base_layer", ""): value for name, value in model.base_model.model.state_dict().items()}
    assert all(torch.equal(stored[name], value) for name, value in base.items())
    model.save_pretrained(tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").glob("*.safetensors")} == {"adapter_model.safetensors"}
    again = peft.PeftModel.from_pretrained(rans_kernels.load(folder), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(rans_kernels.load(folder)))


def test_gradients_of_an_adapter_are_those_above_plain_weights(folder, tmp_path):
    from transformers import AutoModelForCausalLM

    from qat.interop import to_plain

    compressed = adapted(folder)
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"])
    plain = AutoModelForCausalLM.from_pretrained(to_plain(folder, tmp_path / "plain", "float32"))
    plain = peft.get_peft_model(plain, config)
    ids = torch.arange(48).reshape(2, 24)
    for model in (compressed, plain):
        model.eval()(input_ids=ids, labels=ids).loss.backward()
    expected = dict(plain.named_parameters())
    seen = 0
    for name, parameter in compressed.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, expected[name].grad)
            seen += "lora_B" in name and bool(parameter.grad.any())
    assert seen == 4


def test_merging_and_variants_that_need_the_weight_are_one_line(folder):
    for change in (adapted(folder).merge_and_unload, lambda: adapted(folder, use_dora=True)):
        with pytest.raises(ValueError, match=r"compressed (weights|layers)") as error:
            change()
        assert "\n" not in str(error.value)


def test_peft_may_be_imported_first(monkeypatch):
    # as if ours had not been: peft's own configs, and rans_kernels imported anew
    monkeypatch.setattr(peft.LoraConfig, "__post_init__", lambda config: setattr(config, "_custom_modules", None))
    monkeypatch.delitem(sys.modules, "rans_kernels.lora")
    importlib.reload(rans_kernels)
    assert rans_kernels.CompressedLinear in peft.LoraConfig()._custom_modules


@pytest.mark.gpu
def test_an_adapter_learns_on_a_gpu(folder):
    found = losses(adapted(folder, "cuda"))
    assert found[-1] < 0.7 * found[0]
