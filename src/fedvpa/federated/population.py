"""What the server learns about the population: components, their number, and balanced labels (M6).

`SeenFit` reads the clients' posteriors, `SummedFit` sums over clients alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fedvpa.config import Config
from fedvpa.federated.algorithm import Clients
from fedvpa.federated.components import Ask, Moments, best_separated, fit, population
from fedvpa.federated.messages import Scores
from fedvpa.federated.release import Release
from fedvpa.telling import tell
from fedvpa.types import Params, Population, ServerState

Fits = dict[int, Moments]
"""Moments of the components of a fit, by their number."""
MAX_MODES = 10
SMALLEST_VARIANCE = 1e-4


def fit_population(mean: Float[Tensor, "k d"], modes: int, seed: int) -> Population:
    """Components of the clients' posterior means by k-means: centres, spherical variances, shares
    of clients.

    Never more components than distinct clients. (EM of a spherical mixture merged groups that
    k-means keeps apart.)
    """
    from sklearn.cluster import KMeans

    points = mean.double().numpy()
    distinct = len(np.unique(points, axis=0))
    count = max(1, min(modes, distinct))
    fit = KMeans(count, n_init=20, random_state=seed).fit(points)
    labels = torch.from_numpy(fit.labels_.astype(np.int64))
    centre = torch.from_numpy(fit.cluster_centers_).to(mean.dtype)
    squared = (mean - centre[labels]).square().mean(-1)
    members = torch.bincount(labels, minlength=count).to(mean.dtype)
    variance = torch.zeros(count, dtype=mean.dtype).index_add_(
        0, labels, squared
    ) / members.clamp_min(1)
    return Population(centre, variance.clamp_min(SMALLEST_VARIANCE), members / members.sum())


def choose_modes(points: NDArray[np.float64], seed: int) -> int:
    """Number of clusters with the best silhouette (Rousseeuw, 1987), from 2 to `MAX_MODES`; 1 where
    there are too few distinct points to tell (under 4). (BIC of a Gaussian mixture takes every
    direction in which users of one group differ for a component: it chose 8 to 10 where there were
    2 groups.)"""
    from sklearn.cluster import KMeans
    from sklearn.metrics import silhouette_score

    distinct = len(np.unique(points, axis=0))
    scores = {}
    for count in range(2, min(MAX_MODES, distinct - 1) + 1):
        labels = KMeans(count, n_init=5, random_state=seed).fit_predict(points)
        scores[count] = silhouette_score(
            points, labels, sample_size=min(2000, len(points)), random_state=seed
        )
    return max(scores, key=lambda count: scores[count]) if distinct >= 4 else 1


def candidate_modes(mean: Float[Tensor, "k d"]) -> list[int]:
    """Numbers of components worth trying: from 2 to `MAX_MODES` while there are at least three
    distinct clients for each."""
    distinct = len(np.unique(mean.double().numpy(), axis=0))
    return list(range(2, min(MAX_MODES, distinct // 3) + 1)) or [1]


def summed_scores(each: Float[Tensor, "k t"]) -> Scores:
    """Those of k clients, added up in float64 (their differences are small)."""
    wide = each.double()
    return Scores(torch.tensor(float(len(wide)), dtype=torch.float64), wide.sum(0), wide.T @ wide)


def fewest_within_error(scores: Scores) -> int:
    """Index of the first candidate that is not clearly worse than the best: their mean difference,
    paired by client, is within two standard errors (after the one-standard-error rule of Breiman et
    al., 1984; with one, too many were chosen). Mean and variance of the differences follow from the
    sums alone."""
    count = float(scores.clients)
    mean, second = scores.total / count, scores.outer / count
    best = int(mean.argmax())
    gap = mean[best] - mean
    square = second[best, best] + second.diagonal() - 2 * second[best]
    variance = (square - gap.square()).clamp_min(0) * count / max(1.0, count - 1)
    return int((gap <= 2 * (variance / count).sqrt()).nonzero()[0])


def balanced_labels(
    mean: Float[Tensor, "k d"], prototype: Float[Tensor, "m d"], seed: int
) -> Int[Tensor, "k"]:
    """Balanced k-means on the clients' means; clusters are matched to prototypes by the Hungarian
    method (M6).

    The matching minimises the summed angle between cluster centres and prototypes, so that labels
    keep their meaning from round to round. With fewer clients than modes everyone gets -1 (no
    label).
    """
    from k_means_constrained import KMeansConstrained

    clients, modes = mean.shape[0], prototype.shape[0]
    if clients < modes:
        return torch.full((clients,), -1, dtype=torch.long)
    fit = KMeansConstrained(
        modes,
        size_min=clients // modes,
        size_max=-(-clients // modes),
        n_init=3,
        random_state=seed,
        n_jobs=1,
    ).fit(mean.double().numpy())
    centre = torch.from_numpy(fit.cluster_centers_)
    likeness = (
        torch.nn.functional.normalize(centre, dim=-1)
        @ torch.nn.functional.normalize(prototype.double(), dim=-1).T
    )
    rows, columns = linear_sum_assignment(-likeness.numpy())
    to_prototype = torch.empty(modes, dtype=torch.long)
    to_prototype[torch.as_tensor(rows)] = torch.as_tensor(columns)
    return to_prototype[torch.from_numpy(np.asarray(fit.labels_, dtype=np.int64))]


@runtime_checkable
class PopulationFit(Protocol):
    """Fits components to the clients under a state's model."""

    def anchors(self, state: ServerState, clients: Clients, release: Release) -> Population:
        """Components that will be frozen, as many as were asked for or as the clients' withheld
        choices want."""
        ...

    def finalise(self, state: ServerState, clients: Clients, release: Release) -> ServerState:
        """The population under the final model, unless there is one already."""
        ...


