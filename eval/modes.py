"""Ways of generating with a model, none of which may change what comes out: caches, compilers, batches, devices.

`eval.mode_suite` compares the compressed model in each with a reference; docs/evaluation.md says what is promised.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import rans_kernels
import torch
from rans_kernels.placement import GB, BudgetError
from torch import Tensor
from transformers import AutoModelForCausalLM, CompileConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from eval.graph import graph_greedy, has_host_state
from qat.errors import UserError
from qat.inference import Trace, join_prompts, read_logits, rows_at_once, trace_greedy

BATCHES = (1, 2, 8, 16, 32)
COMPILER: str | Callable[..., Any] = "inductor"
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
    """Loads the compressed model, given as it is, from its folder in another way; what that generates is compared with
    the eager runs of both models, and promised to equal them."""


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


def _load_streamed(model: PreTrainedModel, folder: str) -> PreTrainedModel:
    try:
        # a byte: the error tells the least that does
        return rans_kernels.load(folder, model.device, model.dtype, budget=1 / GB)
    except BudgetError as error:
        return rans_kernels.load(folder, model.device, model.dtype, budget=(error.least + 1) / GB)


MODES: dict[str, Mode] = {
    "dynamic": Mode(_eager),
    "repeat": Mode(_eager),
    "static": Mode(_static),
    "compile": Mode(_compiled, _no_compiler),
    "cuda_graph": Mode(_recorded, _no_graphs),
    "prefill": Mode(reread),
    **{f"batch_{size}": _in_batches(size) for size in BATCHES},
    "two_gpus": Mode(_eager, _no_second_gpu, _load_on_two_gpus),
    "streamed": Mode(_eager, load=_load_streamed),
}
"""By the names that `modes` takes, beside CHECKS; docs/evaluation.md says what each is."""
