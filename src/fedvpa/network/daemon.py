"""A networked client: it owns its pairs, their features and its private state, and answers the
server's requests.

What a request may do is settled here, whatever its sender says of it: which features are read,
which code is run and whether an answer is masked are the client's own decisions (`client.yaml`).
What goes wrong reaches the server as a code (`fedvpa.network.codes`), and this client's log in
words.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from fedvpa.config import Config
from fedvpa.data.partition import ClientPairs, split_off, without_duplicates
from fedvpa.data.reading import read_pairs
from fedvpa.errors import BadInputError, FedvpaError
from fedvpa.evaluation.protocol import validation
from fedvpa.experiment.build import build_algorithm, build_clients, needs_common
from fedvpa.experiment.dataset import to_store
from fedvpa.features.cache import FeatureCache
from fedvpa.features.whitening import Whitener, WhiteningSums
from fedvpa.federated.clients import SimulatedClients
from fedvpa.federated.exchanges import EXCHANGES, may_hold
from fedvpa.federated.messages import PROTOTYPES, broadcast_of, reply_of, section, under
from fedvpa.files import write_atomically
from fedvpa.foreign import harmless
from fedvpa.network.answers import BayesAnswers, S, SelectorAnswers, round_of
from fedvpa.network.codes import RefusedError, as_code
from fedvpa.network.records import populations_of
from fedvpa.network.serve import describe, travels
from fedvpa.network.settings import ClientSettings
from fedvpa.network.wire import Packet, flatten, pack, subject, unpack
from fedvpa.parts import REFERENCE
from fedvpa.records import PreferencePair
from fedvpa.types import Params, ServerState

logger = logging.getLogger("fedvpa")

READING_SECONDS = 20.0
"""How long a greeting waits for features; less than the server's timeout."""
IN_THE_CLEAR = frozenset(kind for kind, e in EXCHANGES.items() if e.tells_nothing)
"""Requests whose answers say nothing of a client's pairs."""


