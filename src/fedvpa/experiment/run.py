"""A run's directory: what is in it, and how it is opened again.

| file | what |
|---|---|
| `config.yaml` | the effective configuration |
| `data.json` | clients, groups, counts, backbone; what was skipped |
| `whitening.safetensors` | centre and projection of the features |
| `checkpoint.safetensors` | state and history after the last saved round |
| `manifest.json` | what travels between a client and the server, in bytes |
| `history.json` | losses and validation accuracy by round |
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from fedvpa.checkpoint import Checkpoint, load_checkpoint
from fedvpa.config import Config, build_config, flatten, read_yaml, what_is_read
from fedvpa.data.partition import ClientPairs
from fedvpa.errors import BadInputError, CheckpointError
from fedvpa.experiment.build import build_algorithm, needs_common
from fedvpa.experiment.dataset import features_of, to_store, training_data
from fedvpa.experiment.opening import ELSEWHERE, RunData, check_state, read_data
from fedvpa.features.cache import FeatureCache
from fedvpa.features.whitening import Whitener
from fedvpa.federated.algorithm import Algorithm, Predictor
from fedvpa.federated.batch import ClientStore, Roster
from fedvpa.files import plain_json, write_atomically
from fedvpa.records import Progress
from fedvpa.types import PairBatch


@dataclass(frozen=True)
class RunPaths:
    """Files of a run."""

    root: Path

    @property
    def config(self) -> Path:
        """Effective configuration."""
        return self.root / "config.yaml"

    @property
    def checkpoint(self) -> Path:
        """State and history."""
        return self.root / "checkpoint.safetensors"

    @property
    def whitening(self) -> Path:
        """Centre and projection."""
        return self.root / "whitening.safetensors"

    def write_json(self, name: str, content: Any) -> None:
        """Write one of the JSON files."""
        write_atomically(self.root / name, plain_json(content))


def save_config(paths: RunPaths, config: Config) -> None:
    """Write the settings that the run reads; `--config` takes them again."""
    text = yaml.safe_dump(what_is_read(config), sort_keys=False)
    write_atomically(paths.config, text.encode())


def load_config(paths: RunPaths) -> Config:
    """Read the configuration of a run.

    Raises:
        BadInputError: the directory holds no run.
    """
    if not paths.config.is_file():
        raise BadInputError(
            f"{paths.root}: no run there (no config.yaml); train one with `fedvpa train --out"
            f" {paths.root}`"
        )
    settings = read_yaml(paths.config)
    try:
        return build_config(settings)
    except BadInputError as error:
        raise BadInputError(
            f"{paths.config}: not a configuration of this version: {error}. A run of an earlier"
            " version has to be trained again; what was fedvpa-gp is fedvpl+anchors now"
        ) from error


@dataclass(frozen=True)
class Run:
    """A trained run, opened for use. `store` holds the training clients, when the run was opened
    with them; else it is None."""

    config: Config
    paths: RunPaths
    whitener: Whitener
    checkpoint: Checkpoint
    algorithm: Algorithm
    data: RunData
    store: ClientStore | None = None

    @property
    def roster(self) -> Roster:
        """Names and groups of the training clients."""
        return roster_of(self.data)

    @property
    def identity(self) -> str:
        """Names the run's settings, data and backbone: what a z, and a policy, belong to."""
        return self.data.identity

    @property
    def predictor(self) -> Predictor:
        """The trained method."""
        return self.algorithm.predictor(self.checkpoint.state)

    @property
    def told(self) -> dict[str, Any] | None:
        """What the method found out about its structure, where it searches one."""
        told = getattr(self.algorithm, "told", None)
        return None if told is None else told(self.checkpoint.state)

    @property
    def needs_common(self) -> bool:
        """Whether the reward reads more than differences of features."""
        return needs_common(self.config)


