"""Does z do anything? One's own state against the others, on the same targets, with intervals; and
the answer in words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from fedvpa.evaluation.protocol import Scores
from fedvpa.evaluation.statistics import Interval, interval

AGAINST = ("shared", "prior_mean", "shuffled")
"""States that one's own is held against, the first that there is being the yardstick."""
_NAMES = {
    "shared": "a shared reward", "prior_mean": "the prior mean", "shuffled": "another user's z",
}  # fmt: skip
ALIKE = 1e-6
"""Differences (nats per pair) below this are of rounding."""


def compared_states(scores: Mapping[str, Scores]) -> dict[str, Any]:
    """Own minus other state: negative log-likelihood (nats per pair) and accuracy, by pair (over
    all targets; intervals take users as drawn at random) and by client."""
    own, found = scores["own"], dict[str, Any]()
    for name in AGAINST:
        if name not in scores:
            continue
        other = scores[name]
        count = own.count.double().numpy()
        nll = (own.nll - other.nll).double().numpy()
        right = (own.correct - other.correct).double().numpy()
        has = count > 0
        found[name] = {
            "nll_by_pair": ratio_of_sums(nll[has], count[has]),
            "nll_by_client": interval((nll[has] / count[has]).tolist()),
            "accuracy_by_pair": ratio_of_sums(right[has], count[has]),
            "accuracy_by_client": interval((right[has] / count[has]).tolist()),
        }
    return found


def ratio_of_sums(total: NDArray[np.float64], count: NDArray[np.float64]) -> Interval:
    """Sum of users' totals over the sum of their counts, with the 95 % interval of a ratio whose
    users are drawn at random (Cochran, 1977, eq. 6.13; Student t)."""
    users = len(total)
    if not users or not count.sum():
        return Interval(mean=math.nan, low=math.nan, high=math.nan, n=0)
    mean = float(total.sum() / count.sum())
    if users < 2:
        return Interval(mean=mean, low=math.nan, high=math.nan, n=users)
    spread = ((total - mean * count) ** 2).sum() * users / (users - 1)
    half = float(stdtrit(users - 1, 0.975) * math.sqrt(spread) / count.sum())
    return Interval(mean=mean, low=mean - half, high=mean + half, n=users)


def by_overlap(scores: Mapping[str, Scores]) -> dict[str, Any]:
    """Own z and prior mean on targets with 0, 1 and 2 responses that the user has judged in the
    context, by pair, and the share of each; empty where contents are unknown."""
    table = scores["own"].overlap
    total = float(table[:, 0].sum())
    if not total:
        return {}
    found: dict[str, Any] = {}
    for k in range(3):
        count = float(table[k, 0])
        row: dict[str, Any] = {"share": count / total, "targets": int(count)}
        for name in ("own", "prior_mean", "shared"):
            if name in scores and count:
                own = scores[name].overlap[k]
                row[name] = {"accuracy": float(own[1] / count), "nll": float(own[2] / count)}
        found[str(k)] = row
    return found


def verdict_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """What the differences say, in words, of seen and of unseen clients."""
    found = {}
    for part, who in (("seen", results["seen"]), ("unseen", results)):
        if who and who["differences"]:
            found[part] = {
                "sentence": sentence(part, who["differences"]),
                "helps": helps(who["differences"]),
            }
    return found


def helps(differences: Mapping[str, Any]) -> bool | None:
    """Whether own z is clearly better (True) or clearly worse (False) than the yardstick, by pair;
    None: neither."""
    value = next(iter(differences.values()))["nll_by_pair"]
    if math.isnan(value["low"]) or abs(value["mean"]) < ALIKE:
        return None
    return True if value["high"] < 0 else False if value["low"] > 0 else None


def sentence(part: str, differences: Mapping[str, Any]) -> str:
    """In words, for the terminal, the report, and the JSON."""
    yardstick = next(iter(differences))
    against = differences[yardstick]["nll_by_pair"]
    users = f"these {against['n']} {part} users"
    answer = helps(differences)
    if answer is None:
        said = f"{users} do not differ measurably; {_NAMES[yardstick]} serves them as well"
    elif answer:
        said = f"{users} differ, and their own z is better than {_NAMES[yardstick]}"
    else:
        said = f"{users} are served worse by their own z than by {_NAMES[yardstick]}"
    figures = ", ".join(
        f"{_NAMES[name]} {_signed(value['nll_by_pair'])}" for name, value in differences.items()
    )
    return f"{said} (own z minus, nats per pair: {figures})"


def found_structure(structure: Mapping[str, Any]) -> str:
    """What the users' preferences are found to be, in words."""
    kind, order = structure["kind"], structure["order"]
    if kind == "shared" or (not structure["width"] and kind == "directions"):
        return "structure: one reward for everybody; no z was better on contents not seen before"
    if kind == "groups":
        return f"structure: {order} groups of users"
    along = "one direction" if order == 1 else f"{order} directions"
    return f"structure: users differ by degree, along {along} (width {structure['width']:.2g})"


def _signed(value: Interval) -> str:
    if math.isnan(value["low"]):
        return f"{value['mean']:+.4f}"
    return f"{value['mean']:+.4f} [{value['low']:+.4f}, {value['high']:+.4f}]"
