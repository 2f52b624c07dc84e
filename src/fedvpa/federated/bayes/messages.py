"""What clients answer to the server of a Bayes method: sums over their pairs, which the server
needs only added up over clients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Outline(NamedTuple):
    """First moments of the clients' pairs without each of t folds, from which training starts.

    `pairs` counts rows, `total` and `square` add their differences and the squares of these.
    `counted`, `halves` and `cross` are over clients whose pairs can be divided: how many pairs
    these have, and, weighted by it, the means of the two halves and their product, whose
    expectation is the covariance *between* clients.
    """

    pairs: Float[Tensor, "t"]
    total: Float[Tensor, "t p"]
    counted: Float[Tensor, "t"]
    halves: Float[Tensor, "t 2 p"]
    cross: Float[Tensor, "t p p"]
    square: Float[Tensor, "t p"]
    clients: Float[Tensor, ""]
    several: Float[Tensor, ""]
    """Clients with two prompts or more."""


class Slopes(NamedTuple):
    """Sums over clients of one round, for each of t models: gradients of the targets' negative
    log-likelihood, the number of targets, and what the population step reads."""

    weight: Float[Tensor, "t p"]
    bilinear: Float[Tensor, "t d p"]
    targets: Float[Tensor, "t"]
    loss: Float[Tensor, "t"]
    share: Float[Tensor, "t m"]
    mode: Float[Tensor, "t m d"]
    divergence: Float[Tensor, "t"]
    clients: Float[Tensor, "t"]


class Judged(NamedTuple):
    """Sums over clients of what t options say of held-out targets.

    A client's s holds its sums of log-probabilities, d its differences from the s of the reference
    option, and n the number of its targets; the sums of d, d^2, n d and n^2 give the error of mean
    differences per pair, clients being what is drawn at random.
    """

    clients: Float[Tensor, ""]
    pairs: Float[Tensor, ""]
    squares: Float[Tensor, ""]
    total: Float[Tensor, "t"]
    correct: Float[Tensor, "t"]
    gap: Float[Tensor, "t"]
    cross: Float[Tensor, "t"]
    square: Float[Tensor, "t"]


def judged(
    total: Float[Tensor, "k t"], correct: Float[Tensor, "k t"], pairs: Tensor, reference: int
) -> Judged:
    """Of k clients with so many targets each [k]; those without any do not count."""
    has = pairs > 0
    s, n = total[has].double(), pairs[has].double()
    d = s - s[:, reference : reference + 1]
    return Judged(
        has.sum().double(), n.sum(), n.square().sum(), s.sum(0), correct[has].double().sum(0),
        d.sum(0), n @ d, d.square().sum(0),
    )  # fmt: skip


def added(parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The sums of messages of one kind, field by field."""
    return tuple(torch.stack(list(values)).sum(0) for values in zip(*parts))