def open_run(
    directory: str | Path, *, with_clients: bool = False, progress: Progress | None = None
) -> Run:
    """Open a run; `with_clients` also reads its training data again (its features come from the
    cache).

    Raises:
        BadInputError: no run there, or its data are gone.
        CheckpointError: training did not finish, or a file of the run is damaged, edited, or of
            another run; the message names it.
    """
    # 1. Settings and data, which say what the other files must hold.
    paths = RunPaths(Path(directory))
    config = load_config(paths)
    data = read_data(paths.root, config)
    # 2. Tensors, by their names, shapes and types.
    checkpoint = load_checkpoint(paths.checkpoint)
    if not checkpoint.finished:
        raise CheckpointError(
            f"{paths.root}: training stopped after round {checkpoint.state.round} of"
            f" {config.federation.rounds}; finish it with `fedvpa train --resume --out"
            f" {paths.root}`"
        )
    algorithm = build_algorithm(config, len(data.clients))
    check_run(paths, config, data, checkpoint, algorithm)
    whitener = Whitener.read(paths.whitening, data.identity, config.model.inputs)
    # 3. The training pairs, where they are asked for.
    store = None
    if with_clients:
        clients = training_data(config).train
        features, table = features_of(clients, FeatureCache(config.features), progress)
        store = to_store(clients, features, whitener, needs_common(config))
        _same_signature(paths.root, data, table.signature)
        if checkpoint.fingerprint != fingerprint(config, clients, table.signature):
            raise BadInputError(
                f"{paths.root}: its training data, or the backbone that reads them, have changed"
                " since it was trained; what it was trained on is no longer known, so nothing can"
                " be evaluated honestly"
            )
    return Run(config, paths, whitener, checkpoint, algorithm, data, store)


def check_run(
    paths: RunPaths, config: Config, data: RunData, checkpoint: Checkpoint, algorithm: Algorithm
) -> None:
    """Compare a checkpoint with the settings and the data that it stands beside.

    Raises:
        CheckpointError: it is another run's, or damaged.
    """
    if checkpoint.fingerprint != data.identity:
        raise CheckpointError(f"{paths.checkpoint}: is of another run than {paths.root}/data.json")
    check_state(paths.checkpoint, checkpoint.state, algorithm.init(roster_of(data)))


def fingerprint(config: Config, clients: Sequence[ClientPairs], signature: str) -> str:
    """Hash of settings, clients, their comparisons and the backbone: what a checkpoint belongs to.

    Features are not in it: computed again in other batches, they differ in their last bits.
    """
    settings = config.model_dump(mode="json", exclude=ELSEWHERE)
    digest = hashlib.sha256(json.dumps([settings, signature]).encode())
    for client in clients:
        digest.update(json.dumps([client.name, client.group, len(client.pairs)]).encode())
        for pair in client.pairs:
            digest.update(f"{pair.content_key()}{pair.chosen_is_first():d}".encode())
    return digest.hexdigest()


def roster_of(data: RunData) -> Roster:
    """Names and groups of a run's clients, as it wrote them down."""
    return Roster(tuple(row.name for row in data.clients), tuple(row.group for row in data.clients))


def same_backbone(run: Run, signature: str) -> None:
    """Refuse features of another backbone than the run was trained on.

    Raises:
        BadInputError: with both signatures.
    """
    _same_signature(run.paths.root, run.data, signature)


def _same_signature(root: Path, data: RunData, signature: str) -> None:
    if data.signature != signature:
        raise BadInputError(
            f"{root}: was trained on features that were made in another way ({data.signature}) than"
            f" here ({signature}): by another backbone, in another number type, or by another"
            " version of fedvpa, which prepares texts otherwise; name the backbone and"
            " --features.dtype when training, or train the run again"
        )


def pairs_to_batch(run: Run, features: torch.Tensor, orders: torch.Tensor) -> PairBatch:
    """One user's features [n, 2, H] as a batch [1, n, p]."""
    common = run.whitener.common(features).unsqueeze(0) if run.needs_common else None
    mask = torch.ones(1, features.shape[0], dtype=torch.bool)
    return PairBatch(
        run.whitener.difference(features).unsqueeze(0), common, orders.unsqueeze(0), mask
    )


def changed_settings(saved: Config, explicit: dict[str, Any]) -> list[str]:
    """Explicit settings that differ from a saved configuration."""
    given, old = flatten(build_config(explicit).model_dump()), flatten(saved.model_dump())
    return sorted(name for name in flatten(explicit) if given.get(name) != old.get(name))
