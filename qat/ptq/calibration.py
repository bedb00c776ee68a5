"""Second moments of what enters every linear layer, block by block, behind the blocks that are already rounded."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qat.errors import UserError
from qat.model import decoder_layers

Options = tuple[tuple[Any, ...], dict[str, Any]]
"""What a block is given besides the hidden states: GPT-2's get their mask by position."""


@torch.no_grad()
def walk(model: PreTrainedModel, layers: dict[str, nn.Linear], batches: list[Tensor]) -> Iterator[dict[str, Tensor]]:
    """Go through the decoder's blocks in order; what the caller does to a block's weights, the next blocks see.

    Inputs are kept between blocks, so that every block runs twice: once for its Hessians, once as it then is.

    Args:
        model: a decoder with its blocks in `layers`, as transformers has them.
        layers: the linear layers to report on, by name.
        batches: token ids, int64 [B, T] each.

    Yields:
        For every block, H = mean over tokens of x x^T, float32 [K, K], of those of its layers that are asked for.

    Raises:
        UserError: a layer is in no block, or was not run.
    """
    # the whole model is no block: it takes token ids
    blocks = [block for block in decoder_layers(model) if block is not model.base_model]
    name_of = {module: name for name, module in layers.items()}
    if outside := set(name_of) - {module for block in blocks for module in block.modules()}:
        raise UserError(f"{min(name_of[m] for m in outside)} is in no decoder block, so nothing calibrates it")
    states, options = _inputs(model, blocks, batches)
    for block, given in zip(blocks, options, strict=True):
        inside = {name_of[module]: module for module in block.modules() if module in name_of}
        with _Moments(inside) as moments:
            for x, (args, kwargs) in zip(states, given, strict=True):
                block(x, *args, **kwargs)
        yield moments.means()
        states = [_first(block(x, *args, **kwargs)) for x, (args, kwargs) in zip(states, given, strict=True)]


def _inputs(
    model: PreTrainedModel, blocks: list[nn.Module], batches: list[Tensor]
) -> tuple[list[Tensor], list[list[Options]]]:
    """What enters the first block, by batch, and what every block is given with it, by block and batch."""
    states: list[Tensor] = []
    options: list[list[Options]] = [[] for _ in blocks]

    def keep(index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            more = {key: value for key, value in kwargs.items() if key != "hidden_states"}
            options[index].append((args[1:], more))
            if index == 0:
                states.append(args[0] if args else kwargs["hidden_states"])

        return hook

    handles = [
        block.register_forward_pre_hook(keep(index), with_kwargs=True) for index, block in enumerate(blocks)
    ]  # fmt: skip
    try:
        for batch in batches:
            model.get_decoder()(input_ids=batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return states, options


class _Moments:
    """Adds up x x^T of the inputs of some layers while it is open."""

    def __init__(self, layers: dict[str, nn.Linear]):
        self.layers = layers
        self.sums: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}

    def __enter__(self) -> "_Moments":
        self.handles = [module.register_forward_pre_hook(self._hook(name)) for name, module in self.layers.items()]
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()

    def means(self) -> dict[str, Tensor]:
        if idle := sorted(self.layers.keys() - self.sums.keys()):
            raise UserError(f"{idle[0]} was not run on the calibration text")
        return {name: total / self.tokens[name] for name, total in self.sums.items()}

    def _hook(self, name: str) -> Any:
        def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1]).float()
            self.sums[name] = self.sums.get(name, 0) + x.T @ x
            self.tokens[name] = self.tokens.get(name, 0) + len(x)

        return add


def _first(output: Any) -> Tensor:
    # some architectures' blocks return a tuple
    return output[0] if isinstance(output, tuple) else output
