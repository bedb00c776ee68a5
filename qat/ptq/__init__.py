"""Rounding after training: what quantisation-aware training has to beat."""

from qat.ptq.layerwise import compensate, gptq
from qat.ptq.methods import METHODS, Method, Rounded
from qat.ptq.model import Cost, Trained, find_knob, stored_cost

__all__ = ["METHODS", "Cost", "Method", "Rounded", "Trained", "compensate", "find_knob", "gptq", "stored_cost"]