class Client(SelectorAnswers, BayesAnswers):
    """Answers requests (bytes in, bytes out). Its state is one file, replaced atomically before an
    answer leaves."""

    def __init__(self, settings: ClientSettings, folder: Path) -> None:
        self.settings = settings
        self.state_folder = folder / settings.state
        self._data = str(folder / settings.data)
        self._config: Config | None = None
        self._identity = ""
        self._index, self._columns, self._clients = 0, 0, 1
        self._features: tuple[ClientPairs, ClientPairs, list[Tensor], str] | None = None
        self._reading: Future[tuple[ClientPairs, ClientPairs, list[Tensor], str]] | None = None
        self._side: tuple[str, Any, Any] | None = None
        self._one_at_a_time = Lock()
        self._told = ""

    def answer(self, blob: bytes) -> bytes:
        """Reply to one request in the clear; what went wrong is a reply too, as a code."""
        try:
            _, reply = self._handled(blob, secure=False)
            return pack(Packet({"ok": True, **reply.header}, reply.tensors))
        except RefusedError as error:
            return pack(Packet({"ok": False, "code": error.code}, {}))

    def numbers(self, blob: bytes) -> tuple[str, bytes]:
        """Reply to one request as a flat float32 vector, which is masked before it leaves this
        machine; and the subject of the vector: two sums of one subject show their difference.

        Raises:
            RefusedError: there is no answer; its code may be sent.
        """
        packet, reply = self._handled(blob, secure=True)
        kind = str(packet.header["kind"])
        return subject(self._identity, packet), flatten(kind, reply.tensors)

    def _handled(self, blob: bytes, *, secure: bool) -> tuple[Packet, Packet]:
        """The request and the reply to it.

        Raises:
            RefusedError: there is none.
        """
        with self._one_at_a_time, self._refusing():
            packet = unpack(blob)
            kind = str(packet.header.get("kind"))
            handler: Callable[[Packet], Packet] | None = getattr(self, f"_on_{kind}", None)
            if kind not in EXCHANGES or handler is None:
                raise RefusedError("unknown-request", f"unknown request '{harmless(kind, 40)}'")
            if self.settings.secure_only and not secure and kind not in IN_THE_CLEAR:
                raise RefusedError("secure-only", f"'{kind}' is answered in secure sums alone")
            reply = handler(packet)
            for name in reply.tensors:
                if not may_hold(kind, name):
                    raise RefusedError("failed", f"'{name}' is not part of a reply to '{kind}'")
            return packet, reply

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Whatever goes wrong is written to the log of this client, and raised as a code."""
        try:
            yield
        except Exception as error:
            found = as_code(error)
            level = logging.INFO if found.code == "not-ready" else logging.ERROR
            logger.log(level, "%s: [%s] %s", self.settings.name, found.code, found)
            if found.code == "failed" and not isinstance(error, FedvpaError):
                logger.exception("%s: a request could not be answered", self.settings.name)
            raise found from error

    def _on_hello(self, packet: Packet) -> Packet:
        """Learn the settings; say who this is, and which features these are."""
        h = packet.header
        names, mine = [str(name) for name in h["clients"]], self.settings.name
        if mine not in names:
            raise RefusedError(
                "not-invited", f"the server knows no client '{mine}'; add it to its server.yaml"
            )
        config = self._agreed(h["config"])
        if (self._identity, self._config) != (str(h["run"]), config):
            self._identity, self._config, self._side = str(h["run"]), config, None
            self._features = self._reading = None
        self._index, self._columns, self._clients = names.index(mine), int(h["columns"]), len(names)
        if self._reading is None:  # computing features may take long; the server asks again
            self._reading = ThreadPoolExecutor(1).submit(self._own_features)
        try:
            _, _, (own, _), signature = self._reading.result(READING_SECONDS)
        except TimeoutError:
            raise RefusedError("not-ready", "features are being computed") from None
        except BaseException:
            self._reading = None  # a file that was missing may be there the next time
            raise
        width = own.shape[-1]
        if self._told != self._identity:  # what leaves, by this client's own reckoning
            self._told = self._identity
            logger.info("%s: features %s, width %d", mine, signature, width)
            for line in self._leaves(names, width):
                logger.info("%s", line)
        return Packet({"name": mine, "signature": signature, "width": width}, {})

    def _agreed(self, given: Any) -> Config:
        """The server's settings, less what is this client's own: its backbone, its device, and code
        that is not fedvpa's.

        Raises:
            RefusedError: they name a part that this client has not agreed to.
        """
        text = json.dumps({k: v for k, v in given.items() if k not in ("features", "data", "out")})
        for name in sorted(set(REFERENCE.findall(text)) - set(self.settings.parts)):
            raise RefusedError(
                "parts",
                f"the server asks for the part {harmless(name)}, which would be imported here; if"
                " you agree, name it under parts in client.yaml",
            )
        asked, own = given["features"], self.settings
        if asked["backbone"] != own.backbone:
            logger.info(
                "%s: the server's backbone is %s; this client reads %s (backbone in client.yaml)",
                own.name, harmless(asked["backbone"]), own.backbone,
            )  # fmt: skip
        features = {**asked, "backbone": own.backbone, "device": own.device}
        try:
            return Config.model_validate({**given, "features": features})
        except ValueError as error:
            raise RefusedError("unread", f"settings of another version: {error}") from error

    def _leaves(self, names: Sequence[str], width: int) -> list[str]:
        """The payload manifest of these settings, in words."""
        return describe(travels(self._known(), names, width), self.settings.secure_only)

    def _check_pairs(self, pairs: Sequence[PreferencePair]) -> None:
        """Refuse to go on in a run that was joined with other pairs. The fingerprint stays here.

        Raises:
            RefusedError: they are others.
        """
        keys = sorted(f"{p.content_key()}{p.chosen_is_first()}" for p in pairs)
        self._check_same(
            "pairs",
            "".join(keys),
            f"{self._data}: holds other pairs than when '{self.settings.name}' joined this run; put"
            " them back, or let the run go on with the new ones",
        )

    def _check_same(self, what: str, content: str, otherwise: str) -> None:
        """Refuse something that is not as it was the first time. The fingerprint stays here.

        Raises:
            RefusedError: it is not, and `client.yaml` does not allow that.
        """
        found = hashlib.sha256(content.encode()).hexdigest()
        # what a client is asked about is held across runs, what it holds within one
        folder = self.state_folder if what == "asked" else self._file(what).parent
        file = folder / f"{what}.sha256"
        before = file.read_text() if file.is_file() else found
        if before != found and self.settings.pairs == "fixed":
            raise RefusedError("other-pairs", f"{otherwise} (pairs: may-change in client.yaml)")
        if before != found:
            logger.warning("%s", otherwise)
        write_atomically(file, found.encode(), private=True)

    def _on_scale(self, packet: Packet) -> Packet:
        """Logarithms of the size of every dimension of dh and of h, so that secure sums of them
        can be scaled."""
        _, _, (own, _), _ = self._own_features()
        wide = own.double()
        each = torch.stack([(wide[:, 0] - wide[:, 1]).square().mean(0), wide.square().mean((0, 1))])
        return Packet({}, {"scale": 0.5 * (each + 1e-12).log()})

    def _on_whitening(self, packet: Packet) -> Packet:
        """Sums over the training pairs, which no label changes; divided by a scale, if one is
        given."""
        _, _, (own, _), _ = self._own_features()
        sums = WhiteningSums.of(own)
        if "scale" in packet.tensors:
            scale = packet.tensors["scale"]
            sums = WhiteningSums(
                sums.moment / torch.outer(scale[0], scale[0]), sums.total / scale[1], sums.pairs
            )
        return Packet({}, dict(sums._asdict()))

    def _on_prepare(self, packet: Packet) -> Packet:
        """Keep the whitening."""
        whitener = Whitener(packet.tensors["centre"], packet.tensors["projection"])
        h, p = self._own_features()[2][0].shape[-1], self._known().model.inputs
        fits = whitener.centre.shape == (h,) and whitener.projection.shape == (h, p)
        if not fits or not whitener.projection.isfinite().all():
            raise RefusedError("unread", "the whitening does not fit this client's features")
        write_atomically(self._file("whitening"), whitener.to_bytes(), private=True)
        self._side = None
        return Packet({"whitening": self._whitening_digest()}, {})

    def _on_train(self, packet: Packet) -> Packet:
        """One local round. Asked for the same round again, it starts from the same private state
        and answers the same."""
        side, number = self._side_of(SimulatedClients), round_of(packet)
        fixed = (PROTOTYPES,) if self._known().prototypes.kind == "fixed" else ()
        broadcast = broadcast_of(number, packet.tensors, fixed)
        tables = self._tables_before(number)
        if "label" in packet.tensors:
            tables["label"] = packet.tensors["label"].view(1)
        ((_, update),) = side.train(broadcast, [0], tables)
        sent = reply_of(update, broadcast.params, side.contract)
        self._save_tables(number, tables, tables | update.private)
        return Packet({"round": number}, sent)

    def _on_settle(self, packet: Packet) -> Packet:
        """Note which component this client belongs to; the answer stays here."""
        own = self._sides()[0].settle(section(packet.tensors, "params"), populations_of(packet)[0])
        write_atomically(self._file("settled"), save(own), private=True)
        return Packet({}, {})

    def _on_validate(self, packet: Packet) -> Packet:
        """Accuracy and negative log-likelihood on the pairs that this client holds out of training;
        zeros if it has none."""
        train, held = self._sides()
        population = {k: v for p in populations_of(packet)[:1] for k, v in p._asdict().items()}
        reached = ServerState(0, section(packet.tensors, "params"), {}, {}, population)
        predictor = build_algorithm(self._known(), self._clients).predictor(reached)
        found = validation(predictor, train.store, held.store, torch.full((1,), -1))
        return Packet({}, dict(found._asdict()))

    def _known(self) -> Config:
        if self._config is None:
            raise RefusedError("not-greeted", "started anew")
        return self._config

    def _own_features(self) -> tuple[ClientPairs, ClientPairs, list[Tensor], str]:
        """Training and validation pairs, their features, and the backbone's signature; computed
        once, then from the cache."""
        config = self._known()
        if self._features is None:
            pairs = without_duplicates(
                read_pairs(self._data, self.settings.split, columns=self.settings.columns).pairs
            )
            if len(pairs) < 2:
                raise BadInputError(
                    f"{self._data}: holds {len(pairs)} pair, but a client needs at least 2"
                )
            self._check_pairs(pairs)
            features = config.features.model_dump_json(exclude={"device"})
            self._check_same(
                "asked",
                f"{config.data.validation_share}|{config.data.content}|{config.seed}|{features}",
                "the server asks for another division of the pairs (seed, validation_share), or for"
                " other features of them, than before: what differs between two such sums would"
                " tell single pairs; if you trust it, allow that",
            )
            train, held = split_off(
                ClientPairs(self.settings.name, None, tuple(pairs)),
                config.data.validation_share,
                config.seed,
                config.data.content,
            )
            table = FeatureCache(config.features).pairs([*train.pairs, *held.pairs])
            parts = list(table.values.split([len(train.pairs), len(held.pairs)]))
            self._features = (train, held, parts, table.signature)
        return self._features

    def _side_of(self, kind: type[S]) -> S:
        side = self._sides()[0]
        if not isinstance(side, kind):
            raise RefusedError("unknown-request", f"{self._known().method} has no such request")
        return side

    def _sides(self) -> tuple[Any, Any]:
        """The client's side of the algorithm over its training pairs, and over those it holds
        out."""
        config, digest = self._known(), self._whitening_digest()
        if not digest:
            raise RefusedError("not-greeted", "the whitening has not been sent")
        if self._side is None or self._side[0] != digest:
            whitener = Whitener.read(self._file("whitening"))
            train, held, (own, rest), _ = self._own_features()
            common = needs_common(config)
            stores = [to_store([c], [f], whitener, common) for c, f in ((train, own), (held, rest))]
            me = torch.tensor([self._index])
            sides = [build_clients(config, store, self._clients, identity=me) for store in stores]
            self._side = (digest, sides[0], sides[1])
        return self._side[1], self._side[2]

    def _file(self, name: str) -> Path:
        run = hashlib.sha256(self._identity.encode()).hexdigest()[:16]
        return self.state_folder / run / f"{name}.safetensors"

    def _whitening_digest(self) -> str:
        path = self._file("whitening")
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""

    def _tables_before(self, number: int) -> Params:
        """The private tables as they were at the start of a round.

        Raises:
            WireError: the round is older than the last one that was trained: its start is no longer
                known.
        """
        path = self._file("private")
        fresh = {"label": torch.full((1,), -1)} | (
            {"prior_logit": torch.zeros(1, self._columns)} if self._columns else {}
        )
        if not path.is_file():
            return fresh
        try:
            saved = load_file(path)
        except (SafetensorError, OSError) as error:
            raise RefusedError(
                "state", f"{path}: damaged: {error}; remove it to start this client afresh"
            ) from error
        last = int(saved["round"])
        if number < last:
            raise RefusedError(
                "replayed",
                f"round {number} was asked for, but round {last} has been trained already",
            )
        return section(saved, "before" if number == last else "after")

    def _save_tables(self, number: int, before: Params, after: Params) -> None:
        tensors = {"round": torch.tensor(number)} | under("before", before) | under("after", after)
        write_atomically(
            self._file("private"),
            save({k: v.contiguous().clone() for k, v in tensors.items()}),
            private=True,
        )
