"""The pull of weights to where they began."""

from collections.abc import Callable
from types import SimpleNamespace

import torch

from qat.checkpoint import read_checkpoint
from qat.config import TrainConfig, to_plain
from qat.lit import build
from qat.lit.anchor import Anchor
from qat.lit.module import QATModule
from qat.model import load_model


def moved(config: TrainConfig) -> dict[str, float]:
    """How far a run takes every parameter, root mean square, by name."""
    weights = read_checkpoint(build.train(config) / "checkpoints" / "last.ckpt").weights
    start = load_model(config.model.path).state_dict()
    return {name: float((weights[name] - start[name]).square().mean().sqrt()) for name in start.keys() & weights.keys()}


def test_the_stronger_the_pull_the_nearer_matrices_stay_and_only_they(
    make_config: Callable[[], TrainConfig],
) -> None:
    found = []
    for anchor in (0.0, 100.0, 1e9):
        config = make_config()
        config.optim.lr, config.optim.anchor, config.optim.weight_decay = 3e-3, anchor, 0.0
        found.append(moved(config))
    free, pulled, held = found
    matrices = [name for name in free if name.endswith("proj.weight")]
    assert matrices and all(pulled[name] < 0.95 * free[name] for name in matrices)
    # back at the start, rounded to bfloat16, in every step
    assert all(held[name] < 2**-8 for name in matrices)
    assert all(held[name] > 0.3 * free[name] for name in free if "norm" in name or "embed" in name)


def test_the_pull_is_the_rate_times_the_way_back(make_config: Callable[[], TrainConfig]) -> None:
    config = make_config()
    config.optim.lr, config.optim.warmup_steps, config.optim.anchor = 1e-2, 0, 10.0
    module, anchor = QATModule(to_plain(config)), Anchor(config)
    # after the first optimiser step, of one micro-batch
    trainer = module._trainer = SimpleNamespace(accumulate_grad_batches=1, global_step=1)  # type: ignore[assignment]
    anchor.on_train_start(trainer, module)  # type: ignore[arg-type]
    weight = module.model.get_parameter("model.layers.0.self_attn.q_proj.weight")
    start = weight.detach().to(torch.bfloat16).float()
    before = (weight.detach() + 1).clone()
    weight.data.copy_(before)
    anchor.on_train_batch_end(trainer, module, None, start, 0)  # type: ignore[arg-type]
    torch.testing.assert_close(weight.detach(), before + 0.1 * (start - before), rtol=0, atol=1e-6)
