"""From a configuration to the clients' whitened pairs, for training and for evaluation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch
from jaxtyping import Float
from torch import Tensor

from fedvpa.config import Config
from fedvpa.data.content import contents
from fedvpa.data.partition import ClientPairs, corrupt, split_off
from fedvpa.data.reading import pairs_by
from fedvpa.data.sources import source_of
from fedvpa.errors import BadInputError
from fedvpa.features.cache import FeatureCache, FeatureTable
from fedvpa.features.whitening import Whitener, WhiteningSums
from fedvpa.federated.aggregators import robust_of
from fedvpa.federated.batch import ClientStore, build_store
from fedvpa.federated.robust import robust_whitening
from fedvpa.records import Progress

FEW_PER_DIMENSION = 5
"""Training pairs per whitened dimension under which users are often not told apart: unseen
personas of two groups had a mean accuracy of 0.60 to 0.72 under their own z with 1.7 to 3.4, and of
0.66 to 0.82 with 6.2 or more (24 settings, four seeds each)."""


@dataclass(frozen=True)
class TrainingData:
    """Clients with their training and validation pairs, and what was skipped on reading."""

    train: list[ClientPairs]
    validation: list[ClientPairs]
    skipped: Counter[str]
    first_skipped: list[str]
    notes: tuple[str, ...] = ()


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
    pairs = pairs_by(config.data, config.data.public).pairs
    features = cache.pairs(pairs, progress).values
    return Whitener.fit(features, config.model.inputs, config.model.white)


def own_whitener(config: Config, features: Sequence[Float[Tensor, "_ 2 h"]]) -> Whitener:
    """Whitening by the training clients' pairs: all of them alike, or by the robust mean over
    clients that the settings ask for."""
    robust = robust_of(config)
    if robust is None:
        return Whitener.fit(torch.cat(list(features)), config.model.inputs, config.model.white)
    sums = robust_whitening([WhiteningSums.of(own) for own in features], robust)
    return Whitener.from_sums(sums, config.model.inputs, config.model.white)


def training_data(config: Config) -> TrainingData:
    """Read, divide, and hold validation pairs out.

    Raises:
        BadInputError: unusable data, or settings that do not fit it.
    """
    found = source_of(config.data).training(config.seed)
    clients = corrupt(found.clients, config.data.corrupted, config.data.corruption, config.seed)
    share = config.data.validation_share
    content = config.data.content
    parts = [split_off(client, share, config.seed, content) for client in clients]
    train = [a for a, _ in parts]
    # nobody else may train on them, whatever the label
    validation, _ = without_overlap([b for _, b in parts], train)
    return TrainingData(train, validation, found.skipped, found.first_skipped, found.notes)


def described(config: Config, data: TrainingData) -> list[str]:
    """What there is to train on, and whether it is much: lines for the user."""
    sizes = [len(c.pairs) for c in data.train]
    pairs = [p for c in (*data.train, *data.validation) for p in c.pairs]
    total, held = sum(sizes), sum(len(c.pairs) for c in data.validation)
    responses = len({text for p in pairs for text in (p.chosen, p.rejected)})
    lines = [
        *data.notes,
        f"{len(sizes)} clients, {total} training pairs ({min(sizes)} to {max(sizes)} per client,"
        f" median {median(sizes):g}), {held} for validation;"
        f" {len({p.prompt for p in pairs})} prompts, {responses} responses",
    ]
    inputs = config.model.inputs
    if config.variational and total < FEW_PER_DIMENSION * inputs:
        lines.append(
            f"few pairs: {total} are {total / inputs:.1f} per whitened dimension; with fewer than"
            f" {FEW_PER_DIMENSION}, users are often not told apart (docs/data-formats.md);"
            f" --inputs {max(2, total // (2 * FEW_PER_DIMENSION))} leaves"
            f" {2 * FEW_PER_DIMENSION} per dimension"
        )
    return lines


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
) -> tuple[list[Float[Tensor, "_ 2 h"]], FeatureTable]:
    """Features of every client's pairs, in their order; and all of them with what is known of
    them."""
    pairs = [pair for client in clients for pair in client.pairs]
    if not pairs:
        raise BadInputError("no pairs are left to work with")
    table = cache.pairs(pairs, progress)
    return list(table.values.split([len(c.pairs) for c in clients])), table


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
        [torch.from_numpy(contents(c.pairs)) for c in clients],
    )


def presentation_order(client: ClientPairs) -> Float[Tensor, "n"]:
    """+1 where the chosen response is shown as A: decided by a hash of the texts, so by chance with
    regard to the label."""
    return torch.tensor([1.0 if pair.chosen_is_first() else -1.0 for pair in client.pairs])
