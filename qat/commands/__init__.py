"""Train and compress language models, look into compressed folders, check them, run them."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import NoReturn

from qat.cli import exit_code
from qat.commands import compress, evaluate, generate, inspect, interop, train, verify

COMMANDS = {
    "train": train,
    "compress": compress,
    "inspect": inspect,
    "verify": verify,
    "generate": generate,
    "eval": evaluate,
    "interop": interop,
}
"""Each has `add_arguments` and `run`, and its docstring is its help."""


class Parser(argparse.ArgumentParser):
    """Tells a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and where help is, and exit."""
        self.exit(2, f"error: {message}; {self.prog} --help says how\n")


def make_parser() -> Parser:
    """The parser of the whole command line; `run` of what it returns is the command's function."""
    parser = Parser(prog="codecllm", description=__doc__)
    parser.add_argument("--version", action="version", version=f"codecllm {version('codecllm')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        text = module.__doc__ or ""
        layout = argparse.RawDescriptionHelpFormatter
        command = commands.add_parser(
            name, help=text.partition("\n")[0].rstrip("."), description=text, formatter_class=layout
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(words: Sequence[str] | None = None) -> NoReturn:
    """Do what the command line says and exit, with the exit codes of `qat.cli.entry_point`."""
    arguments = make_parser().parse_args(words)

    def call() -> None:
        try:
            arguments.run(arguments)
            sys.stdout.flush()
        except BrokenPipeError:
            # whoever reads has enough; what is still buffered goes nowhere, or python would complain at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    sys.exit(exit_code(call, os.environ.get("HYDRA_FULL_ERROR") == "1"))
