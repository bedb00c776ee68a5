"""Compress a checkpoint or a Hugging Face folder.

SOURCE is a .ckpt of train.py, or a Hugging Face folder, which is rounded to nearest. Every tile is decoded and
compared before OUTPUT appears under its name; on an error or Ctrl-C nothing is left.

  codecllm compress my/model compressed/model --profile auto --set quant=std --set quant.k=0.25
  codecllm compress my/model compressed/exact --lossless all --set quant=none
"""

import argparse
from dataclasses import replace

from qat.cli import compose
from qat.commands.values import count
from qat.config import Lossless, Profile


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is compressed, where to, and how."""
    parser.add_argument("source", metavar="SOURCE", help="checkpoint (.ckpt) or Hugging Face folder")
    parser.add_argument("output", metavar="OUTPUT", help="folder to write")
    parser.add_argument(
        "--profile",
        choices=[profile.value for profile in Profile],
        help="fewest bits (compact, the default), fast on a GPU, or between",
    )
    parser.add_argument(
        "--lossless", choices=[kind.value for kind in Lossless], help="16-bit weights to code without loss (none)"
    )
    parser.add_argument("--dtype", help="of what is not compressed: auto (as it is), float32, bfloat16, float16")
    parser.add_argument("--workers", type=count, metavar="N", help="threads (every core)")
    parser.add_argument("--overwrite", action="store_true", help="replace the model at OUTPUT")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any setting of export.py; may be repeated"
    )


def run(arguments: argparse.Namespace) -> None:
    """Export, with the settings that export.py would be given."""
    given = {name: getattr(arguments, name) for name in ("profile", "lossless", "dtype", "workers")}
    words = [f"{name}={value}" for name, value in given.items() if value is not None]
    if arguments.overwrite:
        words.append("overwrite=true")
    config = compose("export", "source=given", "output=given", *words, *arguments.set)

    from qat.export import export

    # paths do not pass through hydra, whose grammar gives a meaning to some of their characters
    export(replace(config, source=arguments.source, output=arguments.output))
