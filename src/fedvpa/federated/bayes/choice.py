"""Which structure and which width: by the negative log-likelihood of targets whose content neither
the parameters nor the user's context have seen (M9)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from jaxtyping import Float
from torch import Tensor

from fedvpa.federated.bayes.messages import Judged
from fedvpa.federated.bayes.models import GROUP_WIDTHS, WIDTHS, Structure


class Option(NamedTuple):
    """A structure at a width."""

    structure: Structure
    width: float


def widths_of(structure: Structure, width: float | Literal["auto"], last: bool) -> Sequence[float]:
    """Widths at which a structure is judged; groups are points until the `last` time."""
    if structure.kind == "shared":
        return (0.0,)
    if width != "auto":
        return (width,)
    if structure.kind == "groups":
        return GROUP_WIDTHS if last else (0.0,)
    return WIDTHS


class Verdict(NamedTuple):
    """Mean negative log-likelihood per held-out pair of each option (nats), and of the differences
    between options the standard errors, clients being drawn at random."""

    nll: Float[Tensor, "t"]
    accuracy: Float[Tensor, "t"]
    error: Float[Tensor, "t t"]
    clients: float
    pairs: float


def verdict(found: Judged) -> Verdict:
    """From the sums over clients.

    The variance of a ratio of sums over k clients (Cochran, 1977, eq. 6.13): sum (d_i - n_i D)^2 /
    N^2 for differences d_i of n_i pairs, with k / (k - 1).
    """
    n, k = found.pairs.clamp_min(1), found.clients
    nll = -found.total / n
    square = found.outer.diagonal()
    squared = square.unsqueeze(0) + square.unsqueeze(1) - 2 * found.outer
    # d = s_b - s_a, its mean D per pair
    gap = (found.total.unsqueeze(0) - found.total.unsqueeze(1)) / n
    cross = found.cross.unsqueeze(0) - found.cross.unsqueeze(1)
    spread = squared - 2 * gap * cross + gap.square() * found.squares
    correction = k / (k - 1).clamp_min(1)
    error = (spread.clamp_min(0) * correction).sqrt() / n
    return Verdict(nll, found.correct / n, error, float(k), float(found.pairs))


def best_options(given: Sequence[Option], found: Verdict, count: int) -> list[Structure]:
    """Structures of the least loss, each at its best width, in order; and the best shared reward,
    which does not count."""
    ranked = list(dict.fromkeys(given[i].structure for i in found.nll.argsort().tolist()))
    shared = next(s for s in ranked if s.kind == "shared")
    return [*[s for s in ranked if s.kind != "shared"][:count], shared]


def chosen(given: Sequence[Option], found: Verdict) -> int:
    """The option of the least loss; of one wide component the smallest width that is within one
    standard error of it, which does the least harm, and still below a shared reward."""
    best = int(found.nll.argmin())
    structure = given[best].structure
    if structure.kind != "directions":
        return best
    shared = min(float(found.nll[i]) for i, o in enumerate(given) if o.structure.kind == "shared")
    within = [
        i for i, option in enumerate(given)
        if option.structure == structure
        and float(found.nll[i] - found.nll[best]) <= float(found.error[best, i])
        and (float(found.nll[i]) < shared or i == best)
    ]  # fmt: skip
    return min(within, key=lambda i: given[i].width)
