"""The page says what the report says, loads nothing, and holds whatever text a model writes."""

import json
import re
import shutil
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from eval.page import AFTER, page, shown, write_page
from qat.errors import UserError
from qat.inference import token_texts
from qat.model import load_tokenizer

VOID = {"meta", "br"}
EVIL = '<script>alert("1")</script> & "quotes" </p>'


class Balanced(HTMLParser):
    """Fails where tags do not close; collects the page's text and what it refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text, self.links, self.tags = "", [], []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value for key, value in attrs if key in ("src", "href", "xlink:href") and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def parsed(text: str) -> Balanced:
    parser = Balanced()
    parser.feed(text)
    parser.close()
    assert not parser.open
    return parser


def job(**more: Any) -> dict[str, Any]:
    environment = {"time": "now", "command": "python x", "gpus": [], "cpu": "a cpu", "versions": {"torch": "2"}}
    return {
        "settings": {"compressed": "/out/model"},
        "device": "cpu",
        "dtype": "float32",
        "environment": environment,
    } | more


def test_the_page_says_what_the_report_says(evaluated: Path) -> None:
    report = json.loads((evaluated / "report.json").read_text())["consistency"]
    found = parsed((evaluated / "report.html").read_text())
    assert "PASS" in found.text
    made = report["fake_quant"]["generation"]
    assert f"{made['divergent_tokens']:,}divergent tokens of {made['tokens']:,}" in found.text
    ratio = report["base"]["logits"]["perplexity"]["ratio"]
    assert f"{100 * (ratio - 1):+.2f} %" in found.text
    for value in report["base"]["logits"]["kl"].values():
        if isinstance(value, float):
            assert f"{value:.5g}" in found.text
    for example in report["base"]["generation"]["examples"]:
        assert unescape(shown(example["prompt"])) in found.text
        at = example["position"] or 0
        assert unescape(shown("".join(example["other"][:at]))) in found.text
    for cost in report["costs"].values():
        assert f"{cost['tokens_per_second']:,.0f}" in found.text
    # every layer of the folder, as its own report has it
    exported = json.loads((Path(report["settings"]["compressed"]) / "export_report.json").read_text())
    rows = [row for row in exported["layers"] if row["kind"] != "plain"]
    assert [f"{row['bits']:.5g}" in found.text and row["name"] in found.text for row in rows] == [True] * len(rows)
    assert all(row["name"] not in found.text for row in exported["layers"] if row["kind"] == "plain")


def test_it_loads_nothing_and_runs_nothing(evaluated: Path) -> None:
    found = parsed((evaluated / "report.html").read_text())
    assert all(link.startswith("#") for link in found.links)
    assert "script" not in found.tags and "img" not in found.tags and "link" not in found.tags
    assert not re.search(r"url\((?!#)", (evaluated / "report.html").read_text())


def test_the_first_token_that_differs_is_marked_and_only_it(evaluated: Path) -> None:
    report = json.loads((evaluated / "report.json").read_text())
    examples = report["consistency"]["base"]["generation"]["examples"]
    marks = re.findall(r"<mark>(.*?)</mark>", (evaluated / "report.html").read_text(), re.DOTALL)
    parting = [example for example in examples if example["position"] is not None]
    assert parting, "the base never parts from a model of 5 bits?"
    wanted = [shown(example[side][example["position"]]) for example in parting for side in ("reference", "other")]
    assert marks == [token or "\u2423" for token in wanted]
    # from the one that parts first to the one that does last
    positions = sorted(found["position"] for found in report["consistency"]["base"]["generation"]["divergences"])
    assert [example["position"] for example in parting][:: len(parting) - 1] == positions[:: len(positions) - 1]


def test_examples_are_the_text_token_by_token(evaluated: Path) -> None:
    report = json.loads((evaluated / "report.json").read_text())["consistency"]
    for name in ("fake_quant", "base"):
        for example in report[name]["generation"]["examples"]:
            assert len(example["reference"]) == len(example["other"]) == report["settings"]["new_tokens"]


@pytest.mark.parametrize(("at", "end"), [(None, 2 * AFTER), (0, 1 + AFTER), (190, 200)])
def test_long_texts_end_some_tokens_behind_the_first_that_differs(at: int | None, end: int) -> None:
    pieces = [f"<{index}>" for index in range(200)]
    example = {"prompt": "", "reference": pieces, "other": pieces, "position": at}
    text = parsed(page(made_report(example))).text
    assert text.count(f"<{end - 1}>") == 2 and f"<{end}>" not in text
    assert text.count("…") == (2 if end < 200 else 0)


@pytest.mark.parametrize(
    "text", ["plain words", "naïve – façade", "日本語のテキスト", "🙂🙃 mixed 日", "\n\n  spaces\t"]
)
def test_pieces_of_any_text_join_to_it(base: Path, text: str) -> None:
    tokenizer = load_tokenizer(str(base))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = token_texts(tokenizer, ids)
    assert len(pieces) == len(ids) and "".join(pieces) == tokenizer.decode(ids)


def made_report(example: dict[str, Any], name: str = "model") -> dict[str, Any]:
    """The least that a comparison with the base says, with one example."""
    spread = dict.fromkeys(("mean", "max", "median"), 0.5)
    perplexity = dict.fromkeys(("reference", "other", "ratio", "ratio_error"), 1.0)
    logits = {
        "kl": spread, "delta_p": spread, "ear": spread, "same_top": 1.0, "tokens": 9, "bit_equal": False,
        "perplexity": perplexity,
    }  # fmt: skip
    made = {"survival": [1.0, 0.5], "divergent_tokens": 2, "tokens": 3, "prompts": 2, "examples": [example]}
    return {
        "consistency": job(passed=False, base={"generation": made, "logits": logits}, settings={"compressed": name})
    }


def test_what_a_model_writes_stays_text() -> None:
    example = {"prompt": EVIL, "reference": [EVIL, "a", "b"], "other": [EVIL, EVIL, "c"], "position": 1}
    found = parsed(page(made_report(example, f"/out/{EVIL.replace('/', '')}")))
    assert "script" not in found.tags
    assert found.text.count(EVIL) == 4
    assert "FAIL" in found.text


def test_benchmarks_alone_make_a_page() -> None:
    scores = {"arc": {"acc": {"value": 0.25, "error": None, "higher_is_better": True}}}
    flips = {"arc": {"items": 8, "lost": 1, "gained": 2, "changed": 3}}
    report = {"harness": job(results={"base": scores, "compressed": scores}, flips=flips, samples={"arc": 8})}
    found = parsed(page(report))
    benchmarks = found.text.partition("Benchmarks")[2]
    assert "right to wrong" in benchmarks and "arc, acc" in benchmarks and "±" not in benchmarks
    report["harness"]["results"]["base"]["arc"]["acc"]["error"] = 0.03125
    report["harness"]["flips"] = {}
    assert "0.25 ± 0.031" in parsed(page(report)).text
    assert "right to wrong" not in parsed(page(report)).text


def test_equal_reports_give_equal_pages(evaluated: Path, tmp_path: Path) -> None:
    shutil.copy(evaluated / "report.json", tmp_path)
    assert write_page(tmp_path).read_bytes() == (evaluated / "report.html").read_bytes()


def test_a_missing_and_a_damaged_report_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no report\.json"):
        write_page(tmp_path)
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        write_page(tmp_path)
    assert not (tmp_path / "report.html").exists()
