"""Quantisation-aware training: what `train.py` and `codecllm train` run."""

from typing import Any

from qat.cli import entry_point
from qat.config import TrainConfig


def main(config: TrainConfig) -> Any:
    """Train; the heavy imports wait until the config is known to be right."""
    from qat.lit.build import train

    return train(config)


if __name__ == "__main__":
    entry_point("train", main)
