"""Whom a run is evaluated on: unseen clients, and new pairs of those that were trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from fedvpa.config import FEDERATION, Config, DataConfig
from fedvpa.data.content import Policy
from fedvpa.data.partition import ClientPairs
from fedvpa.data.reading import read_pairs
from fedvpa.data.sources import Clients, dealt_by, source_of
from fedvpa.errors import BadInputError
from fedvpa.experiment.dataset import (
    TrainingData,
    features_of,
    to_store,
    training_data,
    without_overlap,
)
from fedvpa.experiment.run import Run, RunPaths, load_config, same_backbone
from fedvpa.features.cache import FeatureCache
from fedvpa.features.loading import location_stamp
from fedvpa.federated.batch import ClientStore
from fedvpa.records import PreferencePair, Progress


@dataclass(frozen=True)
class EvaluationSettings:
    """What to evaluate on. `data` None stands for the run's own source; `unseen` names another one
    of unseen users; `clients` 0 stands for all of its ids, or for ten clients where there are
    none; `on_bad_record` and `content` None for the run's own."""

    data: str | None = None
    split: str | None = None
    clients: int = 0
    context: int = 32
    repeats: int = 4
    seed: int = 0
    on_bad_record: str | None = None
    unseen: str | None = None
    columns: tuple[tuple[str, str], ...] = ()
    content: Policy | None = None


class Subjects(NamedTuple):
    """Whitened pairs of those who are evaluated, and what was left out."""

    data: DataConfig
    unseen: ClientStore | None
    held_out: ClientStore | None
    dealt: str | None
    corrupted: Bool[Tensor, "k"]
    dropped: int | None
    skipped: Counter[str]
    notes: list[str]
    texts: Counter[str]

    @property
    def held_out_pairs(self) -> int:
        """Pairs of seen clients that are scored."""
        return 0 if self.held_out is None else int(self.held_out.sizes.sum())


def subjects_of(run: Run, settings: EvaluationSettings, progress: Progress | None) -> Subjects:
    """Unseen clients, and new pairs of seen ones, without any pair that the run was trained on."""
    elsewhere = run.store is None
    trained = TrainingData([], [], Counter(), []) if elsewhere else training_data(run.config)
    everything = [*trained.train, *trained.validation]
    data = evaluation_data(run.config.data, settings)
    found, raw = people_of(run.config, settings, trained.train, set(run.roster.names))
    unseen, dropped = without_overlap(found.clients, everything)
    held_out, dropped_seen = without_overlap(raw, everything)
    held_out = [replace(c, pairs=()) if t.corrupted else c for c, t in zip(held_out, trained.train)]
    # a client of whom one pair is left has no target beside its context
    unseen = [client for client in unseen if len(client.pairs) > 1]
    if not unseen and not any(client.pairs for client in held_out):
        raise BadInputError(
            f"{settings.unseen or data.source}: nothing in it can be scored: every pair was trained"
            f" on ({dropped + dropped_seen} pairs), or belongs to nobody"
        )
    cache = FeatureCache(run.config.features)
    found_features, table = features_of([*unseen, *held_out], cache, progress)
    same_backbone(run, table.signature)
    own, others = found_features[: len(unseen)], found_features[len(unseen) :]
    return Subjects(
        data,
        to_store(unseen, own, run.whitener, run.needs_common) if unseen else None,
        to_store(held_out, others, run.whitener, run.needs_common) if held_out else None,
        dealt_by(trained.train) if held_out else None,
        torch.tensor([c.corrupted for c in trained.train], dtype=torch.bool),
        None if elsewhere else dropped + dropped_seen,
        found.skipped,
        list(found.notes),
        table.notes,
    )


