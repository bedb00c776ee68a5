"""The streaming benchmark on a CPU: every run gives the resident model's tokens, and one that does not stops it."""

import argparse

import pytest
import torch

pytest.importorskip("triton")
from benchmarks import stream  # noqa: E402

CPU = torch.device("cpu")
ARGUMENTS = argparse.Namespace(shape="tiny", budgets=None, slots=3, tokens=5)


def test_rows_say_what_was_streamed():
    rows = stream.bench("4 bits", CPU, ARGUMENTS)
    resident, *streamed = rows
    assert resident["budget_gb"] is None and {row["offload"] for row in streamed} == {"host", "disk"}
    assert {row["slots"] for row in streamed} == {2, 3} and {row["stays"] for row in streamed} == {"first", "spread"}
    for row in streamed:
        assert 0 < row["streamed_bytes"] < row["needed_bytes"] <= 1e9 * row["budget_gb"]
        assert row["eager_tokens_s"] > 0 and ("graph_tokens_s" in row) == (row["offload"] == "host")


def test_other_tokens_stop_it(monkeypatch):
    streamer = stream.Streamer

    def spoiled(model, *options):
        made = streamer(model, *options)
        made.model.lm_head.weight.data.mul_(-1)
        return made

    monkeypatch.setattr(stream, "Streamer", spoiled)
    with pytest.raises(SystemExit, match="gives other tokens"):
        stream.bench("float16", CPU, ARGUMENTS)
