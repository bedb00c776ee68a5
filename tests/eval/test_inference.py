from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

from qat.divergence import top_margin
from qat.errors import UserError
from qat.inference import generate_greedy, pick_device, pick_dtype, repeatable_attention
from qat.model import load_model


@pytest.fixture(scope="module")
def model(base: Path) -> PreTrainedModel:
    return load_model(base)


@pytest.fixture
def prompts() -> torch.Tensor:
    return torch.randint(300, (5, 9), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_tokens_and_margins_are_those_of_the_argmax_without_a_cache(
    model: PreTrainedModel, prompts: torch.Tensor
) -> None:
    ids, margins = prompts, []
    for _ in range(7):
        logits = model(ids, use_cache=False).logits[:, -1]
        margins.append(top_margin(logits))
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    tokens, found = generate_greedy(model, prompts, 7, batch_size=2)
    assert torch.equal(tokens, ids[:, 9:])
    torch.testing.assert_close(found, torch.stack(margins, dim=1), rtol=1e-3, atol=1e-5)


def test_generation_settings_of_the_folder_change_nothing(model: PreTrainedModel, prompts: torch.Tensor) -> None:
    expected, _ = generate_greedy(model, prompts, 7)
    # stops at the first token it would make, samples, and punishes repetition
    own = GenerationConfig(eos_token_id=expected[0, :1].tolist(), repetition_penalty=9.0, do_sample=True, top_k=2)
    before, model.generation_config = model.generation_config, own
    try:
        assert torch.equal(generate_greedy(model, prompts, 7)[0], expected)
        assert model.generation_config is own
    finally:
        model.generation_config = before


def test_progress_adds_up_to_the_prompts(model: PreTrainedModel, prompts: torch.Tensor) -> None:
    done: list[int] = []
    generate_greedy(model, prompts, 1, batch_size=2, advance=done.append)
    assert done == [2, 2, 1]


def test_repeatable_attention_leaves_settings_as_they_were() -> None:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with pytest.raises(ValueError), repeatable_attention():
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        raise ValueError
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


def test_auto_on_the_cpu_is_float32() -> None:
    assert pick_dtype("auto", torch.device("cpu")) is torch.float32
    assert pick_dtype("float16", torch.device("cpu")) is torch.float16


@pytest.mark.parametrize("name", ["gpu", "cpuu", "cuda:99"])
def test_a_device_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(UserError, match=f"device={name}"):
        pick_device(name)


def test_an_unknown_dtype_is_named() -> None:
    with pytest.raises(UserError, match="dtype=int8"):
        pick_dtype("int8", torch.device("cpu"))
