"""The tuner's table: written as it is kept, read back as it was, and only with what is worth it."""

from pathlib import Path

import pytest

pytest.importorskip("triton")
from rans_kernels.ops import tuned  # noqa: E402
from rans_kernels.ops.launch import Launch  # noqa: E402

from benchmarks.tune import neighbours, render, search, update  # noqa: E402

TABLE = {("NVIDIA H200", 4096, 14336, 1): (8, 3), ("NVIDIA A100", 64, 64, 2): (1, 1)}


def read(text):
    namespace: dict = {}
    exec(text, namespace)
    return namespace["TUNED"]


@pytest.mark.parametrize("table", [{}, TABLE])
def test_what_is_written_is_read_back(table):
    assert read(render(table)) == table
    assert list(read(render(table))) == sorted(table)


def test_the_file_is_as_it_would_be_written():
    assert Path(tuned.__file__).read_text() == render(tuned.TUNED)


def test_the_table_gets_what_is_worth_it_and_loses_what_no_longer_is():
    rule, best = Launch(4, 3, True), Launch(8, 1, True)
    known, new, close = ("NVIDIA H200", 4096, 14336, 1), ("NVIDIA H200", 1, 1, 1), ("NVIDIA H200", 2, 2, 1)
    measured = [(known, rule, 10.0, rule, 10.0), (new, rule, 10.0, best, 9.7), (close, rule, 10.0, best, 9.9)]
    assert update(TABLE, measured) == {("NVIDIA A100", 64, 64, 2): (1, 1), new: (8, 1)}


def test_the_search_finds_the_least_of_a_valley_and_measures_a_launch_once():
    asked = []

    def time(launch):
        asked.append(launch)
        return abs(launch.warps - 2) + abs(launch.stages - 1) + 1.0

    best, best_time, rule_time = search(time, Launch(16, 3, True), 1)
    assert (best, best_time, rule_time) == (Launch(2, 1, True), 1.0, 17.0)
    assert len(asked) == len(set(asked))


def test_launches_have_warps_and_stages_that_a_kernel_takes():
    for blocks, most in ((1, 16), (4, 8)):
        for warps in (1, 2, 4, 8, 16):
            for stages in (1, 2, 3, 4):
                for launch in neighbours(Launch(min(warps, most), stages, False), blocks):
                    assert 1 <= launch.warps <= most and 1 <= launch.stages <= 4 and not launch.overlap
