"""Compress a model at about 3 and 4 bits and judge both: `python -m benchmarks.judge --model M --text T --tasks D`.

Rounded to nearest, a step of a row k standard deviations. Both programs of eval/: the consistency suite in every mode
that runs here, and lm-eval beside base and fake-quant model. Raises unless all that is promised holds; writes
benchmarks/results/judge-<model>-<gpu or cpu>.json, all but texts and curves.
"""

import argparse
from pathlib import Path
from typing import Any

from eval.consistency import consistency
from eval.harness import harness
from qat.cli import compose
from qat.export import export
from qat.report import device_slug, environment, print_table, write_json

RESULTS = Path(__file__).parent / "results"
STEPS = {"3 bits": 0.52, "4 bits": 0.26}
"""k of each."""
TASKS = ("arc_easy_local", "piqa_local", "hellaswag_local", "lambada_local")
LONG = {"survival", "examples", "divergences"}


def pair(found: dict[str, Any]) -> dict[str, Any]:
    """A comparison without its curves and lists, but for the first divergence of all."""
    first = min(found["divergences"], key=lambda where: where["position"], default=None)
    short = {key: value for key, value in found.items() if key not in LONG}
    return short | ({"first": first} if first else {})


def short_consistency(report: dict[str, Any]) -> dict[str, Any]:
    """The section `consistency` of report.json without texts, curves, lists and settings."""
    pairs = {name: report[name] for name in ("fake_quant", "library", "base", "floor") if name in report}
    modes = {
        name: {key: pair(value) if key in ("reference", "eager") else value for key, value in entry.items()}
        for name, entry in report["modes"].items()
    }
    return {
        **{key: report[key] for key in ("passed", "device", "dtype", "seconds")},
        **{name: {"generation": pair(found["generation"]), "logits": found["logits"]} for name, found in pairs.items()},
        "modes": modes,
    }


def short_harness(report: dict[str, Any]) -> dict[str, Any]:
    """The section `harness` of report.json without settings, flipped items as numbers by kind."""
    flips = {}
    for task, found in report["flips"].items():
        kinds: dict[str, list[int]] = {}
        for flip in found["flipped"]:
            kinds.setdefault(flip["kind"], []).append(flip["doc_id"])
        flips[task] = found | {"flipped": kinds}
    return {key: report[key] for key in ("passed", "device", "dtype", "results", "likelihoods")} | {"flips": flips}


def judge(k: float, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Compress with one step and judge; the folder and its report stay in `folder`."""
    compressed, common = folder / "model", ["logger=disabled", f"device={args.device}", f"output={folder / 'report'}"]
    settings = ["quant=std", f"quant.k={k}", "overwrite=true"]
    export(compose("export", f"source={args.model}", f"output={compressed}", "logger=disabled", *settings))
    common += [f"compressed={compressed}", f"base={args.model}"]
    sizes = [f"prompts={args.prompts}", f"new_tokens={args.tokens}", f"windows={args.windows}", "modes=all"]
    found = {"consistency": consistency(compose("eval", *common, *sizes, f"text={args.text}"))}
    words = [f"tasks=[{','.join(TASKS)}]", f"data_dir={args.tasks}", f"limit={args.limit or 'null'}"]
    found["harness"] = harness(compose("eval", *common, *words, "harness.fake_quant=true"))
    if failed := [name for name, report in found.items() if report["passed"] is not True]:
        raise SystemExit(f"error: {failed[0]} fails at k={k}; the report is in {folder}; no figures written")
    return {"consistency": short_consistency(found["consistency"]), "harness": short_harness(found["harness"])}


def main() -> None:
    """Judge both, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--text", type=Path, required=True, help="held-out text")
    parser.add_argument("--tasks", type=Path, required=True, help="folder of jsonl files")
    parser.add_argument("--work", type=Path, default=Path("outputs/judge"), help="for what is made (%(default)s)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=256, help="generated a prompt (%(default)s)")
    parser.add_argument("--windows", type=int, default=128, help="of text, for logits (%(default)s)")
    parser.add_argument("--limit", type=int, help="items a task (all)")
    args = parser.parse_args()
    name = args.model.resolve().name
    found: dict[str, Any] = {bits: judge(k, args.work / bits.replace(" ", "-"), args) for bits, k in STEPS.items()}
    device = "cpu" if found["3 bits"]["consistency"]["device"] == "cpu" else device_slug()
    write_json(RESULTS / f"judge-{name}-{device}.json", {"environment": environment(), "k": STEPS, **found})
    rows = []
    for bits, report in found.items():
        modes = report["consistency"]["modes"].values()
        items = report["harness"]["likelihoods"].values()
        rows.append([bits, sum(entry["status"] == "passed" for entry in modes), sum(found["equal"] for found in items)])
    print_table(name, ["", "modes passed", "items equal to the bit"], rows)


if __name__ == "__main__":
    main()
