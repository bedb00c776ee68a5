"""Every way of running a compressed model, beside the same run of a reference: which tokens differ, where, by how much.

Two comparisons a mode. With the reference, run in the same way: nothing may differ (docs/evaluation.md, level 4). With
the compressed model's own eager run: measured, and where only the weights' place in memory is another, promised too.
"""

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import rans_kernels
import torch
from rans_kernels.linear import CompressedLinear, TiedLinear
from rans_kernels.ops.coded import backend_of
from rans_kernels.ops.fold import multiplies_folded
from rans_kernels.ops.rans_linear.op import uses_fused_kernel
from rich.progress import Progress
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CompileConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from eval.graph import graph_greedy, has_host_state
from eval.references import linear_layers, same_weights, weight_of
from qat.config import EvalConfig
from qat.divergence import compare_tokens, first_divergence
from qat.errors import UserError
from qat.inference import Trace, join_prompts, read_logits, rows_at_once, trace_greedy

BATCHES = (1, 2, 8, 16, 32)
LAYER_ROWS = 64
"""Rows of x whose products are compared layer by layer: warp-level kernels give so many the same bits in any batch."""
COMPILER = "inductor"
STREAMED = (0.5, 0.75, 1.0, 1.5, 2.0, 4.0)
"""Budgets as shares of all the weights' bytes; the first that can be kept is taken."""
CHECKS = ("weights", "layers")
"""Modes that generate nothing: levels 1, and 2 and 3, of the numerics contract."""


@dataclass(frozen=True)
class Work:
    """What a mode is to generate."""

    prompts: Tensor
    """int64 [B, T]."""
    new_tokens: int
    batch_size: int
    advance: Callable[[int], Any]
    """Told how many prompts are done."""
    written: Tensor
    """int64 [B, N], what the compressed model generated eagerly."""


@dataclass(frozen=True)
class Mode:
    """A way of generating."""

    generate: Callable[[PreTrainedModel, Work], Trace]
    missing: Callable[[PreTrainedModel], str | None] = lambda model: None
    """Why it cannot run here, None where it can."""
    load: Callable[[PreTrainedModel, str], PreTrainedModel] | None = None
    """Loads the compressed model, given as it is, from its folder in another way; the reference stays as it is, and
    the other way promises what the model gives in this one."""


def choose_modes(names: Any) -> list[str]:
    """Modes by their names: a list, one, `all`, or None for none.

    Raises:
        UserError: no mode is called so.
    """
    names = [names] if isinstance(names, str) else list(names or [])
    known = (*CHECKS, *MODES)
    if unknown := [name for name in names if name not in (*known, "all")]:
        raise UserError(f"modes={unknown[0]}: give all or some of {', '.join(known)}")
    return [name for name in known if "all" in names or name in names]


