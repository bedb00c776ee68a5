import json
from collections.abc import Callable
from pathlib import Path

import pytest

from eval.consistency import check, consistency
from qat.config import EvalConfig, ExportConfig, Lossless, QuantConfig, ScaleRule
from qat.errors import CheckFailed, UserError
from qat.export import export

ALTERED = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_the_compressed_model_is_the_fake_quant_model_and_not_the_base(config: EvalConfig, dtype: str) -> None:
    config.dtype = dtype
    report = consistency(config)
    fake, base = report["fake_quant"], report["base"]
    assert report["passed"]
    assert fake["generation"]["divergent_tokens"] == 0
    assert fake["generation"]["tokens"] == 7 * 13
    assert fake["logits"]["bit_equal"]
    assert fake["logits"]["tokens"] == 5 * 63
    assert not base["logits"]["bit_equal"]
    assert base["logits"]["kl"]["mean"] > 0
    assert base["generation"]["divergent_tokens"] > 0
    floor = report["floor"]
    assert floor["logits"]["kl"]["max"] < base["logits"]["kl"]["mean"] / 1000
    assert floor["generation"]["divergent_tokens"] < base["generation"]["divergent_tokens"]
    assert base["logits"]["perplexity"]["other"] == fake["logits"]["perplexity"]["reference"]


