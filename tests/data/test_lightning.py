import warnings
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from qat.config import DataConfig
from qat.errors import UserError
from qat.lit.data import TextDataModule

STEPS, BATCH, MICRO = 7, 4, 2


class Recorder(pl.LightningModule):
    """Remembers every batch; its one weight depends on all of them and on their order."""

    def __init__(self, die_at: int | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.die_at = die_at
        self.seen: list[tuple[int, list[int]]] = []
        self.validated: list[list[int]] = []

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        if self.global_step == self.die_at:
            raise RuntimeError("killed")
        self.seen.append((self.global_step, batch.flatten().tolist()))
        return (self.weight - batch.double().mean()) ** 2

    def validation_step(self, batch: torch.Tensor, index: int) -> None:
        self.validated += batch.tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    (tmp_path / "train.txt").write_text("".join(f"line {i} of the text to train on\n" for i in range(30)))
    (tmp_path / "valid.txt").write_text("".join(f"{i} held out\n" for i in range(20)))
    return DataConfig(
        train=str(tmp_path / "train.txt"),
        valid=str(tmp_path / "valid.txt"),
        seq_len=24,
        batch_size=BATCH,
        micro_batch_size=MICRO,
    )


def fit(config: DataConfig, tokenizer, root: Path, model: Recorder, steps: int = STEPS, resume: str | None = None):
    data = TextDataModule(config, tokenizer, root / "cache", progress=False)
    trainer = pl.Trainer(
        max_steps=steps,
        accumulate_grad_batches=data.accumulate_grad_batches,
        val_check_interval=2 * data.accumulate_grad_batches,
        check_val_every_n_epoch=None,
        use_distributed_sampler=False,
        accelerator="cpu",
        devices=1,
        default_root_dir=root,
        callbacks=[
            pl.callbacks.ModelCheckpoint(root / "ckpt", every_n_train_steps=1, save_top_k=-1, filename="{step}")
        ],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not resumable")
        trainer.fit(model, data, ckpt_path=resume)
    return model, trainer


@pytest.mark.parametrize("step", [1, 3, 4])
@pytest.mark.parametrize("killed", [True, False], ids=["killed", "finished-and-extended"])
def test_resumed_run_sees_what_the_unbroken_one_sees(config, tokenizer, tmp_path, step, killed):
    whole, _ = fit(config, tokenizer, tmp_path / "whole", Recorder())
    if killed:
        with pytest.raises(RuntimeError, match="killed"):
            fit(config, tokenizer, tmp_path / "part", Recorder(die_at=step))
    else:
        fit(config, tokenizer, tmp_path / "part", Recorder(), steps=step)
    checkpoint = str(tmp_path / "part" / "ckpt" / f"step={step}.ckpt")
    rest, trainer = fit(config, tokenizer, tmp_path / "part", Recorder(), resume=checkpoint)
    assert rest.seen == [(at, batch) for at, batch in whole.seen if at >= step]
    assert trainer.global_step == STEPS
    assert torch.equal(rest.weight, whole.weight)
