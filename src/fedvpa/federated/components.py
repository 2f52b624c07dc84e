"""The population as a mixture of components that are fitted from sums over clients alone (prior:
components).

A client answers with how much of it falls to each component (its count), and with that share of its
latent mean, of the mean's square and of its posterior variance. The server needs these only added
up over clients, so that nobody sees an individual's latent: distributed k-means and EM (Dempster et
al., 1977; sufficient statistics as in Neal & Hinton, 1998).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from fedvpa.federated.random import stream
from fedvpa.telling import tell
from fedvpa.types import MixturePrior, Population

SMALLEST_VARIANCE = 1e-4
RESTARTS = 16
"""Random starts of every number of components; the one with the least squared error is kept."""
ITERATIONS = 12
CONVERGED = 1e-3
"""Centres that move by less than this share of the clients' spread are left; the noise of secure
sums is less."""
FAR = 1e6
"""Where the centres of components that do not exist are put."""


class Moments(NamedTuple):
    """Sums over clients, for every start `t` and component `m`: shares, shares of means, of their
    squares, of variances."""

    weight: Float[Tensor, "*t m"]
    total: Float[Tensor, "*t m d"]
    squared: Float[Tensor, "*t m d"]
    variance: Float[Tensor, "*t m d"]

    def plus(self, other: Moments) -> Moments:
        """Moments of the union of two disjoint sets of clients."""
        return Moments(*(a + b for a, b in zip(self, other)))


@runtime_checkable
class Ask(Protocol):
    """Asks every client for its moments under given centres, and adds them up; with `withhold`,
    clients leave out the choices that are kept from training."""

    def __call__(self, centre: Float[Tensor, "t m d"], withhold: bool = False) -> Moments: ...


def assignments(
    mean: Float[Tensor, "c d"], centre: Float[Tensor, "*t m d"], price: Tensor | None = None
) -> Tensor:
    """One-hot assignment [c, *t, m] of every client's mean to its nearest centre, prices added
    to the squared distances."""
    at = mean.view(mean.shape[0], *[1] * (centre.dim() - 1), mean.shape[-1])
    cost = (at - centre).square().sum(-1)
    if price is not None:
        cost = cost + price
    return torch.nn.functional.one_hot(cost.argmin(-1), centre.shape[-2]).to(mean.dtype)


def moments(
    share: Float[Tensor, "c *t m"], mean: Float[Tensor, "c d"], variance: Float[Tensor, "c d"]
) -> Moments:
    """Moments of every client, [c, *t, m(, d)]."""
    wide = share.unsqueeze(-1)
    shape = (mean.shape[0], *[1] * (share.dim() - 1), mean.shape[-1])
    x, v = mean.view(shape), variance.view(shape)
    return Moments(share, wide * x, wide * x.square(), wide * v)


def summed_moments(
    mean: Float[Tensor, "c d"], variance: Float[Tensor, "c d"], centre: Float[Tensor, "t m d"]
) -> Moments:
    """Moments of all these clients together, each assigned to its nearest centre of every start."""
    nearest = torch.cdist(
        mean.unsqueeze(0), centre, compute_mode="donot_use_mm_for_euclid_dist"
    ).argmin(-1)
    share = torch.nn.functional.one_hot(nearest, centre.shape[-2]).to(mean.dtype)

    def over(x: Tensor) -> Tensor:
        return torch.einsum("tcm,cd->tmd", share, x)

    return Moments(share.sum(1), over(mean), over(mean.square()), over(variance))


def fit(
    ask: Callable[[Float[Tensor, "t m d"]], Moments], latent: int, numbers: Sequence[int],
    seed: int, start: Tensor | None = None, *, restarts: int = RESTARTS,
    iterations: int = ITERATIONS, least: float = 0.0,
) -> dict[int, Moments]:  # fmt: skip
    """Moments of the best components, for every number of them; `start` [m, d] gives the only
    start's centres.

    Starts are drawn from the Gaussian of the clients' means (diagonal). An empty component moves
    beside the one with the greatest squared error; with noised sums, so does one of no more than
    `least` clients, which is likely to be noise. At most `iterations` + 2 exchanges, whatever the
    number of starts.
    """
    if start is None:
        whole = ask(torch.zeros(1, 1, latent))
        centre = (whole.total / whole.weight.clamp_min(1).unsqueeze(-1))[0, 0]
        spread = (
            (whole.squared[0, 0] / whole.weight[0, 0].clamp_min(1) - centre.square())
            .clamp_min(SMALLEST_VARIANCE)
            .sqrt()
        )
        starts, enough = (
            _starts(centre, spread, numbers, seed, restarts),
            CONVERGED * float(spread.mean()),
        )
    else:
        starts, enough = start.unsqueeze(0), CONVERGED * float(start.std())
    sizes = torch.tensor([n for n in numbers for _ in range(starts.shape[0] // len(numbers))])
    for iteration in range(iterations):
        tell("fitting components", iteration, iterations)
        found = ask(starts)
        moved = _next_centres(found, starts, sizes, least, stream(seed, "components", iteration))
        done = bool((moved - starts).abs().max() <= enough)
        starts = moved
        if done:
            break
    tell("fitting components", iterations, iterations)
    found = ask(starts)
    hollow = (
        _hollow(found, sizes, least).any(-1) if least else torch.zeros(len(sizes), dtype=torch.bool)
    )
    error = torch.where(hollow, torch.inf, squared_error(found).sum(-1))
    out = {}
    for number in numbers:
        mine = (sizes == number).nonzero().squeeze(-1)
        best = mine[error[mine].argmin()]
        out[number] = Moments(*(value[best, :number] for value in found))
    return out


def _starts(
    centre: Tensor, spread: Tensor, numbers: Sequence[int], seed: int, restarts: int
) -> Float[Tensor, "t m d"]:
    most = max(numbers)
    generator = stream(seed, "components")
    draws = torch.randn(len(numbers) * restarts, most, centre.shape[0], generator=generator)
    starts = centre + spread * draws
    for i, number in enumerate(numbers):
        starts[i * restarts : (i + 1) * restarts, number:] = FAR
    return starts


def squared_error(found: Moments) -> Float[Tensor, "*t m"]:
    """Sum over a component's clients of the squared distance to their mean."""
    return (
        (found.squared - found.total.square() / found.weight.clamp_min(1e-9).unsqueeze(-1))
        .sum(-1)
        .clamp_min(0)
    )


