"""The distillation loss: token means, chunks, memory, precision."""

import weakref

import pytest
import torch
from torch import Tensor, nn

from qat.distill import distillation_loss, hidden_error, token_losses, token_sums

VOCABULARY = 13


class Models:
    """Hidden states of student [2, tokens, 5] and teacher [2, tokens, 7], their heads, and targets."""

    def __init__(self, tokens: int, dtype: torch.dtype = torch.float64):
        generator = torch.Generator().manual_seed(tokens)
        self.student = torch.randn(2, tokens, 5, generator=generator, dtype=dtype).requires_grad_()
        self.teacher = torch.randn(2, tokens, 7, generator=generator, dtype=dtype)
        self.student_head = nn.Linear(5, VOCABULARY, bias=False, dtype=dtype)
        self.teacher_head = nn.Linear(7, VOCABULARY, bias=False, dtype=dtype)
        self.targets = torch.randint(VOCABULARY, (2, tokens), generator=generator)

    @property
    def arguments(self) -> tuple:
        return self.student, self.teacher, self.student_head, self.teacher_head, self.targets


def naive(models: Models, temperature: float) -> tuple[Tensor, Tensor]:
    """Mean KL * temperature^2 and mean cross-entropy, written token by token, straight from the definitions."""
    kl, ce, tokens = 0.0, 0.0, 0
    for student, teacher, targets in zip(models.student, models.teacher, models.targets, strict=True):
        for s, t, target in zip(student, teacher, targets, strict=True):
            z, y = models.student_head(s).double(), models.teacher_head(t).double()
            p = (y / temperature).exp() / (y / temperature).exp().sum()
            q = (z / temperature).exp() / (z / temperature).exp().sum()
            kl = kl + (p * (p / q).log()).sum() * temperature**2
            ce = ce - (z.exp() / z.exp().sum())[target].log()
            tokens += 1
    return kl / tokens, ce / tokens


@pytest.mark.parametrize("tokens", [1, 7, 63])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_loss_is_the_mean_over_tokens_of_the_definition(tokens: int, temperature: float) -> None:
    models = Models(tokens)
    result = distillation_loss(
        *models.arguments, kl_weight=0.7, ce_weight=0.3, temperature=temperature, chunk_tokens=10
    )
    kl, ce = naive(models, temperature)
    torch.testing.assert_close(result.kl, kl, rtol=1e-12, atol=0)
    torch.testing.assert_close(result.ce, ce, rtol=1e-12, atol=0)
    torch.testing.assert_close(result.loss, 0.7 * kl + 0.3 * ce, rtol=1e-12, atol=0)