@dataclass(frozen=True)
class SeenFit:
    """By k-means on the posteriors that clients send. `modes`: how many components (None: to be
    found)."""

    modes: int | None
    seed: int

    def anchors(self, state: ServerState, clients: Clients, release: Release) -> Population:
        """Components of everybody who has been seen; their number by withheld choices, else by
        the silhouette."""
        count = self.modes
        if count is None:
            mean = self._means(state, clients, withhold=True)
            numbers, candidates = candidate_modes(mean), dict[int, Population]()
            for done, n in enumerate(numbers):
                tell("fitting components", done, len(numbers))
                candidates[n] = fit_population(mean, n, self.seed)
            tell("fitting components", len(numbers), len(numbers))
            count = predicted_modes(state.params, clients, candidates)
            if count is None:
                count = choose_modes(mean.double().numpy(), self.seed)
                return fit_population(mean, count, self.seed)
        return fit_population(self._means(state, clients), count, self.seed)

    def _means(
        self, state: ServerState, clients: Clients, *, withhold: bool = False
    ) -> Float[Tensor, "k d"]:
        """Fresh posterior means of those who have been seen."""
        seen = (state.clients["seen"] >= 0).nonzero().squeeze(-1)
        index, posterior = clients.posteriors(state.params, withhold=withhold)
        return posterior.mean[torch.isin(index, seen)]

    def finalise(self, state: ServerState, clients: Clients, release: Release) -> ServerState:
        """Clients send their posteriors once more."""
        index, posterior = clients.posteriors(state.params)
        tables = {name: table.clone() for name, table in state.clients.items()}
        tables["mean"][index], tables["log_var"][index] = posterior
        tables["seen"][index] = state.round
        state = replace(state, clients=tables)
        if state.population:
            return state
        count = self.modes
        if count is None:
            count = choose_modes(posterior.mean.double().numpy(), self.seed)
        found = fit_population(posterior.mean, count, self.seed)
        return replace(state, population=found._asdict())


@dataclass(frozen=True)
class SummedFit:
    """By distributed k-means on sums over clients, so that nobody's latent is seen.

    Args:
        modes: how many components (None: found).
        seed: of the starts.
        latent: dimensions d of z.
        clients: how many there are, which bounds the number of components to try.
    """

    modes: int | None
    seed: int
    latent: int
    clients: int

    def anchors(self, state: ServerState, clients: Clients, release: Release) -> Population:
        """Components of all clients; their number by withheld choices, else by how far apart they
        are."""
        ask = release.asking(state, clients)
        return population(self.moments(ask, release, lambda f: _by_choices(state, clients, f)))

    def moments(
        self, ask: Ask, release: Release, choose: Callable[[Fits], int | None] = lambda fits: None
    ) -> Moments:
        """Moments of the best components; `choose` picks their number where it is to be found, or
        leaves it to their separation."""
        if self.modes is not None:
            limits = release.limits._asdict()
            return fit(ask, self.latent, [self.modes], self.seed, **limits)[self.modes]
        numbers = list(range(2, min(MAX_MODES, self.clients // 3) + 1)) or [1]
        fits = fit(lambda centre: ask(centre, True), self.latent, numbers, self.seed)
        chosen = choose(fits)
        if chosen is None:
            chosen = best_separated(fits)
        start = fits[chosen].total / fits[chosen].weight.clamp_min(1e-9).unsqueeze(-1)
        return fit(lambda centre: ask(centre), self.latent, [chosen], self.seed, start)[chosen]

    def finalise(self, state: ServerState, clients: Clients, release: Release) -> ServerState:
        """A last fit if there is none, then every client notes for itself where it belongs."""
        if not state.population:
            release.require(state.round)
            found = population(self.moments(release.asking(state, clients), release))
            state = replace(state, population=found._asdict())
        own = clients.settle(state.params, Population(**state.population))
        return replace(state, clients=state.clients | own)


def _by_choices(state: ServerState, clients: Clients, fits: Fits) -> int | None:
    return predicted_modes(state.params, clients, {n: population(f) for n, f in fits.items()})


def predicted_modes(
    params: Params, clients: Clients, candidates: dict[int, Population]
) -> int | None:
    """Number of components whose posterior predictive gives the clients' withheld choices the most
    probability: the fewest within two standard errors of it, from sums over clients. None where
    nobody withheld any."""
    scores = clients.scores(params, list(candidates.values()))
    if float(scores.clients) == 0:
        return None
    return list(candidates)[fewest_within_error(scores)]


def modes_of(config: Config) -> int | None:
    """The number of modes in the settings; None where it is to be found."""
    return None if config.prototypes.modes == "auto" else config.prototypes.modes


def build_fit(config: Config, clients: int, summed: bool) -> PopulationFit:
    """The fit of the settings, for so many clients."""
    modes = modes_of(config)
    if summed:
        return SummedFit(modes, config.seed, config.model.latent, clients)
    return SeenFit(modes, config.seed)