def people_of(
    config: Config, settings: EvaluationSettings, trained: Sequence[ClientPairs], names: set[str]
) -> tuple[Clients, list[ClientPairs]]:
    """Unseen clients, and new pairs of the seen ones in their order (or none), as the evaluation
    data hold them.

    Raises:
        BadInputError: unusable evaluation data, or nobody in it.
    """
    data = evaluation_data(config.data, settings)
    held_out = source_of(data).held_out(config.seed, trained) if trained else []
    if settings.unseen is not None:
        data = data.model_copy(update={"source": settings.unseen, "split": None})
    found = source_of(data).unseen(config.seed, settings.context, names)
    if settings.unseen is not None and not found.clients:
        raise BadInputError(f"{settings.unseen}: every client id in it was trained on")
    if not found.clients and not held_out:
        raise BadInputError(
            f"{data.source}: nobody in it can be evaluated: no client id of it is new, none is of a"
            " client that was trained on, and the training clients were not made by group"
        )
    return found._replace(
        notes=(*found.notes, *_doubts(found.clients, held_out, trained))
    ), held_out


def _doubts(
    unseen: Sequence[ClientPairs], held_out: Sequence[ClientPairs], trained: Sequence[ClientPairs]
) -> list[str]:
    """What a reader should know of how far the unseen are unseen."""
    notes = []
    nameless = any(p.client_id is None for c in unseen for p in c.pairs)
    if nameless and trained and dealt_by(trained) == "id":
        notes.append(
            "the evaluation data have no client ids: the unseen clients are made of their pairs,"
            " and may be people who were trained on"
        )
    shared = {p.content_key() for c in unseen for p in c.pairs} & {
        p.content_key() for c in held_out for p in c.pairs
    }
    if shared:
        notes.append(
            f"{len(shared)} pairs are targets of unseen and of seen clients alike: the two columns"
            " are not independent"
        )
    return notes


def evaluation_data(trained: DataConfig, settings: EvaluationSettings) -> DataConfig:
    """The data settings of an evaluation.

    Raises:
        BadInputError: nobody has said which data, and the run's own cannot be scored.
    """
    update: dict[str, Any] = {
        "split": settings.split, "group_ratio": None, "max_pairs": 0, "clients": settings.clients,
    }  # fmt: skip
    if settings.on_bad_record is not None:
        update["on_bad_record"] = settings.on_bad_record
    if settings.columns:
        update["columns"] = dict(settings.columns)
    if settings.data is not None:
        update["source"] = settings.data
    elif trained.source == FEDERATION:
        raise BadInputError(
            "evaluate: the pairs of a federation are its clients'; say which data to evaluate on,"
            " --data"
        )
    elif settings.split is None and settings.unseen is None and not source_of(trained).generates:
        raise BadInputError(
            "evaluate: say which data, --data (and --split NAME); the training pairs must not be"
            " scored"
        )
    return trained.model_copy(update=update)


def untrained_pairs(
    directory: str | Path, source: str, split: str | None, backbone: str
) -> tuple[list[PreferencePair], int]:
    """Pairs of `source` for a judge of what a run has led to, without those that the run saw in
    training or validation; and how many these were.

    Raises:
        BadInputError: the run reads features of that very backbone, its training data are gone, or
            no pair is left.
    """
    config = load_config(RunPaths(Path(directory)))
    own, stamp = config.features.backbone, location_stamp(backbone)
    if own == backbone or (stamp is not None and stamp == location_stamp(own)):
        raise BadInputError(
            f"{directory}: was trained on features of '{backbone}'; an independent judge needs"
            " another backbone"
        )
    data = training_data(config)
    seen = {
        pair.content_key() for client in (*data.train, *data.validation) for pair in client.pairs
    }
    every = read_pairs(source, split).pairs  # opposed groups may have judged the same pairs
    found = list({(pair.group, pair.content_key()): pair for pair in every}.values())
    left = [pair for pair in found if pair.content_key() not in seen]
    if not left:
        raise BadInputError(f"{source}: the selector in {directory} has seen every pair of it")
    return left, len(found) - len(left)
