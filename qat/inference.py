"""Where models run for evaluation, and greedy generation that two models can be compared by."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from rans_kernels.errors import ABSENT
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

LOGITS = 1 << 26
"""Logits of one model that exist at once."""

LIKELIEST = 4
"""Tokens whose logits a trace keeps."""


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
    except ABSENT as error:
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


def rows_at_once(model: PreTrainedModel, length: int, batch_size: int) -> int:
    """Rows of `length` tokens to read at once, at most `batch_size`, lest their logits fill the memory."""
    return max(1, min(batch_size, LOGITS // (length * model.config.vocab_size)))


class Trace(NamedTuple):
    """What a model generated greedily for B prompts, N tokens each, and what it saw at every step; on the CPU."""

    tokens: Tensor
    """int64 [B, N]."""
    margins: Tensor
    """p(1st) - p(2nd), float32 [B, N]."""
    prints: Tensor
    """`fingerprint` of the logits, int64 [B, N]: whether two models' are equal to the bit, without keeping them."""
    likeliest: Tensor
    """The LIKELIEST tokens with the largest logits, int64 [B, N, k]."""
    logits: Tensor
    """Theirs, float32 [B, N, k]."""


def read_logits(logits: Tensor) -> Trace:
    """The trace of steps whose logits [..., V] are given."""
    logits = logits.float()
    top = logits.topk(min(LIKELIEST, logits.shape[-1]), dim=-1)
    # argmax, not topk's first: of equal logits the lowest token counts
    parts = (logits.argmax(-1), top_margin(logits), fingerprint(logits), top.indices, top.values)
    return Trace(*(part.cpu() for part in parts))


def fingerprint(logits: Tensor) -> Tensor:
    """A hash of the bits of float32 logits [..., V], int64 [...]; zeros of both signs are alike, as for torch.equal."""
    bits = (logits + 0.0).view(torch.int32).to(torch.int64)
    return (bits * _factors(logits.shape[-1], logits.device)).sum(-1)


@lru_cache(maxsize=4)
def _factors(length: int, device: torch.device) -> Tensor:
    """Random odd numbers: a single logit that differs always shows, and sums wrap in any order alike."""
    generator = torch.Generator().manual_seed(length)
    return (torch.randint(2**62, (length,), generator=generator) * 2 + 1).to(device)


class _Recorder(LogitsProcessor):
    """Notes what it sees at every step and changes nothing."""

    def __init__(self) -> None:
        self.steps: list[Trace] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps.append(read_logits(scores))
        return scores


def join_steps(steps: Sequence[Trace]) -> Trace:
    """One trace [B, N] from those of N steps, [B] each."""
    return Trace(*(torch.stack(parts, dim=1) for parts in zip(*steps, strict=True)))


def join_prompts(traces: Sequence[Trace]) -> Trace:
    """One trace from those of several batches."""
    return Trace(*(torch.cat(parts) for parts in zip(*traces, strict=True)))


def generate_greedy(
    model: PreTrainedModel,
    prompts: Tensor,
    new_tokens: int,
    batch_size: int = 16,
    advance: Callable[[int], Any] = lambda done: None,
) -> tuple[Tensor, Tensor]:
    """`trace_greedy`, tokens and margins alone: the new tokens, int64 [B, N], and p(1st) - p(2nd) at each of them."""
    trace = trace_greedy(model, prompts, new_tokens, batch_size, advance)
    return trace.tokens, trace.margins


@contextmanager
def repeatable_attention() -> Iterator[None]:
    """Leave cuDNN's attention out, which torch prefers on Hopper: it does not promise the same bits twice.

    It also plans every length of a cache anew, for tens of milliseconds of the host.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


# not inference_mode: what a model keeps (rotary tables) must serve training too
@torch.no_grad()
def trace_greedy(
    model: PreTrainedModel,
    prompts: Tensor,
    new_tokens: int,
    batch_size: int = 16,
    advance: Callable[[int], Any] = lambda done: None,
    **options: Any,
) -> Trace:
    """Continue every prompt by its most probable tokens, through `generate` with a KV cache.

    The model's own generation settings (sampling, penalties, stop tokens) are left out: the next token is the argmax of
    the logits and nothing else, and an end-of-text token is a token like any other.

    Args:
        model: on any device, in eval mode.
        prompts: int64 [B, T], without padding.
        new_tokens: N.
        batch_size: prompts at once. A row may depend on it in its last bits: use the same one for two models.
        advance: told how many prompts each batch has finished.
        options: more for `generate`, as cache_implementation.
    """
    generate: Any = model.generate
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        traces = []
        for batch in prompts.split(batch_size):
            recorder = _Recorder()
            output = generate(
                batch.to(model.device),
                attention_mask=torch.ones_like(batch, device=model.device),
                do_sample=False,
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                use_cache=True,
                logits_processor=LogitsProcessorList([recorder]),
                **options,
            )
            trace = join_steps(recorder.steps)
            traces.append(trace._replace(tokens=output[:, batch.shape[1] :].cpu()))
            advance(len(batch))
    finally:
        model.generation_config = own
    return join_prompts(traces)


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
