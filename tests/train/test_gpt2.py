"""GPT-2, whose weights are transposed, is trained and exported as any other model."""

from collections.abc import Callable
from pathlib import Path

import rans_kernels
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from qat.checkpoint import load_fake_quant, read_checkpoint
from qat.config import TrainConfig
from qat.lit.build import train
from tests.export.helpers import logits, run


def test_a_trained_gpt2_is_compressed_as_it_was_trained(
    tiny: Path, make_config: Callable[[], TrainConfig], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    shape = GPT2Config(vocab_size=300, n_embd=32, n_inner=48, n_layer=2, n_head=2, n_positions=64, eos_token_id=0)
    base = AutoModelForCausalLM.from_config(shape)
    base.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny / "model").save_pretrained(tmp_path / "base")
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
