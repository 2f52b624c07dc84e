"""Train one run: read, encode, whiten, rounds, checkpoints; resumable after anything."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedvpa.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from fedvpa.config import Config, FederationConfig
from fedvpa.errors import BadInputError
from fedvpa.evaluation.protocol import Scores, given_trial
from fedvpa.evaluation.statistics import interval
from fedvpa.experiment.build import build_algorithm, build_privacy, build_reward
from fedvpa.experiment.dataset import (
    TrainingData,
    Whitener,
    features_of,
    public_whitener,
    to_store,
    training_data,
)
from fedvpa.experiment.run import (
    ELSEWHERE,
    RunPaths,
    fingerprint,
    load_config,
    save_config,
    save_whitener,
)
from fedvpa.experiment.tracking import Tracker, open_tracker
from fedvpa.features.cache import FeatureCache
from fedvpa.federated.algorithm import Algorithm, poisson_cohort, sample_cohort
from fedvpa.federated.batch import ClientStore
from fedvpa.federated.draws import stream
from fedvpa.federated.privacy import BudgetError
from fedvpa.records import Progress
from fedvpa.types import ServerState

logger = logging.getLogger("fedvpa")

OnRound = Callable[[int, int, dict[str, Any]], None]
"""Called with (rounds done, rounds in all, this round's row of the history)."""


@dataclass(frozen=True)
class TrainResult:
    """Where the run is, and its history."""

    root: Path
    config: Config
    history: list[dict[str, Any]]
    seconds: float


def train(
    config: Config,
    *,
    resume: bool = False,
    on_round: OnRound | None = None,
    on_features: Progress | None = None,
    on_data: Callable[[TrainingData], None] | None = None,
) -> TrainResult:
    """Train the configured method and leave a run in `config.out`.

    Nothing is written before the data have been read and checked. An interruption at any time
    leaves a run that `resume=True` continues to the same bits as if it had not been interrupted.

    Raises:
        BadInputError: unusable data or settings, or an output directory that is in use.
        NonFiniteUpdateError: a client's update holds NaN or Inf (the run stays resumable).
        CheckpointError: the checkpoint to resume from is damaged or belongs to other settings or
            data.
    """
    start = time.perf_counter()
    paths = RunPaths(Path(config.out))
    _check_directory(paths, config, resume)
    data = training_data(config)
    if on_data is not None:
        on_data(data)
    cache = FeatureCache(config.features)
    features, backbone, signature = features_of([*data.train, *data.validation], cache, on_features)
    train_features, validation_features = features[: len(data.train)], features[len(data.train) :]
    whitener = public_whitener(config, cache, on_features) or Whitener.fit(
        torch.cat(train_features), config.model.inputs
    )
    needs_common = build_reward(config).needs_common
    store = to_store(data.train, train_features, whitener, needs_common)
    validation = to_store(data.validation, validation_features, whitener, needs_common)
    algorithm = build_algorithm(config, store)
    identity = fingerprint(config, store, signature)

    if resume and paths.checkpoint.is_file():
        found = load_checkpoint(paths.checkpoint, identity)
        state, history = found.state, found.history
        if found.finished:
            logger.info("%s is finished already", paths.root)
            paths.write_json("history.json", history)
            paths.write_json("manifest.json", manifest(algorithm, state, whitener))
            return TrainResult(paths.root, config, history, 0.0)
    else:
        state, history = algorithm.init(), []
        save_config(paths, config)
        save_whitener(paths, whitener)
        paths.write_json("data.json", _describe(data, backbone, signature))
    paths.write_json("manifest.json", manifest(algorithm, state, whitener))
    everyone = len(store)

    privacy = build_privacy(config, everyone)

    def cohort(round_number: int) -> list[int]:
        if privacy is not None:
            return poisson_cohort(
                stream(config.seed, "cohort", round_number), everyone, privacy.rate
            )
        return sample_cohort(config.seed, round_number, everyone, config.federation.cohort)

    def validate(reached: ServerState) -> dict[str, Any]:
        return _validate(algorithm, reached, store, validation)

    with open_tracker(config.tracker, paths.root, config) as tracker:
        journal = Journal(paths, identity, tracker, on_round)
        state, history = run_rounds(
            config.federation, algorithm, (state, history), cohort, validate, journal
        )
    paths.write_json("history.json", history)
    paths.write_json("manifest.json", manifest(algorithm, state, whitener))
    return TrainResult(paths.root, config, history, time.perf_counter() - start)


def manifest(algorithm: Algorithm, state: ServerState, whitener: Whitener) -> list[dict[str, Any]]:
    """All that travels between a client and the server, as plain rows."""
    return [row._asdict() for row in (*whitener.payload(), *algorithm.payload(state))]


@dataclass(frozen=True)
class Journal:
    """Where a run's progress goes: checkpoints of the run called `identity`, a tracker, and whoever
    watches."""

    paths: RunPaths
    identity: str
    tracker: Tracker
    on_round: OnRound | None = None


def run_rounds(
    f: FederationConfig, algorithm: Algorithm, start: tuple[ServerState, list[dict[str, Any]]],
    cohort: Callable[[int], list[int]], validate: Callable[[ServerState], dict[str, Any]],
    journal: Journal,
) -> tuple[ServerState, list[dict[str, Any]]]:  # fmt: skip
    """The rounds that are left, and what is to be done after the last; the same for clients in this
    process and elsewhere.

    Raises:
        FedvpaError: what a round or the checkpoint raises; what is known so far has been saved.
    """
    # state and history change together, in one assignment
    now, saved = start, start[0].round if start[1] else -1
    final: ServerState | None = None

    def save(finished: bool) -> None:
        save_checkpoint(journal.paths.checkpoint, Checkpoint(*now, journal.identity, finished))

    try:
        while now[0].round < f.rounds:
            began = time.perf_counter()
            try:
                state, diagnostics = algorithm.apply(now[0], cohort(now[0].round))
            except BudgetError as error:
                logger.warning("%s; training ends after round %d", error, now[0].round)
                break
            row: dict[str, Any] = {"round": state.round, **diagnostics}
            if state.round % f.validate_every == 0 and state.round < f.rounds:
                row |= validate(state)
            # what is served is validated: for some methods, after a last exchange
            elif state.round == f.rounds:
                final = algorithm.finalise(state)
                row |= validate(final)
            now = (state, [*now[1], row])
            seconds = time.perf_counter() - began
            journal.tracker.log(row, state.round)
            if state.round % f.checkpoint_every == 0 and state.round < f.rounds:
                save(finished=False)
                saved = state.round
            if journal.on_round is not None:
                journal.on_round(state.round, f.rounds, row | {"seconds": seconds})
    # Ctrl-C, a client's NaN, a full disk: what is known so far is kept, and the cause goes on
    except BaseException:
        if saved != now[0].round:
            save(finished=False)
        raise
    now = (algorithm.finalise(now[0]) if final is None else final, now[1])
    save(finished=True)
    return now


def _validate(
    algorithm: Algorithm, state: ServerState, store: ClientStore, validation: ClientStore
) -> dict[str, Any]:
    """Accuracy and NLL on the clients' held-out pairs, z being inferred from their training
    pairs."""
    if int(validation.sizes.sum()) == 0:
        return {}
    predictor = algorithm.predictor(state)
    trial = given_trial(store, validation)
    group = store.group_index()[1]
    scores = Scores.empty(len(store))
    scores.add(
        predictor.margin(predictor.adapt(trial.context, group), trial.target), trial.target.mask
    )
    return {
        "validation_accuracy": interval(scores.accuracy())["mean"],
        "validation_nll": interval(scores.mean_nll())["mean"],
    }


def _check_directory(paths: RunPaths, config: Config, resume: bool) -> None:
    if paths.root.exists() and not paths.root.is_dir():
        raise BadInputError(f"{paths.root}: is a file; --out must name a directory")
    if resume:
        if load_config(paths).model_dump(exclude=ELSEWHERE) != config.model_dump(exclude=ELSEWHERE):
            raise BadInputError(
                f"{paths.root}: was trained with other settings; resume it with --resume --out"
                " alone"
            )
    elif paths.root.is_dir() and any(
        not p.name.startswith(".config.yaml-") for p in paths.root.iterdir()
    ):
        raise BadInputError(
            f"{paths.root}: not empty; continue an interrupted run with --resume, or choose another"
            " --out"
        )


def _describe(data: TrainingData, backbone: str, signature: str) -> dict[str, Any]:
    return {
        "backbone": backbone,
        "signature": signature,
        "clients": [
            {
                "name": t.name,
                "group": t.group,
                "pairs": len(t.pairs),
                "validation_pairs": len(v.pairs),
            }
            for t, v in zip(data.train, data.validation)
        ],
        "skipped": dict(data.skipped),
        "first_skipped": data.first_skipped,
    }
