"""One HTML page of everything that a report.json says: opens offline, on a phone too, and loads nothing.

    python -m eval.page reports/my-model

`eval.consistency` and `eval.harness` write it beside their report.json.
"""

import argparse
import io
import json
import sys
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from eval.tables import TITLES, flip_table, percentile_table, score_table, survival_figure
from qat.cli import exit_code
from qat.errors import UserError
from qat.report import write_text

PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
"""Of control characters, which HTML cannot hold."""

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --good: #178a3c; --bad: #c62f2f; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 .5rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.wide { overflow-x: auto; } figure { margin: 0; background: #fff; border-radius: .4rem; overflow-x: auto; }
svg { width: 100%; height: auto; min-width: 26rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .6rem; padding: 0; }
.facts li { list-style: none; background: var(--soft); border-radius: .4rem; padding: .5rem .7rem; font-size: .85rem; }
.facts b { display: block; font-size: 1.15rem; }
.verdict { font-weight: 600; } .pass { color: var(--good); } .fail { color: var(--bad); }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: .8rem;
  margin: .5rem 0 1.2rem; }
.pair p, blockquote { margin: 0; padding: .6rem; background: var(--soft); border-radius: .4rem; white-space: pre-wrap;
  overflow-wrap: anywhere; font-size: .9rem; }
