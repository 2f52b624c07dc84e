"""Clients of the persona generator, for the benchmarks of privacy, attacks and robustness.

The features are whitened by the pairs of other users (seed 10 007), which stand for public data: no
client contributes to it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedvpa.config import Config, build_config, merged
from fedvpa.evaluation.protocol import Scores, given_trial
from fedvpa.experiment.dataset import features_of, to_store, training_data
from fedvpa.features.cache import FeatureCache
from fedvpa.features.whitening import Whitener
from fedvpa.federated.batch import ClientStore
from fedvpa.federated.bayes.server import FederatedBayes
from fedvpa.federated.variational import FederatedVariational
from fedvpa.types import ServerState

OTHERS = 10_007
"""Seed of the users whose pairs are public; no benchmark has clients of it."""


@dataclass(frozen=True)
class Data:
    """Whitened pairs of the clients, the pairs that they hold out, and their true groups."""

    train: ClientStore
    held: ClientStore
    group: Tensor
    whitened_by: Callable[[Whitener], Data]
    """The same clients under another whitening."""
    features: Sequence[Tensor]
    """Raw features of every client's training pairs, [n, 2, h]."""


def configuration(clients: int, more: Mapping[str, Any] | None = None) -> Config:
    """A method (`fedvpl+anchors` with two components, unless `more` names another) on personas of
    two groups, ten pairs each, a fifth of them held out."""
    data = {"clients": clients, "personas": {"groups": 2, "pairs": 10}, "validation_share": 0.2}
    given = dict(more or {})
    if "method" not in given:
        given = merged({"method": "fedvpl+anchors", "prototypes": {"modes": 2}}, given)
    return build_config(merged({"data": data}, given))


def prepare(clients: int, seed: int = 0, more: Mapping[str, Any] | None = None) -> Data:
    """Features, whitened as the settings say, come from the cache or are computed."""
    config = configuration(clients, merged({"seed": seed}, more or {}))
    cache = FeatureCache(config.features)

    def progress(done: int, total: int, speed: float) -> None:
        sys.stderr.write(f"\rfeatures {done}/{total} {speed:.0f} tokens/s")

    found = training_data(config)
    others = training_data(configuration(60, {"seed": OTHERS}))
    features, _ = features_of([*found.train, *found.validation], cache, progress)
    public, _ = features_of(others.train, cache, progress)
    whitener = Whitener.fit(torch.cat(public), config.model.inputs, config.model.white)
    half = len(found.train)

    def whitened_by(other: Whitener) -> Data:
        train = to_store(found.train, features[:half], other, False)
        held = to_store(found.validation, features[half:], other, False)
        return Data(train, held, train.roster.group_index()[1], whitened_by, features[:half])

    return whitened_by(whitener)


def accuracy(
    algorithm: FederatedVariational | FederatedBayes,
    state: ServerState,
    data: Data,
    clients: Sequence[int] | None = None,
) -> float:
    """Mean accuracy of some clients (all) on their held-out pairs, z being inferred from their
    training pairs."""
    predictor = algorithm.predictor(state)
    trial = given_trial(data.train, data.held)
    scores = Scores.empty(len(data.train))
    scores.add(
        predictor.margin(predictor.adapt(trial.context, data.group), trial.target),
        trial.target.mask,
    )
    each = torch.as_tensor(scores.accuracy())
    chosen = each if clients is None else each[torch.as_tensor(clients)]
    return float(chosen[~chosen.isnan()].mean())
