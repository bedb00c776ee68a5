import inspect
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import rans_kernels
import torch
from lm_eval.tasks import TaskManager

from eval import local_tasks
from eval.harness import CodecLM, check, harness
from eval.local_tasks import TASKS
from qat.config import EvalConfig, HarnessConfig
from qat.errors import CheckFailed, UserError
from qat.model import load_tokenizer
from tests.train.test_run import ENVIRONMENT

CHOICES = [
    {"query": f"Question: {n} foxes and\n", "choices": ["dogs", "two dogs", "rest"], "gold": n % 3} for n in range(9)
]
LAST_WORDS = [{"context": f"the {n} quick foxes ", "continuation": "jump over"} for n in range(5)]
TEXTS = [{"text": f"the {n} lazy dogs jump and rest.\n" * 9} for n in range(3)]
LOCAL = sorted(path.stem for path in TASKS.glob("*.yaml"))


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    files = {
        **dict.fromkeys(["arc_easy", "arc_challenge", "piqa", "hellaswag", "commonsense_qa", "continuation"], CHOICES),
        "lambada_openai": LAST_WORDS,
        "text": TEXTS,
    }
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def task_config(config: EvalConfig, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EvalConfig:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    # lists all that pip has installed, after every model
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    config.data_dir, config.text = str(data_dir), None
    return config


@torch.no_grad()
def log_likelihood(model: torch.nn.Module, before: list[int], after: list[int]) -> float:
    log_p = model(torch.tensor([before + after])).logits[0].double().log_softmax(-1)
    return sum(log_p[len(before) - 1 + at, token].item() for at, token in enumerate(after))


def test_every_local_task_runs_offline_on_both_models(
    task_config: EvalConfig, no_network: None, capsys: pytest.CaptureFixture[str]
) -> None:
    task_config.tasks, task_config.log_samples, task_config.harness.fake_quant = LOCAL, True, True
    before = [os.environ.get(name) for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")]
    report = harness(task_config)
    assert [os.environ.get(name) for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")] == before
    assert list(report["results"]) == ["base", "fake_quant", "compressed"]
    assert report["passed"] and report["results"]["fake_quant"] == report["results"]["compressed"]
    for task, found in report["likelihoods"].items():
        assert found == {"items": report["samples"][task], "equal": report["samples"][task], "max_difference": 0}
    for scores in report["results"].values():
        assert sorted(scores) == LOCAL
        assert all(math.isfinite(score["value"]) for metrics in scores.values() for score in metrics.values())
    assert set(report["results"]["compressed"]["arc_easy_local"]) == {"acc", "acc_norm"}
    assert report["samples"] == {name: 3 if name == "text_perplexity" else 5 if name[0] == "l" else 9 for name in LOCAL}
    assert set(report["versions"].values()) == {1.0}
    assert sorted(report["flips"]) == [name for name in LOCAL if name != "text_perplexity"]
    check_flips(report["flips"], Path(task_config.output))

    stored = json.loads((Path(task_config.output) / "report.json").read_text())["harness"]
    assert stored["results"] == report["results"]
    assert "commonsense_qa_local" in capsys.readouterr().out
    check_prompts(Path(task_config.output))
    check_scores(report["results"]["compressed"], task_config)


def check_flips(flips: dict[str, Any], output: Path) -> None:
    """The listed items are those whose answers differ in the samples that were written."""
    changed = 0
    for task, found in flips.items():
        models = []
        for model in ("base", "compressed"):
            lines = (output / f"samples_{model}_{task}.jsonl").read_text().splitlines()
            models.append({item["doc_id"]: item for item in map(json.loads, lines)})
        before, after = models
        listed = {flip["doc_id"]: flip["kind"] for flip in found["flipped"]}
        for number, item in before.items():
            kind = {1: "lost", -1: "gained", 0: None}[item["acc"] - after[number]["acc"]]
            if kind is None and task != "lambada_local" and item["acc"] == 0:
                best = [max(range(3), key=lambda i: each["resps"][i][0][0]) for each in (item, after[number])]  # noqa: B023
                kind = "wrong_to_wrong" if best[0] != best[1] else None
            assert listed.get(number) == kind
        assert found["changed"] == len(listed) and found["items"] == len(before)
        assert found["difference_interval"][0] <= found["difference"] <= found["difference_interval"][1]
        changed += len(listed)
    assert changed, "5 bits change no answer at all?"


def check_prompts(output: Path) -> None:
    def asked(task: str) -> list[Any]:
        lines = (output / f"samples_compressed_{task}.jsonl").read_text().splitlines()
        item = next(item for item in map(json.loads, lines) if item["doc_id"] == 0)
        return item["arguments"]

    answers = [" dogs", " two dogs", " rest"]
    for task in ("arc_easy_local", "arc_challenge_local", "piqa_local"):
        assert asked(task) == [["Question: 0 foxes and\nAnswer:", answer] for answer in answers]
    for task in ("hellaswag_local", "commonsense_qa_local"):
        assert asked(task) == [["Question: 0 foxes and", answer] for answer in answers]
    assert asked("continuation_local") == [["Question: 0 foxes and\n", answer.strip()] for answer in answers]
    assert asked("lambada_local") == [["the 0 quick foxes", " jump over"]]
    assert asked("text_perplexity") == [[TEXTS[0]["text"]]]


def check_scores(scores: dict[str, Any], config: EvalConfig) -> None:
    model, tokenizer = rans_kernels.load(config.compressed), load_tokenizer(config.compressed)
    found = []
    for row in LAST_WORDS:
        before, whole = (
            tokenizer.encode(text) for text in (row["context"].strip(), row["context"] + row["continuation"])
        )
        found.append(log_likelihood(model, before, whole[len(before) :]))
    assert scores["lambada_local"]["perplexity"]["value"] == pytest.approx(math.exp(-sum(found) / 5), rel=1e-4)

    # shorter than the context, and nothing but the end-of-text token stands before a text
    texts = [row["text"] for row in TEXTS]
    total = sum(log_likelihood(model, [tokenizer.eos_token_id], tokenizer.encode(text)) for text in texts)
    bits = -total / sum(len(text.encode()) for text in texts) / math.log(2)
    assert scores["text_perplexity"]["bits_per_byte"]["value"] == pytest.approx(bits, rel=1e-4)


def test_lm_eval_knows_the_model_by_its_name(task_config: EvalConfig) -> None:
    task = {
        "task": "inline",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{task_config.data_dir}/arc_easy.jsonl"}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{query|trim}}\nAnswer:",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metadata": {"version": 1.0},
    }
    run = lm_eval.simple_evaluate(
        model="codecllm",
        model_args={"pretrained": task_config.compressed, "dtype": "float32"},
        tasks=[task],
        device="cpu",
        batch_size=3,
        task_manager=TaskManager(include_defaults=False),
    )
    task_config.base, task_config.tasks = None, "arc_easy_local"
    ours = harness(task_config)["results"]["compressed"]["arc_easy_local"]
    assert run["results"]["inline"]["acc,none"] == ours["acc"]["value"]


def test_limit_and_shots_reach_lm_eval(task_config: EvalConfig) -> None:
    task_config.base, task_config.tasks = None, ["arc_easy_local"]
    task_config.limit, task_config.num_fewshot, task_config.log_samples = 2, 1, True
    assert harness(task_config)["samples"] == {"arc_easy_local": 2}
    lines = (Path(task_config.output) / "samples_compressed_arc_easy_local.jsonl").read_text().splitlines()
    assert len(lines) == 2
    assert all(line.count("Answer:") > 1 for line in lines)


def test_an_unknown_task_is_told_which_there_are(task_config: EvalConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    # without lm-eval's own, which take seconds to list
    monkeypatch.setattr(local_tasks, "TaskManager", lambda **options: TaskManager(include_defaults=False))
    task_config.tasks = ["arc_easy_local", "arc_easi"]
    with pytest.raises(UserError, match="unknown task arc_easi: .*arc_easy_local, .*text_perplexity"):
        harness(task_config)


def test_a_task_file_of_the_users_own_runs(task_config: EvalConfig, tmp_path: Path) -> None:
    text = (TASKS / "piqa_local.yaml").read_text()
    own = tmp_path / "own.yaml"
    own.write_text(text.replace("piqa_local", "own").replace("piqa.jsonl", f"{task_config.data_dir}/piqa.jsonl"))
    task_config.base, task_config.tasks, task_config.data_dir = None, [str(own)], None
    assert set(harness(task_config)["results"]["compressed"]) == {"own"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tasks": None}, "no tasks: .*arc_easy_local.*text_perplexity"),
        ({"tasks": []}, "no tasks"),
        ({"tasks": "nowhere/own.yaml"}, "no such task file: nowhere/own.yaml"),
        ({"tasks": "arc_easy_local", "data_dir": None}, "arc_easy.jsonl: give data_dir="),
        ({"tasks": "arc_easy_local", "data_dir": "nowhere"}, "nowhere/arc_easy.jsonl, which does not exist"),
        ({"tasks": "piqa_local", "file": ("piqa", "\n\n")}, "piqa.jsonl is empty"),
        ({"tasks": "piqa_local", "file": ("piqa", "[1]")}, "one JSON object a line"),
        ({"tasks": "piqa_local", "file": ("piqa", '{"query": "a"}')}, "no key 'choices'; .* query, choices, gold"),
        ({"tasks": "piqa_local", "base": "./nowhere"}, "no model at ./nowhere"),
        ({"tasks": "text_perplexity", "text": "nowhere.txt"}, "nowhere.txt, which does not exist: check text="),
        ({"tasks": "piqa_local", "harness": HarnessConfig(batch_size="big")}, "harness.batch_size=big"),
        (
            {"tasks": "piqa_local", "harness": HarnessConfig(model_args={"maxlength": 1})},
            "model_args.maxlength: .*max_length",
        ),
        ({"tasks": "piqa_local", "base": None, "harness": HarnessConfig(fake_quant=True)}, "nothing to"),
    ],
)
def test_a_mistake_is_named_in_one_line(task_config: EvalConfig, changes: dict[str, Any], words: str) -> None:
    if file := changes.pop("file", None):
        (Path(str(task_config.data_dir)) / f"{file[0]}.jsonl").write_text(file[1])
    for key, value in changes.items():
        setattr(task_config, key, value)
    with pytest.raises(UserError, match=words) as error:
        harness(task_config)
    assert "\n" not in str(error.value)


def test_every_option_of_lm_eval_is_a_key_or_set_here() -> None:
    ours = {"model", "tasks", "device", "log_samples", "task_manager", "limit", "num_fewshot"}
    # logs of lm-eval's own, and its deprecated way to say how much it tells
    left_out = {"evaluation_tracker", "verbosity"}
    keys = {field.name for field in fields(HarnessConfig)} - {"fake_quant"}
    assert keys | ours | left_out == set(inspect.signature(lm_eval.simple_evaluate).parameters)


def test_options_reach_lm_eval(task_config: EvalConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    evaluate = lm_eval.simple_evaluate

    def spy(lm: Any, **options: Any) -> Any:
        given.update(options, lm=lm)
        return evaluate(lm, **options)

    monkeypatch.setattr(lm_eval, "simple_evaluate", spy)
    task_config.base, task_config.tasks, task_config.num_fewshot = None, ["arc_easy_local"], 1
    task_config.harness = HarnessConfig(
        batch_size="auto", max_batch_size=4, bootstrap_iters=0, samples={"arc_easy_local": [1, 5]},
        system_instruction="Answer", model_args={"max_length": 100}, fewshot_random_seed=7,
    )  # fmt: skip
    report = harness(task_config)
    assert report["samples"] == {"arc_easy_local": 2}
    assert report["results"]["compressed"]["arc_easy_local"]["acc"]["error"] is None
    assert given["fewshot_random_seed"] == 7 and given["system_instruction"] == "Answer"
    assert given["lm"].max_length == 100 and given["lm"].max_batch_size == 4


def test_a_run_goes_on_from_its_responses_and_a_changed_model_does_not(
    task_config: EvalConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task_config.base, task_config.tasks = None, ["piqa_local", "lambada_local"]
    task_config.harness.use_cache = str(tmp_path / "responses")
    task_config.compressed = str(shutil.copytree(task_config.compressed, tmp_path / "copy"))
    first = harness(task_config)["results"]

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model runs")

    monkeypatch.setattr(CodecLM, "_model_call", refuse)
    assert harness(task_config)["results"] == first
    (Path(task_config.compressed) / "config.json").touch()
    with pytest.raises(AssertionError, match="the model runs"):
        harness(task_config)


def test_an_altered_scale_fails(task_config: EvalConfig, altered: None) -> None:
    task_config.tasks, task_config.harness.fake_quant = ["arc_easy_local"], True
    with pytest.raises(CheckFailed):
        check(task_config)
    stored = json.loads((Path(task_config.output) / "report.json").read_text())["harness"]
    assert stored["passed"] is False
    assert stored["likelihoods"]["arc_easy_local"]["max_difference"] > 0


def test_any_text_file_has_a_perplexity(task_config: EvalConfig, tmp_path: Path) -> None:
    text = TEXTS[0]["text"]
    (tmp_path / "one.txt").write_text(text)
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": text}) + "\n")
    task_config.base, task_config.tasks = None, "text_perplexity"
    task_config.data_dir = str(tmp_path / "one.jsonl")
    expected = harness(task_config)["results"]
    task_config.data_dir, task_config.text = None, str(tmp_path / "one.txt")
    assert harness(task_config)["results"] == expected


@pytest.mark.slow
def test_two_processes_share_the_items_and_the_first_writes_what_one_does(task_config: EvalConfig) -> None:
    task_config.tasks, task_config.harness.bootstrap_iters = ["arc_easy_local", "lambada_local"], 0
    # every item a batch: the likelihood of one does not hang on what it shares a batch with
    task_config.batch_size, task_config.harness.fake_quant = 1, True
    alone = harness(task_config)
    shared = Path(task_config.output).with_name("shared")
    words = [f"{key}={getattr(task_config, key)}" for key in ("compressed", "base", "data_dir", "device")]
    words += ["tasks=[arc_easy_local,lambada_local]", "batch_size=1", f"output={shared}", "logger=disabled"]
    words += ["harness.fake_quant=true", "harness.bootstrap_iters=0", f"paths.cache={task_config.paths.cache}"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "-m", "eval.harness", *words], env=ENVIRONMENT, timeout=300, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((shared / "report.json").read_text())["harness"]
    assert found["passed"] and found["likelihoods"] == alone["likelihoods"]
    assert found["results"] == alone["results"] and found["samples"] == alone["samples"]
    assert done.stdout.count("PASS") == 1
    # 9 items of three choices and 5 of one are 32 requests
    assert {int(n) for n in re.findall(r"loglikelihood requests:.*?/(\d+) ", done.stderr)} == {18}


@pytest.mark.gpu
def test_on_a_gpu_every_likelihood_is_that_of_the_dense_integers(task_config: EvalConfig) -> None:
    task_config.device, task_config.tasks, task_config.harness.fake_quant = "cuda", ["arc_easy_local"], True
    assert harness(task_config)["passed"]
