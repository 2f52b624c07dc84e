"""From a configuration to the clients' whitened pairs, for training and for evaluation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fedvpa.config import Config, DataConfig
from fedvpa.data.partition import (
    MIRRORED,
    ClientPairs,
    Partitioner,
    corrupt,
    mirror_image,
    split_off,
)
from fedvpa.data.personas import UNSEEN, personas
from fedvpa.data.reading import PairSet, read_pairs
from fedvpa.errors import BadInputError
from fedvpa.features.cache import FeatureCache
from fedvpa.federated.algorithm import Payload
from fedvpa.federated.batch import ClientStore, build_store
from fedvpa.functional.whitening import second_moment, whitening_matrix
from fedvpa.records import Progress


@dataclass(frozen=True)
class TrainingData:
    """Clients with their training and validation pairs, and what was skipped on reading."""

    train: list[ClientPairs]
    validation: list[ClientPairs]
    skipped: Counter[str]
    first_skipped: list[str]


class WhiteningSums(NamedTuple):
    """A client's part of the whitening, in float64: sum of dh dh^T, sum of h over both responses,
    number of pairs."""

    moment: Float[Tensor, "h h"]
    total: Float[Tensor, "h"]
    pairs: Float[Tensor, ""]

    @staticmethod
    def of(features: Float[Tensor, "n 2 h"]) -> WhiteningSums:
        """Over these pairs."""
        moment = second_moment(features[:, 0] - features[:, 1])
        count = torch.tensor(float(features.shape[0]), dtype=torch.float64)
        return WhiteningSums(moment, features.double().sum((0, 1)), count)


@dataclass(frozen=True)
class Whitener:
    """Centre [H] and projection [H, p], from sums over the training clients."""

    centre: Float[Tensor, "h"]
    projection: Float[Tensor, "h p"]

    @staticmethod
    def fit(features: Float[Tensor, "n 2 h"], dimensions: int) -> Whitener:
        """From the training pairs' features."""
        return Whitener.from_sums(WhiteningSums.of(features), dimensions)

    @staticmethod
    def from_sums(sums: WhiteningSums, dimensions: int) -> Whitener:
        """From the sum of the clients' sums: what a federation knows.

        Raises:
            ValueError: no pairs.
        """
        projection = whitening_matrix(sums.moment, round(float(sums.pairs)), dimensions)
        return Whitener((sums.total / (2 * sums.pairs)).float(), projection)

    def payload(self) -> list[Payload]:
        """What whitening costs once: the clients' sums, and the projection that they are sent."""
        h, p = self.projection.shape
        return [
            Payload("whitening: sum of dh dh^T, float64", (h, h), 8 * h * h, "up", "once"),
            Payload("whitening: sum of h, number of pairs", (h + 1,), 8 * (h + 1), "up", "once"),
            Payload("whitening: centre, projection", (h, p + 1), 4 * h * (p + 1), "down", "once"),
        ]

    def difference(self, features: Float[Tensor, "n 2 h"]) -> Float[Tensor, "n p"]:
        """Whitened h(chosen) - h(rejected)."""
        return (features[:, 0] - features[:, 1]) @ self.projection

    def common(self, features: Float[Tensor, "n 2 h"]) -> Float[Tensor, "n p"]:
        """Whitened mean of both responses."""
        return (features.mean(1) - self.centre) @ self.projection


def public_whitener(
    config: Config, cache: FeatureCache, progress: Progress | None = None
) -> Whitener | None:
    """Whitening from public pairs, if some are named: then clients contribute nothing to it. No
    label is read.

    Raises:
        BadInputError: nothing usable is there.
    """
    if config.data.public is None:
        return None
    pairs = read_pairs(config.data.public, None, config.data.on_bad_record).pairs
    return Whitener.fit(cache.pairs(pairs, progress).values, config.model.inputs)


def training_data(config: Config) -> TrainingData:
    """Read, divide, and hold validation pairs out.

    Raises:
        BadInputError: unusable data, or settings that do not fit it.
    """
    if config.data.source == "personas":
        clients = personas(config.data.personas, range(config.data.clients), config.seed)
        source = PairSet([])
    else:
        source = read_pairs(config.data.source, config.data.split, config.data.on_bad_record)
        clients = partitioner(config.data, config.data.clients)(source.pairs, config.seed)
    clients = corrupt(clients, config.data.corrupted, config.data.corruption, config.seed)
    share = config.data.validation_share
    parts = [split_off(client, share, config.seed) for client in clients]
    train = [a for a, _ in parts]
    # nobody else may train on them, whatever the label
    validation, _ = without_overlap([b for _, b in parts], train)
    return TrainingData(train, validation, source.skipped, source.first_skipped)