def test_the_report_on_disk_is_the_one_returned(config: EvalConfig, capsys: pytest.CaptureFixture[str]) -> None:
    report = consistency(config)
    output = Path(config.output)
    stored = json.loads((output / "report.json").read_text())["consistency"]
    assert stored.pop("environment")["versions"]["transformers"]
    assert stored == json.loads(json.dumps(report))
    assert (output / "survival.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "PASS fake-quant vs compressed: 0 divergent tokens of 91 in 7 prompts" in shown
    assert "99.9%" in shown


def test_one_altered_scale_fails(config: EvalConfig, altered: None, capsys: pytest.CaptureFixture[str]) -> None:
    config.modes = ["weights", "layers", "dynamic", "prefill"]
    with pytest.raises(CheckFailed):
        check(config)
    report = json.loads((Path(config.output) / "report.json").read_text())["consistency"]
    assert report["passed"] is False
    assert report["fake_quant"]["logits"]["max_abs_difference"] > 0
    modes = report["modes"]
    assert {entry["status"] for entry in modes.values()} == {"failed"}
    assert modes["weights"]["weights"]["unequal"] == [ALTERED]
    assert modes["layers"]["layers"]["splits"]["dense"]["broken"] == [ALTERED]
    assert modes["dynamic"]["reference"]["unequal_logits"] > 0
    for found in modes["dynamic"]["reference"]["divergences"]:
        assert found["difference"] > 0 and 0 <= found["margin"] <= 1
    shown = capsys.readouterr().out
    assert "FAIL fake-quant vs compressed" in shown and "FAIL modes: 4 failed" in shown


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_trained_checkpoint_is_what_was_exported_from_it(
    config: EvalConfig, checkpoint: Path, tmp_path: Path, dtype: str
) -> None:
    exported = tmp_path / "exported"
    # what was rounded to 16 bits can then be coded without loss
    lossless = Lossless.none if dtype == "auto" else Lossless.embeddings
    export(
        ExportConfig(
            source=str(checkpoint), output=str(exported), dtype=dtype, lossless=lossless, progress_bar=False
        )
    )  # fmt: skip
    config.base, config.checkpoint = None, str(checkpoint)
    # a folder made from something else
    assert consistency(config)["passed"] is False
    config.compressed = str(exported)
    report = consistency(config)
    assert report["passed"]
    assert "base" not in report


@pytest.mark.parametrize(
    ("quant", "lossless"),
    [
        (QuantConfig(bits=5, embeddings=True), Lossless.none),
        (QuantConfig(bits=5), Lossless.embeddings),
        (QuantConfig(enabled=False), Lossless.all),
    ],
    ids=["embeddings too", "embeddings exact", "nothing"],
)
def test_what_export_rounded_to_16_bits_is_rounded_in_the_twin_of_the_base_too(
    config: EvalConfig, tmp_path: Path, quant: QuantConfig, lossless: Lossless
) -> None:
    exported = str(tmp_path / "exported")
    options = {"dtype": "bfloat16", "lossless": lossless, "progress_bar": False}
    export(ExportConfig(source=str(config.base), output=exported, quant=quant, **options))
    config.compressed = exported
    report = consistency(config)
    assert report["passed"] and not report["base"]["logits"]["bit_equal"]


def test_of_a_trained_folder_the_base_alone_tells_the_distance_and_promises_nothing(
    config: EvalConfig, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.compressed = str(tmp_path / "exported")
    export(ExportConfig(source=str(checkpoint), output=config.compressed, progress_bar=False))
    report = consistency(config)
    assert report["passed"] is None and "fake_quant" not in report
    assert report["base"]["logits"]["kl"]["mean"] > 0
    assert "neither PASS nor FAIL" in capsys.readouterr().out
    # its own integers are a reference for every way of running
    config.modes = ["weights", "prefill"]
    report = consistency(config)
    assert report["passed"] and list(report["modes"]) == config.modes


def test_a_learned_step_that_nothing_trained_is_where_it_starts(config: EvalConfig, tmp_path: Path) -> None:
    config.compressed = str(tmp_path / "exported")
    quant = QuantConfig(scale=ScaleRule.learned, init=ScaleRule.std, k=0.4)
    export(ExportConfig(source=str(config.base), output=config.compressed, quant=quant, progress_bar=False))
    config.modes = ["weights", "layers"]
    assert consistency(config)["passed"]


def test_a_model_coded_without_loss_is_its_base(
    config: EvalConfig, tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    source, exported = str(tiny_llama(dtype="bfloat16")), str(tmp_path / "exact")
    quant = QuantConfig(enabled=False)
    export(ExportConfig(source=source, output=exported, quant=quant, lossless=Lossless.all, progress_bar=False))
    config.base, config.compressed = source, exported
    report = consistency(config)
    assert report["passed"]
    assert report["base"]["logits"]["bit_equal"] and report["base"]["generation"]["divergent_tokens"] == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base": None}, "base=.*checkpoint="),
        ({"text": None}, "text="),
        ({"base": "./nowhere"}, "no model at ./nowhere"),
        ({"checkpoint": "./last.ckpt"}, "no checkpoint at last.ckpt"),
        ({"prompts": 1000}, "tokens, and 1000 prompts of 9 need 9,000"),
        ({"seq_len": 200}, "seq_len=200 does not fit the model's context of 128"),
        ({"new_tokens": 120}, "prompt_tokens=9 and new_tokens=120 do not fit .* 128"),
        ({"windows": 0}, "windows=0"),
        ({"prompts": 0}, "prompts=0"),
        ({"modes": ["static", "statick"]}, "modes=statick: give all or some of weights, .*streamed"),
        ({"device": "nowhere"}, "device=nowhere"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_mistake_is_named_in_one_line_and_leaves_no_report(
    config: EvalConfig, changes: dict[str, object], words: str
) -> None:
    for key, value in changes.items():
        setattr(config, key, value)
    with pytest.raises(UserError, match=words) as error:
        consistency(config)
    assert "\n" not in str(error.value)
    assert not list(Path(config.output).glob("*.json"))


def test_a_text_shorter_than_a_window_is_told_its_length(config: EvalConfig, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("the dogs rest. " * 3)
    config.text, config.prompts, config.prompt_tokens = str(tmp_path / "short.txt"), 1, 2
    with pytest.raises(UserError, match=r"the text has \d+ tokens, and one window of seq_len=63 needs 64"):
        consistency(config)


def test_models_of_two_vocabularies_are_refused(config: EvalConfig, other_vocabulary: Path) -> None:
    config.base = str(other_vocabulary)
    with pytest.raises(UserError, match="vocabulary of 310"):
        consistency(config)
