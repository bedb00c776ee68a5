"""Base models and tokenizers of Hugging Face, loaded whole or not at all.

`from_pretrained` fills what a checkpoint lacks with random numbers and a warning. Here a missing or unexpected
weight is an error, and every way in which a path can be wrong is one line that says so.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import logging as hub_logging
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from qat.errors import UserError


def load_model(path: str | Path, dtype: torch.dtype = torch.float32, revision: str | None = None) -> PreTrainedModel:
    """A causal language model in eval mode on the CPU.

    Args:
        path: local folder, or a name on the hub.
        dtype: of the weights.
        revision: branch, tag or commit on the hub.

    Raises:
        UserError: no such folder or name, not a causal language model, already quantised, or weights
            that do not fit the architecture exactly.
    """
    if getattr(load_config(path, revision), "quantization_config", None) is not None:
        raise UserError(f"{path} is quantised already; training and export start from plain weights")
    return _load(AutoModelForCausalLM, path, _source(path), dtype=dtype, revision=revision)


def load_weights(folder: Path, weights: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model that `folder` (config.json, no weights) describes, holding `weights`, in eval mode on the CPU.

    Raises:
        UserError: as `load_model`.
    """
    config = load_config(folder)
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return _load(kind, folder, None, config=config, state_dict=weights, dtype=dtype)


def check_weights(folder: Path, weights: dict[str, Tensor]) -> None:
    """Compare names and shapes of weights, all on the meta device, with what config.json of `folder` describes.

    Transformers judges them as it does when it loads them, old names of weights included, and reads nothing.

    Raises:
        UserError: as `load_model`; one is missing, not known, or of another shape.
    """
    config = load_config(folder)
    # names and shapes are those of the plain model
    vars(config).pop("quantization_config", None)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{folder} is no causal language model: {config.model_type}")
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    options = {"device_map": "meta", "ignore_mismatched_sizes": True}
    _load(kind, folder, None, config=config, state_dict=weights, **options)


def load_config(path: str | Path, revision: str | None = None) -> PreTrainedConfig:
    """What config.json says of a model; errors as `load_model`."""
    return _call(AutoConfig.from_pretrained, path, _source(path), revision=revision)


def load_tokenizer(path: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a model; errors as `load_model`."""
    return _call(AutoTokenizer.from_pretrained, path, _source(path), revision=revision)


def output_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits [..., V] from the last hidden states [..., D] of `model.base_model`.

    What some architectures do to the logits behind the head is done here too: Gemma's soft cap, Cohere's and
    Granite's constant factor.
    """
    logits = model.get_output_embeddings()(hidden)
    if cap := getattr(model.config, "final_logit_softcapping", None):
        logits = torch.tanh(logits / cap) * cap
    factor = getattr(model.config, "logit_scale", None) or 1 / (getattr(model.config, "logits_scaling", None) or 1)
    return logits if factor == 1 else logits * factor


@torch.no_grad()
def check_output_logits(model: PreTrainedModel, tokens: int = 8) -> None:
    """Compare `output_logits` with the model's own logits on a few random tokens.

    Raises:
        UserError: the architecture does something to its logits that is not known here.
    """
    ids = torch.randint(model.config.vocab_size, (1, tokens), device=model.device)
    own = model(input_ids=ids, use_cache=False).logits
    ours = output_logits(model, model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    if own.shape != ours.shape or not torch.allclose(own, ours, rtol=1e-3, atol=1e-4):
        raise UserError(
            f"{type(model).__name__} changes its logits behind the output head; this architecture cannot be trained"
        )


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers that transformers knows as such, in order; the whole model in front of the head if there are none."""
    layers: list[nn.Module] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    return layers or [model.base_model]


def compile_layers(model: PreTrainedModel, backend: str = "inductor") -> None:
    """Compile the decoder layers of a model in place; what the compiler makes of one serves all that are alike."""
    for module in decoder_layers(model):
        # not module.compile(), which would trace hooks too
        module.forward = torch.compile(module.forward, backend=backend)


def hidden_states(model: PreTrainedModel, ids: Tensor, layers: bool = False) -> list[Tensor]:
    """Last hidden states [B, T, D] for token ids [B, T], behind those of every decoder layer but the last if asked.

    By hooks of our own: those of transformers' `output_hidden_states` lie inside of what is compiled, too.
    """
    found: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    hooks = [module.register_forward_hook(keep) for module in decoder_layers(model)[:-1]] if layers else []
    try:
        last = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    return [*found, last]


def _source(path: str | Path) -> str:
    """What to hand to transformers: a folder that exists, or a name that can be one on the hub."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return str(folder)
    if folder.exists():
        raise UserError(f"{path} is a file; a model is a Hugging Face folder or a name on the hub")
    text = str(path)
    if text.count("/") > 1 or text.startswith((".", "/", "~")) or text.endswith("/"):
        raise UserError(f"no model at {path}: there is no such folder")
    return text


def _call(function: Callable[..., Any], path: str | Path, source: str | None, **options: Any) -> Any:
    """`function(source, ...)` of transformers, its errors told as the user's, its warnings and bars held back."""
    from safetensors import SafetensorError

    levels = hf_logging.get_verbosity(), hub_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        return function(source, **options)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        where = "" if Path(path).expanduser().is_dir() else " (which is no folder here) from the hub"
        raise UserError(f"cannot load {path}{where}: {reason}") from error
    finally:
        hf_logging.set_verbosity(levels[0])
        hub_logging.set_verbosity(levels[1])
        hf_logging.enable_progress_bar()


def _load(kind: Any, path: str | Path, source: str | None, **options: Any) -> PreTrainedModel:
    model, info = _call(kind.from_pretrained, path, source, output_loading_info=True, **options)
    for problem in ("missing", "unexpected", "mismatched"):
        if keys := sorted(map(str, info[f"{problem}_keys"])):
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise UserError(f"the weights of {path} do not fit {type(model).__name__}: {problem} {keys[0]}{more}")
    return model.eval()
