"""metrics.jsonl, and W&B only where it is asked for."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from qat.lit.loggers import JsonlLogger


def lines(path: Path) -> list[dict[str, float | None]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_of_a_step_share_a_line(tmp_path: Path) -> None:
    logger = JsonlLogger(tmp_path / "metrics.jsonl")
    logger.log_metrics({"a": 1.5}, step=1)
    logger.log_metrics({"b": 2}, step=1)
    logger.log_metrics({"a": 3}, step=2)
    assert lines(logger.path) == [{"step": 1, "a": 1.5, "b": 2}]
    logger.finalize("success")
    assert lines(logger.path) == [{"step": 1, "a": 1.5, "b": 2}, {"step": 2, "a": 3}]


def test_every_line_is_strict_json(tmp_path: Path) -> None:
    logger = JsonlLogger(tmp_path / "metrics.jsonl")
    logger.log_metrics({"a": math.nan, "b": math.inf, "c": 0.1}, step=1)
    logger.save()
    assert logger.path.read_text() == '{"step": 1, "a": null, "b": null, "c": 0.1}\n'


@pytest.mark.parametrize("torn", ['{"step": 2, "a"', ""])
def test_a_resumed_run_appends_behind_what_a_killed_one_left(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1}\n' + torn)
    logger = JsonlLogger(path)
    logger.log_metrics({"a": 2}, step=2)
    logger.save()
    assert lines(path) == [{"step": 1, "a": 1}, {"step": 2, "a": 2}]


def test_disabled_wandb_is_not_imported_and_reading_checkpoints_needs_no_lightning() -> None:
    code = (
        "import sys, qat.checkpoint, qat.cli; assert 'pytorch_lightning' not in sys.modules; "
        "assert 'transformers' not in sys.modules; import qat.lit.build; assert 'wandb' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
