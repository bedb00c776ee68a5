"""How far two language models are apart: pure functions of logits and tokens, and an accumulator over many windows.

p is the next-token distribution of the reference, q that of the other model, behind the same prefix; y is the token
that follows in the text. All logarithms are natural. Standard errors take tokens as independent, as llama.cpp's do.
docs/evaluation.md defines every number in words.
"""

import math
from typing import Any

import torch
from torch import Tensor

PERCENTILES = {
    "max": 100.0,
    "99.9%": 99.9,
    "99%": 99.0,
    "95%": 95.0,
    "90%": 90.0,
    "median": 50.0,
    "10%": 10.0,
    "5%": 5.0,
    "1%": 1.0,
    "0.1%": 0.1,
}
"""The rows of llama.cpp's tables, in its order."""


def log_probabilities(logits: Tensor) -> Tensor:
    """log_softmax of [..., V] in float64; in float32 on a device that has no float64 (mps)."""
    return logits.to(torch.float32 if logits.device.type == "mps" else torch.float64).log_softmax(-1)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) = sum_v p(v) (ln p(v) - ln q(v)), in nats.

    Equal inputs give exactly 0. In float64, rounding stays below 1e-12 nats, the floor of what can be told from 0
    (float32: 1e-5); negative results are rounding and become 0.

    Args:
        log_p: log-probabilities [..., V] of the reference; -inf allowed.
        log_q: of the other model, same shape.

    Returns:
        [...], at least 0; inf where q rules out what p allows, nan where either is nan.
    """
    p = log_p.exp()
    return torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(-1).clamp_min(0.0)


def expected_agreement(log_p: Tensor, log_q: Tensor) -> Tensor:
    """EAR = sum_v min(p(v), q(v)) = 1 - total variation: how often tokens drawn from both can be made to agree.

    Args and shapes as `kl_divergence`. arXiv 2605.02404 calls a mean of 0.99 or more distribution-lossless.
    """
    return torch.minimum(log_p, log_q).exp().sum(-1).clamp_max(1.0)


def negative_log_likelihood(log_p: Tensor, targets: Tensor) -> Tensor:
    """-ln p(y): [...] from log-probabilities [..., V] and int64 targets [...]."""
    return -log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def same_top(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """Whether both put the same token first: bool [...] from [..., V]; of equal logits the lowest token counts."""
    return p_logits.argmax(-1) == q_logits.argmax(-1)


def top_margin(logits: Tensor) -> Tensor:
    """p(1st) - p(2nd), in [0, 1]: [...] from logits [..., V] with V >= 2. Near 0 the choice is a coin's."""
    first, second = logits.to(torch.float32).softmax(-1).topk(2, dim=-1).values.unbind(-1)
    return first - second


def first_divergence(reference: Tensor, other: Tensor) -> Tensor:
    """How many tokens agree before the first that differs: int64 [B] from two [B, N]; N where none differs."""
    differs = reference != other
    # a column that always differs ends every row
    return torch.cat([differs, differs.new_ones(len(differs), 1)], dim=1).int().argmax(1)


