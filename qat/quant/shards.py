"""Parameters of which every process holds some rows (FSDP2's DTensors), and ordinary ones, alike.

Inside the forward of a sharded module its parameters are whole and ordinary. These functions are for everywhere else.
Those that gather must be called by all processes, in the same order.
"""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """All rows, gathered where they are spread, without gradient; else the tensor itself."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor


def held(tensor: Tensor) -> Tensor:
    """The rows that this process holds, with gradient; else the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def spread_as(value: Tensor, like: Tensor) -> Tensor:
    """`value`, whole and the same in all processes, spread over them as `like` is; else itself."""
    if not isinstance(like, DTensor):
        return value
    spread = distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    # the rows alone: they may be a view of the whole
    return spread.clone()


def summed(value: Tensor, like: Tensor) -> Tensor:
    """`value` added up over the processes that hold `like`, its gradient that of this one's part; else itself."""
    if not isinstance(like, DTensor):
        return value
    total = value.detach().clone()
    torch.distributed.all_reduce(total, group=like.device_mesh.get_group())
    return value + (total - value.detach())
