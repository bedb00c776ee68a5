"""The frontier's command on the tiny Llama: its rows are what they say, its figure the same for the same rows."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from benchmarks.frontier import METHODS, Candidate, Method, draw, locked, main, merge
from benchmarks.trained import RECIPES, Training
from qat.cli import compose
from qat.errors import UserError
from qat.model import load_model

KEYS = {"method", "target_bits", "bits", "entropy", "ppl", "ratio", "kl", "top1", "tokens", "seconds", "knob",
        "training"}  # fmt: skip


@pytest.fixture
def run(tiny_llama, sample_text, tmp_path):
    """Runs the command on two texts and gives the file it wrote."""
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(sample_text * (1 + ord(name) % 3))

    def call(*words):
        main(
            [f"--model={tiny_llama()}", f"--calibration={tmp_path / 'c.txt'}", "--valid", f"one={tmp_path / 'a.txt'}",
             f"two={tmp_path / 'b.txt'}", "--windows=10", "--calibration-windows=4", "--seq-len=40",
             f"--cache={tmp_path / 'cache'}", f"--results={tmp_path}", f"--figure={tmp_path / 'figure.svg'}", *words]
        )  # fmt: skip
        return json.loads((tmp_path / f"frontier-{tiny_llama().name}.json").read_text())

    return call


def test_every_method_makes_its_rows(run, tmp_path):
    found = run("--bits", "6", "5")
    rows = found["rows"]
    methods = [name for name in METHODS if name not in RECIPES]
    targeted = [name for name in methods if METHODS[name].targeted]
    assert {"rtn", "gptq", "entquant"} <= set(targeted)
    assert [row["method"] for row in rows] == sorted((row["method"] for row in rows), key=list(METHODS).index)
    assert len(rows) == 2 * len(targeted) + len(methods) - len(targeted)
    for row in rows:
        assert row.keys() == KEYS and row["tokens"] == 800
        assert row["entropy"] < row["bits"]
        assert row["target_bits"] is None or abs(row["bits"] - row["target_bits"]) <= 0.02
        for text, base in found["setting"]["base_ppl"].items():
            assert row["ratio"][text] == pytest.approx(row["ppl"][text] / base, rel=1e-4)
    assert rows[0]["method"] == "int8" and rows[0]["kl"] == min(row["kl"] for row in rows)
    assert (tmp_path / "figure.svg").read_text().startswith("<?xml")


def test_a_method_can_be_added_and_rows_of_others_stay(run, monkeypatch):
    def untouched(study, target):
        assert isinstance(study.device, torch.device)
        return Candidate(load_model(study.model), target, 0.0)

    run("--methods", "int8", "rtn", "--bits", "6")
    monkeypatch.setitem(METHODS, "mine", Method(untouched, targeted=True))
    rows = run("--methods", "mine", "rtn", "--bits", "6")["rows"]
    assert [row["method"] for row in rows] == ["int8", "mine", "rtn"]
    assert rows[1]["kl"] == 0 and rows[1]["top1"] == 1 and set(rows[1]["ratio"].values()) == {1}


def test_every_recipe_trains_to_the_target_and_a_broken_one_loses_no_others(run, monkeypatch, tmp_path):
    monkeypatch.setitem(RECIPES, "rate-dual", ["experiment=nope"])
    words = ["--methods", *RECIPES, "--bits", "8", f"--train={tmp_path / 'c.txt'}", "--tokens=12000",
             "--micro-batch=32", "--label=-x",
             "--set", "optim.warmup_steps=1", "rate.every=1", "optim.lr=1e-4"]  # fmt: skip
    with pytest.raises(UserError, match="rate-dual at 8"):
        run(*words)
    (path,) = tmp_path.glob("frontier-*.json")
    rows = {row["method"].removesuffix("-x"): row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == [name for name in RECIPES if name != "rate-dual"]
    for name, row in rows.items():
        assert row["training"] == {"tokens": 12000, "steps": 4, "overrides": words[-3:]}
        # a container this small jumps from split to split
        assert abs(row["bits"] - (16 if name == "finetune" else 8)) < 0.3, name


@pytest.mark.parametrize("tied", [True, False])
def test_the_whole_model_meets_the_target_with_the_ends_half_a_bit_above(tiny_llama, tmp_path, tied):
    folder = tiny_llama(tie_word_embeddings=tied)
    training = Training(folder, ["x"], "y", 1000, 10, 1, 1, "c", "cpu")
    config = compose("train", *training.words("rate-whole", 3.0, tmp_path))
    ends = 300 * 48 * (1 if tied else 2)
    total = ends + sum(p.numel() for name, p in load_model(folder).named_parameters() if "proj" in name)
    target, own = config.rate.target_bits, config.rate.embedding_bits
    assert own == pytest.approx(target + 0.5)
    assert own * ends + target * (total - ends) == pytest.approx(3.0 * total)


def test_calls_at_the_same_time_keep_each_others_rows(tmp_path):
    path = tmp_path / "x.json"

    def add(index):
        with locked(path):
            rows = merge(path, {}, [{"method": str(index), "target_bits": None}])
            path.write_text(json.dumps({"setting": {"base_ppl": index}, "rows": rows}))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(40)))
    assert len(json.loads(path.read_text())["rows"]) == 40


def test_rows_of_another_setting_go(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"setting": {"windows": 1}, "rows": [{"method": "a", "target_bits": 4}]}))
    row = {"method": "b", "target_bits": None}
    assert len(merge(path, {"windows": 1}, [row])) == 2
    assert merge(path, {"windows": 2}, [row]) == [row]
    assert merge(tmp_path / "none.json", {}, [row]) == [row]


def test_the_same_rows_draw_the_same_file(tmp_path):
    rows = [
        {"method": name, "bits": bits, "ratio": {"a": 1 + 0.1 / bits, "b": 1.0}, "kl": 0.1 / bits}
        for name in ("x", "y") for bits in (4.0, 3.0)
    ]  # fmt: skip
    for name in ("one", "two"):
        draw(rows, tmp_path / f"{name}.svg")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_bits_that_no_step_gives_are_refused(run):
    with pytest.raises(UserError, match="30 bits"):
        run("--methods", "rtn", "--bits", "30")
