"""Greedy generation with a static cache whose step is one CUDA graph, recorded once and replayed for every token."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from rans_kernels.streaming import record
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from qat.inference import Trace, join_prompts, join_steps, read_logits


class StepGraph:
    """A step of a batch: from its last tokens to the next, in buffers that stay where they are."""

    def __init__(self, model: PreTrainedModel, batch: int, length: int):
        """Args: model: in eval mode. batch: rows. length: tokens that the cache holds."""
        self.model = model
        self.replay: Callable[[], None] | None = None
        self.cache = StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=length)
        # transformers 5.24 has another name for it
        names = inspect.signature(type(model).forward).parameters
        self.options: dict[str, Any] = {"cache" if "cache" in names else "past_key_values": self.cache}
        self.ids = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)
        self.logits: Tensor | None = None

    def read(self, ids: Tensor) -> None:
        """Feed ids [batch, T]: `logits` [batch, V] and `ids` [batch, 1] become those of what follows."""
        logits = self.model(input_ids=ids, use_cache=True, **self.options).logits[:, -1].float()
        if self.logits is None:
            self.logits = torch.empty_like(logits)
        self.logits.copy_(logits)
        self.ids.copy_(logits.argmax(-1, keepdim=True))

    def start(self, prompt: Tensor) -> None:
        """Begin anew behind a prompt, which is read eagerly; the first time on a GPU the step is recorded."""
        if self.replay is None and self.model.device.type == "cuda":
            self._record(prompt)
        self.cache.reset()
        self.read(prompt)

    def step(self) -> None:
        """Read the last tokens."""
        if self.replay is None:
            self.read(self.ids)
        else:
            self.replay()

    def _record(self, prompt: Tensor) -> None:
        stream = torch.cuda.Stream(self.model.device)
        stream.wait_stream(torch.cuda.current_stream(self.model.device))
        with torch.cuda.stream(stream):
            self.read(prompt)
            # kernels are compiled and buffers made before anything is recorded
            for _ in range(2):
                self.read(self.ids)
        torch.cuda.current_stream(self.model.device).wait_stream(stream)
        self.replay = record(self.model, lambda: self.read(self.ids))


@torch.no_grad()
def graph_greedy(
    model: PreTrainedModel,
    prompts: Tensor,
    new_tokens: int,
    batch_size: int,
    advance: Callable[[int], Any] = lambda done: None,
) -> Trace:
    """What `qat.inference.trace_greedy` does, by a StepGraph; on a CPU the same loop without a graph.

    Args:
        model: on any device, in eval mode.
        prompts: int64 [B, T]; B is a multiple of the batch size.
        new_tokens: N, at least 1.
        batch_size: prompts at once.
        advance: told how many prompts each batch has finished.
    """
    # two tokens more than are kept: recording takes steps of its own
    graph = StepGraph(model, batch_size, prompts.shape[1] + max(new_tokens, 4))
    traces = []
    for batch in prompts.to(model.device).split(batch_size):
        steps = []
        for step in range(new_tokens):
            if step == 0:
                graph.start(batch)
            else:
                graph.step()
            assert graph.logits is not None
            steps.append(read_logits(graph.logits))
        traces.append(join_steps(steps))
        advance(len(batch))
    return join_prompts(traces)


def has_host_state(model: PreTrainedModel) -> bool:
    """Whether a static cache of the model keeps numbers outside of tensors, which a graph would not see change."""
    cache = StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=8)
    return any(getattr(layer, "is_sliding", False) for layer in cache.layers)
