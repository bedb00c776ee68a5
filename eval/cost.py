"""What it costs to run a model: tokens a second and memory."""

import gc
from typing import Any

import torch
from torch import nn


class CostMeter:
    """Made before a model is loaded, read after it has generated."""

    def __init__(self, device: torch.device):
        """Args: device: that the model runs on; of GPUs all are watched, since a model may lie on several."""
        self.gpus = list(range(torch.cuda.device_count())) if device.type == "cuda" else []
        # a model that was dropped may still be there
        gc.collect()
        for gpu in self.gpus:
            torch.cuda.reset_peak_memory_stats(gpu)
        self.before = sum(map(torch.cuda.memory_allocated, self.gpus))

    def read(self, model: nn.Module, tokens: int, seconds: float) -> dict[str, Any]:
        """The cost since.

        Args:
            model: that was loaded.
            tokens: that it generated, all prompts together.
            seconds: that this took.

        Returns:
            tokens_per_second.
            weight_bytes: `held_bytes` of the model.
            peak_bytes: the most that tensors took on the GPUs beyond what was there before, activations and cache
                included; None on a CPU.
        """
        peak = sum(map(torch.cuda.max_memory_allocated, self.gpus)) - self.before
        return {
            "tokens_per_second": tokens / seconds,
            "weight_bytes": held_bytes(model),
            "peak_bytes": peak if self.gpus else None,
        }


def held_bytes(model: nn.Module) -> int:
    """Bytes of all tensors that a model's modules hold, what they keep decoded too; shared memory counts once."""
    held = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        held += [value for value in vars(module).values() if isinstance(value, torch.Tensor)]
    storages = [tensor.untyped_storage() for tensor in held if not tensor.is_meta]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
