"""One HTML page of everything that a report.json says: opens offline, on a phone too, loads nothing and runs nothing.

    python -m eval.page reports/my-model

`eval.consistency` and `eval.harness` write it beside their report.json.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from eval import figures
from eval.charts import legend
from eval.tables import (
    MODELS,
    TITLES,
    Table,
    cost_table,
    flip_table,
    layer_table,
    percentile_table,
    score_table,
)
from qat.cli import exit_code
from qat.errors import UserError
from qat.report import write_text

PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
"""Of control characters, which HTML cannot hold."""

STYLE = Path(__file__).with_suffix(".css")

AFTER = 48
"""Tokens shown behind the first that differs, and of texts that do not differ twice as many."""

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""Whatever text a model writes, a browser fetches and runs nothing."""


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
    write_text(path, page(report))
    return path


def page(report: dict[str, Any]) -> str:
    """The page as text; report: of report.json, any of `consistency`, `harness` and `weights`."""
    jobs = [report[job] for job in ("consistency", "harness") if job in report]
    name = Path(jobs[0]["settings"]["compressed"]).name if jobs else "no report"
    consistency, harness, weights = (report.get(job) for job in ("consistency", "harness", "weights"))
    parts = [f"<h1>{escape(name)}</h1>", *_verdict(consistency), *_facts(consistency, weights)]
    if weights:
        parts += ["<h2>Size</h2>", figures.sizes(weights["summary"])]
    if consistency:
        parts += _divergence(consistency) + _examples(consistency)
    if harness:
        parts += _harness(harness)
    if consistency:
        parts += _costs(consistency)
    if weights:
        parts += _weights(weights)
    parts.append(f"<footer>{''.join(f'<p>{escape(_origin(job))}</p>' for job in jobs)}</footer>")
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    head += '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{escape(name)}</title>\n<style>\n{STYLE.read_text(encoding='utf-8')}</style>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{chr(10).join(parts)}\n</body></html>\n'


def _verdict(consistency: dict[str, Any] | None) -> list[str]:
    passed = consistency and consistency["passed"]
    if passed is None:
        return []
    kind, words = ("pass", "PASS: every token and every logit is") if passed else ("fail", "FAIL: not everything is")
    return [f'<p class="verdict {kind}">{words} that of the fake-quantised model</p>']


def _facts(consistency: dict[str, Any] | None, weights: dict[str, Any] | None) -> list[str]:
    """The handful of numbers that come first."""
    facts: list[tuple[str, str]] = []
    if weights:
        summary = weights["summary"]
        facts.append((f"{summary['bits']:.2f}", "stored bits a compressed weight"))
        facts.append((f"{summary['ratio']:.2f}×", "smaller than FP16, the whole model"))
    pairs = consistency or {}
    if "base" in pairs:
        logits = pairs["base"]["logits"]
        facts.append((f"{100 * (logits['perplexity']['ratio'] - 1):+.2f} %", "perplexity over the base's"))
        facts.append((f"{logits['kl']['mean']:.4f}", "mean KL to the base, nats"))
        facts.append((f"{100 * logits['same_top']:.1f} %", "same top token as the base"))
    if "fake_quant" in pairs:
        made = pairs["fake_quant"]["generation"]
        words = f"divergent tokens of {made['tokens']:,}, to the fake-quantised model"
        facts.append((f"{made['divergent_tokens']:,}", words))
    items = "".join(f"<li><b>{escape(value)}</b>{escape(what)}</li>" for value, what in facts)
    return [f'<ul class="facts">{items}</ul>'] if items else []


def _costs(consistency: dict[str, Any]) -> list[str]:
    # a report of before it was measured
    if "costs" not in consistency:
        return []
    settings = consistency["settings"]
    note = f"Greedy generation of {settings['new_tokens']} tokens, {settings['batch_size']} prompts at once, on "
    note += f"{consistency['device']} in {consistency['dtype']}."
    if consistency["device"] == "cpu":
        note += " A CPU decodes compressed weights once and keeps them beside the stored ones."
    columns, rows = cost_table(consistency)
    shown = [index for index in range(len(columns)) if any(row[index] is not None for row in rows)]
    table = _table([columns[index] for index in shown], [[row[index] for index in shown] for row in rows])
    return ["<h2>Speed and memory</h2>", _note(note), table]


def _divergence(consistency: dict[str, Any]) -> list[str]:
    pairs = {name: consistency[name] for name in TITLES if name in consistency}
    prompts = next(iter(pairs.values()))["generation"]["prompts"]
    parts = [
        "<h2>How long greedy text stays the same</h2>",
        _note(f"Share of {prompts} prompts without a divergence so far."),
        figures.survival(pairs),
    ]
    parts.append("<h2>How far next-token distributions are apart</h2>")
    for name, pair in pairs.items():
        logits = pair["logits"]
        parts.append(f"<h3>{escape(TITLES[name].capitalize())}</h3>")
        if logits["bit_equal"]:
            parts.append(_note(f"All logits over {logits['tokens']:,} tokens are equal to the bit: every number is 0."))
            continue
        parts.append(_note(_apart(logits)))
        columns, rows = percentile_table({name: pair})
        parts.append(_table([columns[0], "KL, nats", "delta p"], rows))
    return parts


