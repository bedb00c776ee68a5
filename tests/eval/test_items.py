"""Items of a benchmark under two models: counts, intervals and tests against what is known of them."""

from math import inf
from typing import Any

import pytest

from eval.items import compare_answers, compare_responses, mcnemar, paired_interval, wilson_interval


def item(number: int, likelihoods: list[float], gold: int) -> dict[str, Any]:
    best = likelihoods.index(max(likelihoods))
    responses = [(value, False) for value in likelihoods]
    return {"doc_id": number, "filtered_resps": responses, "acc": float(best == gold)}


def test_flips_are_listed_by_kind() -> None:
    before = [item(0, [-1, -2], 0), item(1, [-1, -2], 1), item(2, [-1, -2, -3], 2), item(5, [-1, -2], 0)]
    # in another order, as several processes give them
    after = [item(5, [-1, -2.5], 0), item(2, [-2, -1, -3], 2), item(1, [-3, -2], 1), item(0, [-3, -2], 0)]
    found = compare_answers(before, after)
    assert found is not None
    assert [(flip["doc_id"], flip["kind"]) for flip in found["flipped"]] == [
        (0, "lost"), (1, "gained"), (2, "wrong_to_wrong"),
    ]  # fmt: skip
    assert found["flipped"][2] == {"doc_id": 2, "kind": "wrong_to_wrong", "reference": 0, "other": 1}
    assert (found["lost"], found["gained"], found["wrong_to_wrong"], found["changed"]) == (1, 1, 1, 3)
    assert found["difference"] == 0 and found["p"] == 1


def test_without_choices_a_wrong_answer_stays_wrong() -> None:
    before = [{"doc_id": n, "filtered_resps": [(-1.0, True)], "acc": n % 2} for n in range(4)]
    after = [{"doc_id": n, "filtered_resps": [(-2.0, True)], "acc": 0} for n in range(4)]
    found = compare_answers(before, after)
    assert found is not None
    assert (found["lost"], found["gained"], found["wrong_to_wrong"]) == (2, 0, None)
    assert found["difference"] == -0.5


def test_a_task_without_right_and_wrong_has_no_flips() -> None:
    samples = [{"doc_id": 0, "filtered_resps": [-3.5], "word_perplexity": (-3.5, 2)}]
    assert compare_answers(samples, samples) is None


def test_responses_are_compared_to_the_bit() -> None:
    before = [item(0, [-1.0, -inf], 0), item(1, [-1.0, -2.0], 0), item(2, [-1.0], 0)]
    after = [item(0, [-1.0, -inf], 0), item(1, [-1.0, -2.0 - 2**-50], 0), item(2, [-1.25], 0)]
    assert compare_responses(before, after) == {"items": 3, "equal": 1, "max_difference": 0.25}
    rolling, text = {"doc_id": 0, "filtered_resps": [-3.5]}, {"doc_id": 0, "filtered_resps": ["a"]}
    assert compare_responses([rolling], [rolling]) == {"items": 1, "equal": 1, "max_difference": 0}
    assert compare_responses([text], [{**text, "filtered_resps": ["b"]}]) == {
        "items": 1, "equal": 0, "max_difference": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    # Newcombe 1998 (Statistics in Medicine 17, 857), table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_intervals_are_those_of_the_literature(count: int, total: int, low: float, high: float) -> None:
    assert wilson_interval(count, total) == pytest.approx([low, high], abs=5e-5)
    other = wilson_interval(total - count, total)
    assert other == pytest.approx([1 - high, 1 - low], abs=5e-5)


def test_an_even_split_is_chance_and_a_lopsided_one_is_not() -> None:
    assert mcnemar(0, 0) == mcnemar(4, 4) == 1
    assert mcnemar(0, 5) == mcnemar(5, 0) == 2 / 2**5
    assert mcnemar(1, 9) == pytest.approx(2 * 11 / 1024)
    assert mcnemar(0, 4000) < 1e-300 or mcnemar(0, 4000) == 0


@pytest.mark.parametrize(("lost", "gained", "total"), [(0, 0, 9), (3, 8, 200), (40, 2, 60)])
def test_the_interval_of_a_difference_turns_with_its_sides(lost: int, gained: int, total: int) -> None:
    low, high = paired_interval(lost, gained, total)
    assert low <= (gained - lost) / total <= high
    assert paired_interval(gained, lost, total) == pytest.approx([-high, -low])
