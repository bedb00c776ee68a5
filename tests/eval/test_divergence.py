import math

import numpy as np
import pytest
import torch
from torch import Tensor

from qat.divergence import (
    PERCENTILES,
    LogitComparison,
    compare_tokens,
    describe,
    expected_agreement,
    first_divergence,
    kl_divergence,
    log_probabilities,
    negative_log_likelihood,
    perplexity,
    perplexity_ratio,
    same_top,
    survival_curve,
    top_margin,
)


def logits(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize(("tokens", "vocab"), [(1, 2), (63, 257), (5, 8192)])
def test_kl_is_the_definition_summed_over_the_vocabulary(tokens: int, vocab: int) -> None:
    p, q = logits(tokens, vocab), logits(tokens, vocab, seed=1)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p.double()), torch.distributions.Categorical(logits=q.double())
    )
    torch.testing.assert_close(
        kl_divergence(log_probabilities(p), log_probabilities(q)), expected, rtol=1e-12, atol=1e-12
    )


def test_kl_of_equal_logits_is_exactly_zero_and_of_shifted_ones_below_the_stated_floor() -> None:
    log_p = log_probabilities(logits(50, 8192))
    shifted = (logits(50, 8192).double() + math.pi).log_softmax(-1)
    assert kl_divergence(log_p, log_p).eq(0).all()
    assert kl_divergence(log_p, shifted).max() < 1e-12
    single = logits(50, 8192).log_softmax(-1)
    assert kl_divergence(single, (logits(50, 8192) + math.pi).log_softmax(-1)).max() < 1e-5


def test_kl_sees_changes_far_below_what_float32_resolves() -> None:
    # to second order KL is half the variance of the change
    p, change = logits(20, 300).double(), 1e-5 * logits(20, 300, seed=1).double()
    weights = p.softmax(-1)
    variance = (weights * change**2).sum(-1) - (weights * change).sum(-1) ** 2
    found = kl_divergence(log_probabilities(p), log_probabilities(p + change))
    torch.testing.assert_close(found, variance / 2, rtol=1e-3, atol=0)


def test_impossible_tokens_count_nothing_where_both_rule_them_out_and_infinity_where_only_q_does() -> None:
    p, q = torch.tensor([0.0, 1.0, -math.inf]), torch.tensor([1.0, 0.0, -math.inf])
    both = kl_divergence(log_probabilities(p), log_probabilities(q))
    assert both == pytest.approx(kl_divergence(log_probabilities(p[:2]), log_probabilities(q[:2])).item())
    assert kl_divergence(log_probabilities(q.nan_to_num(neginf=0.0)), log_probabilities(p)) == math.inf


def test_ear_is_one_minus_total_variation_and_symmetric() -> None:
    log_p, log_q = log_probabilities(logits(63, 257)), log_probabilities(logits(63, 257, seed=1))
    variation = (log_p.exp() - log_q.exp()).abs().sum(-1) / 2
    torch.testing.assert_close(expected_agreement(log_p, log_q), 1 - variation, rtol=1e-12, atol=0)
    assert torch.equal(expected_agreement(log_p, log_q), expected_agreement(log_q, log_p))
    assert expected_agreement(log_p, log_p).max() <= 1


def test_top_margin_is_zero_on_a_tie_and_one_where_nothing_else_is_possible() -> None:
    margin = top_margin(torch.tensor([[2.0, 2.0, 1.0], [0.0, math.log(3), -math.inf], [0.0, 200.0, 0.0]]))
    torch.testing.assert_close(margin, torch.tensor([0.0, 0.5, 1.0]))


def test_equal_top_logits_are_won_by_the_lowest_token() -> None:
    tie = torch.tensor([[1.0, 5.0, 5.0]])
    assert same_top(tie, torch.tensor([[0.0, 1.0, 0.0]])).item()
    assert not same_top(tie, torch.tensor([[0.0, 0.0, 1.0]])).item()


@pytest.mark.parametrize(("rows", "length"), [(1, 1), (1, 63), (40, 7), (9, 257)])
def test_first_divergence_is_where_a_scan_stops(rows: int, length: int) -> None:
    generator = torch.Generator().manual_seed(rows + length)
    reference = torch.randint(100, (rows, length), generator=generator)
    other = torch.where(torch.rand(rows, length, generator=generator) < 0.1, reference + 1, reference)
    scan = [next((i for i in range(length) if a[i] != b[i]), length) for a, b in zip(reference, other, strict=True)]
    assert first_divergence(reference, other).tolist() == scan
    survival = survival_curve(torch.tensor(scan), length)
    assert survival.tolist() == pytest.approx([sum(at > n for at in scan) / rows for n in range(length)])
    assert survival[-1] == sum(torch.equal(a, b) for a, b in zip(reference, other, strict=True)) / rows


