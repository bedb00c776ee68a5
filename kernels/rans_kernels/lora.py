"""LoRA through peft on compressed layers: the adapter is a pair of small float matrices, what is below stays coded.

Imported as soon as peft's LoRA is (rans_kernels/__init__.py), never before.
"""

from typing import Any

from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from torch import nn

from rans_kernels.linear import CompressedLinear

STARTS = (True, False, "gaussian")
"""Values of `init_lora_weights` that neither read nor change the weights below."""


class CompressedLoraLinear(Linear):
    """peft's layer around a CompressedLinear, without what needs its weights as floats."""

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, CompressedLinear)
        return module.in_features, module.out_features

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """Plain LoRA alone."""
        return {(): None}

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """As peft.

        Raises:
            ValueError: the config asks for a variant of LoRA, or a start from the weights below.
        """
        if config.init_lora_weights not in STARTS:
            start = f"init_lora_weights={config.init_lora_weights!r}"
            raise ValueError(f"{start} works on float weights, these are compressed: give True, False or 'gaussian'")
        try:
            self.resolve_lora_variant(config=config)
        except ValueError as error:
            raise ValueError(f"compressed layers take plain LoRA alone ({error}): leave that setting out") from error
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "an adapter cannot be merged into compressed weights: keep it beside them, or merge it into the plain "
            "model (codecllm interop --to plain) and compress that"
        )


def _prepare_model(self: LoraModel, peft_config: Any, model: nn.Module) -> None:
    """peft's hook before it looks for its targets: say what our layers are."""
    peft_config._register_custom_module({CompressedLinear: CompressedLoraLinear})
    if peft_config.target_modules == "all-linear":
        # peft's own list knows nn.Linear alone
        _maybe_include_all_linear_layers(peft_config, model)
        peft_config.target_modules |= _linear_names(model)
    _peft_prepare_model(self, peft_config, model)


def _linear_names(model: Any) -> set[str]:
    """Compressed linear layers, without the output head and those that are below an adapter."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    layers = {name: m for name, m in model.named_modules() if isinstance(m, CompressedLinear) and m is not head}
    return {name for name in layers if not name.endswith(".base_layer")}


# the one hook that every adapter passes, new or read from disk; a config knows custom layers only for itself
_lora_model: Any = LoraModel
_peft_prepare_model = _lora_model._prepare_model
_lora_model._prepare_model = _prepare_model