def unseen_clients(
    data: DataConfig, seed: int, count: int, context: int, seen: set[str]
) -> tuple[list[ClientPairs], Counter[str]]:
    """New clients from evaluation data: never trained on. Personas get `context` pairs and as many
    targets.

    Raises:
        BadInputError: every client id of the evaluation data is among `seen`, the clients that were
            trained on.
    """
    if data.source == "personas":
        users = range(UNSEEN, UNSEEN + count)
        return personas(data.personas, users, seed, "test", pairs=max(4, 2 * context)), Counter()
    source = read_pairs(data.source, data.split, data.on_bad_record)
    new = [p for p in source.pairs if p.client_id is None or p.client_id not in seen]
    if not new:
        raise BadInputError(
            f"{data.source}: every client id in it was trained on, so nobody is unseen; evaluate on"
            " other users, or leave some out of training (--clients N takes N of them)"
        )
    return partitioner(data, count)(new, seed, prefix="unseen"), source.skipped


def held_out_pairs(data: DataConfig, seed: int, seen: Sequence[ClientPairs]) -> list[ClientPairs]:
    """Evaluation pairs for the clients that were trained on: their own where ids are natural, else
    dealt by group.

    A seen client that gets none is given an empty row. For mirrored clients the reversed halves get
    reversed pairs. A persona gets half as many new pairs as it was given for training.
    """
    if data.source == "personas":
        users = [int(client.name.split("-")[1]) for client in seen]
        return personas(data.personas, users, seed, "test", pairs=max(2, data.personas.pairs // 2))
    if data.protocol == "mirrored":
        plain = data.model_copy(update={"protocol": "natural"})
        originals = held_out_pairs(
            plain, seed, [_ungrouped(c) for c in seen if not c.name.endswith(MIRRORED)]
        )
        return [
            side
            for c in originals
            for side in (replace(c, group=c.group or "original"), mirror_image(c))
        ]
    pairs = read_pairs(data.source, data.split, data.on_bad_record).pairs
    named = {p.client_id for p in pairs if p.client_id is not None}
    if named & {c.name for c in seen}:
        return [replace(c, pairs=tuple(p for p in pairs if p.client_id == c.name)) for c in seen]
    out = []
    for client in seen:
        holders = [c.name for c in seen if c.group == client.group]
        pool = [p for p in pairs if client.group is None or p.group == client.group]
        out.append(replace(client, pairs=tuple(pool[holders.index(client.name) :: len(holders)])))
    return out


def _ungrouped(client: ClientPairs) -> ClientPairs:
    return replace(client, group=None) if client.group == "original" else client


def partitioner(data: DataConfig, clients: int) -> Partitioner:
    """The partitioner that the settings describe."""
    return Partitioner(
        clients,
        data.partition,
        data.group_ratio,
        data.dirichlet_alpha,
        data.mixing,
        data.protocol,
        data.max_pairs,
    )


def without_overlap(
    clients: Sequence[ClientPairs], seen: Sequence[ClientPairs]
) -> tuple[list[ClientPairs], int]:
    """Drop evaluation pairs that any training client holds; returns what is left and how many were
    dropped."""
    keys = {pair.content_key() for client in seen for pair in client.pairs}
    left = [
        replace(c, pairs=tuple(p for p in c.pairs if p.content_key() not in keys)) for c in clients
    ]
    return left, sum(len(c.pairs) for c in clients) - sum(len(c.pairs) for c in left)


def features_of(
    clients: Sequence[ClientPairs], cache: FeatureCache, progress: Progress | None = None
) -> tuple[list[Float[Tensor, "_ 2 h"]], str, str]:
    """Features of every client's pairs, in their order; the backbone's name and signature."""
    pairs = [pair for client in clients for pair in client.pairs]
    if not pairs:
        raise BadInputError("no pairs are left to work with")
    table = cache.pairs(pairs, progress)
    return (
        list(table.values.split([len(c.pairs) for c in clients])),
        table.backbone,
        table.signature,
    )


def to_store(
    clients: Sequence[ClientPairs],
    features: Sequence[Float[Tensor, "_ 2 h"]],
    whitener: Whitener,
    needs_common: bool,
) -> ClientStore:
    """Whitened pairs of the clients."""
    return build_store(
        [c.name for c in clients],
        [c.group for c in clients],
        [whitener.difference(f) for f in features],
        [whitener.common(f) for f in features] if needs_common else None,
        [presentation_order(c) for c in clients],
    )


def presentation_order(client: ClientPairs) -> Float[Tensor, "n"]:
    """+1 where the chosen response is shown as A: decided by a hash of the texts, so by chance with
    regard to the label."""
    return torch.tensor([1.0 if pair.chosen_is_first() else -1.0 for pair in client.pairs])
