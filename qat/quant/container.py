"""What a codec's container stores beyond the entropy of the integers, from coding a sample of every tensor.

The sample's tiles get the layout that export would choose for the whole tensor. What the code itself, states and
offsets add is measured on the sample; the frequency table and the scales are counted once, over the whole tensor.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from rans_kernels.coder import encode_tiles, entropy, weight_histogram
from rans_kernels.coder.plan import can_fold, choose_layout
from rans_kernels.format import UNIT_ROWS

from qat.quant.fit import fit_integers, integer_counts
from qat.quant.modules import QATModule


def container_overhead(modules: Mapping[str, QATModule], profile: str, panels: int, fit: bool = False) -> float:
    """Stored bits less entropy, in bits a weight over all tensors; arguments as `overhead_bits`."""
    weights = sum(module.weight.numel() for module in modules.values())
    return sum(overhead_bits(modules, profile, panels, fit).values()) / weights


@torch.no_grad()
def overhead_bits(modules: Mapping[str, QATModule], profile: str, panels: int, fit: bool = False) -> dict[str, float]:
    """Stored bits less entropy of every tensor, in bits.

    Args:
        modules: fake-quantising layers; layers that share a weight must be there once.
        profile: compact, fast or auto, of the export.
        panels: of 16 rows of the coded matrix, spread evenly, that are coded; if it has no more, the result is exact.
        fit: as if weights were put inside the range of each tensor, see `qat.quant.fit`.
    """
    return {name: _overhead_bits(module, profile, panels, fit) for name, module in modules.items()}


def _overhead_bits(module: QATModule, profile: str, panels: int, fit: bool) -> float:
    q = module.integers()
    if fit:
        q = fit_integers(q)
    counts = integer_counts(q).cpu().numpy()
    scales = module.scale().numel()
    foldable = can_fold(scales, getattr(module, "bias", None) is not None)
    layout = choose_layout(counts, (q.shape[0], q.shape[1]), profile, foldable)
    rows = q.reshape(layout.coded_shape)
    sample = rows[_panel_rows(len(rows), panels)].cpu().numpy()
    encoded = encode_tiles(sample, replace(layout, shape=sample.shape, fold=1))
    # bits of the sample, scaled up to the tensor, and what a tensor has once
    grown = 8 * (encoded.nbytes - encoded.freqs.nbytes) - entropy(weight_histogram(sample)) * sample.size
    return grown * q.numel() / sample.size + 8 * encoded.freqs.nbytes + 32 * scales


def _panel_rows(rows: int, panels: int) -> torch.Tensor:
    """Rows of evenly spread panels; or all rows, of which the last panel may have fewer than 16."""
    if rows <= panels * UNIT_ROWS:
        return torch.arange(rows)
    chosen = np.linspace(0, rows // UNIT_ROWS - 1, panels).round().astype(np.int64)
    return torch.from_numpy((chosen[:, None] * UNIT_ROWS + np.arange(UNIT_ROWS)).ravel())
