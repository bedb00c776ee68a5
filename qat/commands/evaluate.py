"""Compare a compressed model with those it came from, or run lm-eval tasks.

The words that follow are those of `python -m eval.consistency` and `python -m eval.harness`; `--help` behind either
lists them. Exits with 3 where the compressed model is not what it promises to be.

  codecllm eval consistency compressed=compressed/model base=my/model text=my/valid.txt output=reports/model modes=all
  codecllm eval lm-eval compressed=compressed/model tasks=[arc_easy] limit=200 output=reports/model
"""

import argparse
import sys
from importlib import import_module

from qat.cli import ROOT, entry_point

PROGRAMS = {"consistency": ("eval.consistency", "check"), "lm-eval": ("eval.harness", "check")}
"""Module and function of each."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which program, and its words."""
    parser.add_argument("program", choices=list(PROGRAMS), help="tokens and logits, or tasks")
    parser.add_argument("words", metavar="KEY=VALUE", nargs=argparse.REMAINDER, help="settings (docs/evaluation.md)")


def run(arguments: argparse.Namespace) -> None:
    """Hand the words over to the program, which exits."""
    sys.path.insert(0, str(ROOT))
    module, task = PROGRAMS[arguments.program]
    # hydra reads the command line by itself
    sys.argv = [f"codecllm eval {arguments.program}", *arguments.words]
    entry_point("eval", getattr(import_module(module), task))
