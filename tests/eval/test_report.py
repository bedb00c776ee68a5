import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qat.config import LoggerConfig, LoggerMode
from qat.errors import UserError
from qat.report import log_to_wandb, output_folder, print_table, track, write_json, write_report


def test_a_report_keeps_what_other_jobs_wrote_and_says_where_it_was_made(tmp_path: Path) -> None:
    write_report(tmp_path, "consistency", {"value": 1})
    write_report(tmp_path, "harness", {"value": 2})
    path = write_report(tmp_path, "consistency", {"value": 3})
    report = json.loads(path.read_text())
    assert {job: entry["value"] for job, entry in report.items()} == {"consistency": 3, "harness": 2}
    assert report["harness"]["environment"]["versions"]["torch"]


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": [math.nan, {"b": -math.inf}], "c": 0.5})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [None, {"b": None}], "c": 0.5}


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "a.json", {"a": 1})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_json(tmp_path / "a.json", {"a": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="output="):
        output_folder(tmp_path / "file")


def test_tables_show_every_cell_whole(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("sizes", ["name", "bytes", "share"], [["model.layers.0.mlp.gate_proj", 1234567, None], ["b", 1, 0.25]])
    shown = capsys.readouterr().out
    assert all(cell in shown for cell in ("sizes", "model.layers.0.mlp.gate_proj", "1,234,567", " - ", "0.25"))


def test_track_gives_every_item_in_order() -> None:
    assert list(track(range(63), "counting", enabled=False)) == list(range(63))


def test_disabled_logging_does_not_import_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # None makes an import fail
    monkeypatch.setitem(sys.modules, "wandb", None)
    log_to_wandb(LoggerConfig(mode=LoggerMode.disabled), tmp_path, "job", {}, {})
    with pytest.raises(ImportError):
        log_to_wandb(LoggerConfig(), tmp_path, "job", {}, {})


def test_offline_logging_leaves_a_run_with_tables_histograms_and_the_page(
    tmp_path: Path, no_network: None, wandb_log: Callable[[Path], bytes]
) -> None:
    table = (["layer", "bits"], [["a", 3], ["b", "none"]])
    page = tmp_path / "report.html"
    page.write_text("<!doctype html><p>all of it, naïve – façade")
    counts = {"weights/up": ([1, 7, 63], [-1.5, -0.5, 0.5, 1.5])}
    log_to_wandb(LoggerConfig(), tmp_path, "job", {"a": {"b": 1.5}}, {"layers": table}, page=page, histograms=counts)
    (run,) = tmp_path.glob("wandb/offline-run-*")
    assert len(list(run.glob("*.wandb"))) == 1
    (kept,) = run.glob("files/media/html/report_*.html")
    assert kept.read_text() == page.read_text()
    (rows,) = run.glob("files/media/table/layers_*.table.json")
    assert json.loads(rows.read_text())["data"] == table[1]
    log = wandb_log(run)
    assert b"weights/up" in log and b"[1, 7, 63]" in log.replace(b"[1,7,63]", b"[1, 7, 63]")


@pytest.mark.parametrize("artifact", [False, True])
def test_a_model_is_logged_from_beside_it_and_only_if_wanted(
    tmp_path: Path, no_network: None, wandb_log: Callable[[Path], bytes], artifact: bool
) -> None:
    model = tmp_path / "my model"
    (model / "inner").mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (model / "inner" / "weights").write_bytes(bytes(63))
    log_to_wandb(LoggerConfig(artifact=artifact), model, "export", {"bits": 3.5}, {}, model=model)
    (run,) = tmp_path.glob("wandb/offline-run-*")
    kept = {str(path.relative_to(run / "artifact")) for path in run.glob("artifact/**/*") if path.is_file()}
    assert kept == ({"config.json", "inner/weights"} if artifact else set())
    assert {path.name for path in model.iterdir()} == {"config.json", "inner"}
    assert (b"inner/weights" in wandb_log(run)) == artifact
