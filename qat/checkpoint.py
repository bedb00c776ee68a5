"""Read what training wrote, without Lightning: <run>/checkpoints/*.ckpt with <run>/hf beside it.

Checkpoints are loaded with weights_only=True: a file from a stranger cannot run code.
"""

import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qat.config import TrainConfig, from_plain
from qat.errors import UserError


@dataclass(frozen=True)
class Checkpoint:
    """One state of a training run."""

    config: TrainConfig
    weights: dict[str, Tensor]
    """Float masters under Hugging Face names, learned scales as `<module>.weight_log2_scale`; mapped from the file."""
    hf_folder: Path
    """config.json, generation config and tokenizer of the base model."""
    step: int
    """Optimiser steps done."""

    @property
    def fake_quant_on(self) -> bool:
        """True if the model computed with quantised weights at this step."""
        return self.config.quant.enabled and self.step >= self.config.quant.start_step


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint; the weights stay on disk until they are used.

    Raises:
        UserError: there is none, it is truncated, it is not one of ours, or the run's hf folder is not beside it.
    """
    from omegaconf.errors import OmegaConfBaseException

    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"{path} is truncated or is no checkpoint") from error
    try:
        config = from_plain(TrainConfig, state["hyper_parameters"]["config"])
        weights = {k.removeprefix("model."): v for k, v in state["state_dict"].items()}
        step = int(state["global_step"])
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{path} is no checkpoint of train.py") from error
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} was written by another version of this program: {reason}") from error
    hf_folder = path.absolute().parent.parent / "hf"
    if not (hf_folder / "config.json").is_file():
        raise UserError(f"{path} stands alone: the hf folder of its run must be at {hf_folder}")
    return Checkpoint(config, weights, hf_folder, step)


def load_fake_quant(path: str | Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The model as it computed at the checkpoint: prepared layers, fake quantisation on or off as then, in eval mode.

    Args:
        path: of the checkpoint.
        dtype: of the weights; learned scales stay float32.

    Raises:
        UserError: as `read_checkpoint`, or the weights do not fit the model.
    """
    from qat.model import load_weights
    from qat.quant import prepare, set_fake_quant

    checkpoint = read_checkpoint(path)
    scales = {k: v for k, v in checkpoint.weights.items() if k.endswith(".weight_log2_scale")}
    weights = {k: v for k, v in checkpoint.weights.items() if k not in scales}
    model = load_weights(checkpoint.hf_folder, weights, dtype)
    if checkpoint.config.quant.enabled:
        prepare(model, checkpoint.config.quant)
        model.load_state_dict(scales, strict=False)
        set_fake_quant(model, checkpoint.fake_quant_on)
    return model.eval()
