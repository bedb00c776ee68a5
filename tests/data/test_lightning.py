import dataclasses
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from qat.config import DataConfig
from qat.errors import UserError
from qat.lit.data import TextDataModule, accumulate_grad_batches

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


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
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
    rest, trainer = fit(config, tokenizer, tmp_path / "rest", Recorder(), resume=checkpoint)
    assert rest.seen == [(at, batch) for at, batch in whole.seen if at >= step]
    assert trainer.global_step == STEPS
    assert torch.equal(rest.weight, whole.weight)


def test_validation_sees_the_first_windows_once_at_every_validation(config, tokenizer, tmp_path):
    model, trainer = fit(dataclasses.replace(config, valid_windows=3), tokenizer, tmp_path, Recorder(), steps=4)
    expected = [window.tolist() for window in torch.utils.data.Subset(trainer.datamodule.valid_windows, range(3))]
    assert model.validated == expected * 2


def on_rank(data: TextDataModule, rank: int, ranks: int) -> TextDataModule:
    data.trainer = SimpleNamespace(global_rank=rank, world_size=ranks)
    return data


@given(ranks=st.integers(1, 5), micro=st.sampled_from([1, 2, 3, 16]), spare=st.integers(0, 20))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_validation_shares_have_each_window_once(config, tokenizer, tmp_path, ranks, micro, spare):
    config = dataclasses.replace(
        config, seq_len=3, batch_size=micro, micro_batch_size=micro, valid_windows=ranks + spare
    )
    data = TextDataModule(config, tokenizer, tmp_path / "cache", progress=False)
    data.setup("validate")
    loaders = [on_rank(data, rank, ranks).val_dataloader() for rank in range(ranks)]
    windows = [window for loader in loaders for batch in loader for window in batch.tolist()]
    assert sorted(windows) == sorted(data.valid_windows[i].tolist() for i in range(ranks + spare))
    assert all(len(batch) <= max(micro, 2) for loader in loaders for batch in loader)
    # collectives inside a batch need the same number of them
    assert len({len(loader) for loader in loaders}) == 1


def test_fewer_validation_windows_than_devices_are_refused(config, tokenizer, tmp_path):
    data = TextDataModule(dataclasses.replace(config, valid_windows=2), tokenizer, tmp_path / "cache", progress=False)
    data.setup("validate")
    with pytest.raises(UserError, match="2 validation windows are too few for 3 devices"):
        on_rank(data, 0, 3).val_dataloader()


def test_accumulation_follows_from_the_number_of_devices(config):
    config = dataclasses.replace(config, batch_size=64, micro_batch_size=4)
    assert [accumulate_grad_batches(config, devices) for devices in (1, 2, 8, 16)] == [16, 8, 2, 1]
    with pytest.raises(UserError, match="data.batch_size=64 .* data.micro_batch_size=4 x 3 devices = 12"):
        accumulate_grad_batches(config, 3)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"batch_size": 6, "micro_batch_size": 4}, "data.batch_size=6 is not a multiple of data.micro_batch_size=4"),
        ({"micro_batch_size": 0}, "data.micro_batch_size=0"),
        ({"batch_size": 0}, "data.batch_size=0"),
        ({"seq_len": 0}, "data.seq_len=0"),
        ({"valid_windows": 0}, "data.valid_windows=0"),
        ({"train": "nowhere.txt"}, "no such file: .*nowhere.txt"),
    ],
)
def test_wrong_sizes_and_sources_are_named_before_anything_is_read(config, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        TextDataModule(dataclasses.replace(config, **change), "no tokenizer is needed", tmp_path / "cache")


def test_text_in_both_train_and_valid_is_refused(config, tmp_path):
    config = dataclasses.replace(config, train=f"{tmp_path}/*.txt", valid=f"{tmp_path}/../{tmp_path.name}/valid.txt")
    with pytest.raises(UserError, match="valid.txt is in data.train and in data.valid"):
        TextDataModule(config, "no tokenizer is needed", tmp_path / "cache")


def test_trainer_that_disagrees_is_refused(config, tokenizer, tmp_path):
    data = TextDataModule(config, tokenizer, tmp_path / "cache", progress=False)
    data.setup("fit")
    data.trainer = SimpleNamespace(global_rank=0, world_size=1, max_steps=-1, accumulate_grad_batches=2)
    with pytest.raises(UserError, match="trainer.max_steps=-1"):
        data.train_dataloader()
    data.trainer = SimpleNamespace(global_rank=0, world_size=1, max_steps=5, accumulate_grad_batches=1)
    with pytest.raises(ValueError, match="accumulate_grad_batches=2"):
        data.train_dataloader()


def test_data_module_adds_nothing_to_checkpoints(config, tokenizer, tmp_path):
    fit(config, tokenizer, tmp_path, Recorder(), steps=1)
    (path,) = (tmp_path / "ckpt").iterdir()
    checkpoint = torch.load(path, weights_only=True)
    assert not [key for key in checkpoint if "data" in key.lower()]