def test_longer_windows_of_the_same_tokens_leave_the_loss_as_it_is() -> None:
    # a mean over the batch alone would grow with the length
    models = Models(9)
    short = distillation_loss(*models.arguments)
    models.student = models.student.repeat(1, 4, 1)
    models.teacher, models.targets = models.teacher.repeat(1, 4, 1), models.targets.repeat(1, 4)
    torch.testing.assert_close(distillation_loss(*models.arguments).loss, short.loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("chunk_tokens", [1, 5, 125, 126, 1000])
def test_chunks_change_neither_loss_nor_gradients(chunk_tokens: int) -> None:
    models = Models(63)
    weights = {"kl_weight": 0.6, "ce_weight": 0.4, "temperature": 1.5}
    leaves = [models.student, models.student_head.weight]
    result = distillation_loss(*models.arguments, **weights, chunk_tokens=chunk_tokens)
    gradients = torch.autograd.grad(result.loss, leaves)
    kl, ce = naive(models, 1.5)
    expected = torch.autograd.grad(0.6 * kl + 0.4 * ce, leaves)
    torch.testing.assert_close(result.loss, 0.6 * kl + 0.4 * ce, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=1e-12)


def test_compiled_losses_are_those_of_eager_ones() -> None:
    models = Models(63)
    leaves = [models.student, models.student_head.weight]
    found = []
    for losses in (token_losses, torch.compile(token_losses)):
        result = distillation_loss(*models.arguments, kl_weight=0.6, ce_weight=0.4, chunk_tokens=32, losses=losses)
        found.append((*result, *torch.autograd.grad(result.loss, leaves)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)


def test_logits_of_one_chunk_exist_at_a_time() -> None:
    models, chunk_tokens = Models(257), 32
    living: weakref.WeakSet = weakref.WeakSet()
    rows: list[int] = []

    def counting(head: nn.Linear):
        def call(hidden: Tensor) -> Tensor:
            logits = head(hidden)
            living.add(logits.untyped_storage())
            rows.append(len(hidden))
            # student and teacher
            assert len(living) <= 2
            return logits

        return call

    arguments = list(models.arguments)
    arguments[2:4] = counting(models.student_head), counting(models.teacher_head)
    distillation_loss(*arguments, ce_weight=1.0, chunk_tokens=chunk_tokens).loss.backward()
    token_sums(*arguments, chunk_tokens=chunk_tokens)
    assert max(rows) == chunk_tokens
    # forward, backward and validation each see every token, in student and teacher
    assert sum(rows) == 3 * 2 * models.targets.numel()
    assert not living


def test_without_a_teacher_the_loss_is_the_cross_entropy() -> None:
    models = Models(7)
    result = distillation_loss(
        models.student, None, models.student_head, None, models.targets, kl_weight=0.0, ce_weight=1.0
    )
    _, ce = naive(models, 1.0)
    torch.testing.assert_close(result.loss, ce, rtol=1e-12, atol=0)
    assert result.kl == 0


def test_the_teacher_gets_no_gradient() -> None:
    models = Models(7)
    distillation_loss(*models.arguments).loss.backward()
    assert models.teacher_head.weight.grad is None
    assert models.student_head.weight.grad is not None


def test_half_precision_logits_are_summed_in_float32() -> None:
    models = Models(63, torch.bfloat16)
    result = distillation_loss(*models.arguments, ce_weight=1.0)
    assert result.kl.dtype == torch.float32
    # the definition in float64 on the same bfloat16 logits
    kl, ce = naive(models, 1.0)
    torch.testing.assert_close((result.kl.double(), result.ce.double()), (kl, ce), rtol=1e-5, atol=0)


def test_the_error_of_hidden_states_is_relative_to_each_token_of_each_layer() -> None:
    torch.manual_seed(0)
    teacher = [torch.randn(2, 7, 5, dtype=torch.float64) for _ in range(3)]
    shares = torch.tensor([0.1, 0.2, 0.3])
    # of the length of every token's own state, in any direction
    student = [
        t + share * t.norm(dim=-1, keepdim=True) * torch.eye(5)[0] for t, share in zip(teacher, shares, strict=True)
    ]
    assert hidden_error(student, teacher).item() == pytest.approx(shares.square().mean().item(), rel=1e-6)
    # one token a thousand times as long does not drown the others
    loud = [t * torch.tensor([1000.0, 1, 1, 1, 1, 1, 1]).unsqueeze(-1) for t in teacher]
    far = [t + share * t.norm(dim=-1, keepdim=True) * torch.eye(5)[0] for t, share in zip(loud, shares, strict=True)]
    assert hidden_error(far, loud).item() == pytest.approx(shares.square().mean().item(), rel=1e-6)
    assert hidden_error(teacher, teacher) == 0
    with pytest.raises(ValueError):
        hidden_error(student[:2], teacher)


def test_equal_models_have_no_divergence() -> None:
    models = Models(63)
    student = models.student.detach()
    head = models.student_head
    kl, _, agreeing, tokens = token_sums(student, student, head, head, models.targets, chunk_tokens=10)
    assert (kl, agreeing, tokens) == (0, 126, 126)


def test_validation_sums_count_tokens_and_agreement() -> None:
    models = Models(63)
    kl, ce, agreeing, tokens = token_sums(*models.arguments, chunk_tokens=10).tolist()
    expected_kl, expected_ce = (x.item() for x in naive(models, 1.0))
    same = models.student_head(models.student).argmax(-1) == models.teacher_head(models.teacher).argmax(-1)
    assert (agreeing, tokens) == (int(same.sum()), 126)
    assert kl / tokens == pytest.approx(expected_kl, rel=1e-12)
    assert ce / tokens == pytest.approx(expected_ce, rel=1e-12)
