"""The README.md of a compressed folder: what it is, how to load it, its figures, and what an evaluation found.

    python -m qat.model_card compressed/model --report reports/model --base TinyLlama/TinyLlama_v1.1

Export writes one without an evaluation; this writes it anew.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from qat.cli import exit_code
from qat.errors import UserError
from qat.report import write_text


def model_card(name: str, summary: dict[str, Any], config: dict[str, Any], report: dict[str, Any] | None = None) -> str:
    """Model card in Markdown with the YAML header that the Hugging Face hub reads.

    Args:
        name: of the folder.
        summary: of the export report; its `base` becomes the hub's base_model where it can be a model there.
        config: config.json, `quantization_config` included.
        report: of an evaluation, report.json.
    """
    quant = config["quantization_config"]["quant"]
    base, lossless = summary.get("base") or name, summary["lossless_weights"]
    kinds = [f"INT8 weights ({quant['granularity']}, {quant['scale']} scales)"] if quant["enabled"] else []
    kinds += [f"{lossless:,} weights in 16 bits, coded without loss"] if lossless else []
    hub = f"base_model: {base}\nbase_model_relation: quantized\n" if on_hub(base) else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
{hub}tags: [codecllm, {"int8, rans, qat" if quant["enabled"] else "lossless, rans"}]
---
# {base.rstrip("/").rpartition("/")[2]}, compressed by codecllm

{"; ".join(kinds)}: rANS-coded in tiles. Import `rans_kernels` before
loading: without it transformers does not know the format.

```python
import rans_kernels
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = {json.dumps(name)}  # where this is, or its name on the hub
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer("Once upon a time", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

| | |
|---|---|
| compressed weights | {summary["compressed_weights"]:,} |
| bits a weight, everything stored | {summary["bits"]:.3f} |
| entropy of the {"integers; of floats, the high byte's and 8" if lossless else "integers"} | {summary["entropy"]:.3f} |
| whole model | {summary["model_bytes"] / 1e6:.1f} MB, {summary["model_bits"]:.2f} bits a parameter |
| the same in FP16 | {summary["fp16_bytes"] / 1e6:.1f} MB |

Per layer: export_report.json. Every tile was decoded and compared before this folder was written.
{_evaluation(report or {})}"""


def write_card(folder: Path, report: Path | None = None, base: str | None = None) -> Path:
    """Write README.md of a compressed folder anew; gives its path.

    Args:
        folder: with config.json and export_report.json.
        report: the folder of an evaluation's report.json; None takes the one in `folder`, if there is one.
        base: name of the base model on the hub; None keeps what export noted.

    Raises:
        UserError: a file is missing or damaged, the report is of another model, or `base` can be no name on the hub.
    """
    if base is not None and not on_hub(base):
        raise UserError(f"--base {base} is no name on the hub: give it as organisation/model")
    config, exported = _read(folder / "config.json"), _read(folder / "export_report.json")
    where = folder if report is None else report
    found = _read(where / "report.json") if report is not None or (where / "report.json").is_file() else None
    for job in (found or {}).values():
        name = Path(job.get("settings", {}).get("compressed", folder.name)).name
        if name != folder.resolve().name:
            raise UserError(f"{where / 'report.json'} is of {name}, not of {folder}: give the folder of its own report")
    summary = exported["summary"] | ({} if base is None else {"base": base})
    path = folder / "README.md"
    write_text(path, model_card(folder.resolve().name, summary, config, found))
    return path


def on_hub(name: str) -> bool:
    """Whether this can be a model of the hub, organisation/model; a folder of this machine is none."""
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name)) and not Path(name).exists()


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: give a folder that export or an evaluation wrote") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error


def _evaluation(report: dict[str, Any]) -> str:
    """What was measured, as Markdown; nothing where nothing was."""
    rows: list[tuple[str, str]] = []
    consistency, harness = report.get("consistency", {}), report.get("harness", {})
    if "fake_quant" in consistency:
        made = consistency["fake_quant"]["generation"]
        equal = "yes" if consistency["fake_quant"]["logits"]["bit_equal"] else "no"
        counted = f"{made['divergent_tokens']:,} of {made['tokens']:,}"
        rows += [
            ("tokens that differ from the fake-quantised model's", counted),
            ("logits equal to its to the bit", equal),
        ]
    if "base" in consistency:
        logits = consistency["base"]["logits"]
        kl, perplexity = logits["kl"], logits["perplexity"]
        change = f"{perplexity['reference']:.3f} to {perplexity['other']:.3f}, {100 * (perplexity['ratio'] - 1):+.2f} %"
        rows += [
            ("perplexity, base to compressed", change),
            ("KL to the base, nats: mean, median, 99 %", f"{kl['mean']:.4g}, {kl['median']:.4g}, {kl['99%']:.4g}"),
            ("same top token as the base", f"{100 * logits['same_top']:.2f} %"),
        ]
    for task, metrics in harness.get("results", {}).get("compressed", {}).items():
        for metric, score in metrics.items():
            base = harness["results"].get("base", {}).get(task, {}).get(metric)
            before = "" if base is None else f"{base['value']:.4g} to "
            rows.append((f"{task}, {metric}", f"{before}{score['value']:.4g}"))
    for task, flips in harness.get("flips", {}).items():
        changed = f"{flips['lost']}, {flips['gained']} of {flips['items']:,}"
        rows.append((f"{task}, items right to wrong, wrong to right", changed))
    table = "".join(f"| {what} | {value} |\n" for what, value in rows)
    return f"\n## Evaluation\n\n| | |\n|---|---|\n{table}" if rows else ""


def main() -> None:
    """`python -m qat.model_card FOLDER`; exit codes as those of `qat.cli.entry_point`."""
    parser = argparse.ArgumentParser(
        prog="python -m qat.model_card", description="Write the model card of a compressed folder anew."
    )
    parser.add_argument("folder", type=Path, help="a compressed folder")
    parser.add_argument("--report", type=Path, help="folder of its evaluation's report.json (default: FOLDER)")
    parser.add_argument("--base", help="name of the base model on the Hugging Face hub")
    given = parser.parse_args()
    sys.exit(exit_code(lambda: print(f"card: {write_card(given.folder, given.report, given.base)}")))


if __name__ == "__main__":
    main()
