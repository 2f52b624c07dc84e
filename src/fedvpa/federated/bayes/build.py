"""Builders of a Bayes method's server."""

from __future__ import annotations

from fedvpa.config import Config
from fedvpa.errors import BadInputError
from fedvpa.federated.accounting import privacy_of
from fedvpa.federated.aggregators import build_server
from fedvpa.federated.bayes.private import PrivateBayes
from fedvpa.federated.bayes.search import Search
from fedvpa.federated.bayes.server import FederatedBayes
from fedvpa.federated.bayes.start import Starts
from fedvpa.federated.release import NoiseOf, PrivateRelease, seeded_noise
from fedvpa.selector.bayes import BayesSelector


def build(*, config: Config, clients: int, noise: NoiseOf | None = None) -> FederatedBayes:
    """The server's side of the settings' method.

    Args:
        config: the settings.
        clients: how many clients the federation has.
        noise: source of the noise of private releases; None: one that a simulation repeats.

    Raises:
        BadInputError: one group.
    """
    p = config.population
    if p.structure == "groups" and p.order == 1:
        raise BadInputError(
            "population.order: 1 group is one reward for everybody; at least 2, or --method"
            " fedavg-btl"
        )
    rounds = config.federation.rounds
    m, searches = config.model, p.width == "auto"
    starts = Starts(
        m.inputs, m.latent, p.structure, p.order, p.ridge, searches, p.folds, p.radius, p.spread,
        config.seed,
    )  # fmt: skip
    selector, server = BayesSelector(m.inputs, m.latent), build_server(config)
    search = Search(starts, p.width, max(1, round(p.search * rounds)))
    if (privacy := privacy_of(config, clients)) is None:
        return FederatedBayes(selector, server, search)
    assert not isinstance(p.order, str)  # checked with the settings
    assert not isinstance(p.ridge, str)
    release = PrivateRelease(privacy, seeded_noise(config.seed) if noise is None else noise)
    return PrivateBayes(selector, server, search, release, searches, p.order, p.ridge)
