"""FSDP2: every process holds its rows of every parameter, of the gradient and of the optimiser's state.

The student is gathered a decoder layer at a time, in float32, by the forward and again by the backward; embedding,
last norm and head for the whole of both. Checkpoints are those of one process: a run may go on under any strategy.
"""

from collections.abc import Mapping
from typing import Any

from pytorch_lightning.core.optimizer import LightningOptimizer
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.optim import Optimizer
from transformers.modeling_utils import PreTrainedModel

from qat.lit.module import QATModule
from qat.model import decoder_layers
from qat.quant.shards import spread_as, whole


class ShardedStrategy(DDPStrategy):
    """Starts processes as DDP does, and shards where that would wrap.

    Not Lightning's ModelParallelStrategy: that saves the optimiser under other numbers than one process would, and
    cannot load what one process saved.
    """

    def configure_ddp(self) -> None:
        """Shard, before the optimiser is made: student and teacher, by decoder layers."""
        module = self.lightning_module
        assert isinstance(module, QATModule)
        mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        for model in (module.model, *module.teacher):
            _shard_layers(model, mesh)
        # all that is left, with the chunked head, which runs outside of the model's own forward
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
        for method in ("training_step", "validation_step", "divergence"):
            register_fsdp_forward_method(module, method)

    def model_to_device(self) -> None:
        """Left to the sharding: a device need not hold the whole model."""

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole tensors on the CPU, in the first process alone."""
        return self._collect(super().lightning_module_state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """As one process would save it, in the first process alone."""
        inner: Any = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        state = inner.state_dict()
        return state | {"state": {key: self._collect(values) for key, values in state["state"].items()}}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Spread what `optimizer_state`, or one process, saved."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            state = {
                key: {k: spread_as(v, parameters[key]) if v.ndim else v for k, v in values.items()}
                for key, values in saved["state"].items()
            }
            optimizer.load_state_dict(saved | {"state": state})

    def _collect(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        collected = {}
        for key, value in tensors.items():
            value = whole(value)
            if self.is_global_zero:
                collected[key] = value.cpu()
        return collected


def _shard_layers(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
