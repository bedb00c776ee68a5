"""Tokens that the teacher writes in the place of those that were there."""

import pytest
import torch
from torch import Tensor

from qat.errors import UserError
from qat.lit.build import check_config
from qat.noise import replace_tokens
from tests.train.test_run import MakeConfig, metrics, run

VOCABULARY = 7


def head(hidden: Tensor) -> Tensor:
    """The hidden states are the logits."""
    return hidden


def certain(tokens: Tensor) -> Tensor:
    """Hidden states of a model that is sure of the token that comes next."""
    following = torch.roll(tokens, -1, dims=1)
    return 1e4 * torch.nn.functional.one_hot(following, VOCABULARY).float()


@pytest.mark.parametrize("length", [1, 2, 63, 257])
@pytest.mark.parametrize("chunk_tokens", [1, 50, 10_000])
def test_a_model_that_is_sure_of_a_text_changes_nothing(length: int, chunk_tokens: int) -> None:
    ids = torch.randint(VOCABULARY, (3, length))
    assert torch.equal(replace_tokens(ids, certain(ids), head, 0.5, chunk_tokens), ids)


def test_no_share_changes_nothing_and_the_first_token_stays() -> None:
    ids = torch.zeros(64, 31, dtype=torch.int64)
    hidden = certain(ids + 1)
    assert torch.equal(replace_tokens(ids, hidden, head, 0.0), ids)
    assert not replace_tokens(ids, hidden, head, 0.5)[:, 0].any()


def test_as_many_are_replaced_as_asked_and_windows_differ() -> None:
    ids = torch.zeros(4000, 41, dtype=torch.int64)
    changed = replace_tokens(ids, certain(ids + 1), head, 0.2)[:, 1:].double().mean(dim=1)
    assert changed.mean() == pytest.approx(0.2, abs=0.01)
    # uniform from 0 to 0.4, and the chance of 40 tokens
    assert changed.var() == pytest.approx(0.4**2 / 12 + (0.2 - 0.4**2 / 3) / 40, rel=0.1)


def test_samples_follow_what_stands_before_them() -> None:
    p = torch.tensor([0.0, 0.5, 0.25, 0.125, 0.125, 0.0, 0.0])
    ids = torch.zeros(2000, 101, dtype=torch.int64)
    # the second half of every window has another distribution
    hidden = torch.stack([p, p.flip(0)]).log()[(torch.arange(101) >= 50).long()].expand(2000, -1, -1)
    noisy = replace_tokens(ids, hidden, head, 0.5)
    for part, wanted in ((noisy[:, 1:51], p), (noisy[:, 51:], p.flip(0))):
        counts = torch.bincount(part[part > 0], minlength=VOCABULARY).double()
        share = counts / counts.sum()
        # zeros are counted among the tokens that stayed
        assert share[1:] == pytest.approx(wanted[1:] / wanted[1:].sum(), abs=0.01)


def test_noise_is_what_both_models_read(make_config: MakeConfig) -> None:
    def trained(noise: float) -> dict[int, dict[str, float]]:
        config = make_config()
        config.data.noise, config.name = noise, f"noise{noise}"
        return metrics(run(config))

    clean, noisy = trained(0.0), trained(0.5)
    assert noisy == trained(0.5)
    # fake quantisation is off at first: there the student is the teacher, on any text
    assert noisy[1]["train/kl"] == pytest.approx(0.0, abs=1e-6)
    assert noisy[1]["train/ce"] != clean[1]["train/ce"]
    assert noisy[6]["train/kl"] != clean[6]["train/kl"]


def test_noise_needs_a_teacher(make_config: MakeConfig) -> None:
    config = make_config()
    config.data.noise, config.loss.kl, config.loss.ce = 0.3, 0.0, 1.0
    with pytest.raises(UserError, match=r"data.noise.*loss.kl"):
        check_config(config)
