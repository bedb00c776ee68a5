"""Codec on the CPU: frequency tables, encoder, decoder and an independent reference decoder. Needs numpy and numba."""

from rans_kernels.coder.decoder import decode_tiles
from rans_kernels.coder.encoder import EncodedTensor, encode_tiles
from rans_kernels.coder.tables import byte_histogram, entropy, high_bytes, normalise_frequencies, weight_histogram

__all__ = [
    "EncodedTensor",
    "byte_histogram",
    "decode_tiles",
    "encode_tiles",
    "entropy",
    "high_bytes",
    "normalise_frequencies",
    "weight_histogram",
]
