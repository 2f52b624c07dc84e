"""The server's run of a federation: greet, whiten, rounds, checkpoints; resumable after
anything."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import SystemRandom
from typing import Any

from fedvpa import __version__
from fedvpa.checkpoint import load_checkpoint
from fedvpa.config import Config
from fedvpa.errors import BadInputError, FedvpaError
from fedvpa.experiment.build import build_algorithm
from fedvpa.experiment.dataset import public_whitener
from fedvpa.experiment.opening import ELSEWHERE, settings_hash, with_checksum
from fedvpa.experiment.run import RunPaths, load_config, save_config
from fedvpa.experiment.tracking import open_tracker
from fedvpa.experiment.train import Journal, manifest, run_rounds, told
from fedvpa.features.cache import FeatureCache
from fedvpa.features.whitening import Whitener
from fedvpa.federated.accounting import privacy_of
from fedvpa.federated.algorithm import Algorithm, sample_cohort
from fedvpa.federated.batch import Roster
from fedvpa.federated.bayes.private import PrivateBayes
from fedvpa.federated.messages import Contract
from fedvpa.federated.release import PrivateRelease, secret_noise
from fedvpa.federated.variational import FederatedVariational
from fedvpa.files import make_folder, write_atomically
from fedvpa.network.bayes import NetworkedBayes
from fedvpa.network.clients import Networked, NetworkedClients
from fedvpa.network.conduct import Conduct
from fedvpa.network.settings import ServerSettings, read_settings, training_config
from fedvpa.network.transport import Expected, Transport
from fedvpa.types import Population, ServerState

logger = logging.getLogger("fedvpa")

CONDUCT = "conduct.json"
"""Who has sent what no client of this program sends, in the run's directory."""
LOG = "log.txt"
"""What the run says, in its directory."""
PATIENCE = 600.0
"""Seconds that a run waits for its clients to connect."""


