"""Quantisation-aware training; `python train.py --help` says how."""

from qat.cli import entry_point
from qat.programs.train import main

if __name__ == "__main__":
    entry_point("train", main)
