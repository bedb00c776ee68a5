"""Sizes of shared memory: every tile's words fit, in few sizes; pieces hold what was asked for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rans_kernels.format import CODED_BITS, PROBABILITY_BITS

pytest.importorskip("triton")
from rans_kernels.ops.coded import round_rows  # noqa: E402
from rans_kernels.ops.simt import WORD_RING_BYTES, shared_pieces, word_buffer_bytes  # noqa: E402
from rans_kernels.ops.warp import fills  # noqa: E402


@given(st.integers(0, 5000))
def test_words_fit_their_buffer(rows):
    size, ring = word_buffer_bytes(rows)
    assert ring == (16 * rows > WORD_RING_BYTES)
    assert size >= min(16 * rows, WORD_RING_BYTES)
    assert size % 512 == 0
    assert size <= max(512, 16 * rows + 511)


@given(st.integers(0, 5000))
def test_rounded_rows_need_the_same_buffer(rows):
    assert round_rows(rows) >= rows
    assert word_buffer_bytes(round_rows(rows)) == word_buffer_bytes(rows)


def test_buffers_come_in_few_sizes():
    assert len({word_buffer_bytes(rows) for rows in range(1, 5000)}) <= 5


@given(st.sampled_from(CODED_BITS), st.integers(0, 10**6))
def test_a_ring_that_was_refilled_lasts_half_a_unit_longer_than_the_next_refill(coded_bits, taken):
    """What is there before half a unit was begun before the half unit ahead of it, and must last through it."""
    # 2 C symbols of 12 bits at most; a lane's state holds back less than a word
    most = 2 * 32 * ((2 * coded_bits * max(PROBABILITY_BITS) + 16) // 16)
    room = (taken // 16 + WORD_RING_BYTES // 16) * 16
    assert 512 * fills(coded_bits) >= most
    assert room - (taken + most) >= most


@given(st.integers(0, 230_000))
def test_pieces_are_powers_of_two_that_hold_the_size(size):
    pieces = shared_pieces(size)
    assert all(piece & (piece - 1) == 0 for piece in pieces)
    # what is lost to rounding costs occupancy
    assert size <= 4 * sum(pieces) <= max(size * 1.15 + 1024, 3 * 1024)
