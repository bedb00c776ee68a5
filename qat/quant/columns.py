"""Steps that differ by column at no cost in the format: columns are rescaled, and what feeds them undoes it.

A matrix W sees inputs x. With W' = W diag(a) and x' = x / a it computes the same, but a step of W' is one of step / a_c
in column c of W. At a given rate the error sum_c E[x_c^2] (step / a_c)^2 is least for a_c ~ rms(x_c). Between blocks
x' comes for free: an RMSNorm's gain takes 1 / a for all matrices behind it, and rows of v_proj and up_proj take it
for o_proj and down_proj, since attention and the gate are linear in them. Trained on, the gains are column factors.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import UserError

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose blocks are known: y = gain * normalised x, and nothing nonlinear behind v_proj and up_proj."""


@torch.no_grad()
def rescale_columns(model: Any, squares: Mapping[nn.Module, Tensor], exponent: float, rows: bool) -> None:
    """Multiply columns by rms(x_c) ** exponent, of geometric mean 1, in place; the model computes what it did.

    Args:
        model: a decoder of `ARCHITECTURES`, its linear layers stock or fake-quantised.
        squares: mean of x^2 of what enters q_proj, o_proj, up_proj and down_proj of every block, [K] by module.
        exponent: 1 is right for independent rounding errors, 0 changes nothing.
        rows: rescale o_proj and down_proj too, by half the exponent. That moves rows of v_proj and up_proj, which
            costs nothing where each has a step of its own.

    Raises:
        UserError: another architecture.
    """
    check_architecture(model)
    for block in model.get_decoder().layers:
        attention, mlp = block.self_attn, block.mlp
        behind = [attention.q_proj, attention.k_proj, attention.v_proj]
        _fold([block.input_layernorm], behind, _factors(squares[attention.q_proj], exponent))
        behind = [mlp.gate_proj, mlp.up_proj]
        _fold([block.post_attention_layernorm], behind, _factors(squares[mlp.up_proj], exponent))
        if rows:
            # query heads of a group share the rows of a value head
            size, heads = attention.head_dim, attention.v_proj.out_features // attention.head_dim
            shared = squares[attention.o_proj].view(heads, -1, size).mean(1)
            _fold([attention.v_proj], [attention.o_proj], _factors(shared.flatten(), exponent / 2), size)
            _fold([mlp.up_proj], [mlp.down_proj], _factors(squares[mlp.down_proj], exponent / 2))


def check_architecture(model: Any) -> None:
    """Raise UserError for a model whose norms cannot take the factors of the columns behind them."""
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in ARCHITECTURES:
        raise UserError(f"quant.columns: not for {kind} models, only {', '.join(ARCHITECTURES)}; set it to 0")


def _factors(squares: Tensor, exponent: float) -> Tensor:
    # a column that nothing enters has no say; it is kept within what float32 bears
    logs = squares.double().clamp_min(squares.max().clamp_min(1e-30) * 1e-8).log() * exponent / 2
    return (logs - logs.mean()).exp().float()


def _fold(sources: list[Any], behind: list[Any], factors: Tensor, head: int | None = None) -> None:
    """Divide outputs of `sources` by the factors, multiply columns of `behind`; `head`: values of one head."""
    for source in sources:
        source.weight.div_(factors if source.weight.ndim == 1 else factors[:, None])
        if getattr(source, "bias", None) is not None:
            source.bias.div_(factors)
    for linear in behind:
        if head is not None:
            groups = linear.in_features // len(factors)
            factors = factors.view(-1, 1, head).expand(-1, groups, -1).flatten()
        linear.weight.mul_(factors)
