"""Train one run: read, encode, whiten, rounds, checkpoints; resumable after anything."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedvpa import __version__
from fedvpa.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from fedvpa.config import Config, FederationConfig
from fedvpa.errors import BadInputError
from fedvpa.evaluation.protocol import validation_row
from fedvpa.experiment.build import build_method, needs_common
from fedvpa.experiment.dataset import (
    TrainingData,
    features_of,
    own_whitener,
    public_whitener,
    to_store,
    training_data,
)
from fedvpa.experiment.opening import ELSEWHERE, read_data, settings_hash, with_checksum
from fedvpa.experiment.run import RunPaths, check_run, fingerprint, load_config, save_config
from fedvpa.experiment.tracking import Tracker, open_tracker
from fedvpa.features.cache import FeatureCache
from fedvpa.features.whitening import Whitener
from fedvpa.federated.accounting import BudgetError, privacy_of
from fedvpa.federated.algorithm import Algorithm, poisson_cohort, sample_cohort
from fedvpa.federated.batch import ClientStore
from fedvpa.federated.exchanges import ONCE, payload_rows
from fedvpa.federated.random import stream
from fedvpa.files import claim, write_atomically
from fedvpa.records import Progress
from fedvpa.types import ServerState

logger = logging.getLogger("fedvpa")

PATIENT, COIN = 5, 1e-3
"""So many rounds in a row within this of the loss of a coin are a reason for a warning."""

KEPT = "data"
"""Folder, within that of a run, of pairs that a caller had in memory."""
OnRound = Callable[[int, int, dict[str, Any]], None]
"""Called with (rounds done, rounds in all, this round's row of the history)."""


@dataclass(frozen=True)
class TrainResult:
    """A trained run: its folder, settings, history (one row per round) and seconds of training."""

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
    leaves per run that `resume=True` continues to the same bits as if it had not been interrupted.

    Raises:
        BadInputError: unusable data or settings, or an output directory that is in use.
        NonFiniteUpdateError: a client's update holds NaN or Inf (the run stays resumable).
        CheckpointError: the checkpoint to resume from is damaged or belongs to other settings or
            data.
    """
    start = time.perf_counter()
    paths = RunPaths(Path(config.out))
    # 1. Nothing is written before data and settings are known to be usable.
    _claim(paths, config, resume)
    data = training_data(config)
    if on_data is not None:
        on_data(data)
    # 2. Features of the training pairs, whitened; then the method and its clients.
    ready = _prepare(paths, config, data, resume, on_features)
    store, found = ready.store, ready.found
    algorithm, clients = build_method(config, store)
    # 3. Where to begin.
    if found is None:
        state, history = algorithm.init(store.roster), list[dict[str, Any]]()
        save_config(paths, config)
        write_atomically(paths.whitening, ready.whitener.to_bytes(ready.identity))
        paths.write_json("data.json", _describe(config, data, ready))
    else:
        state, history = found.state, found.history
        check_run(paths, config, read_data(paths.root, config), found, algorithm)
        if found.finished:
            logger.info("%s is finished already", paths.root)
    paths.write_json("manifest.json", manifest(algorithm, state, ready.whitener))
    # 4. The rounds.
    if found is None or not found.finished:
        group = store.roster.group_index()[1]

        def validate(reached: ServerState) -> dict[str, float]:
            return validation_row(algorithm.predictor(reached), store, ready.held, group)

        with open_tracker(config.tracker, paths.root, config) as tracker:
            journal = Journal(paths, ready.identity, tracker, on_round)
            state, history = run_rounds(
                config.federation, algorithm, clients, (state, history),
                _cohorts(config, len(store)), validate, journal,
            )  # fmt: skip
    # 5. What a reader of the run wants to see without opening the checkpoint.
    paths.write_json("history.json", history)
    paths.write_json("manifest.json", manifest(algorithm, state, ready.whitener))
    return TrainResult(paths.root, config, history, time.perf_counter() - start)


@dataclass(frozen=True)
class _Ready:
    """What training starts from: whitened pairs, and the checkpoint to go on from."""

    store: ClientStore
    held: ClientStore
    whitener: Whitener
    identity: str
    backbone: str
    signature: str
    texts: Counter[str]
    found: Checkpoint | None


def _prepare(
    paths: RunPaths, config: Config, data: TrainingData, resume: bool, on_features: Progress | None
) -> _Ready:
    """Features, their whitening by the training pairs alone (or by public ones), and the stores."""
    cache = FeatureCache(config.features)
    features, table = features_of([*data.train, *data.validation], cache, on_features)
    train_features, held_features = features[: len(data.train)], features[len(data.train) :]
    identity = fingerprint(config, data.train, table.signature)
    resumes = resume and paths.checkpoint.is_file()
    found = load_checkpoint(paths.checkpoint, identity) if resumes else None
    whitener = None
    if found is not None:
        whitener = Whitener.read(paths.whitening, identity, config.model.inputs)
    if whitener is None:
        public = public_whitener(config, cache, on_features)
        whitener = own_whitener(config, train_features) if public is None else public
    common = needs_common(config)
    store = to_store(data.train, train_features, whitener, common)
    held = to_store(data.validation, held_features, whitener, common)
    return _Ready(
        store, held, whitener, identity, table.backbone, table.signature, table.notes, found
    )


def _cohorts(config: Config, everyone: int) -> Callable[[int], list[int]]:
    """Draws the clients of a round; with privacy as its accounting presumes."""
    privacy = privacy_of(config, everyone)
    if privacy is None:
        return lambda number: sample_cohort(config.seed, number, everyone, config.federation.cohort)
    rate = privacy.rate
    return lambda number: poisson_cohort(stream(config.seed, "cohort", number), everyone, rate)


def told(row: Mapping[str, Any], delta: float) -> str:
    """A round's row of the history in words."""
    parts = []
    if "loss" in row:
        parts.append(f"loss {row['loss']:.4f}")
    if "validation_accuracy" in row:
        parts.append(f"validation {row['validation_accuracy']:.3f}")
    if "epsilon" in row:
        parts.append(f"epsilon {row['epsilon']:.2f} (delta {delta:g})")
    return ", ".join(parts)


def manifest(algorithm: Algorithm, state: ServerState, whitener: Whitener) -> list[dict[str, Any]]:
    """All that travels between a client and the server, as plain rows."""
    h, p = whitener.projection.shape
    once: dict[str, tuple[str, dict[str, int]]] = dict.fromkeys(
        ("whitening", "prepare"), (ONCE, {"h": h, "p": p})
    )
    rows = [row._asdict() for row in (*payload_rows(once, set(), {}), *algorithm.payload(state))]
    # in an order of their own: a state that was read back has another one
    return sorted(rows, key=lambda row: (row["when"], row["direction"], row["name"]))


@dataclass(frozen=True)
class Journal:
    """Where a run's progress goes: checkpoints of the run called `identity`, a tracker, and whoever
    watches."""

    paths: RunPaths
    identity: str
    tracker: Tracker
    on_round: OnRound | None = None


def run_rounds(
    f: FederationConfig, algorithm: Algorithm, clients: Any,
    start: tuple[ServerState, list[dict[str, Any]]], cohort: Callable[[int], list[int]],
    validate: Callable[[ServerState], dict[str, float]], journal: Journal,
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
                state, diagnostics = algorithm.apply(now[0], clients, cohort(now[0].round))
            except BudgetError as error:
                logger.warning("%s; training ends after round %d", error, now[0].round)
                break
            row: dict[str, Any] = {"round": state.round, **diagnostics}
            if state.round % f.validate_every == 0 and state.round < f.rounds:
                row |= validate(state)
            # what is served is validated: for some methods, after a last exchange
            elif state.round == f.rounds:
                final = algorithm.finalise(state, clients)
                row |= validate(final)
            now = (state, [*now[1], row])
            _warn_where_nothing_is_learnt(now[1])
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
    now = (algorithm.finalise(now[0], clients) if final is None else final, now[1])
    save(finished=True)
    return now


def _warn_where_nothing_is_learnt(history: list[dict[str, Any]]) -> None:
    """Say it once, when the loss has been that of a coin for so many rounds."""
    said = [row.get("recon", row.get("loss")) for row in history]
    flat = [loss is not None and abs(loss - math.log(2)) < COIN for loss in said]
    first = len(flat) == PATIENT or (len(flat) > PATIENT and not flat[-PATIENT - 1])
    if first and all(flat[-PATIENT:]):
        logger.warning(
            "rounds %d to %d have learnt nothing: the loss is that of a coin, %.4f; look at the"
            " features and at their whitening (one client may have spoilt it), and at"
            " federation.learning_rate", len(flat) - PATIENT + 1, len(flat), math.log(2),
        )  # fmt: skip


def _claim(paths: RunPaths, config: Config, resume: bool) -> None:
    if not resume:
        claim(
            paths.root, "continue an interrupted run with --resume, or choose another --out",
            ignored=KEPT,
        )  # fmt: skip
        return
    if load_config(paths).model_dump(exclude=ELSEWHERE) != config.model_dump(exclude=ELSEWHERE):
        raise BadInputError(
            f"{paths.root}: was trained with other settings; resume it with --resume --out alone"
        )
    if paths.checkpoint.is_file():
        read_data(paths.root, config)  # or it is refused, before anything is loaded


def _describe(config: Config, data: TrainingData, ready: _Ready) -> dict[str, Any]:
    """What `data.json` holds."""
    content = {
        "fedvpa": __version__,
        "identity": ready.identity,
        "settings": settings_hash(config),
        "backbone": ready.backbone,
        "signature": ready.signature,
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
        "notes": list(data.notes),
        "texts": dict(ready.texts),
    }
    return with_checksum(content)
