"""The benchmark of a training step on a CPU: every variant trains and has its row, and the file says what was run."""

import json
import math
from pathlib import Path

import pytest

pytest.importorskip("triton")
from benchmarks.step import VARIANTS, main  # noqa: E402
from qat.errors import UserError  # noqa: E402

TINY = ("--shape=tiny", "--layers=2", "--batch=2", "--seq-len=16", "--steps=2", "--device=cpu", "--compile=none")


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_every_variant_has_its_row(tmp_path: Path, granularity: str) -> None:
    main([*TINY, f"--results={tmp_path}", f"--granularity={granularity}"])
    found = json.loads((tmp_path / "step-cpu.json").read_text())
    assert [row["variant"] for row in found["rows"]] == [*VARIANTS, "finetune"]
    rows = [row for row in found["rows"] if "missing" not in row]
    assert all("torchao" in row["variant"] for row in found["rows"] if row not in rows)
    for row in rows:
        assert all(math.isfinite(row[key]) and row[key] > 0 for key in ("ms", "ms_amortised", "over_finetune", "loss"))
        assert row["ms_p10"] <= row["ms"] <= row["ms_p90"]
        # only those with a price take histograms
        assert bool(row["refresh_ms"]) is (row["variant"] in ("qat-rate", "teacher"))
    losses = {row["variant"]: row["loss"] for row in rows}
    # before the first step: no rate in the loss, rounding in it, and the text's cross-entropy is not the teacher's KL
    assert losses["qat-rate"] == losses["qat"] != losses["finetune"]
    assert losses["teacher"] < 0.1 * losses["qat"]
    assert found["setting"]["layers"] == 2 and found["environment"]["command"]
    assert math.isfinite(found["teacher_ms"])


def test_variants_can_be_chosen(tmp_path: Path) -> None:
    main([*TINY, f"--results={tmp_path}", "--variants", "qat"])
    found = json.loads((tmp_path / "step-cpu.json").read_text())
    assert [row["variant"] for row in found["rows"]] == ["finetune", "qat", "finetune"]
    assert found["teacher_ms"] is None


def test_a_large_shape_without_a_gpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tinyllama-1.1b needs a GPU") as caught:
        main(["--device=cpu", f"--results={tmp_path}"])
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
