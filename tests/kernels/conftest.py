"""Kernel tests run under Triton's interpreter where there is no GPU; the switch must be set before triton is
imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
