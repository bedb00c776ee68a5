"""Rescaled columns change nothing but what rounding costs."""

import pytest
import torch

from qat.config import Granularity, QuantConfig, RateConfig, ScaleRule
from qat.errors import UserError
from qat.model import load_model
from qat.ptq.calibration import walk
from qat.quant import prepare, quantized_modules
from qat.quant.columns import check_architecture, rescale_columns
from qat.quant.rate import RateTerm


def rescaled(folder, exponent, rows, ids):
    """The model with unequal inputs of every block, rescaled, and its linear layers."""
    model = load_model(folder)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in n}
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("layernorm.weight"):
                parameter.copy_(torch.randn_like(parameter).exp())
        before = model(ids).logits
    squares = {}
    for moments in walk(model, layers, [ids]):
        squares |= {layers[name]: moment.diagonal() for name, moment in moments.items()}
    rescale_columns(model, squares, exponent, rows)
    return model, before


@pytest.fixture
def ids():
    return torch.randint(300, (8, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}])
@pytest.mark.parametrize("rows", [False, True])
@torch.no_grad()
def test_the_model_computes_what_it_did(tiny_llama, ids, changes, rows):
    model, before = rescaled(tiny_llama(**changes), 1.0, rows, ids)
    own = load_model(tiny_llama(**changes))
    moved = {n for (n, a), b in zip(model.named_parameters(), own.parameters(), strict=True) if not torch.equal(a, b)}
    assert all(any(key in name for name in moved) for key in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"))
    assert any("down_proj" in name for name in moved) == any("o_proj" in name for name in moved) == rows
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("granularity", [Granularity.per_tensor, Granularity.per_channel])
@torch.no_grad()
def test_rounded_at_equal_bits_it_is_nearer(tiny_llama, ids, granularity):
    errors = []
    for exponent in (0.0, 1.0):
        model, before = rescaled(tiny_llama(), exponent, False, ids)
        prepare(model, QuantConfig(scale=ScaleRule.learned, init=ScaleRule.std, granularity=granularity, k=0.25))
        term = RateTerm(quantized_modules(model), RateConfig())
        term.land(lambda term=term: term.content().entropy, 3.5, 4.0)
        assert term.content().entropy == pytest.approx(3.5, abs=0.01)
        errors.append(float((model(ids).logits - before).square().mean()))
    assert errors[1] < 0.8 * errors[0]


def test_a_model_of_unknown_blocks_is_refused(tiny):
    with pytest.raises(UserError, match=r"quant\.columns.*TinyModel"):
        check_architecture(tiny())
