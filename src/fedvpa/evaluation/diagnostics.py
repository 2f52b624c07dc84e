"""Diagnostics of the latent preference: collapse, clusters, and whether predictions use it.

True groups are read here and nowhere else.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fedvpa.evaluation.protocol import Trial
from fedvpa.federated.algorithm import LatentPredictor
from fedvpa.functional.gaussian import gaussian_log_prob, standard_kl_per_dimension
from fedvpa.types import Posterior

ACTIVE = 0.01
"""A latent dimension is active if the variance of posterior means over clients exceeds this
(Burda et al., 2016)."""


def posterior_diagnostics(posterior: Posterior) -> dict[str, Any]:
    """Active units, KL per dimension from N(0, I), mutual information estimate (nats), mean
    sigma."""
    mean, log_var = posterior
    kl = standard_kl_per_dimension(mean, log_var).mean(0)
    spread = mean.var(0, unbiased=False)
    return {
        "active_units": int((spread > ACTIVE).sum()),
        "dimensions": mean.shape[-1],
        "kl_per_dimension": kl.tolist(),
        "kl": float(kl.sum()),
        "mutual_information": mutual_information(posterior),
        "mean_sigma": float((0.5 * log_var).exp().mean()),
        "mean_norm": float(mean.norm(dim=-1).mean()),
    }


def mutual_information(posterior: Posterior, samples: int = 16, most: int = 512) -> float:
    """I(client; z) in nats: E log q_i(z) - log of the clients' mean density (Hoffman & Johnson,
    2016); at most log K.

    Over the first `most` clients (their order is random): the densities of K clients at K samples
    grow with K^2.
    """
    mean, log_var = (value[:most] for value in posterior)
    generator = torch.Generator().manual_seed(0)
    z = mean + (0.5 * log_var).exp() * torch.randn(samples, *mean.shape, generator=generator)
    own = gaussian_log_prob(z, mean, log_var)
    every = gaussian_log_prob(z.unsqueeze(-2), mean, log_var)
    return float((own - torch.logsumexp(every, -1) + math.log(mean.shape[0])).mean())


def cluster_diagnostics(mean: Float[Tensor, "k d"], group: Int[Tensor, "k"]) -> dict[str, Any]:
    """k-means on the clients' means against the true groups (k = their number), and how far the
    groups stand apart.

    ARI, NMI, silhouette, ratio of between- to within-group variance, accuracy of a linear probe
    (5-fold). Without two groups there is nothing to compare with, and the entries are None.
    """
    from sklearn.cluster import KMeans
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, silhouette_score
    from sklearn.model_selection import StratifiedKFold, cross_val_score

    labels, x = group.numpy(), mean.double().numpy()
    names = sorted(set(labels.tolist()) - {-1})
    keys = ("ari", "nmi", "silhouette", "between_within", "linear_probe")
    if len(names) < 2 or (labels < 0).any() or len(x) <= len(names):
        return dict.fromkeys(keys)
    with warnings.catch_warnings():
        # collapsed latents have fewer distinct points than clusters: that is the finding
        warnings.simplefilter("ignore")
        found = KMeans(len(names), n_init=10, random_state=0).fit_predict(x)
        centre = np.stack([x[labels == g].mean(0) for g in names])
        index = np.searchsorted(names, labels)
        within = float(((x - centre[index]) ** 2).sum(1).mean())
        between = float(((centre[index] - x.mean(0)) ** 2).sum(1).mean())
        smallest = int(np.bincount(index).min())
        probe = None
        if smallest >= 2:
            folds = StratifiedKFold(min(5, smallest), shuffle=True, random_state=0)
            probe = float(
                cross_val_score(LogisticRegression(max_iter=1000), x, labels, cv=folds).mean()
            )
        return {
            "ari": float(adjusted_rand_score(labels, found)),
            "nmi": float(normalized_mutual_info_score(labels, found)),
            "silhouette": float(silhouette_score(x, labels)),
            "between_within": between / max(within, 1e-12),
            "linear_probe": probe,
        }


def prototype_cosines(prototype: Float[Tensor, "m d"]) -> list[list[float]]:
    """Cosine between every two prototypes (or fitted components)."""
    unit = torch.nn.functional.normalize(prototype, dim=-1)
    return (unit @ unit.T).tolist()


def coverage(context: Posterior, everything: Posterior, level: float = 0.9) -> float:
    """Share of users and dimensions in which the mean from all of a user's pairs lies in the
    posterior's central interval given the context alone; a calibrated posterior has `level`. The
    mean from all pairs stands for the unknown truth."""
    half = math.sqrt(2) * float(torch.erfinv(torch.tensor(level))) * (0.5 * context.log_var).exp()
    return float(((everything.mean - context.mean).abs() <= half).float().mean())


def component_confidence(
    context: Float[Tensor, "u m"], everything: Float[Tensor, "u m"]
) -> dict[str, float]:
    """Mean posterior probability of the likeliest component given the context, and how often all of
    the user's pairs agree with it: calibrated, the two are equal."""
    agreement = context.argmax(-1) == everything.argmax(-1)
    return {
        "confidence": float(context.max(-1).values.mean()),
        "agreement": float(agreement.float().mean()),
    }


