"""rANS-compressed INT8 weights, and 16-bit floats without loss: codec, kernels and runtime.

`import rans_kernels` makes `AutoModelForCausalLM.from_pretrained` read compressed folders. The import itself costs
nothing: torch and transformers are loaded when first needed, so that `rans_kernels.format` works with numpy alone.
"""

import importlib
import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rans_kernels.hf import load
    from rans_kernels.linear import CompressedEmbedding, CompressedLinear

__all__ = ["CompressedEmbedding", "CompressedLinear", "load"]

_LAZY = {"load": "hf", "CompressedLinear": "linear", "CompressedEmbedding": "linear"}
_HOOKS = {"transformers.quantizers.auto": "rans_kernels.hf", "peft.tuners.lora.model": "rans_kernels.lora"}
"""Modules of others, and ours that register something there."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'rans_kernels' has no attribute {name!r}")
    return getattr(importlib.import_module(f"rans_kernels.{_LAZY[name]}"), name)


class _ImportAfter(MetaPathFinder, Loader):
    """Imports a module of ours as soon as another has been imported."""

    def __init__(self, theirs: str, ours: str):
        self.theirs, self.ours = theirs, ours

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != self.theirs:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self._loader  # type: ignore[union-attr]
        self._loader.exec_module(module)
        importlib.import_module(self.ours)


for _theirs, _ours in _HOOKS.items():
    if _theirs in sys.modules:
        importlib.import_module(_ours)
    else:
        sys.meta_path.insert(0, _ImportAfter(_theirs, _ours))
