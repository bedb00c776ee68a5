"""Train a model's weights so that they compress.

The words that follow are those of train.py: settings, and behind the first of them Hydra's options too; --help there
lists all settings.

  codecllm train experiment=tinyllama_qat data.train=my/train.txt data.valid=my/valid.txt
  codecllm train experiment=tinyllama_qat --help
"""

import argparse
import sys

from qat.cli import entry_point
from qat.programs import train


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The program's words."""
    parser.add_argument("words", metavar="KEY=VALUE", nargs=argparse.REMAINDER, help="settings (qat/config.py)")


def run(arguments: argparse.Namespace) -> None:
    """Hand the words over to the program, which exits."""
    # what hydra reads, and what Lightning starts further processes by, unless python was given a module
    sys.argv = [train.__file__, *arguments.words]
    sys.modules["__main__"].__spec__ = None
    entry_point("train", train.main)
