"""The frontier's command on the tiny Llama: its rows are what they say, its figure the same for the same rows."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import trained
from benchmarks.frontier import METHODS, Candidate, Method, broken_promises, draw, locked, main, merge
from benchmarks.trained import RECIPES, Training
from qat.checkpoint import read_checkpoint
from qat.cli import compose
from qat.errors import UserError
from qat.lit.build import check_config
from qat.model import load_model

KEYS = {"method", "target_bits", "bits", "entropy", "ppl", "ratio", "kl", "top1", "tokens", "seconds", "knob",
        "training", "consistency"}  # fmt: skip


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


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_command_of_training(tiny_llama, tmp_path, name):
    training = Training(tiny_llama(), ["x"], "y", 20000, 20, 2, 1, "c", "cpu")
    config = compose("train", *training.words(name, None if name == "finetune" else 3.0, tmp_path))
    check_config(config)
    assert config.trainer.max_steps == 500 and config.quant.enabled == (name != "finetune")


# of every way to price, hold and count
KINDS = ["rate", "rate-prior", "rate-dual", "rate-whole", "rate-fast", "ste", "finetune"]


def test_recipes_train_to_the_target_and_a_broken_one_loses_no_others(run, monkeypatch, tmp_path):
    monkeypatch.setitem(RECIPES, "rate-dual", ["experiment=nope"])
    words = ["--methods", *KINDS, "--bits", "8", f"--train={tmp_path / 'c.txt'}", "--tokens=12000", "--batch=64",
             "--micro-batch=32", "--label=-x",
             "--set", "optim.warmup_steps=1", "rate.every=1", "optim.lr=1e-4"]  # fmt: skip
    with pytest.raises(UserError, match="rate-dual at 8"):
        run(*words)
    (path,) = tmp_path.glob("frontier-*.json")
    rows = {row["method"].removesuffix("-x"): row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == [name for name in KINDS if name != "rate-dual"]
    for name, row in rows.items():
        notes = row["training"]
        assert (notes["tokens"], notes["steps"], notes["overrides"]) == (12000, 4, words[-3:])
        assert notes["seconds"].keys() == {"start", "training", "judging"} and row["consistency"] is None
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


CONSISTENCY = ["--bits", "8", "--tokens=12000", "--batch=64", "--micro-batch=32", "--consistency=3", "--set",
               "optim.warmup_steps=1", "rate.every=1", "optim.lr=1e-4"]  # fmt: skip
TRAIN = ["--methods", "rate", *CONSISTENCY]


def test_an_exported_row_generates_what_was_trained_and_is_kept(run, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(trained, "NEW_TOKENS", 20)
    words = [f"--train={tmp_path / 'c.txt'}", f"--keep={tmp_path / 'kept'}", "--label=-x", *TRAIN]
    (row,) = run(*words)["rows"]
    found = row["consistency"]
    assert (found["prompts"], found["new_tokens"], found["tokens"]) == (3, 20, 60)
    assert (found["divergent_tokens"], found["margin"], found["logits_equal"]) == (0, None, True)
    assert (found["device"], found["dtype"]) == ("cpu", "float32")
    assert found["stored_bits"] == row["bits"]
    assert list(row["training"]["seconds"]) == ["start", "training", "export", "consistency", "judging"]
    out = capsys.readouterr().out
    assert "rate-x at 8.0: start" in out and "PASS" not in out
    folder = tmp_path / "kept" / "rate-x-8"
    assert read_checkpoint(folder / "checkpoints" / "last.ckpt").step == 4
    report = json.loads((folder / "compressed" / "export_report.json").read_text())["summary"]
    assert (report["profile"], report["bits"]) == ("compact", row["bits"])
    # nothing kept is written over, and that shows before the training
    with pytest.raises(UserError, match="--keep"):
        run(*words)


@pytest.mark.parametrize(("name", "profile"), [("rate-fast", "fast"), ("rate-whole", "compact")])
def test_a_row_is_exported_in_the_profile_of_its_recipe(run, monkeypatch, tmp_path, name, profile):
    monkeypatch.setattr(trained, "NEW_TOKENS", 20)
    words = [f"--train={tmp_path / 'c.txt'}", f"--keep={tmp_path / 'kept'}", "--methods", name, *CONSISTENCY]
    (row,) = run(*words)["rows"]
    found = row["consistency"]
    assert (found["divergent_tokens"], found["margin"], found["logits_equal"]) == (0, None, True)
    assert found["stored_bits"] == row["bits"]
    report = json.loads((tmp_path / "kept" / f"{name}-8" / "compressed" / "export_report.json").read_text())
    assert report["summary"]["profile"] == profile


def test_a_divergent_token_fails_the_call_and_keeps_the_row(run, monkeypatch, tmp_path):
    monkeypatch.setattr(trained, "NEW_TOKENS", 20)
    export = trained.export

    def damaged(config):
        folder = export(config)
        shards = load_file(folder / "model.safetensors")
        shards["model.norm.weight"] = -shards["model.norm.weight"]
        save_file(shards, folder / "model.safetensors", {"format": "pt"})
        return folder

    monkeypatch.setattr(trained, "export", damaged)
    with pytest.raises(UserError, match=r"rate at 8.0: [0-9]+ divergent tokens of 60 on cpu in float32"):
        run(f"--train={tmp_path / 'c.txt'}", *TRAIN)
    (path,) = tmp_path.glob("frontier-*.json")
    (row,) = json.loads(path.read_text())["rows"]
    assert row["consistency"]["divergent_tokens"] > 0 and row["consistency"]["margin"] > 0


def test_a_comparison_that_breaks_costs_no_row(run, tmp_path):
    # 64 tokens of a prompt and 256 new ones are more than the tiny model takes
    with pytest.raises(UserError, match="rate at 8.0: not compared.*context"):
        run(f"--train={tmp_path / 'c.txt'}", *TRAIN)
    assert len(list(tmp_path.glob("frontier-*.json"))) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"device": "cuda:0", "logits_equal": False}, None),
        ({"logits_equal": False}, "logits"),
        ({"divergent_tokens": 1}, "1 divergent tokens of 20"),
        ({"stored_bits": 3.02}, "3.02"),
    ],
)
def test_what_breaks_a_promise(change, message):
    found = {"divergent_tokens": 0, "tokens": 20, "logits_equal": True, "device": "cpu", "dtype": "float32",
             "stored_bits": 3.0} | change  # fmt: skip
    wrong = broken_promises({"method": "a", "target_bits": 3.0, "bits": 3.001, "consistency": found})
    assert not wrong if message is None else message in wrong[0]


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
