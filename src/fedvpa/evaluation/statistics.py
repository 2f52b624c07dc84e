"""Means with 95 % intervals over clients or seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
from scipy.special import stdtrit


class Interval(TypedDict):
    """A mean over clients (or seeds), its 95 % Student-t interval, and how many there were."""

    mean: float
    low: float
    high: float
    n: int


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % interval; of one value the interval is unknown (NaN), and values that are
    NaN are left out."""
    x = np.asarray([v for v in values if not math.isnan(v)], dtype=float)
    if x.size == 0:
        return Interval(mean=math.nan, low=math.nan, high=math.nan, n=0)
    mean = float(x.mean())
    if x.size == 1:
        return Interval(mean=mean, low=math.nan, high=math.nan, n=1)
    half = float(stdtrit(x.size - 1, 0.975) * x.std(ddof=1) / math.sqrt(x.size))
    return Interval(mean=mean, low=mean - half, high=mean + half, n=int(x.size))


def share(values: Sequence[float]) -> Interval:
    """Mean of shares (accuracies) and its 95 % interval, which stays within [0, 1].

    Wilson's score interval (Wilson, 1927) for as many trials as have the variance that is seen
    between the values, with Student's t in place of the normal quantile. Where all values are 0 or
    all are 1 there is none to be seen, and each value counts as one trial.
    """
    found = interval(values)
    if found["n"] < 2:
        return found
    p, n = found["mean"], found["n"]
    quantile = float(stdtrit(n - 1, 0.975))
    error = (found["high"] - found["mean"]) / quantile
    trials = (
        p * (1 - p) / error**2 if error > 1e-12 else (float(n) if p in (0.0, 1.0) else math.inf)
    )
    if math.isinf(trials) or trials <= 0:
        return found
    weight = quantile**2 / trials
    centre = (p + weight / 2) / (1 + weight)
    half = quantile / (1 + weight) * math.sqrt(p * (1 - p) / trials + weight / (4 * trials))
    return Interval(mean=p, low=max(0.0, centre - half), high=min(1.0, centre + half), n=n)


CONTROLS = (
    "own", "worst_group", "shared", "prior_mean", "shuffled", "other_group", "flipped",
)  # fmt: skip
"""Rows of an evaluation, in their order."""


def told_apart(*accuracies: Mapping[str, Any]) -> list[str]:
    """Of `CONTROLS`, those that say something of their own in some of these evaluations: not the
    worst of fewer than two groups, and not another state that no prediction depends on."""
    out = []
    for name in CONTROLS:
        parts = [a for a in accuracies if name in a]
        if name == "worst_group":
            parts = [a for a in parts if len(a["by_group"]) > 1]
        elif name != "own":
            parts = [a for a in parts if a[name]["mean"] != a["own"]["mean"]]
        if parts:
            out.append(name)
    return out


def ratio_interval(numerator: Sequence[float], denominator: Sequence[float]) -> Interval:
    """Ratio of two means over the same seeds, with the 95 % interval of the delta method
    (linearised; Student t)."""
    top, bottom = np.asarray(numerator, dtype=float), np.asarray(denominator, dtype=float)
    if abs(bottom.mean()) < 1e-9:
        return Interval(mean=math.nan, low=math.nan, high=math.nan, n=int(top.size))
    ratio = float(top.mean() / bottom.mean())
    spread = interval(((top - ratio * bottom) / bottom.mean()).tolist())
    return Interval(
        mean=ratio, low=ratio + spread["low"], high=ratio + spread["high"], n=int(top.size)
    )


def show(value: Mapping[str, Any] | None, digits: int = 3) -> str:
    """An interval in words, as ``0.645 [0.620, 0.670]``; ``-`` where there is none."""
    if value is None or value["mean"] is None or math.isnan(value["mean"]):
        return "-"
    mean = f"{value['mean']:.{digits}f}"
    if value["low"] is None or math.isnan(value["low"]):
        return mean
    return f"{mean} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"
