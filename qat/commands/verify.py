"""Check a compressed folder, all of it, and stop at the first fault.

config.json and the index, every shard and the names and shapes in it, the checksums of tensors that are not
compressed, then layer by layer those of the compressed ones, and every tile decoded.

  codecllm verify compressed/model
"""

import argparse
import time
from math import prod
from typing import TYPE_CHECKING

from qat.commands.values import count
from qat.errors import UserError
from qat.report import track

if TYPE_CHECKING:
    from torch import Tensor

    from qat.commands.folder import Folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder, and threads."""
    parser.add_argument("folder", metavar="FOLDER", help="a compressed folder")
    parser.add_argument("--workers", type=count, metavar="N", help="threads (every core)")


def run(arguments: argparse.Namespace) -> None:
    """Check headers, then names and shapes, then weights.

    Raises:
        UserError: no such folder, or tensors that are not those of the architecture.
        rans_kernels.format.FormatError: anything else that is wrong.
    """
    from rans_kernels.checkpoint import check_plain, iterate_weights

    from qat.commands.folder import open_folder
    from qat.model import check_weights

    begin = time.perf_counter()
    folder = open_folder(arguments.folder)
    try:
        check_weights(folder.path, plain_shapes(folder))
    except UserError as error:
        raise UserError(f"{error}: copy or export the folder again") from error
    check_plain(folder.path)
    tiles = 0
    layers = iterate_weights(folder.path, arguments.workers)
    for _, entry, _, _ in track(layers, "verify", total=len(folder.layers)):
        tiles += entry.layout.tiles
    weights = sum(prod(entry.layout.shape) for entry in folder.layers.values())
    seconds = time.perf_counter() - begin
    print(
        f"{arguments.folder} is whole: {len(folder.layers)} compressed modules of {weights:,} weights, "
        f"{tiles:,} tiles, {len(folder.plain)} other tensors; {seconds:.1f} s"
    )


def plain_shapes(folder: "Folder") -> dict[str, "Tensor"]:
    """The weights that the model had before it was compressed, on the meta device: names and shapes alone."""
    import torch

    shapes = {name: tensor.shape for name, tensor in folder.plain.items()}
    shapes |= {f"{name}.weight": entry.stock_shape for name, entry in folder.layers.items()}
    shapes |= {f"{head}.weight": folder.layers[source].layout.shape for head, source in folder.tied.items()}
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
