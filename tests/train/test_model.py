"""Loading base models: whole or not at all."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    Cohere2Config,
    Gemma2Config,
    GraniteConfig,
    PreTrainedConfig,
)

from qat.errors import UserError
from qat.model import (
    check_output_logits,
    hidden_states,
    load_model,
    load_tokenizer,
    load_weights,
    output_logits,
)


@pytest.fixture
def model_folder(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny / "model", tmp_path / "model"))


def refusal(path: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        load_model(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def edit_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_loaded_model_has_the_weights_of_the_file_in_float32(tiny: Path) -> None:
    model = load_model(tiny / "model")
    stored = load_file(tiny / "model" / "model.safetensors")
    assert not model.training
    assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in stored.items())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.dtype for p in load_model(tiny / "model", torch.bfloat16).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("path", ["no/such/folder", "./nothing", "/nothing"])
def test_a_folder_that_is_not_there_is_named(path: str) -> None:
    assert "no such folder" in refusal(path)


def test_a_name_that_the_hub_cannot_give_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refusal("nobody/nothing")


def test_a_file_is_no_model(tiny: Path) -> None:
    assert "is a file" in refusal(tiny / "train.txt")


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    refusal(tmp_path)


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    CLIPVisionConfig().save_pretrained(tmp_path)
    refusal(tmp_path)


def test_missing_weights_are_refused(model_folder: Path) -> None:
    (model_folder / "model.safetensors").unlink()
    refusal(model_folder)


def test_truncated_weights_are_refused(model_folder: Path) -> None:
    weights = model_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refusal(model_folder)


def test_a_missing_weight_is_named_and_not_made_up(model_folder: Path) -> None:
    weights = load_file(model_folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, model_folder / "model.safetensors", metadata={"format": "pt"})
    assert "missing model.norm.weight" in refusal(model_folder)


def test_an_unexpected_weight_is_named(model_folder: Path) -> None:
    weights = load_file(model_folder / "model.safetensors") | {"model.extra": torch.zeros(3)}
    save_file(weights, model_folder / "model.safetensors", metadata={"format": "pt"})
    assert "unexpected model.extra" in refusal(model_folder)


def test_weights_of_another_shape_are_refused(model_folder: Path) -> None:
    edit_config(model_folder, intermediate_size=64)
    refusal(model_folder)


def test_a_quantised_checkpoint_is_refused(model_folder: Path) -> None:
    edit_config(model_folder, quantization_config={"quant_method": "anything"})
    assert "quantised already" in refusal(model_folder)


def test_a_missing_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=str(tmp_path)):
        load_tokenizer(tmp_path)


def test_a_model_from_config_and_weights_computes_the_same(tiny: Path, tmp_path: Path) -> None:
    model = load_model(tiny / "model")
    model.config.save_pretrained(tmp_path)
    again = load_weights(tmp_path, model.state_dict())
    ids = torch.randint(300, (2, 9))
    assert torch.equal(model(ids).logits, again(ids).logits)


def test_hidden_states_are_those_that_transformers_collects(tiny: Path) -> None:
    model = load_model(tiny / "model")
    ids = torch.randint(300, (2, 9))
    expected = model(ids, output_hidden_states=True).hidden_states[1:]
    for _ in range(2):
        # no hook stays behind
        found = hidden_states(model, ids, layers=True)
        assert len(found) == len(expected) and all(map(torch.equal, found, expected))
    assert torch.equal(hidden_states(model, ids)[0], expected[-1])


SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**SMALL, final_logit_softcapping=0.1),
        Cohere2Config(**SMALL, logit_scale=0.25),
        GraniteConfig(**SMALL, logits_scaling=8.0),
    ],
    ids=lambda config: config.model_type,
)
def test_what_is_done_behind_the_output_head_is_done_here_too(config: PreTrainedConfig) -> None:
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(50, (2, 9))
    hidden = model.base_model(ids).last_hidden_state
    torch.testing.assert_close(output_logits(model, hidden), model(ids).logits)
    check_output_logits(model)


def test_an_architecture_with_unknown_changes_to_its_logits_is_refused_by_name(tiny: Path) -> None:
    model = load_model(tiny / "model")

    def doubled(_module: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        output.logits = output.logits * 2
        return output

    model.register_forward_hook(doubled)
    with pytest.raises(UserError, match="LlamaForCausalLM"):
        check_output_logits(model)