def serve(
    settings_path: Path, transport: Transport, bound: Mapping[str, int] | None = None,
    features: Expected | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Run the federation of a `server.yaml` to its end, from its last checkpoint if there is one.

    Args:
        settings_path: the `server.yaml`.
        transport: reaches the clients' nodes.
        bound: the node of every client, by the key that it was registered with.
        features: what clients have to read, if it is known already.

    Raises:
        BadInputError: unusable settings, or a run directory of other settings.
        CohortError: too few clients, or too few usable replies; the run can be resumed.
    """
    settings = read_settings(settings_path, ServerSettings)
    config = training_config(settings)
    # it holds what the server sees of single clients
    paths = RunPaths(make_folder(settings_path.parent / settings.run, private=True))
    status = Status(paths.root / "status.json", config.federation.rounds)
    try:
        kind = NetworkedBayes if config.entry.summed else NetworkedClients
        clients = kind(
            settings, config, transport, bound=bound or {},
            features=features or expected_features(settings, config),
            conduct=Conduct.read(paths.root / CONDUCT),
        )  # fmt: skip
        return _serve(settings, config, paths, clients, status)
    except BaseException as error:
        status.say(
            "failed",
            message=f"{error}" if isinstance(error, FedvpaError | OSError) else repr(error),
        )
        raise


class Status:
    """What the run is doing, in a small file for other processes."""

    def __init__(self, path: Path, rounds: int) -> None:
        self._path, self._rounds = path, rounds

    def say(self, state: str, **more: Any) -> None:
        """Replace the file."""
        line = {"state": state, "rounds": self._rounds, "pid": os.getpid(), **more}
        write_atomically(self._path, (json.dumps(line) + "\n").encode())


class Ledger:
    """How many rounds were begun, written down before anything of them can be released: a round
    that a crash undid counts."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def begun(self) -> int:
        """Rounds that were begun in all, those done again included."""
        return int(json.loads(self._path.read_text())["begun"]) if self._path.is_file() else 0

    def begin(self) -> None:
        """One more."""
        write_atomically(self._path, (json.dumps({"begun": self.begun() + 1}) + "\n").encode())

    def lost(self, done: int) -> int:
        """Rounds that were begun and are not among the `done` ones of the state."""
        return max(0, self.begun() - done)


def expected_features(settings: ServerSettings, config: Config) -> Expected:
    """Which features the clients of these settings read: by the server's own copy of the backbone,
    or as `server.yaml` says.

    Raises:
        BadInputError: the server has no such backbone.
    """
    if settings.features is not None:
        return Expected(settings.features.signature, settings.features.width)
    try:
        signature, width = FeatureCache(config.features).identity()
    except BadInputError as error:
        raise BadInputError(
            f"{error}; the server needs the backbone to know which features its clients read. A"
            " server without it is told: features: {signature: ..., width: ...} in server.yaml, as"
            " a client's log says"
        ) from error
    return Expected(signature, width)


def _serve(
    settings: ServerSettings, config: Config, paths: RunPaths, clients: Networked,
    status: Status,
) -> dict[str, Any]:  # fmt: skip
    # 1. The run's own name, its algorithm, and clients that are connected and have the whitening.
    started = time.perf_counter()
    identity = _identity(paths, settings, config, clients.features.signature)
    algorithm = build_algorithm(config, len(settings.clients), noise=secret_noise)
    clients.join(identity["run"], *_promised(algorithm))
    status.say("waiting", round=0)
    fingerprint = _fingerprint(config, settings, identity["run"])
    whitener = _whitened(config, paths, clients, fingerprint)
    # 2. Where to begin.
    ledger = Ledger(paths.root / "ledger.json")
    roster = Roster(settings.clients, (None,) * len(settings.clients))
    state, history = algorithm.init(roster), list[dict[str, Any]]()
    if paths.checkpoint.is_file():
        found = load_checkpoint(paths.checkpoint, fingerprint)
        state, history = found.state, found.history
        _say([f"goes on after round {state.round} of {config.federation.rounds}"])
        if found.finished:
            status.say("finished", round=state.round)
            return {"run": str(paths.root), "rounds": state.round}
    algorithm = _with_losses(algorithm, ledger, state, config.federation.rounds)
    # 3. What will travel is said before anything does.
    described = _described(settings, config, fingerprint, clients.features.signature)
    paths.write_json("data.json", described)
    rows = manifest(algorithm, state, whitener)
    paths.write_json("manifest.json", rows)
    _say(describe(rows, settings.secure))
    # 4. The rounds.
    seconds: list[float] = []

    def on_round(done: int, total: int, row: dict[str, Any]) -> None:
        seconds.append(row["seconds"])
        status.say("running", round=done, seconds=row["seconds"], loss=row.get("loss"))
        words = f"{row['seconds']:.2f} s, {told(row, config.privacy.delta)}"
        logger.info("round %d of %d: %s", done, total, words)

    with open_tracker(config.tracker, paths.root, config) as tracker:
        journal = Journal(paths, fingerprint, tracker, on_round)
        # clients remember one round back
        every_round = config.federation.model_copy(update={"checkpoint_every": 1})
        state, history = run_rounds(
            every_round, algorithm, clients, (state, history), _cohorts(config, clients, ledger),
            lambda reached: _validate(config, clients, reached), journal,
        )  # fmt: skip
    # 5. What is left of it.
    result = {
        "run": str(paths.root), "rounds": state.round, "clients": len(clients),
        "seconds": time.perf_counter() - started,
        "seconds_per_round": sorted(seconds)[len(seconds) // 2] if seconds else None,
        # they tell how many took part
        "bytes": None if config.privacy.enabled else clients.traffic,
        "left_out": clients.conduct.out,
    }  # fmt: skip
    _keep(paths, history, manifest(algorithm, state, whitener), result)
    status.say("finished", round=state.round)
    return result


def _keep(
    paths: RunPaths, history: list[dict[str, Any]], rows: Any, result: dict[str, Any]
) -> None:
    """Write what a reader of the run wants to see without opening the checkpoint."""
    paths.write_json("history.json", history)
    paths.write_json("manifest.json", rows)
    paths.write_json("federation.json", result | {"history_rounds": len(history)})
    logger.info("finished: %s", json.dumps(result))


def _say(lines: Sequence[str]) -> None:
    for line in lines:
        logger.info("%s", line)


def _whitened(config: Config, paths: RunPaths, clients: Networked, identity: str) -> Whitener:
    """The whitening of the run, made in its first attempt, once enough clients are there."""
    if paths.whitening.is_file():
        clients.whitener = Whitener.read(paths.whitening, identity, config.model.inputs)
    clients.wait(PATIENCE)
    if clients.whitener is None:
        public = public_whitener(config, FeatureCache(config.features))
        whitener = clients.fit_whitening() if public is None else clients.hand_out(public)
        write_atomically(paths.whitening, whitener.to_bytes(identity))
    assert clients.whitener is not None
    return clients.whitener


def _promised(algorithm: Algorithm) -> tuple[Contract, int]:
    """What clients send in every round, and the columns of their tables of private logits."""
    if isinstance(algorithm, FederatedVariational):
        return algorithm.contract, algorithm.prior.columns
    return Contract(), 0


def _with_losses(
    algorithm: Algorithm, ledger: Ledger, state: ServerState, rounds: int
) -> Algorithm:
    """The algorithm whose accounting knows of releases that a crash undid."""
    if not isinstance(algorithm, FederatedVariational | PrivateBayes):
        return algorithm
    if not isinstance(algorithm.release, PrivateRelease):
        return algorithm
    lost = ledger.lost(state.round)
    judged = algorithm.release.privacy.judged
    # a fit may have been part of any of them; a width is chosen after the last round
    unfitted = state.round + 1 >= rounds if judged else not state.population
    lost_fits = lost if unfitted else 0
    return replace(algorithm, release=algorithm.release.with_lost(lost, lost_fits))


def _cohorts(config: Config, clients: Networked, ledger: Ledger) -> Callable[[int], list[int]]:
    """Draws the clients of a round among those who are connected."""
    privacy = privacy_of(config, len(clients))

    def cohort(round_number: int) -> list[int]:
        online = clients.wait(PATIENCE)
        # whoever is not connected does not take part: the chance of everybody stays within q
        if privacy is not None:
            chance = SystemRandom()
            ledger.begin()
            return [place for place in online if chance.random() < privacy.rate]
        size = config.federation.cohort
        return [online[i] for i in sample_cohort(config.seed, round_number, len(online), size)]

    return cohort


def _validate(config: Config, clients: Networked, reached: ServerState) -> dict[str, float]:
    if config.privacy.enabled:
        return {}  # it would be a release that nobody accounts for
    population = Population(**reached.population) if reached.population else None
    return clients.validate(reached.params, population)


def travels(config: Config, names: Sequence[str], width: int) -> list[dict[str, Any]]:
    """The payload manifest of these settings, for clients of these names and features so wide."""
    algorithm = build_algorithm(config, len(names))
    state = algorithm.init(Roster(tuple(names), (None,) * len(names)))
    return manifest(algorithm, state, Whitener.blank(width, config.model.inputs))


def describe(rows: list[dict[str, Any]], secure: bool = False) -> list[str]:
    """The payload manifest in words: what travels between a client and the server, and how large it
    is."""
    out = ["what travels between a client and the server, and nothing else:"]
    for direction, word in (("down", "to the client"), ("up", "to the server")):
        mine = [row for row in rows if row["direction"] == direction]
        each = sum(row["bytes"] for row in mine if row["when"] == "every round")
        out.append(f"  {word}: {each:,} bytes every round")
        out += [
            f"    {row['name']} {list(row['shape'])}: {row['bytes']:,} bytes, {row['when']}"
            for row in mine
        ]
    if secure:
        out.append(
            "  to the server all of it is masked, eight bytes a number, and only its sum over"
            " clients can be opened"
        )
    return out


def _identity(
    paths: RunPaths, settings: ServerSettings, config: Config, signature: str
) -> dict[str, Any]:
    """The run's own name, made once; the same settings have to be given when it goes on."""
    if paths.config.is_file():
        if load_config(paths).model_dump(exclude=ELSEWHERE) != config.model_dump(exclude=ELSEWHERE):
            raise BadInputError(
                f"{paths.root}: was begun with other settings; name another run in server.yaml"
            )
        found: dict[str, Any] = json.loads((paths.root / "identity.json").read_text())
        if found["clients"] != list(settings.clients):
            raise BadInputError(
                f"{paths.root}: was begun with other clients; name another run in server.yaml"
            )
        if found.get("signature", signature) != signature:
            raise BadInputError(
                f"{paths.root}: was begun with features of another backbone"
                f" ({found['signature']}, now {signature}); name another run in server.yaml"
            )
        return found
    identity = {
        "run": uuid.uuid4().hex, "clients": list(settings.clients), "signature": signature
    }  # fmt: skip
    paths.write_json("identity.json", identity)
    save_config(paths, config)
    return identity


def _fingerprint(config: Config, settings: ServerSettings, run: str) -> str:
    given = [config.model_dump(mode="json", exclude=ELSEWHERE), list(settings.clients), run]
    return hashlib.sha256(json.dumps(given).encode()).hexdigest()


def _described(
    settings: ServerSettings, config: Config, identity: str, signature: str
) -> dict[str, Any]:
    """What the server knows of the data: who takes part."""
    rows = [
        {"name": name, "group": None, "pairs": None, "validation_pairs": None}
        for name in settings.clients
    ]
    content: dict[str, Any] = {
        "fedvpa": __version__,
        "identity": identity,
        "settings": settings_hash(config),
        "backbone": None,
        "signature": signature,
        "clients": rows,
        "skipped": {},
        "first_skipped": [],
    }
    return with_checksum(content)