def test_compare_tokens_counts_tokens_prompts_and_margins_of_the_first_difference_alone() -> None:
    reference = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    other = torch.tensor([[1, 2, 3, 4], [1, 9, 3, 9], [1, 2, 3, 9]])
    found = compare_tokens(reference, other, torch.arange(12).reshape(3, 4) / 16)
    assert found == {
        "prompts": 3,
        "new_tokens": 4,
        "tokens": 12,
        "divergent_prompts": 2,
        "divergent_tokens": 3,
        "token_match": 0.75,
        "first_divergence": {"min": 1, "median": 3.0},
        "survival": [1.0, pytest.approx(2 / 3), pytest.approx(2 / 3), pytest.approx(1 / 3)],
        "divergences": [
            {"prompt": 1, "position": 1, "margin": 5 / 16},
            {"prompt": 2, "position": 3, "margin": 11 / 16},
        ],
    }


def test_error_of_the_ratio_comes_from_the_covariance() -> None:
    shared = logits(1000).abs()
    nll_p, nll_q = shared + 0.01 * logits(1000, seed=1), shared + 0.02 * logits(1000, seed=2) + 0.1
    ratio, error = perplexity_ratio(nll_p, nll_q)
    covariance = torch.cov(torch.stack([nll_p, nll_q]).double())
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    assert ratio == pytest.approx(perplexity(nll_q)[0] / perplexity(nll_p)[0])
    assert error == pytest.approx(ratio * math.sqrt(variance / 1000), rel=1e-6)
    assert error < perplexity(nll_p)[1] / 10


def test_perplexity_of_a_uniform_model_is_its_vocabulary() -> None:
    nll = negative_log_likelihood(log_probabilities(torch.zeros(63, 257)), torch.arange(63))
    assert perplexity(nll) == (pytest.approx(257, rel=1e-12), pytest.approx(0, abs=1e-10))
    assert perplexity(torch.tensor([1e6]))[0] == math.inf


@pytest.mark.parametrize("count", [1, 2, 63, 257])
def test_percentiles_are_numpys(count: int) -> None:
    values = logits(count)
    found = describe(values)
    expected = np.percentile(values.double().numpy(), list(PERCENTILES.values()))
    assert [found[name] for name in PERCENTILES] == pytest.approx(expected.tolist(), rel=1e-12)
    assert list(found) == ["mean", "error", *PERCENTILES]
    assert math.isnan(found["error"]) == (count == 1)


def test_a_comparison_does_not_depend_on_how_the_text_is_cut() -> None:
    p, q = logits(257, 63), logits(257, 63) + 0.1 * logits(257, 63, seed=1)
    targets = torch.arange(257) % 63
    whole, cut = LogitComparison(), LogitComparison()
    whole.update(p, q, targets)
    for part in torch.arange(257).split(63):
        cut.update(p[part], q[part], targets[part])
    assert whole.summary() == cut.summary()
    assert whole.summary()["tokens"] == 257


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_last_bit_of_one_logit_is_seen(dtype: torch.dtype) -> None:
    p = logits(63, 257).to(dtype)
    q = p.clone()
    q[41, 200] = torch.nextafter(q[41, 200], torch.tensor(math.inf, dtype=dtype))
    comparison = LogitComparison()
    comparison.update(p[:40], q[:40], torch.arange(40))
    assert comparison.summary()["bit_equal"]
    comparison.update(p[40:], q[40:], torch.arange(23))
    summary = comparison.summary()
    assert not summary["bit_equal"]
    assert summary["max_abs_difference"] == (q - p).abs().max().item() > 0


def test_a_model_that_computes_nan_is_not_taken_for_a_good_one() -> None:
    p, targets = logits(5, 63), torch.arange(5)
    p[:, 7] = -math.inf
    q = p.clone()
    comparison = LogitComparison()
    comparison.update(p, q, targets)
    assert comparison.summary()["max_abs_difference"] == 0
    q[3, 2] = math.nan
    comparison.update(p, q, targets)
    summary = comparison.summary()
    assert not summary["bit_equal"]
    found = [summary["max_abs_difference"], summary["kl"]["max"], summary["perplexity"]["ratio"]]
    assert all(math.isnan(value) for value in found)


def test_a_better_model_has_a_ratio_below_one_and_a_positive_delta_p() -> None:
    p, targets = logits(257, 63), torch.arange(257) % 63
    q = p + 0.5 * torch.nn.functional.one_hot(targets, 63)
    comparison = LogitComparison()
    comparison.update(p, q, targets)
    summary = comparison.summary()
    assert summary["perplexity"]["ratio"] < 1
    assert summary["delta_p"]["0.1%"] > 0
    assert summary["perplexity"]["other"] < summary["perplexity"]["reference"]