class ModeSuite:
    """Runs the modes that a config names and keeps what was found, by mode.

    An entry has `status` (passed, failed, skipped), `reason` of a skipped one, `seconds`, and the comparisons: for
    CHECKS `weights` (`eval.references.same_weights`) or `layers` (`compare_layers`), else `reference` and, but for the
    eager run itself, `eager` (`compare_traces`, with `promised`: whether a divergent token fails the mode).
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
        begin = time.perf_counter()
        yield entry
        seconds = round(time.perf_counter() - begin, 3)
        status = "failed" if any(map(_broken, entry.values())) else "passed"
        self.found[name] = {"status": status, "reason": None, **entry, "seconds": seconds}


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
        modules, rows: how many. splits: `dense` compares with the reference on all rows, `batch_<n>` with the same rows
        n at a time; each {"unequal_rows", "max_difference", "broken"}: rows of all layers that differ in any bit, the
        largest difference, and the names of the layers that differ although equality is promised.
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
        others |= {f"batch_{n}": (torch.cat([module(part) for part in x.split(n)]), shared) for n in BATCHES}
        for split, (other, promised) in others.items():
            row = splits.setdefault(split, {"unequal_rows": 0, "max_difference": 0.0, "broken": []})
            if unequal := (y != other).any(-1).sum().item():
                row["unequal_rows"] += unequal
                row["max_difference"] = max(row["max_difference"], (y.float() - other.float()).abs().max().item())
                row["broken"] += [name] if promised else []
    return {"modules": len(layers), "rows": ids.shape[1], "splits": splits}


def _promises(layer: CompressedLinear | TiedLinear, x: Tensor) -> tuple[bool, bool]:
    """Whether a layer promises to equal its dense twin on x, and a row of x alone to equal it in the batch."""
    weight, bias = weight_of(layer), getattr(layer, "bias", None)
    layout, group_size = weight.layout, weight.group_size
    fused = uses_fused_kernel(len(x), x.device, x.dtype, group_size, getattr(torch, layout.dtype))
    fused = fused and multiplies_folded(layout.fold, weight.weight_scale, bias, group_size)
    # portable Triton has no kernel for dense INT8
    return x.device.type == "cpu" or backend_of(x.device) == "gluon", fused


@torch.no_grad()
def reread(model: PreTrainedModel, work: Work) -> Trace:
    """The trace of what was written read in one piece behind its prompts, without a cache.

    Its tokens are what greedy generation without a cache gives, up to the first that is not the one read.
    """
    traces, begin = [], work.prompts.shape[1]
    sequences = torch.cat([work.prompts, work.written[:, :-1]], dim=1)
    for batch in sequences.split(rows_at_once(model, sequences.shape[1], work.batch_size)):
        logits = model(input_ids=batch.to(model.device), use_cache=False).logits[:, begin - 1 :]
        # row by row: a fingerprint takes several times the memory of the logits
        traces += [read_logits(row[None]) for row in logits]
        work.advance(len(batch))
    return join_prompts(traces)


def full_batches(generate: Callable[[PreTrainedModel, Work], Trace]) -> Callable[[PreTrainedModel, Work], Trace]:
    """The last prompt again until all batches are full: what is compiled or recorded has one shape."""

    def run(model: PreTrainedModel, work: Work) -> Trace:
        prompts = work.prompts
        full = torch.cat([prompts, prompts[-1:].expand(-len(prompts) % work.batch_size, -1)])
        return Trace(*(part[: len(prompts)] for part in generate(model, replace(work, prompts=full))))

    return run


def _eager(model: PreTrainedModel, work: Work, **options: Any) -> Trace:
    return trace_greedy(model, work.prompts, work.new_tokens, work.batch_size, work.advance, **options)


def _static(model: PreTrainedModel, work: Work) -> Trace:
    return _eager(model, work, cache_implementation="static", disable_compile=True)


@full_batches
def _compiled(model: PreTrainedModel, work: Work) -> Trace:
    compile_config = CompileConfig(backend=COMPILER)
    # transformers compiles by itself on a GPU alone
    vars(compile_config)["_compile_all_devices"] = True
    try:
        return _eager(model, work, cache_implementation="static", compile_config=compile_config)
    finally:
        torch._dynamo.reset()
        vars(model).pop("_compiled_call", None)


@full_batches
def _recorded(model: PreTrainedModel, work: Work) -> Trace:
    return graph_greedy(model, work.prompts, work.new_tokens, work.batch_size, work.advance)


def _in_batches(size: int) -> Mode:
    return Mode(lambda model, work: _eager(model, replace(work, batch_size=size)))


def _no_compiler(model: PreTrainedModel) -> str | None:
    # one line of code tells a machine without a compiler from a model that does not compile
    try:
        torch.compile(lambda x: x + 1, backend=COMPILER)(torch.zeros(8, device=model.device))
    except Exception as error:
        return f"torch.compile does not work here: {str(error).strip().splitlines()[0]}"
    return None


def _no_graphs(model: PreTrainedModel) -> str | None:
    if model.device.type != "cuda":
        return "needs a CUDA GPU"
    return "a part of the cache counts on the host (sliding window)" if has_host_state(model) else None


def _no_second_gpu(model: PreTrainedModel) -> str | None:
    return None if model.device.type == "cuda" and torch.cuda.device_count() > 1 else "needs two GPUs"


def _load_on_two_gpus(model: PreTrainedModel, folder: str) -> PreTrainedModel:
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=model.dtype, device_map=split_layers(model), local_files_only=True
    )
    return loaded.eval()


def split_layers(model: PreTrainedModel) -> dict[str, int]:
    """A device map: the second half of the decoder layers on GPU 1, all else on GPU 0."""
    layers = [name for name, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer)]
    second = layers[(len(layers) + 1) // 2 :]
    # modules that hold the layers, which a map does not name
    above = {"", *(name.rsplit(".", depth)[0] for name in layers for depth in range(1, name.count(".") + 1))}
    names = [name for name, _ in model.named_modules() if name not in above]
    return {name: int(name in second) for name in names if name.rpartition(".")[0] in above}


def _no_streaming(model: PreTrainedModel) -> str | None:
    return None if "budget" in inspect.signature(rans_kernels.load).parameters else "rans_kernels.load takes no budget"


def _load_streamed(model: PreTrainedModel, folder: str) -> PreTrainedModel:
    load: Any = rans_kernels.load
    total = sum(tensor.nbytes for tensor in {*model.parameters(), *model.buffers()})
    *shares, last = STREAMED
    for share in shares:
        # what has to stay, and staging, can be most of a small model
        with suppress(ValueError):
            return load(folder, model.device, model.dtype, budget=share * total / 1e9)
    return load(folder, model.device, model.dtype, budget=last * total / 1e9)


MODES: dict[str, Mode] = {
    "dynamic": Mode(_eager),
    "static": Mode(_static),
    "compile": Mode(_compiled, _no_compiler),
    "cuda_graph": Mode(_recorded, _no_graphs),
    "prefill": Mode(reread),
    **{f"batch_{size}": _in_batches(size) for size in BATCHES},
    "two_gpus": Mode(_eager, _no_second_gpu, _load_on_two_gpus),
    "streamed": Mode(_eager, _no_streaming, _load_streamed),
}
"""By the names that `modes` takes, beside CHECKS; docs/evaluation.md says what each is."""
