"""GPT-2, whose weights are transposed, is trained and exported as any other model."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import rans_kernels
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, PreTrainedModel

from qat.checkpoint import load_fake_quant, read_checkpoint
from qat.config import Rounding, TrainConfig
from qat.lit.build import train
from tests.export.helpers import logits, run


@pytest.fixture
def base(tiny: Path, tmp_path: Path) -> PreTrainedModel:
    """A random model, saved as tmp_path / "base"."""
    torch.manual_seed(0)
    shape = GPT2Config(vocab_size=300, n_embd=32, n_inner=48, n_layer=2, n_head=2, n_positions=64, eos_token_id=0)
    model = AutoModelForCausalLM.from_config(shape)
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny / "model").save_pretrained(tmp_path / "base")
    return model


def test_a_trained_gpt2_is_compressed_as_it_was_trained(
    base: PreTrainedModel, make_config: Callable[[], TrainConfig], tmp_path: Path
) -> None:
    config = make_config()
    config.model.path, config.trainer.max_steps = str(tmp_path / "base"), 3
    checkpoint = train(config) / "checkpoints" / "last.ckpt"
    name = "transformer.h.0.attn.c_attn.weight"
    stored = read_checkpoint(checkpoint).weights[name]
    assert stored.shape == (32, 96)
    # it went on from the base
    assert 0 < (stored - base.state_dict()[name]).abs().max() < 0.1
    compressed = rans_kernels.load(run(checkpoint, tmp_path / "compressed"))
    assert torch.equal(logits(compressed), logits(load_fake_quant(checkpoint)))


def test_gptq_starts_nearer(
    base: PreTrainedModel, make_rate_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    kl = {}
    for rounding in Rounding:
        config = make_rate_config(1, target_bits=11.0, lead=0.0, every=1)
        config.name, config.model.path, config.quant.rounding = rounding.value, str(tmp_path / "base"), rounding
        config.optim.lr = config.optim.scale_lr = 0.0
        lines = [json.loads(line) for line in (train(config) / "metrics.jsonl").read_text().splitlines()]
        kl[rounding] = next(line["start/kl"] for line in lines if "start/kl" in line)
    assert kl[Rounding.gptq] < 0.9 * kl[Rounding.nearest]