def _apart(logits: dict[str, Any]) -> str:
    perplexity = logits["perplexity"]
    return (
        f"Over {logits['tokens']:,} tokens of held-out text: perplexity {perplexity['reference']:.3f} to "
        f"{perplexity['other']:.3f}, ratio {perplexity['ratio']:.4f} ± {perplexity['ratio_error']:.4f}; same top token "
        f"{100 * logits['same_top']:.2f} %; tokens drawn from both can agree in {100 * logits['ear']['mean']:.2f} %."
    )


def _examples(consistency: dict[str, Any]) -> list[str]:
    """What both models wrote, folded away where it is the same."""
    parts = []
    for name in TITLES:
        if name not in consistency or not (examples := consistency[name]["generation"].get("examples")):
            continue
        shown = "".join(_example(example, MODELS[name]) for example in examples)
        if all(example["position"] is None for example in examples):
            words = f"{TITLES[name]}: {len(examples)} prompts, every token the same"
            shown = f"<details><summary>{escape(words)}</summary>{shown}</details>"
        else:
            shown = f"<h3>{escape(TITLES[name].capitalize())}</h3>{shown}"
        parts.append(shown)
    return ["<h2>What they wrote</h2>", _note("The first token that differs is marked."), *parts] if parts else []


def _example(example: dict[str, Any], reference: str) -> str:
    """A prompt, and what both models made of it, side by side."""
    at = example["position"]
    sides = "".join(
        f"<div><h4>{escape(name)}</h4><p>{_marked(example[side], at)}</p></div>"
        for name, side in ((reference, "reference"), ("compressed", "other"))
    )
    return f'<blockquote>{shown(example["prompt"])}</blockquote><div class="pair">{sides}</div>'


def _marked(pieces: Sequence[str], at: int | None) -> str:
    """Text of some tokens, the one at `at` marked and those after it paler, cut where it says no more."""
    end = 2 * AFTER if at is None else at + 1 + AFTER
    more = " …" * (end < len(pieces))
    if at is None:
        return shown("".join(pieces[:end])) + more
    # a token may add nothing to the text yet
    token = shown(pieces[at]) or "\u2423"
    before, after = shown("".join(pieces[:at])), shown("".join(pieces[at + 1 : end])) + more
    return f'{before}<mark>{token}</mark><span class="after">{after}</span>'


def shown(text: str) -> str:
    """Text as HTML; control characters as their pictures."""
    return escape(text.translate(PICTURES))


def _harness(report: dict[str, Any]) -> list[str]:
    columns, rows = score_table(report)
    # a narrow screen has no room for two columns of names
    joined = [[f"{task}, {metric}", *values] for task, metric, *values in rows]
    parts = ["<h2>Benchmarks</h2>", _table(*_with_errors(["task", *columns[2:]], joined))]
    if report["flips"]:
        words = {"lost": "right to wrong", "gained": "wrong to right", "changed": "another choice"}
        columns, rows = flip_table(report)
        named = [words.get(column, column) for column in columns]
        parts += ["<h3>Items whose answer changed</h3>", _table(named, rows)]
    return parts


def _with_errors(columns: list[str], rows: list[list[Any]]) -> Table:
    """A table with every column "± name" put behind the number in the column `name` before it."""
    kept = [index for index, column in enumerate(columns) if not column.startswith("± ")]

    def joined(row: list[Any], index: int) -> Any:
        if index + 1 in kept or index + 1 == len(row) or row[index + 1] is None:
            return row[index]
        return f"{_cell(row[index])} ± {row[index + 1]:.2g}"

    return [columns[index] for index in kept], [[joined(row, index) for index in kept] for row in rows]


def _weights(weights: dict[str, Any]) -> list[str]:
    modules = weights["modules"]
    columns, rows = layer_table(weights)
    note = "How often each weight occurs, and how often the frequency table that codes it expects it to, as shares of "
    note += "all. A symbol that occurs has at least one slot of its table, so rare weights are expected too often."
    return [
        "<h2>Bits of every layer</h2>",
        figures.layer_bits(modules),
        f"<details><summary>all {len(rows)} layers</summary>{_table(columns, rows)}</details>",
        "<h2>Weights against the model that codes them</h2>",
        _note(note),
        legend([("s1l", "counted"), ("s2", "expected by the coder")]),
        f'<div class="grid">{"".join(map(_histogram, weights["histograms"]))}</div>',
    ]


def _histogram(found: dict[str, Any]) -> str:
    layers = "1 layer" if found["modules"] == 1 else f"{found['modules']} layers"
    note = f"{layers}: entropy {found['entropy']:.3f}, coded in {found['coded_bits']:.3f} bits"
    return f"<div><h3>{escape(found['role'])}</h3>{_note(note)}{figures.histogram(found)}</div>"


def _note(words: str) -> str:
    return f'<p class="note">{escape(words)}</p>'


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(_cell(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.5g}" if isinstance(value, float) else str(value)


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
