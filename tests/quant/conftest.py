from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn


class TinyModel(nn.Module):
    """Embedding, two layers, head; odd sizes, and the two getters by which Hugging Face models name their ends."""

    def __init__(self, tied: bool):
        super().__init__()
        self.embed = nn.Embedding(257, 63)
        self.up = nn.Linear(63, 129)
        self.down = nn.Linear(129, 63, bias=False)
        self.lm_head = nn.Linear(63, 257, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.lm_head(x + self.down(torch.relu(self.up(x))))


@pytest.fixture
def tiny() -> Callable[[bool], TinyModel]:
    """tiny(tied): the same weights at every call."""

    def build(tied: bool = False) -> TinyModel:
        torch.manual_seed(0)
        return TinyModel(tied)

    return build


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(257, (3, 7), generator=torch.Generator().manual_seed(1))
