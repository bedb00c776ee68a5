"""The page in a real browser: quiet, offline, no wider than a phone, readable by day and by night."""

import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest

from eval.page import page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
    "--enable-logging=stderr", "--window-size=1400,900",
)  # fmt: skip

PROBE = """
const luminance = color => {
  const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
    .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b;
};
const ground = node => {
  for (; node; node = node.parentElement) {
    const color = getComputedStyle(node).backgroundColor;
    if (color !== "rgba(0, 0, 0, 0)") return color;
  }
};
const contrast = node => {
  const [low, high] = [getComputedStyle(node).color, ground(node)].map(luminance).sort((a, b) => a - b);
  return (high + .05) / (low + .05);
};
const look = frame => {
  const page = frame.contentDocument, all = [...page.body.querySelectorAll("*")];
  const words = all.filter(node => [...node.childNodes].some(child => child.nodeType === 3 && child.data.trim()));
  const right = node => node.getBoundingClientRect().right, ground_of = node => getComputedStyle(node).backgroundColor;
  const marks = [...page.querySelectorAll("mark")];
  return {
    width: page.documentElement.scrollWidth,
    overflowing: all.filter(node => !node.closest(".wide, svg") && right(node) > frame.clientWidth + 1)
      .map(node => node.outerHTML),
    resources: frame.contentWindow.performance.getEntriesByType("resource").map(entry => entry.name),
    scripts: page.scripts.length,
    images: page.images.length,
    faint: words.filter(node => node.checkVisibility() && contrast(node) < 4.5).map(node => node.outerHTML),
    ground: ground(page.body),
    marks: marks.map(node => node.textContent),
    marked: marks.every(node => ground_of(node) !== ground(node.parentElement)),
    headings: [...page.querySelectorAll("h2")].map(node => node.textContent),
    tables: page.querySelectorAll("table tbody tr").length,
    plots: [...page.querySelectorAll(".plot svg")].map(svg => {
      const box = svg.getBoundingClientRect();
      return [box.width, box.height, svg.querySelectorAll("rect, path").length];
    }),
    smallest: Math.min(...words.map(node => parseFloat(getComputedStyle(node).fontSize))),
    ran: frame.contentWindow.ran ?? null,
  };
};
addEventListener("load", () => {
  const found = Object.fromEntries([...document.querySelectorAll("iframe")].map(frame => [frame.id, look(frame)]));
  document.querySelector("pre").textContent = JSON.stringify(found);
});
"""


def browse(pages: dict[str, tuple[str, int]], folder: Path, dark: bool = False) -> tuple[dict[str, Any], list[str]]:
    """Show pages, each by its text and width, at once; what PROBE sees of each, and what the console said."""
    frames = "".join(
        f'<iframe id="{name}" width="{width}" height="800" style="border:0" srcdoc="{escape(text)}"></iframe>'
        for name, (text, width) in pages.items()
    )
    (folder / "probe.html").write_text(
        f"<!doctype html><meta charset=utf-8><script>{PROBE}</script>{frames}<pre></pre>"
    )
    scheme = [f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--user-data-dir={folder / 'profile'}"]
    done = subprocess.run(
        [str(BROWSER), *FLAGS, *scheme, "--dump-dom", f"file://{folder}/probe.html"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    (found,) = re.findall(r"<pre>(.*?)</pre>", done.stdout, re.DOTALL)
    return json.loads(unescape(found)), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on this machine")


@pytest.fixture
def report(evaluated: Path) -> dict[str, Any]:
    """Of both programs; the benchmarks' section is made up."""
    report = json.loads((evaluated / "report.json").read_text())
    assert page(report) == (evaluated / "report.html").read_text()
    scores = {"arc": {"acc": {"value": 0.25, "error": 0.03, "higher_is_better": True}}}
    flips = {"arc": {"items": 8, "lost": 1, "gained": 2, "changed": 3}}
    harness = {"results": {"base": scores, "compressed": scores}, "flips": flips, "samples": {"arc": 8}}
    about = {key: report["consistency"][key] for key in ("settings", "device", "dtype")}
    return report | {"harness": harness | about}


@pytest.mark.parametrize("dark", [False, True])
def test_the_page_is_quiet_fits_and_can_be_read(report: dict[str, Any], tmp_path: Path, dark: bool) -> None:
    found, console = browse({"phone": (page(report), 360), "desk": (page(report), 1280)}, tmp_path, dark)
    assert console == []
    examples = report["consistency"]["base"]["generation"]["examples"]
    parting = [example for example in examples if example["position"] is not None]
    for name, width in (("phone", 360), ("desk", 1280)):
        seen = found[name]
        assert seen["width"] <= width and seen["overflowing"] == []
        assert seen["resources"] == [] and seen["scripts"] == seen["images"] == 0
        assert seen["faint"] == [] and seen["smallest"] >= 11
        assert (seen["ground"] == "rgb(255, 255, 255)") == (not dark)
        assert len(seen["marks"]) == 2 * len(parting) > 0 and seen["marked"]
        assert {"Size", "Speed and memory", "What they wrote", "Benchmarks", "Bits of every layer"} <= set(
            seen["headings"]
        )
        # survival, bits, and a histogram a role
        assert len(seen["plots"]) == 2 + len(report["weights"]["histograms"])
        assert all(across > 0.6 * min(width, 260) and high > 100 and shapes for across, high, shapes in seen["plots"])
        assert seen["tables"] > len(report["weights"]["modules"])


def test_hostile_text_runs_nothing_and_fetches_nothing(report: dict[str, Any], tmp_path: Path) -> None:
    evil = "<script>ran = 1</script><img src='http://localhost:9/x' onerror='ran = 1'>\"><svg onload='ran = 1'>"
    hostile = json.loads(json.dumps(report))
    for example in hostile["consistency"]["base"]["generation"]["examples"]:
        example |= {"prompt": evil, "reference": [evil] * 3, "other": [evil, evil, "x"], "position": 1}
    hostile["weights"]["modules"][0]["name"] = hostile["weights"]["histograms"][0]["role"] = evil
    text = page(hostile)
    # the same text where it is not escaped: the policy of the page still holds
    loose = text.replace("</body>", f"{evil}</body>")
    unguarded = re.sub("<meta http-equiv.*?>", "", loose, count=1)
    found, console = browse({"page": (text, 360), "loose": (loose, 360), "unguarded": (unguarded, 360)}, tmp_path)
    assert found["page"]["ran"] is None and found["page"]["scripts"] == found["page"]["images"] == 0
    assert found["page"]["width"] <= 360 and found["page"]["overflowing"] == []
    assert found["loose"]["ran"] is None and any("Content Security Policy" in line for line in console)
    # what this test looks at would have shown it
    assert found["unguarded"]["ran"] == 1 and found["unguarded"]["resources"]
