"""Where models run for evaluation, and greedy generation that two models can be compared by."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from qat.divergence import top_margin
from qat.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> torch.device:
    """The device a config value names; auto is the GPU where there is one, else the CPU.

    Raises:
        UserError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device={name} is not there ({reason}): auto takes what is") from error
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype a config value names; auto is float32 on the CPU, and on a GPU bfloat16 where it has it.

    Raises:
        UserError: not a name in DTYPES.
    """
    if name == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    if name not in DTYPES:
        raise UserError(f"dtype={name}: give auto or one of {', '.join(DTYPES)}")
    return DTYPES[name]


class _Margins(LogitsProcessor):
    """Notes the top-1 margin of every step and changes nothing."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps.append(top_margin(scores))
        return scores


# not inference_mode: what a model keeps (rotary tables) must serve training too
@torch.no_grad()
def generate_greedy(
    model: PreTrainedModel,
    prompts: Tensor,
    new_tokens: int,
    batch_size: int = 16,
    advance: Callable[[int], Any] = lambda done: None,
) -> tuple[Tensor, Tensor]:
    """Continue every prompt by its most probable tokens, through `generate` with a KV cache.

    The model's own generation settings (sampling, penalties, stop tokens) are left out: the next token is the argmax of
    the logits and nothing else, and an end-of-text token is a token like any other.

    Args:
        model: on any device, in eval mode.
        prompts: int64 [B, T], without padding.
        new_tokens: N.
        batch_size: prompts at once. A row may depend on it in its last bits: use the same one for two models.
        advance: told how many prompts each batch has finished.

    Returns:
        The new tokens, int64 [B, N], and p(1st) - p(2nd) at each of them, float32 [B, N], both on the CPU.
    """
    generate: Any = model.generate
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        tokens, margins = [], []
        for batch in prompts.split(batch_size):
            noted = _Margins()
            output = generate(
                batch.to(model.device),
                attention_mask=torch.ones_like(batch, device=model.device),
                do_sample=False,
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                use_cache=True,
                logits_processor=LogitsProcessorList([noted]),
            )
            tokens.append(output[:, batch.shape[1] :].cpu())
            margins.append(torch.stack(noted.steps, dim=1).cpu())
            advance(len(batch))
    finally:
        model.generation_config = own
    return torch.cat(tokens), torch.cat(margins)


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """What each token adds to the text, joined the text of all; of a character in several tokens the last has it."""
    pieces, done = [], ""
    for end in range(1, len(ids) + 1):
        text = str(tokenizer.decode(ids[:end]))
        # a character whose bytes are not all there yet
        shown = done if text.endswith("\ufffd") and end < len(ids) else text
        pieces.append(shown[len(done) :])
        done = shown
    return pieces
