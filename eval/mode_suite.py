"""Runs a compressed model in every way of `eval.modes` beside a reference: which tokens differ, where, by how much.

Two comparisons a mode. With the reference, run in the same way: nothing may differ (docs/evaluation.md, level 4). With
the compressed model's own eager run: measured, and where only the weights' place in memory is another, promised too.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rans_kernels.linear import CompressedLinear, TiedLinear
from rans_kernels.ops.coded import backend_of
from rans_kernels.ops.fold import multiplies_folded
from rans_kernels.ops.rans_linear.op import uses_fused_kernel
from rich.progress import Progress
from torch import Tensor, nn
from transformers import PreTrainedModel

from eval.modes import BATCHES, MODES, Mode, Work, choose_modes
from eval.references import linear_layers, same_weights, weight_of
from qat.config import EvalConfig
from qat.divergence import compare_tokens, first_divergence
from qat.inference import Trace

LAYER_ROWS = 64
"""Rows of x whose products are compared layer by layer: warp-level kernels give so many the same bits in any batch."""


class ModeSuite:
    """Runs the modes that a config names and keeps what was found, by mode.

    An entry has `status` (passed, failed, skipped), `reason` of one that did not end, `seconds`, and comparisons: for
    CHECKS `weights` (`eval.references.same_weights`) or `layers` (`compare_layers`), else `reference` and, but for the
    eager run itself, `eager` (`compare_traces`, with `promised`: whether a divergent token fails the mode); for
    `repeat` also `itself`, the reference's eager run against its first.
    """

    def __init__(self, config: EvalConfig, prompts: Tensor, progress: Progress):
        """Args: config: modes, new_tokens and batch_size. prompts: int64 [B, T]. progress: gets a bar a run."""
        self.names = choose_modes(config.modes)
        self.config, self.prompts, self.progress = config, prompts, progress
        self.found: dict[str, dict[str, Any]] = {}

    def compare_weights(self, reference: nn.Module, compressed: nn.Module) -> None:
        """Level 1, by what the compressed model decodes to; `reference` still with its master weights."""
        if "weights" in self.names:
            with self._entry("weights") as entry:
                entry["weights"] = same_weights(reference, compressed)

    def run(self, reference: PreTrainedModel, compressed: PreTrainedModel, eager: tuple[Trace, Trace]) -> None:
        """The modes that need both models; eager: what they generated in the way of mode `dynamic`."""
        if "layers" in self.names:
            ids = self.prompts.flatten()[:LAYER_ROWS][None].to(compressed.device)
            with self._entry("layers") as entry:
                entry["layers"] = compare_layers(reference, compressed, ids)
        for name, mode in self._here(compressed, loaded=False):
            with self._entry(name) as entry:
                if name in ("dynamic", f"batch_{self.config.batch_size}"):
                    ours, theirs = eager
                else:
                    written = eager[1].tokens
                    ours = self._generate(f"{name}, reference", mode, reference, written)
                    theirs = self._generate(f"{name}, compressed", mode, compressed, written)
                entry["reference"] = compare_traces(ours, theirs) | {"promised": True}
                if name != "dynamic":
                    entry["eager"] = compare_traces(eager[1], theirs) | {"promised": False}
                if name == "repeat":
                    entry["itself"] = compare_traces(eager[0], ours) | {"promised": False}

    def run_loaded(self, compressed: PreTrainedModel, eager: tuple[Trace, Trace]) -> None:
        """The modes that load the compressed model in another way; arguments as `run`."""
        for name, mode in self._here(compressed, loaded=True):
            with self._entry(name) as entry:
                assert mode.load is not None
                model = mode.load(compressed, self.config.compressed)
                trace = self._generate(name, mode, model, eager[1].tokens)
                entry["reference"] = compare_traces(eager[0], trace) | {"promised": True}
                entry["eager"] = compare_traces(eager[1], trace) | {"promised": True}

    def report(self) -> dict[str, dict[str, Any]]:
        """What was found, in the order of CHECKS and MODES."""
        return {name: self.found[name] for name in self.names if name in self.found}

    def _here(self, compressed: PreTrainedModel, loaded: bool) -> Iterator[tuple[str, Mode]]:
        """The modes that can run; the others are noted as skipped."""
        for name, mode in MODES.items():
            if name not in self.names or (mode.load is not None) != loaded:
                continue
            if reason := mode.missing(compressed):
                self.found[name] = {"status": "skipped", "reason": reason}
            else:
                yield name, mode

    def _generate(self, title: str, mode: Mode, model: PreTrainedModel, written: Tensor) -> Trace:
        task = self.progress.add_task(title, total=len(self.prompts))
        size = self.config.batch_size
        work = Work(self.prompts, self.config.new_tokens, size, lambda n: self.progress.advance(task, n), written)
        return mode.generate(model, work)

    @contextmanager
    def _entry(self, name: str) -> Iterator[dict[str, Any]]:
        entry: dict[str, Any] = {}
        reason, begin = None, time.perf_counter()
        try:
            yield entry
        except (RuntimeError, ValueError) as error:
            # no memory, nothing that a compiler or a graph can take: the other modes are worth having
            reason = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
        seconds = round(time.perf_counter() - begin, 3)
        status = "failed" if reason or any(map(_broken, entry.values())) else "passed"
        self.found[name] = {"status": status, "reason": reason, **entry, "seconds": seconds}


def _broken(found: dict[str, Any]) -> bool:
    """Whether a comparison says that a promise was."""
    if "promised" in found:
        return found["promised"] and found["divergent_tokens"] > 0
    if "splits" in found:
        return any(row["broken"] for row in found["splits"].values())
    return bool(found["unequal"])


def compare_traces(reference: Trace, other: Trace) -> dict[str, Any]:
    """Compare what two runs generated from the same prompts.

    Returns:
        What `compare_tokens` does but for the survival curve; each divergence also has `difference`, the largest
        between logits of tokens that were among the likeliest in both runs, None where none was.
        unequal_logits: steps up to the first divergence of each prompt whose logits differ in any bit.
        max_logit_difference: over all those steps, as `difference`.
    """
    found = compare_tokens(reference.tokens, other.tokens, reference.margins)
    del found["survival"]
    first = first_divergence(reference.tokens, other.tokens)
    # behind it prefixes differ too
    comparable = torch.arange(reference.tokens.shape[1]) <= first[:, None]
    shared = reference.likeliest[..., :, None] == other.likeliest[..., None, :]
    apart = (reference.logits[..., :, None] - other.logits[..., None, :]).abs().where(shared, -1.0)
    difference = apart.flatten(-2).amax(-1)
    found["unequal_logits"] = ((reference.prints != other.prints) & comparable).sum().item()
    found["max_logit_difference"] = difference[comparable].amax().clamp_min(0).item()
    for where in found["divergences"]:
        value = difference[where["prompt"], where["position"]].item()
        where["difference"] = value if value >= 0 else None
    return found


@torch.inference_mode()
def compare_layers(reference: nn.Module, compressed: PreTrainedModel, ids: Tensor) -> dict[str, Any]:
    """Levels 2 and 3: every compressed linear layer on what it is given for a text, alone and in batches.

    Args:
        reference: whose layers of the same names compute the same.
        compressed: the model.
        ids: int64 [1, T], the text; its T positions are the rows.

    Returns:
        modules: how many. splits: `dense` compares with the reference on all rows, `batch_<n>` with the same rows n at
        a time; each {"rows", "unequal_rows", "max_difference", "broken"}: rows of all layers that were compared and
        that differ, the largest difference, and the names of the layers that differ although equality is promised.
    """
    layers = linear_layers(compressed)
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args: inputs.__setitem__(name, args[0].flatten(0, -2))

    hooks = [module.register_forward_pre_hook(keep(name)) for name, module in layers.items()]
    try:
        compressed(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    splits: dict[str, Any] = {}
    for name, x in inputs.items():
        module = layers[name]
        y, (dense, shared) = module(x), _promises(module, x)
        others = {"dense": (reference.get_submodule(name)(x), dense)}
        for n in BATCHES:
            # every row where that is promised; else one batch measures what a CPU takes long for
            rows = x if shared else x[:n]
            others[f"batch_{n}"] = torch.cat([module(part) for part in rows.split(n)]), shared
        for split, (other, promised) in others.items():
            row = splits.setdefault(split, {"rows": 0, "unequal_rows": 0, "max_difference": 0.0, "broken": []})
            apart = (y[: len(other)].float() - other.float()).abs().amax(-1)
            row["rows"] += len(other)
            if unequal := apart.count_nonzero().item():
                row["unequal_rows"] += unequal
                row["max_difference"] = max(row["max_difference"], apart.max().item())
                row["broken"] += [name] if promised else []
    return {"modules": len(layers), "splits": splits}


def _promises(layer: CompressedLinear | TiedLinear, x: Tensor) -> tuple[bool, bool]:
    """Whether a layer promises to equal its dense twin on x, and a row of x alone to equal it in the batch."""
    weight, bias = weight_of(layer), getattr(layer, "bias", None)
    layout, group_size = weight.layout, weight.group_size
    fused = uses_fused_kernel(len(x), x.device, x.dtype, group_size, getattr(torch, layout.dtype))
    fused = fused and multiplies_folded(layout.fold, weight.weight_scale, bias, group_size)
    # portable Triton has no kernel for dense INT8
    return x.device.type == "cpu" or backend_of(x.device) == "gluon", fused
