"""What benchmarks.judge keeps of a report: every count, the flipped items, no text."""

import json
from typing import Any

from benchmarks.judge import pair, parts, short_consistency, short_harness
from eval.modes import choose_modes


def generation() -> dict[str, Any]:
    divergences = [{"prompt": 3, "position": 9, "margin": 0.1}, {"prompt": 5, "position": 2, "margin": 0.2}]
    return {"divergent_tokens": 4, "divergences": divergences, "survival": [1.0], "examples": [{"prompt": "a text"}]}


def test_the_first_divergence_of_all_is_kept() -> None:
    assert pair(generation()) == {"divergent_tokens": 4, "first": {"prompt": 5, "position": 2, "margin": 0.2}}
    assert pair({"divergent_tokens": 0, "divergences": []}) == {"divergent_tokens": 0}


def test_texts_and_curves_are_not() -> None:
    modes = {
        "static": {"status": "passed", "reference": generation(), "eager": generation()},
        "cuda_graph": {"status": "skipped", "reason": "needs a CUDA GPU"},
        "weights": {"status": "passed", "weights": {"unequal": []}},
    }
    report = {key: key for key in ("passed", "device", "dtype", "seconds", "settings")}
    report |= {"base": {"generation": generation(), "logits": {"kl": 0.5}}, "modes": modes}
    short = short_consistency(report)
    assert not any(word in json.dumps(short) for word in ("a text", "survival", "settings"))
    assert short["base"]["logits"] == {"kl": 0.5} and short["modes"]["cuda_graph"] == modes["cuda_graph"]
    assert short["modes"]["static"]["eager"]["divergent_tokens"] == 4


def test_flipped_items_are_listed_by_kind() -> None:
    flipped = [{"doc_id": 4, "kind": "lost"}, {"doc_id": 7, "kind": "gained"}, {"doc_id": 9, "kind": "lost"}]
    keys = ("passed", "device", "dtype", "results", "likelihoods", "settings")
    report = {key: key for key in keys} | {"flips": {"arc": {"lost": 2, "flipped": flipped}}}
    assert short_harness(report)["flips"] == {"arc": {"lost": 2, "flipped": {"lost": [4, 9], "gained": [7]}}}


def test_several_processes_run_every_mode_once() -> None:
    assert parts(1) == [("consistency", ["modes=all"]), ("harness", [])]
    words = [word for program, words in parts(3) if program == "consistency" for word in words]
    lists = [word.removeprefix("modes=[").removesuffix("]") for word in words if word.startswith("modes=")]
    assert sorted(",".join(lists).split(",")) == sorted(choose_modes("all"))


def test_chosen_modes_are_all_that_runs() -> None:
    assert parts(2, ["two_gpus", "repeat"]) == [("consistency", ["modes=[two_gpus,repeat]", "floor=false"])]
