"""What two models did with the same items of a benchmark: log-likelihoods to the bit, and answers that flipped."""

import math
from typing import Any

Z = 1.959963984540054
"""Of a two-sided interval of 95 %."""

METRICS = ("acc", "exact_match")
"""Metrics of an item that are 1 for right and 0 for wrong, the first that a task has counts."""

Sample = dict[str, Any]
"""An item of lm-eval's `samples`."""


def compare_responses(reference: list[Sample], other: list[Sample]) -> dict[str, Any]:
    """Compare all that two models answered to the items of one task.

    Returns:
        items, equal: how many, and how many with the same log-likelihoods to the bit (the same text, where a model
        writes). max_difference: between two log-likelihoods, nats; None where there are none.
    """
    pairs = [(_responses(before), _responses(after)) for before, after in _matched(reference, other)]
    numbers = [(p, q) for before, after in pairs for p, q in zip(before, after, strict=True) if isinstance(p, float)]
    return {
        "items": len(pairs),
        "equal": sum(before == after for before, after in pairs),
        # equal infinities do not differ
        "max_difference": max((0.0 if p == q else abs(p - q) for p, q in numbers), default=None),
    }


def compare_answers(reference: list[Sample], other: list[Sample]) -> dict[str, Any] | None:
    """Count the items of one task whose answer flipped (Dutta et al. 2024, arXiv 2407.09141).

    Returns:
        None for a task without right and wrong answers, else
        metric: of METRICS. items: how many.
        lost, gained: from right to wrong, from wrong to right.
        wrong_to_wrong: from a wrong choice to another wrong one; None where there are no choices to tell them by.
        changed: all of these.
        intervals: 95 % of the shares of items of those three, Wilson's.
        difference: of the accuracies, other - reference. difference_interval: 95 %, `paired_interval`.
        p: `mcnemar`.
        flipped: [{"doc_id", "kind": lost, gained or wrong_to_wrong}], with the choices of both, from 0, where there are
        any.
    """
    metric = next((name for name in METRICS if all(name in item for item in reference)), None)
    pairs = _matched(reference, other)
    if metric is None or not pairs or any(item[metric] not in (0, 1) for pair in pairs for item in pair):
        return None
    choices = all(len(before["filtered_resps"]) > 1 for before, _ in pairs)
    flipped: list[dict[str, Any]] = []
    for before, after in pairs:
        right, still = before[metric] == 1, after[metric] == 1
        chosen = {"reference": choice(before), "other": choice(after)} if choices else {}
        if right != still:
            flipped.append({"doc_id": before["doc_id"], "kind": "lost" if right else "gained", **chosen})
        elif not right and chosen and chosen["reference"] != chosen["other"]:
            flipped.append({"doc_id": before["doc_id"], "kind": "wrong_to_wrong", **chosen})
    kinds = ("lost", "gained", "wrong_to_wrong") if choices else ("lost", "gained")
    counts = {kind: sum(flip["kind"] == kind for flip in flipped) for kind in kinds}
    lost, gained, items = counts["lost"], counts["gained"], len(pairs)
    return {
        "metric": metric,
        "items": items,
        "wrong_to_wrong": None,
        **counts,
        "changed": len(flipped),
        "intervals": {kind: wilson_interval(count, items) for kind, count in counts.items()},
        "difference": (gained - lost) / items,
        "difference_interval": paired_interval(lost, gained, items),
        "p": mcnemar(lost, gained),
        "flipped": flipped,
    }


def choice(item: Sample) -> int:
    """Of a multiple-choice item, the likeliest; of equals the first, as for lm-eval."""
    likelihoods = _responses(item)
    return likelihoods.index(max(likelihoods))


def wilson_interval(count: int, total: int) -> list[float]:
    """95 % interval of a share (Wilson 1927): holds for few events too, and for none."""
    share, spread = count / total, Z * Z / total
    middle = share + spread / 2
    half = Z * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return [max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))]


def paired_interval(lost: int, gained: int, total: int) -> list[float]:
    """95 % interval of the difference of two accuracies on the same items (Bonett and Price 2012, adjusted Wald)."""
    down, up = (lost + 1) / (total + 2), (gained + 1) / (total + 2)
    half = Z * math.sqrt((up + down - (up - down) ** 2) / (total + 2))
    return [max(-1.0, up - down - half), min(1.0, up - down + half)]


def mcnemar(lost: int, gained: int) -> float:
    """p of McNemar's exact test: that so uneven a split, or a more uneven one, is chance; two-sided."""
    total, fewer = lost + gained, min(lost, gained)
    tail = sum(math.comb(total, count) for count in range(fewer + 1))
    return min(1.0, 2 * tail / 2**total)


def _matched(reference: list[Sample], other: list[Sample]) -> list[tuple[Sample, Sample]]:
    """The items of both, in the order of their numbers; with several of lm-eval's filters, by the first of them."""
    after: dict[int, Sample] = {}
    before: dict[int, Sample] = {}
    for found, items in ((before, reference), (after, other)):
        for item in items:
            found.setdefault(item["doc_id"], item)
    return [(before[number], after[number]) for number in sorted(before)]


def _responses(item: Sample) -> list[Any]:
    """Log-likelihoods, or texts."""
    firsts = [found[0] if isinstance(found, list | tuple) else found for found in item["filtered_resps"]]
    return [first if isinstance(first, str) else float(first) for first in firsts]
