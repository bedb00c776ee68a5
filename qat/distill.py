"""Distillation and cross-entropy over the vocabulary without ever holding the logits of a whole batch.

Tokens go through the output head in chunks; each chunk's logits are dropped after its loss and made again for its
gradient. At a vocabulary of 32,000, two models and 32,768 tokens a step that is 0.5 GB instead of 8 GB, for one more
product with the head. All means are over tokens, in nats: `F.kl_div(..., reduction="batchmean")` on [B, T, V] would
divide by B alone and be T times too large.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]
"""Hidden states [T, D] -> logits [T, V]."""
Losses = Callable[[Tensor, Tensor | None, Tensor, float], tuple[Tensor, Tensor]]
"""`token_losses`, or what a compiler made of it."""


class Distillation(NamedTuple):
    """Means over tokens, in nats; `kl` and `ce` carry no gradient, `kl` is 0 without a teacher."""

    loss: Tensor
    kl: Tensor
    ce: Tensor


def token_losses(
    student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Sums over tokens of KL(teacher || student) * temperature^2 and of the cross-entropy with `targets`.

    The KL is between the distributions at `temperature`; its square keeps the size of the gradient (Hinton et al.
    2015, arXiv 1503.02531). The cross-entropy is at temperature 1.

    Args:
        student_logits: [T, V], any float dtype; the arithmetic is float32 or wider.
        teacher_logits: [T, V], or None for a KL of 0.
        targets: int64 [T].
        temperature: above 0.
    """
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    log_q = F.log_softmax(student_logits.to(dtype), dim=-1)
    ce = F.nll_loss(log_q, targets, reduction="sum")
    if teacher_logits is None:
        return torch.zeros_like(ce), ce
    if temperature != 1:
        log_q = F.log_softmax(student_logits.to(dtype) / temperature, dim=-1)
    log_p = F.log_softmax(teacher_logits.to(dtype) / temperature, dim=-1)
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True) * temperature**2, ce


def distillation_loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor | None,
    student_head: Head,
    teacher_head: Head | None,
    targets: Tensor,
    kl_weight: float = 1.0,
    ce_weight: float = 0.0,
    temperature: float = 1.0,
    chunk_tokens: int = 2048,
    losses: Losses = token_losses,
) -> Distillation:
    """kl_weight * KL(teacher || student) * temperature^2 + ce_weight * cross-entropy, means over tokens.

    Args:
        student_hidden: [..., D], with gradient.
        teacher_hidden: [..., D'], or None to leave the KL out.
        student_head: gives the student's logits.
        teacher_head: gives the teacher's logits; None goes with `teacher_hidden`.
        targets: int64 [...], the next token of each position.
        kl_weight: of the KL term.
        ce_weight: of the cross-entropy.
        temperature: of the KL term.
        chunk_tokens: tokens whose logits exist at once.
        losses: of a chunk. As it is, its dozen passes over the logits take a third of a small model's step.
    """

    def chunk_loss(student: Tensor, teacher: Tensor | None, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        teacher_logits = None
        if teacher is not None and teacher_head is not None:
            with torch.no_grad():
                teacher_logits = teacher_head(teacher)
        kl, ce = losses(student_head(student), teacher_logits, target, temperature)
        # a term of weight 0 has no part in the graph: its backward would be a [T, V] tensor of zeros
        terms = [weight * term for weight, term in ((kl_weight, kl), (ce_weight, ce)) if weight]
        return sum(terms, start=torch.zeros_like(ce)), kl.detach(), ce.detach()

    sums = [
        torch.stack(checkpoint(chunk_loss, *chunk, use_reentrant=False, preserve_rng_state=False))
        for chunk in _chunks(student_hidden, teacher_hidden, targets, chunk_tokens)
    ]
    return Distillation(*(torch.stack(sums).sum(dim=0) / targets.numel()))


def hidden_error(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Squared distance of hidden states over the squared length of the teacher's, mean over layers and tokens.

    Relative token by token, since some tokens have states many times longer than others (arXiv 2402.17762).

    Args:
        student: [..., D] of each layer, with gradient; the arithmetic is float32 or wider.
        teacher: likewise, of the same shapes.
    """
    errors = []
    for ours, theirs in zip(student, teacher, strict=True):
        dtype = torch.promote_types(ours.dtype, torch.float32)
        theirs = theirs.to(dtype)
        distance = (ours.to(dtype) - theirs).square().sum(dim=-1)
        errors.append((distance / theirs.square().sum(dim=-1).clamp_min(torch.finfo(dtype).tiny)).mean())
    return torch.stack(errors).mean()


@torch.no_grad()
def token_sums(
    student_hidden: Tensor,
    teacher_hidden: Tensor | None,
    student_head: Head,
    teacher_head: Head | None,
    targets: Tensor,
    chunk_tokens: int = 2048,
) -> Tensor:
    """Sums for validation, float64 [4] on the CPU: KL, cross-entropy, tokens on whose top choice both agree, tokens.

    Arguments as `distillation_loss`, at temperature 1. Without a teacher the first and third are 0.
    """

    def chunk_sums(student: Tensor, teacher: Tensor | None, target: Tensor) -> Tensor:
        logits = student_head(student)
        teacher_logits = None if teacher is None or teacher_head is None else teacher_head(teacher)
        kl, ce = token_losses(logits, teacher_logits, target)
        agreeing = 0
        if teacher_logits is not None:
            agreeing = int((logits.argmax(dim=-1) == teacher_logits.argmax(dim=-1)).sum())
        return torch.tensor([kl.item(), ce.item(), agreeing, target.numel()], dtype=torch.float64)

    total = torch.zeros(4, dtype=torch.float64)
    for chunk in _chunks(student_hidden, teacher_hidden, targets, chunk_tokens):
        total += chunk_sums(*chunk)
    return total


def _chunks(
    student_hidden: Tensor, teacher_hidden: Tensor | None, targets: Tensor, chunk_tokens: int
) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """Flat runs of at most `chunk_tokens` tokens: student [T, D], teacher [T, D'] or None, targets [T]."""
    student = student_hidden.flatten(0, -2).split(chunk_tokens)
    target = targets.flatten().split(chunk_tokens)
    teacher = [None] * len(target) if teacher_hidden is None else teacher_hidden.flatten(0, -2).split(chunk_tokens)
    yield from zip(student, teacher, target, strict=True)
