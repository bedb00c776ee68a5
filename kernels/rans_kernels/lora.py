"""LoRA of peft on top of compressed layers: imported, and with it known to peft, when peft is.

The weights stay coded; gradients pass through them to what is below.
"""

import warnings
from typing import Any, NoReturn

from peft.tuners.lora import LoraConfig
from peft.tuners.lora.layer import Linear

from rans_kernels.linear import CompressedLinear


class CompressedLora(Linear):
    """Adapters of a CompressedLinear."""

    def __init__(self, base_layer: Any, *args: Any, **kwargs: Any):
        """As peft's Linear."""
        with warnings.catch_warnings():
            # peft knows the shape by the names of the attributes, and says that the type is unknown
            warnings.filterwarnings("ignore", message="Unsupported layer type")
            super().__init__(base_layer, *args, **kwargs)

    def resolve_lora_variant(self, **kwargs: Any) -> None:
        """None: plain LoRA.

        Raises:
            ValueError: DoRA or another variant, which reads or changes the weight.
        """
        variant = super().resolve_lora_variant(**kwargs)
        if variant is not None:
            raise ValueError(f"compressed layers take plain LoRA alone, not {type(variant).__name__}: switch it off")

    def merge(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not possible.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "an adapter cannot be merged into compressed weights: keep it beside them, or merge it into the plain "
            "model (codecllm interop --to plain) and compress that"
        )


def _register() -> None:
    """Give every LoraConfig that is made from now on our kind of layer, as peft's users do for one config."""
    initialise = LoraConfig.__post_init__

    def __post_init__(self: LoraConfig) -> None:
        initialise(self)
        self._register_custom_module({CompressedLinear: CompressedLora})

    setattr(LoraConfig, "__post_init__", __post_init__)  # noqa: B010 -- mypy takes no assignment to a method


_register()
