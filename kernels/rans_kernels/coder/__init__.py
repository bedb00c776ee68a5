"""Codec on the CPU: frequency tables, encoder, decoder and an independent reference decoder. Needs numpy and numba."""

from rans_kernels.coder.decoder import decode_tiles
from rans_kernels.coder.encoder import EncodedTensor, encode_tiles
from rans_kernels.coder.tables import entropy, normalise_frequencies, weight_histogram

__all__ = [
    "EncodedTensor",
    "decode_tiles",
    "encode_tiles",
    "entropy",
    "normalise_frequencies",
    "weight_histogram",
]