def survival_curve(first: Tensor, length: int) -> Tensor:
    """S(n) = P[first divergence > n] for n = 0 ... length - 1, float64 [length].

    S(n) is the share of prompts whose tokens 0 ... n all agree; the last value is the share of identical outputs.

    Args:
        first: int64 [B], as `first_divergence` gives them.
        length: N, the tokens generated a prompt.
    """
    return (first[:, None] > torch.arange(length, device=first.device)).double().mean(0)


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean of [n] and its standard error std / sqrt(n), std with n - 1; the error is nan for n = 1."""
    values = values.double()
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return values.mean().item(), error


def perplexity(nll: Tensor) -> tuple[float, float]:
    """exp(mean nll) and its standard error, from the negative log-likelihoods [n] of single tokens."""
    mean, error = mean_and_error(nll)
    # unlike math.exp, inf where it overflows
    value = torch.tensor(mean, dtype=torch.float64).exp().item()
    return value, value * error


def perplexity_ratio(nll_p: Tensor, nll_q: Tensor) -> tuple[float, float]:
    """PPL(q) / PPL(p) = exp(mean(nll_q - nll_p)) and its standard error.

    Var[ln ratio] = (Var[nll_q] + Var[nll_p] - 2 Cov[nll_q, nll_p]) / n, which is the variance of the mean of the
    differences: what both models find hard cancels, and small changes show long before the two perplexities part.

    Args:
        nll_p: of the reference, [n].
        nll_q: of the other model on the same tokens, [n].
    """
    return perplexity(nll_q.double() - nll_p.double())


def describe(values: Tensor) -> dict[str, float]:
    """Mean, standard error and PERCENTILES of [n], by linear interpolation: {"mean", "error", "max", "99.9%", ...}."""
    mean, error = mean_and_error(values)
    ordered = values.double().sort().values
    positions = torch.tensor(list(PERCENTILES.values()), dtype=torch.float64) / 100 * (len(ordered) - 1)
    low = positions.floor().long()
    # torch.quantile refuses more than 16 million values
    below, above = ordered[low], ordered[(low + 1).clamp_max(len(ordered) - 1)]
    percentiles = torch.where(below == above, below, below.lerp(above, positions - low))
    return {"mean": mean, "error": error, **dict(zip(PERCENTILES, percentiles.tolist(), strict=True))}


def compare_tokens(reference: Tensor, other: Tensor, margins: Tensor) -> dict[str, Any]:
    """Compare what two models generated greedily from the same prompts.

    Args:
        reference: int64 [B, N].
        other: int64 [B, N].
        margins: float [B, N], p(1st) - p(2nd) of the reference at each of its tokens.

    Returns:
        prompts, new_tokens, tokens: B, N, B * N.
        divergent_prompts, divergent_tokens: outputs that differ anywhere; positions that differ.
        token_match: 1 - divergent_tokens / tokens.
        first_divergence: {"min", "median"} over all prompts; an output that never diverges counts as N.
        survival: S(0) ... S(N - 1).
        divergences: [{"prompt", "position", "margin"}], one for each divergent prompt.
    """
    prompts, length = reference.shape
    first = first_divergence(reference, other)
    differing = (reference != other).sum().item()
    rows = (first < length).nonzero().flatten().tolist()
    return {
        "prompts": prompts,
        "new_tokens": length,
        "tokens": prompts * length,
        "divergent_prompts": len(rows),
        "divergent_tokens": differing,
        "token_match": 1 - differing / (prompts * length),
        "first_divergence": {"min": first.min().item(), "median": first.double().quantile(0.5).item()},
        "survival": survival_curve(first, length).tolist(),
        "divergences": [
            {"prompt": row, "position": at, "margin": margins[row, at].item()}
            for row, at in zip(rows, first[rows].tolist(), strict=True)
        ],
    }


class LogitComparison:
    """Compares two models on ever more text and keeps a few numbers a token, never logits."""

    def __init__(self) -> None:
        self._scores: dict[str, list[Tensor]] = {}

    def update(self, p_logits: Tensor, q_logits: Tensor, targets: Tensor) -> None:
        """Add the tokens of one window.

        Args:
            p_logits: of the reference, float [T, V].
            q_logits: of the other model, float [T, V].
            targets: int64 [T], the tokens that follow.
        """
        log_p, log_q = log_probabilities(p_logits), log_probabilities(q_logits)
        nll_p, nll_q = negative_log_likelihood(log_p, targets), negative_log_likelihood(log_q, targets)
        scores = {
            "nll_p": nll_p,
            "nll_q": nll_q,
            "kl": kl_divergence(log_p, log_q),
            "ear": expected_agreement(log_p, log_q),
            "delta_p": (-nll_q).exp() - (-nll_p).exp(),
            "same_top": same_top(p_logits, q_logits),
            # equal infinities do not differ
            "difference": torch.where(p_logits == q_logits, 0.0, (p_logits.float() - q_logits.float()).abs()).amax(-1),
            "equal": torch.tensor([torch.equal(p_logits, q_logits)]),
        }
        for name, values in scores.items():
            self._scores.setdefault(name, []).append(values.cpu())

    def summary(self) -> dict[str, Any]:
        """The comparison over all tokens so far.

        Returns:
            tokens: how many.
            bit_equal: torch.equal of all logits. max_abs_difference: of any two logits.
            same_top, same_top_error: share of tokens with the same top-1 token.
            kl, delta_p, ear: `describe` of KL(p || q) in nats, of q(y) - p(y), of sum_v min(p, q).
            delta_p_rms: root mean square of delta_p.
            perplexity: {"reference", "reference_error", "other", "other_error", "ratio", "ratio_error",
            "correlation"}; the last is Pearson's, of the per-token log-likelihoods, nan where they do not vary.
        """
        scores = {name: torch.cat(values) for name, values in self._scores.items()}
        nll_p, nll_q = scores["nll_p"], scores["nll_q"]
        same, same_error = mean_and_error(scores["same_top"])
        (ppl_p, error_p), (ppl_q, error_q) = perplexity(nll_p), perplexity(nll_q)
        ratio, ratio_error = perplexity_ratio(nll_p, nll_q)
        return {
            "tokens": len(nll_p),
            "bit_equal": scores["equal"].all().item(),
            "max_abs_difference": scores["difference"].max().item(),
            "same_top": same,
            "same_top_error": same_error,
            "kl": describe(scores["kl"]),
            "delta_p": describe(scores["delta_p"]),
            "delta_p_rms": scores["delta_p"].square().mean().sqrt().item(),
            "ear": describe(scores["ear"]),
            "perplexity": {
                "reference": ppl_p,
                "reference_error": error_p,
                "other": ppl_q,
                "other_error": error_q,
                "ratio": ratio,
                "ratio_error": ratio_error,
                "correlation": torch.corrcoef(torch.stack([nll_p, nll_q]))[0, 1].item(),
            },
        }
