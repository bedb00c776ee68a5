"""Counts, bits and the coded model are those of the folder; what a model holds is counted once."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rans_kernels
import torch
from rans_kernels.coder import encode_tiles, high_bytes
from rans_kernels.format import Split, TileLayout
from torch import nn

from eval.cost import CostMeter, held_bytes
from eval.tables import cost_table, histograms, natural, weight_tables
from eval.weights import coded_distribution, describe_weights, role


@pytest.mark.parametrize(
    "split", [Split(8, 0), Split(4, 2), Split(4, 4), Split(2, 3), Split(1, 3), Split(1, 7)], ids=str
)
def test_the_coded_model_is_a_distribution_over_what_the_split_holds(split: Split) -> None:
    rng = np.random.default_rng(0)
    weights = np.clip(np.rint(rng.normal(0, 2, (70, 130))), split.low, -split.low - 1).astype(np.int8)
    encoded = encode_tiles(weights, TileLayout(weights.shape, split, units=2))
    coded = coded_distribution(encoded.layout, encoded.freqs)
    assert coded.sum() == pytest.approx(1)
    integers = np.arange(-128, 128)
    assert not coded[(integers < split.low) | (integers >= -split.low)].any()
    # weights cost what words and raw bits take, but for states; rows of words end in zeros
    cost = -np.log2(coded[weights.astype(int) + 128]).sum()
    stored = 16 * (encoded.words != 0).sum() + split.raw_bits * weights.size
    assert cost == pytest.approx(stored, rel=0.25)
    if split == Split(8, 0):
        assert np.array_equal(coded * 4096, encoded.freqs)


@pytest.mark.parametrize("split", [Split(8, 0), Split(4, 3), Split(2, 5)], ids=str)
def test_the_coded_model_of_floats_is_one_of_high_bytes(float_case: Callable[..., Any], split: Split) -> None:
    layout, bits = float_case((48, 130), split)
    coded = coded_distribution(layout, encode_tiles(bits, layout).freqs)
    # windows that overlap have codes for one byte twice
    assert 0.98 < coded.sum() < 1 + 1e-9 and (coded[high_bytes(bits)] > 0).all()


def test_what_is_said_of_a_folder_is_what_export_said(compressed: Path) -> None:
    found = describe_weights(compressed)
    exported = {row["name"]: row for row in json.loads((compressed / "export_report.json").read_text())["layers"]}
    for module in found["modules"]:
        assert {key: module[key] for key in ("entropy", "bits", "bytes", "split")} == {
            key: exported[module["name"]][key] for key in ("entropy", "bits", "bytes", "split")
        }
        assert module["entropy"] <= module["coded_bits"] + 1e-4
    totals = {part["role"]: sum(part["counts"]) for part in found["histograms"]}
    for name, total in totals.items():
        assert total == sum(row["weights"] for row in found["modules"] if role(row["name"]) == name)
    for part in found["histograms"]:
        assert part["counts"][0] and part["counts"][-1] and len(part["counts"]) == len(part["coded"])
        assert sum(part["coded"]) <= totals[part["role"]] + 1
    columns, rows = weight_tables(found)["weights against the coded model"]
    assert sum(row[columns.index("count")] for row in rows) == found["summary"]["compressed_weights"]
    for counts, edges in histograms(found).values():
        assert len(edges) == len(counts) + 1


def test_blocks_come_in_order_and_roles_are_without_them() -> None:
    names = ["model.embed", "model.layers.0.a.b", "model.layers.2.a.b", "model.layers.10.a.b"]
    assert [row["name"] for row in natural([{"name": name} for name in names[::-1]])] == names
    assert [role(name) for name in ("lm_head", *names[:2], "h.1.experts.31.up")] == ["lm_head", "embed", "a.b", "up"]


def test_what_a_model_holds_counts_once_with_what_it_decoded(compressed: Path) -> None:
    tied = nn.Sequential(nn.Linear(5, 7, bias=False), nn.Linear(5, 7, bias=False))
    tied[1].weight = tied[0].weight
    assert held_bytes(tied) == 4 * 35
    model = rans_kernels.load(compressed, device="cpu", dtype=torch.float32)
    before = held_bytes(model)
    model(torch.zeros(1, 3, dtype=torch.long))
    decoded = sum(row["weights"] for row in describe_weights(compressed)["modules"])
    assert held_bytes(model) - before >= decoded


def test_cost_is_tokens_a_second_and_no_peak_without_a_gpu() -> None:
    cost = CostMeter(torch.device("cpu")).read(nn.Linear(3, 5), tokens=12, seconds=4.0)
    assert cost == {"tokens_per_second": 3.0, "weight_bytes": 4 * 20, "peak_bytes": None}
    assert cost_table({"costs": {"base": cost}})[1] == [["base", "3", "0.0", None]]


@pytest.mark.gpu
def test_the_peak_is_what_came_since_the_meter_was_made() -> None:
    device = torch.device("cuda")
    there = torch.empty(1 << 20, device=device)
    meter = CostMeter(device)
    model = nn.Linear(256, 256, bias=False, device=device)
    model(torch.zeros(1024, 256, device=device))
    assert 4 * 256 * (256 + 2 * 1024) <= meter.read(model, 1, 1.0)["peak_bytes"] < there.nbytes + 4 * 256 * 256 * 16