def _hollow(found: Moments, sizes: Tensor, least: float) -> Tensor:
    """Which components [t, m] exist but hold (next to) nobody."""
    return (found.weight <= least) & (torch.arange(found.weight.shape[1]) < sizes.unsqueeze(-1))


def _next_centres(
    found: Moments, centre: Tensor, sizes: Tensor, least: float, generator: torch.Generator
) -> Tensor:
    """Each component's mean; an empty one goes beside the component with the greatest squared
    error."""
    new = torch.where(
        found.weight.unsqueeze(-1) > 0,
        found.total / found.weight.clamp_min(1e-9).unsqueeze(-1),
        centre,
    )
    error = squared_error(found)
    empty = _hollow(found, sizes, least)
    for t, m in empty.nonzero().tolist():
        worst = int(torch.where(empty[t], -1.0, error[t]).argmax())
        count = found.weight[t, worst].clamp_min(1)
        spread = (found.squared[t, worst] / count - new[t, worst].square()).clamp_min(0).sqrt()
        new[t, m] = new[t, worst] + spread * torch.randn(new.shape[-1], generator=generator)
    return new


def population(found: Moments) -> Population:
    """Centres, spherical variances of the means, and shares of clients; components without a client
    are left out."""
    kept = found.weight > 0.5
    kept[found.weight.argmax()] = True
    count = found.weight[kept]
    centre = found.total[kept] / count.unsqueeze(-1)
    squared = (found.squared[kept] / count.unsqueeze(-1) - centre.square()).mean(-1)
    return Population(centre, squared.clamp_min(SMALLEST_VARIANCE), count / count.sum())


def mixture(found: Moments) -> MixturePrior:
    """The components as a prior: the variance of a component is that of its means and of their
    posteriors together.

    No component belongs to a client, so that `client` is -1 and nobody is left out of its own
    prior.
    """
    count = found.weight.clamp_min(1e-6).unsqueeze(-1)
    centre = found.total / count
    variance = (found.squared / count - centre.square()).clamp_min(0) + found.variance / count
    index = torch.arange(found.weight.numel())
    return MixturePrior(
        centre, variance.clamp_min(SMALLEST_VARIANCE).log(), found.weight, torch.full_like(index,
        -1), index
    )  # fmt: skip


def best_separated(fits: dict[int, Moments]) -> int:
    """Number of components with the greatest ratio of variance between and within (Calinski &
    Harabasz, 1974, eq. 2.5): like the silhouette it says how apart clusters are, but it can be told
    from sums."""
    scores = {}
    for number, found in fits.items():
        clients = found.weight.sum()
        if clients <= number or number < 2:
            continue
        within = squared_error(found).sum()
        overall = found.total.sum(0) / clients
        between = (
            found.weight
            * (found.total / found.weight.clamp_min(1e-9).unsqueeze(-1) - overall).square().sum(-1)
        ).sum()
        scores[number] = float(
            between / (number - 1) / (within / (clients - number)).clamp_min(1e-12)
        )
    return max(scores, key=lambda n: scores[n]) if scores else min(fits)


def adjusted_price(
    price: Float[Tensor, "m"], labelled: Float[Tensor, "m"], found: Moments
) -> Float[Tensor, "m"]:
    """Raise the price of components that more than their share of clients chose, lower that of the
    others.

    The step is the mean squared distance between a client and its component: the dual ascent of
    balanced assignment (Bertsekas, 1988), from counts alone.
    """
    share = labelled / labelled.sum().clamp_min(1)
    scale = squared_error(found).sum() / found.weight.sum().clamp_min(1)
    return price + scale * (share - 1 / labelled.numel())
