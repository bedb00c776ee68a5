"""Write a compressed folder again for programs that know nothing of ours.

As plain floats, or as compressed-tensors' INT8, with the same integers and scales. Checksums are compared, and OUTPUT
appears under its name only when complete.

  codecllm interop compressed/model my/plain --to plain
  codecllm interop compressed/model my/int8 --to compressed-tensors --dtype float32
"""

import argparse

FORMATS = ("plain", "compressed-tensors")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is read, what is written, and how."""
    parser.add_argument("source", metavar="FOLDER", help="a compressed folder")
    parser.add_argument("output", metavar="OUTPUT", help="folder to write")
    parser.add_argument("--to", required=True, choices=FORMATS, help="ordinary floats, or INT8 (W8A16)")
    parser.add_argument("--dtype", default="bfloat16", help="of every float: %(default)s, float32, float16 or auto")
    parser.add_argument("--shard-size", default="5GB", metavar="SIZE", help="of a file at most (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace the model at OUTPUT")


def run(arguments: argparse.Namespace) -> None:
    """Write the folder.

    Raises:
        UserError: a wrong value, or an output that must not be replaced.
        rans_kernels.format.FormatError: no compressed folder, or a damaged one.
    """
    from qat.interop import to_compressed_tensors, to_plain

    write = to_plain if arguments.to == "plain" else to_compressed_tensors
    write(arguments.source, arguments.output, arguments.dtype, arguments.overwrite, arguments.shard_size)
