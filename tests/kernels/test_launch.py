"""Sizes of shared memory: every tile's words fit, in few sizes; pieces hold what was asked for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")
from rans_kernels.ops.coded import round_rows  # noqa: E402
from rans_kernels.ops.rans_decode.gluon import fullest  # noqa: E402
from rans_kernels.ops.simt import shared_pieces, word_buffer_bytes  # noqa: E402


@given(st.integers(0, 5000))
def test_words_fit_their_buffer(rows):
    size = word_buffer_bytes(rows)
    assert size >= 16 * rows
    assert size % 512 == 0
    assert size <= max(512, 2 * 16 * rows)


@given(st.integers(0, 5000))
def test_rounded_rows_need_the_same_buffer(rows):
    assert round_rows(rows) >= rows
    assert word_buffer_bytes(round_rows(rows)) == word_buffer_bytes(rows)


def test_buffers_come_in_few_sizes():
    assert len({word_buffer_bytes(rows) for rows in range(1, 1025)}) <= 4 + 12


@given(st.integers(0, 230_000))
def test_pieces_are_powers_of_two_that_hold_the_size(size):
    pieces = shared_pieces(size)
    assert all(piece & (piece - 1) == 0 for piece in pieces)
    # what is lost to rounding costs occupancy
    assert size <= 4 * sum(pieces) <= max(size * 1.15 + 1024, 3 * 1024)


@given(st.integers(1, 32), st.integers(1, 40))
def test_blocks_of_the_decoder_fill_a_multiprocessor(table, warp):
    limit = 227 << 10

    def resident(warps):
        block = 4 * sum(shared_pieces(1024 * table + 512 * warp * warps)) + 1024
        return min(48, limit // block * warps)

    found = fullest(limit, lambda warps: 1024 * table + 512 * warp * warps)
    assert resident(found) == max(resident(warps) for warps in (2, 4, 8, 16))