def detection(signal: Float[Tensor, "k"], corrupted: Bool[Tensor, "k"]) -> dict[str, float]:
    """Mean of a signal over corrupted and over clean clients, and the AUC with which it tells them
    apart."""
    from sklearn.metrics import roc_auc_score

    return {
        "corrupted": float(signal[corrupted].mean()),
        "clean": float(signal[~corrupted].mean()),
        "auc": float(roc_auc_score(corrupted.numpy(), signal.numpy())),
    }


def prior_weight_diagnostics(
    log_weight: Float[Tensor, "k j"], peer_group: Int[Tensor, "j"], group: Int[Tensor, "k"]
) -> dict[str, float]:
    """Entropy of the mixture weights (1 is uniform over the peers allowed) and the weight given to
    peers of one's group."""
    weight = log_weight.exp()
    allowed = (log_weight > -torch.inf).sum(-1).clamp_min(2).log()
    entropy = -(weight * log_weight.masked_fill(weight == 0, 0.0)).sum(-1) / allowed
    same = (peer_group == group.unsqueeze(-1)).to(weight.dtype)
    base = (same * (log_weight > -torch.inf)).sum(-1) / (log_weight > -torch.inf).sum(-1)
    return {
        "entropy": float(entropy.mean()),
        "same_group_weight": float((weight * same).sum(-1).mean()),
        "same_group_share_of_peers": float(base.mean()),
    }


def switch_rate(
    predictor: LatentPredictor, trials: list[Trial], group: Int[Tensor, "u"]
) -> dict[str, float | None]:
    """How often replacing a user's z by one of another group reverses the predicted choice; and, of
    those pairs whose prediction was right under the user's own z, how many (a pair that both groups
    would label alike should not switch)."""
    switched = total = right_switched = right = 0.0
    generator = torch.Generator().manual_seed(0)
    for trial in trials:
        state = predictor.adapt(trial.context, group)
        other = torch.arange(group.numel())
        for u in range(group.numel()):
            foreign = (group != group[u]).nonzero().squeeze(-1)
            if foreign.numel():
                other[u] = foreign[torch.randint(foreign.numel(), (1,), generator=generator)].item()
        own, swapped = (
            predictor.margin(state, trial.target),
            predictor.margin(state[other], trial.target),
        )
        mask = trial.target.mask & (other != torch.arange(group.numel())).unsqueeze(-1)
        change = ((own > 0) != (swapped > 0)) & mask
        switched += float(change.sum())
        total += float(mask.sum())
        right += float((mask & (own > 0)).sum())
        right_switched += float((change & (own > 0)).sum())
    if not total:
        return {"all": None, "of_right_predictions": None}
    return {"all": switched / total, "of_right_predictions": right_switched / max(right, 1.0)}
