"""The card says what the folder and its evaluation say, its header is YAML for the hub, and its code runs."""

import json
import re
from pathlib import Path

import pytest
import rans_kernels  # noqa: F401
from huggingface_hub import ModelCard

from qat.config import ExportConfig, QuantConfig
from qat.errors import UserError
from qat.export import export
from qat.model_card import on_hub, write_card


@pytest.fixture(scope="module")
def exported(tiny_llama, tmp_path_factory):
    output = tmp_path_factory.mktemp("card") / "my model"
    return export(
        ExportConfig(source=str(tiny_llama()), output=str(output), quant=QuantConfig(bits=4), progress_bar=False)
    )


@pytest.fixture
def report(exported, tmp_path):
    perplexity = {"reference": 20.0, "other": 20.5, "ratio": 1.025}
    kl = {"mean": 0.0625, "median": 0.03125, "99%": 0.5}
    scores = [{"arc": {"acc": {"value": value, "error": None}}} for value in (0.5, 0.375)]
    sections = {
        "consistency": {
            "fake_quant": {"generation": {"divergent_tokens": 0, "tokens": 25600}, "logits": {"bit_equal": True}},
            "base": {"generation": {}, "logits": {"kl": kl, "perplexity": perplexity, "same_top": 0.875}},
        },
        "harness": {
            "results": dict(zip(("base", "compressed"), scores, strict=True)),
            "flips": {"arc": {"items": 100, "lost": 7, "gained": 3, "changed": 12}},
        },
        "weights": {},
    }
    for job in ("consistency", "harness"):
        sections[job]["settings"] = {"compressed": str(exported)}
    (tmp_path / "report.json").write_text(json.dumps(sections))
    return tmp_path


def test_the_header_is_yaml_that_the_hub_reads(exported):
    write_card(exported, base="some-org/Tiny.Llama_1")
    data = ModelCard.load(exported / "README.md").data
    assert data.library_name == "transformers" and data.pipeline_tag == "text-generation"
    assert data.base_model == "some-org/Tiny.Llama_1" and data.base_model_relation == "quantized"
    assert {"codecllm", "int8", "rans"} <= set(data.tags)
    # a folder of this machine is no model of the hub
    write_card(exported)
    assert ModelCard.load(exported / "README.md").data.base_model is None


def test_its_code_runs_where_the_folder_is(exported, monkeypatch, capsys):
    monkeypatch.chdir(exported.parent)
    (code,) = re.findall(r"```python\n(.*?)```", (exported / "README.md").read_text(), re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("Once upon a time")


def test_it_has_the_figures_of_the_folder_and_of_an_evaluation(exported, report):
    summary = json.loads((exported / "export_report.json").read_text())["summary"]
    text = write_card(exported, report).read_text()
    for words in (
        f"{summary['bits']:.3f}", f"{summary['compressed_weights']:,}", "0 of 25,600", "20.000 to 20.500, +2.50 %",
        "0.0625, 0.03125, 0.5", "87.50 %", "0.5 to 0.375", "7, 3 of 100",
    ):  # fmt: skip
        assert words in text
    assert "## Evaluation" not in write_card(exported).read_text()


def test_a_report_of_another_model_and_missing_files_are_refused(exported, report, tmp_path):
    text = (report / "report.json").read_text().replace(str(exported), "/out/other")
    (report / "report.json").write_text(text)
    before = (exported / "README.md").read_bytes()
    with pytest.raises(UserError, match="is of other"):
        write_card(exported, report)
    with pytest.raises(UserError, match="no name on the hub"):
        write_card(exported, base="../model")
    with pytest.raises(UserError, match="is missing"):
        write_card(exported, tmp_path / "nowhere")
    assert (exported / "README.md").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "wanted"), [("a/b", True), ("org/m-1.0_x", True), ("a", False), ("a/b/c", False), ("/a/b", False),
                         ("./a", False), ("~/a", False), ("a/b: c", False), ("a/b\nc", False)],
)  # fmt: skip
def test_what_can_be_a_name_on_the_hub(name, wanted):
    assert on_hub(name) is wanted


def test_a_folder_that_looks_like_a_name_on_the_hub_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my/model").mkdir(parents=True)
    assert not on_hub("my/model")
