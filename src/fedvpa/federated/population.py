"""What the server learns about the population from the clients' posterior means: components, and
balanced labels (M6)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fedvpa.types import Population

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


class Scores(NamedTuple):
    """Sums over clients of their log-probabilities s of withheld choices under t populations: how
    many, s, and s s^T."""

    clients: Float[Tensor, ""]
    total: Float[Tensor, "t"]
    outer: Float[Tensor, "t t"]


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
