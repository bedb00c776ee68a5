"""Gate, then judge training on a real model: `python -m benchmarks.qat --model M --train T --valid V`.

The setting of experiment=bookllama_qat (step 0.522 standard deviations, about 3 bits; distillation alone; 600 steps
of 64 x 512 tokens), then experiment=bookllama_rate at the stored bits that it came to, export, and perplexity on the
first windows of held-out text against the base and against rounding the base to nearest. The gate is zero divergent
tokens and equal logits between fake-quant and compressed model, which holds on a CPU; on a GPU the two run different
kernels, so there the gate compares integers: every tile is decoded and compared at export. Writes
benchmarks/results/qat-<model>-<device>.json.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from eval.consistency import consistency
from qat.cli import compose
from qat.export import export
from qat.lit.build import train
from qat.report import device_slug, environment, print_table, write_json

RESULTS = Path(__file__).parent / "results"


def judge(compressed: Path, base: str, valid: str, windows: int, output: Path, *more: str) -> dict[str, Any]:
    """Perplexities, divergence from the base and stored bits of one compressed folder."""
    report = consistency(
        compose(
            "eval",
            f"compressed={compressed}",
            f"base={base}",
            f"text={valid}",
            f"windows={windows}",
            f"output={output}",
            "prompts=32",
            "new_tokens=64",
            "batch_size=32",
            "floor=false",
            "logger=disabled",
            *more,
        )  # fmt: skip
    )
    if report["device"] == "cpu" and not report["passed"]:
        raise SystemExit("error: the compressed model differs from the fake-quantised one; no figures written")
    summary = json.loads((compressed / "export_report.json").read_text())["summary"]
    logits = report["base"]["logits"]
    return {
        "bits": summary["bits"],
        "entropy": summary["entropy"],
        "ppl_base": round(logits["perplexity"]["reference"], 4),
        "ppl": round(logits["perplexity"]["other"], 4),
        "ratio": round(logits["perplexity"]["ratio"], 5),
        "kl": round(logits["kl"]["mean"], 5),
        "top1": round(logits["same_top"], 4),
        "tokens": logits["tokens"],
        "divergent_tokens_fake_quant": report["fake_quant"]["generation"]["divergent_tokens"],
    }


def main() -> None:
    """Round to nearest, train, judge both, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="Hugging Face folder of the base")
    parser.add_argument("--train", required=True, nargs="+", help="text to train on")
    parser.add_argument("--valid", required=True, help="held-out text")
    parser.add_argument("--windows", type=int, default=1024, help="windows of 512 tokens to judge on")
    parser.add_argument("overrides", nargs="*", help="of train.py's config, as trainer.max_steps=50")
    args = parser.parse_args()
    texts = f"data.train=[{','.join(args.train)}]"
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rounded = export(
            compose("export", f"source={args.model}", f"output={folder / 'rounded'}", "quant=std", "quant.k=0.522")
        )
        judged = judge(rounded, args.model, args.valid, args.windows, folder / "report")
        rows.append({"method": "round to nearest", **judged, "seconds": 0.0})
        # the rate term is to be had at the bits that plain QAT came to
        for method, experiment in [("QAT, distillation", "bookllama_qat"), ("QAT, rate term", "bookllama_rate")]:
            same_bits = [f"rate.target_bits={rows[-1]['bits']}"] if experiment == "bookllama_rate" else []
            begin = time.perf_counter()
            run = train(
                compose(
                    "train",
                    f"experiment={experiment}",
                    f"model.path={args.model}",
                    texts,
                    f"data.valid={args.valid}",
                    "logger=disabled",
                    f"paths.output_root={folder}",
                    *same_bits,
                    *args.overrides,
                )  # fmt: skip
            )
            seconds = time.perf_counter() - begin
            checkpoint = run / "checkpoints" / "last.ckpt"
            trained = export(compose("export", f"source={checkpoint}", f"output={folder / experiment}-coded"))
            judged = judge(trained, args.model, args.valid, args.windows, folder / "report", f"checkpoint={checkpoint}")
            rows.append({"method": method, **judged, "seconds": round(seconds, 1)})
    path = RESULTS / f"qat-{Path(args.model).name}-{device_slug()}.json"
    write_json(path, {"environment": environment(), "overrides": args.overrides, "rows": rows})
    print_table("perplexity at about 3 bits", list(rows[0]), [list(row.values()) for row in rows])
    print(f"written to {path}")


if __name__ == "__main__":
    main()
