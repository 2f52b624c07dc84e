"""Which structure and which width: by the negative log-likelihood of targets whose content neither
the parameters nor the user's context have seen (M9)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fedvpa.federated.bayes.messages import Judged
from fedvpa.federated.bayes.models import EFFECTS, GROUP_EFFECTS, SPREADS, Kind, Structure, Width

LITTLE = 0.04
"""Where z takes less than this share off a shared reward's loss, people differ by degree."""
SAME, PRACTICAL = 0.1, 0.005
"""What is simpler may lose this share of the gain over a shared reward, and so many nats per pair
at the most: nobody would notice."""


class Option(NamedTuple):
    """A structure at a width, and which of the models that are compared it is."""

    structure: Structure
    width: Width
    model: int


def widths_of(structure: Structure, effect: float | Literal["auto"], last: bool) -> Sequence[Width]:
    """Widths at which a structure is judged; groups are points until the `last` time."""
    if structure.kind == "shared":
        return (Width(0.0),)
    if structure.kind == "directions":
        return [Width(e) for e in (EFFECTS if effect == "auto" else (effect,))]
    effects = GROUP_EFFECTS if effect == "auto" else (effect,)
    return [Width(e, s) for e in effects for s in (SPREADS if last else (0.0,))]


class Verdict(NamedTuple):
    """Mean negative log-likelihood per held-out pair of each option (nats), and the standard error
    of its difference from the reference, clients being drawn at random."""

    nll: Float[Tensor, "t"]
    accuracy: Float[Tensor, "t"]
    error: Float[Tensor, "t"]
    clients: float
    pairs: float


def verdict(found: Judged) -> Verdict:
    """From the sums over clients.

    The variance of a ratio of sums over k clients (Cochran, 1977, eq. 6.13): sum (d_i - n_i D)^2 /
    N^2 for differences d_i of n_i pairs and their mean D per pair, with k / (k - 1).
    """
    n, k = found.pairs.clamp_min(1), found.clients
    gap = found.gap / n
    spread = found.square - 2 * gap * found.cross + gap.square() * found.squares
    correction = k / (k - 1).clamp_min(1)
    error = (spread.clamp_min(0) * correction).sqrt() / n
    nll = (-found.total / n).nan_to_num(torch.inf, torch.inf)  # a candidate that diverged is last
    error = error.nan_to_num(0.0, 0.0)
    return Verdict(nll, found.correct / n, error, float(k), float(found.pairs))


def best_models(given: Sequence[Option], found: Verdict, count: int) -> list[int]:
    """Personal models of the least loss, each at its best width, in the order of their loss; and
    the best shared reward, if there is one, which does not count."""
    ranked = list(dict.fromkeys(given[i].model for i in found.nll.argsort().tolist()))
    kind = {option.model: option.structure.kind for option in given}
    shared = [m for m in ranked if kind[m] == "shared"]
    return [*[m for m in ranked if kind[m] != "shared"][:count], *shared[:1]]


def chosen(given: Sequence[Option], found: Verdict) -> int:
    """The option that is served; errors are of differences from the least loss, which is
    optimistic, as the least of many, so that what is simpler wins within the error (Breiman et al.,
    1984, sec. 3.4.3).

    1. A shared reward within one standard error of the least loss: z then does no harm.
    2. Directions within one, where there is `LITTLE` to be gained; they are the wider prior.
    3. Groups within one that are practically the same, and of these the fewest within two.
    4. Else the kind of the least loss. Of directions, those of the least loss among them, at the
       least effect within one standard error.
    """
    best = int(found.nll.argmin())
    loss = found.nll.tolist()

    def within(kind: Kind, errors: float) -> list[int]:
        return [
            i for i, option in enumerate(given) if option.structure.kind == kind
            and loss[i] - loss[best] <= errors * float(found.error[i])
        ]  # fmt: skip

    if shared := within("shared", 1.0):
        return min(shared, key=loss.__getitem__)
    beside = [loss[i] for i, option in enumerate(given) if option.structure.kind == "shared"]
    gain = min(beside) - loss[best] if beside else 0.0
    little = bool(beside) and gain < LITTLE * min(beside)
    same = min(PRACTICAL, SAME * gain) if beside else PRACTICAL
    groups, directions = within("groups", 1.0), within("directions", 1.0)
    if directions and little:
        groups = []
    groups = [i for i in groups if loss[i] - loss[best] <= same or not directions]
    if groups:
        most = same + min(loss[i] for i in groups)
        few = [i for i in within("groups", 2.0) if loss[i] <= most]
        return min(few, key=lambda i: (given[i].structure.order, loss[i]))
    model = given[min(directions, key=loss.__getitem__)].model
    least = [i for i in directions if given[i].model == model]
    return min(least, key=lambda i: given[i].width)
