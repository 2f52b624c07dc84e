"""Win rates of paired responses with bootstrap intervals, corrected for length; and what texts look
like, without a judge."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fedvpa.evaluation.statistics import Interval

RESAMPLES = 1000

Statistic = Callable[[NDArray[np.float64]], NDArray[np.float64]] | None


def bootstrap(rows: NDArray[np.float64], statistic: Statistic = None, seed: int = 0) -> Interval:
    """A statistic of rows [n, ...] (one row a prompt; default: the mean), with its 95 % percentile
    bootstrap interval over the rows (Efron, 1979). `statistic` reads many resamples at once, [r, n,
    ...] to [r].

    With one row, or where the statistic is undefined, the interval is NaN.
    """
    n, read = len(rows), statistic or (lambda x: x.mean(1))
    mean = float(read(rows[None])[0]) if n else math.nan
    if n < 2:
        return Interval(mean=mean, low=math.nan, high=math.nan, n=n)
    drawn = read(rows[np.random.default_rng(seed).integers(n, size=(RESAMPLES, n))])
    low, high = (
        np.nanpercentile(drawn, [2.5, 97.5]) if not np.isnan(drawn).all() else (math.nan, math.nan)
    )
    return Interval(mean=mean, low=float(low), high=float(high), n=n)


def win_rate(outcomes: Sequence[float]) -> Interval:
    """Mean outcome (1 a win, 1/2 a tie, 0 a loss), with its bootstrap interval over prompts."""
    return bootstrap(np.asarray(outcomes, dtype=float))


def difference(first: Sequence[float], second: Sequence[float]) -> Interval:
    """How much larger the mean of `first` is than that of `second`, prompt by prompt, with its
    bootstrap interval."""
    return bootstrap(np.asarray(first, dtype=float) - np.asarray(second, dtype=float))


def length_controlled(
    outcomes: Sequence[float], words: Sequence[int], other_words: Sequence[int]
) -> Interval:
    """Win rate where both responses are as long as each other (Dubois et al., 2024,
    *Length-controlled AlpacaEval*).

    A logistic regression of the outcome on tanh of the difference in words (in standard deviations)
    is read at difference zero. A tie counts half as a win and half as a loss.
    """
    gap = np.asarray(words, dtype=float) - np.asarray(other_words, dtype=float)
    spread = gap.std()
    rows = np.stack(
        [np.asarray(outcomes, dtype=float), np.tanh(gap / spread) if spread > 0 else 0 * gap], -1
    )
    return bootstrap(rows, _at_equal_length)


def _at_equal_length(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Logistic regressions of outcome on gap, [r, n, 2] to [r]: the probability at gap zero.
    Newton's method; a unit Gaussian prior on the slope, and a weak one (variance 100) on the
    intercept, so that a run of wins stays finite."""
    outcome, gap = rows[..., 0], rows[..., 1]
    design = np.stack([np.ones_like(gap), gap], -1)
    prior = np.diag([0.01, 1.0])
    weights = np.zeros((len(rows), 2))
    for _ in range(12):
        probability = 1 / (1 + np.exp(-(design @ weights[..., None])[..., 0]))
        gradient = ((outcome - probability)[..., None] * design).sum(1) - weights @ prior
        curvature = (
            np.einsum("rn,rni,rnj->rij", probability * (1 - probability), design, design) + prior
        )
        weights = weights + np.linalg.solve(curvature, gradient[..., None])[..., 0]
    return np.asarray(1 / (1 + np.exp(-weights[:, 0])))


def distinct_n(text: str, n: int) -> float:
    """Share of different n-grams of words within a text (Li et al., 2016); NaN where it is shorter
    than n words."""
    grams = _grams(text.lower().split(), n)
    return len(set(grams)) / len(grams) if grams else math.nan


def repetition(text: str, n: int = 4) -> float:
    """Share of a text's n-grams of words that stood in it before (Welleck et al., 2020); 0 for a
    text shorter than that."""
    counts = Counter(_grams(text.lower().split(), n))
    total = sum(counts.values())
    return 1 - len(counts) / total if total else 0.0


def _grams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return (
        [tuple(words)] * 0
        if len(words) < n
        else [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    )


def monotone(values: Sequence[float]) -> bool:
    """Whether the values only rise, or only fall."""
    steps = [b - a for a, b in pairwise(values)]
    return all(s >= 0 for s in steps) or all(s <= 0 for s in steps)
