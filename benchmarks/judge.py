"""Compress a model at about 3 and 4 bits and judge both: `python -m benchmarks.judge --model M --text T --tasks D`.

Rounded to nearest, a step of a row k standard deviations. Both programs of eval/: the consistency suite in every mode
that runs here, and lm-eval beside base and fake-quant model. Raises unless all that is promised holds; writes
benchmarks/results/judge-<model>-<gpu or cpu>.json, all but texts and curves. With --modes it runs these alone, and
writes judge-<model>-<modes>-<gpu or cpu>.json.
"""

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from eval.consistency import consistency
from eval.harness import harness
from eval.modes import choose_modes
from qat.cli import compose
from qat.errors import UserError
from qat.export import export
from qat.report import device_slug, environment, print_table, write_json

RESULTS = Path(__file__).parent / "results"
STEPS = {"3 bits": 0.52, "4 bits": 0.26}
"""k of each."""
TASKS = ("arc_easy_local", "piqa_local", "hellaswag_local", "lambada_local")
SLOW = ("batch_1", "batch_2")
"""Modes that run apart where several processes do."""
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
        name: {key: pair(value) if key in ("reference", "eager", "itself") else value for key, value in entry.items()}
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


def run(program: str, words: list[str]) -> dict[str, Any]:
    """The report of a program of eval/."""
    return {"consistency": consistency, "harness": harness}[program](compose("eval", *words))


def parts(jobs: int, modes: list[str] | None = None) -> list[tuple[str, list[str]]]:
    """Runs of a folder, by the program and the words of the consistency suite; small batches take longest by far.

    Args: jobs: processes. modes: these alone, without lm-eval; None for all.
    """
    if modes:
        return [("consistency", [f"modes=[{','.join(modes)}]", "floor=false"])]
    if jobs == 1:
        return [("consistency", ["modes=all"]), ("harness", [])]
    others = [name for name in choose_modes("all") if name not in SLOW]
    runs = [[f"modes=[{','.join(others)}]"], *([f"modes=[{name}]", "floor=false"] for name in SLOW)]
    return [*(("consistency", words) for words in runs), ("harness", [])]


def judge(args: argparse.Namespace) -> dict[str, Any]:
    """Compress with every step and judge; folders and reports stay in `args.work`."""
    owners, jobs = [], []
    for bits, k in STEPS.items():
        folder = args.work / bits.replace(" ", "-")
        compressed, settings = folder / "model", ["quant=std", f"quant.k={k}", "overwrite=true"]
        export(compose("export", f"source={args.model}", f"output={compressed}", "logger=disabled", *settings))
        for i, (program, more) in enumerate(parts(args.jobs, args.modes)):
            words = ["logger=disabled", f"device={args.device}", f"output={folder / f'report-{i}'}", *more]
            words += [f"compressed={compressed}", f"base={args.model}"]
            if program == "consistency":
                words += [f"prompts={args.prompts}", f"new_tokens={args.tokens}", f"windows={args.windows}"]
                words += [f"text={args.text}"]
            else:
                words += [f"tasks=[{','.join(TASKS)}]", f"data_dir={args.tasks}", f"limit={args.limit or 'null'}"]
                words += ["harness.fake_quant=true", "harness.bootstrap_iters=1000"]
            owners.append(bits)
            jobs.append((program, words))
    if args.jobs == 1:
        reports = [run(*job) for job in jobs]
    else:
        with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
            reports = list(pool.map(run, *zip(*jobs, strict=True)))
    found: dict[str, Any] = {bits: {} for bits in STEPS}
    for bits, (program, _), report in zip(owners, jobs, reports, strict=True):
        if report["passed"] is not True:
            raise SystemExit(f"error: {program} fails at {bits}; reports are in {args.work}; no figures written")
        short = short_consistency(report) if program == "consistency" else short_harness(report)
        if program in found[bits]:
            found[bits][program]["modes"] |= short["modes"]
        else:
            found[bits][program] = short
    return found


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
    parser.add_argument("--jobs", type=int, default=1, help="processes at once, of which a GPU takes several")
    parser.add_argument("--limit", type=int, help="items a task (all)")
    chosen = "of the consistency suite, and no lm-eval (all, and lm-eval)"
    parser.add_argument("--modes", nargs="+", choices=choose_modes("all"), help=chosen)
    args = parser.parse_args()
    name = args.model.resolve().name
    try:
        found = judge(args)
    except UserError as error:
        parser.error(str(error))
    device = "cpu" if found["3 bits"]["consistency"]["device"] == "cpu" else device_slug()
    file = "-".join(["judge", name, *(args.modes or []), device])
    write_json(RESULTS / f"{file}.json", {"environment": environment(), "k": STEPS, **found})
    rows = []
    for bits, report in found.items():
        modes = report["consistency"]["modes"].values()
        items = report.get("harness", {"likelihoods": {}})["likelihoods"].values()
        rows.append([bits, sum(entry["status"] == "passed" for entry in modes), sum(found["equal"] for found in items)])
    print_table(name, ["", "modes passed", "items equal to the bit"], rows)


if __name__ == "__main__":
    main()