mark { background: #ffd54a; color: #000; border-radius: .2rem; } .after { opacity: .55; }
footer { margin-top: 2.5rem; font-size: .8rem; opacity: .75; overflow-wrap: anywhere; }
"""


def write_page(output: Path) -> Path:
    """Write output/report.html from output/report.json; gives its path.

    Raises:
        UserError: there is no report, or it is no JSON.
    """
    try:
        report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{output} has no report.json: run eval/consistency.py or eval/harness.py first") from error
    except ValueError as error:
        raise UserError(f"{output / 'report.json'} is damaged: {error}") from error
    path = output / "report.html"
    write_text(path, page(report, _export_report(report)))
    return path


def page(report: dict[str, Any], exported: dict[str, Any] | None = None) -> str:
    """The page as text.

    Args:
        report: of report.json: `consistency`, `harness` or both.
        exported: export_report.json of the compressed folder, None without one.
    """
    jobs = [report[job] for job in ("consistency", "harness") if job in report]
    name = Path(jobs[0]["settings"]["compressed"]).name if jobs else "no report"
    parts = [f"<h1>{escape(name)}</h1>"]
    parts += _verdict(report) + _facts(report, exported)
    if "consistency" in report:
        parts += _consistency(report["consistency"])
    if "harness" in report:
        parts += _harness(report["harness"])
    if exported:
        parts += _sizes(exported)
    parts.append(f"<footer>{''.join(f'<p>{escape(_origin(job))}</p>' for job in jobs)}</footer>")
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{escape(name)}</title><style>{STYLE}</style>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{chr(10).join(parts)}\n</body></html>\n'


def _export_report(report: dict[str, Any]) -> dict[str, Any] | None:
    """What export said of the folder, if that is still where it was."""
    for job in report.values():
        try:
            return json.loads((Path(job["settings"]["compressed"]) / "export_report.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def _verdict(report: dict[str, Any]) -> list[str]:
    passed = report.get("consistency", {}).get("passed")
    if passed is None:
        return []
    kind, words = ("pass", "PASS: every token and every logit is") if passed else ("fail", "FAIL: not everything is")
    return [f'<p class="verdict {kind}">{words} that of the fake-quantised model</p>']


def _facts(report: dict[str, Any], exported: dict[str, Any] | None) -> list[str]:
    """The handful of numbers that come first."""
    facts: list[tuple[str, str]] = []
    if exported:
        summary = exported["summary"]
        facts.append(("stored bits a weight", f"{summary['bits']:.2f}"))
        size = f"{summary['model_bytes'] / 1e6:,.1f} MB"
        facts.append((f"all of it; FP16 takes {summary['ratio']:.1f} times as much", size))
    pairs = report.get("consistency", {})
    if "base" in pairs:
        logits = pairs["base"]["logits"]
        facts.append(("perplexity over the base's", f"{100 * (logits['perplexity']['ratio'] - 1):+.2f} %"))
        facts.append(("mean KL to the base, nats", f"{logits['kl']['mean']:.4g}"))
        facts.append(("same top token as the base", f"{100 * logits['same_top']:.2f} %"))
    if "fake_quant" in pairs:
        made = pairs["fake_quant"]["generation"]
        facts.append(("divergent tokens", f"{made['divergent_tokens']:,} of {made['tokens']:,}"))
    items = "".join(f"<li><b>{escape(value)}</b>{escape(what)}</li>" for what, value in facts)
    return [f'<ul class="facts">{items}</ul>'] if items else []


def _consistency(report: dict[str, Any]) -> list[str]:
    pairs = {name: report[name] for name in TITLES if name in report}
    parts = [
        "<h2>Prompts without a divergence so far</h2>",
        _figure(survival_figure(pairs)),
        "<h2>Percentiles over tokens</h2>",
        _table(*percentile_table(pairs)),
    ]
    for name, pair in pairs.items():
        if examples := pair["generation"].get("examples"):
            parts += [f"<h2>Generated, {escape(TITLES[name])}</h2>", *map(_example, examples)]
    return parts


def _example(example: dict[str, Any]) -> str:
    """A prompt, and what both models made of it, side by side."""
    at = example["position"]
    sides = "".join(f"<p>{_marked(example[side], at)}</p>" for side in ("reference", "other"))
    return f'<blockquote>{shown(example["prompt"])}</blockquote><div class="pair">{sides}</div>'


def _marked(pieces: Sequence[str], at: int | None) -> str:
    """Text of some tokens, the one at `at` marked and those after it paler."""
    if at is None:
        return shown("".join(pieces))
    # a token may add nothing to the text yet
    token = shown(pieces[at]) or "\u2423"
    before, after = shown("".join(pieces[:at])), shown("".join(pieces[at + 1 :]))
    return f'{before}<mark>{token}</mark><span class="after">{after}</span>'


def shown(text: str) -> str:
    """Text as HTML; control characters as their pictures."""
    return escape(text.translate(PICTURES))


def _harness(report: dict[str, Any]) -> list[str]:
    columns, rows = score_table(report)
    # a narrow screen has no room for two columns of names
    joined = [[f"{task}, {metric}", *values] for task, metric, *values in rows]
    parts = ["<h2>Benchmarks</h2>", _table(["task", *columns[2:]], joined)]
    if report["flips"]:
        words = {"lost": "right to wrong", "gained": "wrong to right", "changed": "another choice"}
        columns, rows = flip_table(report)
        named = [words.get(column, column) for column in columns]
        parts += ["<h2>Items whose answer changed</h2>", _table(named, rows)]
    return parts


def _sizes(exported: dict[str, Any]) -> list[str]:
    layers = [layer for layer in exported["layers"] if layer.get("entropy") is not None]
    rows = [[layer["name"], *layer["shape"], layer["split"], layer["entropy"], layer["bits"]] for layer in layers]
    parts = []
    if layers:
        parts += ["<h2>Bits of every layer</h2>", _figure(_bits(layers))]
        columns = ["layer", "rows", "columns", "split", "entropy", "stored bits"]
        parts.append(f"<details><summary>all {len(rows)} layers</summary>{_table(columns, rows)}</details>")
    return parts


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(_cell(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.5g}" if isinstance(value, float) else str(value)


def _bits(layers: list[dict[str, Any]]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(len(layers)), [layer["bits"] for layer in layers], color="#4477aa", label="stored")
    axes.plot(range(len(layers)), [layer["entropy"] for layer in layers], "k_", label="entropy")
    axes.set(xlabel="layer, in the order of their names", ylabel="bits a weight")
    axes.legend()
    return figure


def _figure(figure: Any) -> str:
    """A matplotlib figure as SVG in the page; equal figures give equal text."""
    import matplotlib

    drawn = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "page"}):
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    # without the declarations of a file of its own
    return f"<figure>{drawn.getvalue()[drawn.getvalue().index('<svg') :]}</figure>"


def _origin(job: dict[str, Any]) -> str:
    """When, where and by what a section was made."""
    made = job.get("environment", {})
    versions = ", ".join(f"{package} {version}" for package, version in made.get("versions", {}).items())
    where = ", ".join(made.get("gpus") or [made.get("cpu", "")])
    return f"{made.get('time', '')}, {job['device']} ({where}), {job['dtype']}: {made.get('command', '')}; {versions}"


def main() -> None:
    """`python -m eval.page FOLDER`; exit codes as those of `qat.cli.entry_point`."""
    parser = argparse.ArgumentParser(prog="python -m eval.page", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="with a report.json in it")
    folder = parser.parse_args().folder
    sys.exit(exit_code(lambda: print(f"page: {write_page(folder)}")))


if __name__ == "__main__":
    main()
