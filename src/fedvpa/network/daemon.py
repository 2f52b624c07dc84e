"""A networked client: it owns its pairs, their features and its private state, and answers the
server's requests.

It outlives the processes that Flower starts for each message (see `relay`), so that neither torch
nor the features are loaded anew every round, and so that the code which the server's operator ships
never touches the data: it only passes blobs on.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock

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
from fedvpa.experiment.train import manifest
from fedvpa.features.cache import FeatureCache
from fedvpa.features.whitening import Whitener, WhiteningSums
from fedvpa.federated.batch import Roster
from fedvpa.federated.clients import SimulatedClients
from fedvpa.federated.exchanges import EXCHANGES, may_hold
from fedvpa.federated.messages import PROTOTYPES, broadcast_of, reply_of, section, under
from fedvpa.files import write_atomically
from fedvpa.network.records import populations_of
from fedvpa.network.serve import describe
from fedvpa.network.settings import ClientSettings
from fedvpa.network.wire import NOT_READY, UNGREETED, Packet, WireError, flatten, pack, unpack
from fedvpa.selector.predictor import VariationalPredictor
from fedvpa.types import Params

logger = logging.getLogger("fedvpa")

READING_SECONDS = 20.0
"""How long a greeting waits for features; less than the server's timeout."""
IN_THE_CLEAR = frozenset(kind for kind, e in EXCHANGES.items() if e.tells_nothing)
"""Requests whose answers say nothing of a client's pairs."""


class Client:
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
        self._side: tuple[str, SimulatedClients, SimulatedClients] | None = None
        self._one_at_a_time = Lock()
        self._told = ""

    def answer(self, blob: bytes) -> bytes:
        """Reply to one request; what went wrong is a reply too, with the reason and without any
        data."""
        with self._one_at_a_time:
            return self._answer(blob)

    def _answer(self, blob: bytes) -> bytes:
        secure = False
        try:
            packet = unpack(blob)
            kind, secure = str(packet.header.get("kind")), bool(packet.header.get("secure"))
            handler: Callable[[Packet], Packet] | None = getattr(self, f"_on_{kind}", None)
            if kind not in EXCHANGES or handler is None:
                raise WireError(f"unknown request '{kind}'")
            if self.settings.secure_only and not secure and kind not in IN_THE_CLEAR:
                raise WireError(
                    f"client '{self.settings.name}' answers '{kind}' in secure sums alone"
                    " (secure_only)"
                )
            reply = handler(packet)
            for name in reply.tensors:
                if not may_hold(kind, name):
                    raise WireError(
                        f"refused to send '{name}', which the reply to '{kind}' does not hold"
                    )
            if secure:  # a flat vector that is masked before it leaves this machine
                return b"\x01" + flatten(kind, reply.tensors)
            return pack(Packet({"ok": True, **reply.header}, reply.tensors))
        except FedvpaError as error:
            reason = f"{type(error).__name__}: {error}"
        except OSError as error:  # a full disk: the state is the old one, and nothing was sent
            reason = f"the client could not save its state: {error}"
        # a message of another version, say: it must not end the client, nor tell what it holds
        except Exception as error:
            logger.exception("%s: a request could not be answered", self.settings.name)
            reason = f"the request could not be answered ({type(error).__name__})"
        logger.log(
            logging.INFO if NOT_READY in reason else logging.ERROR,
            "%s: %s",
            self.settings.name,
            reason,
        )
        return (
            b"\x00" + reason.encode()
            if secure
            else pack(Packet({"ok": False, "error": reason}, {}))
        )

    def _on_hello(self, packet: Packet) -> Packet:
        """Learn the settings; say who this is, which backbone its features come from and which
        whitening it holds."""
        h = packet.header
        config = Config.model_validate(h["config"])
        if (self._identity, self._config) != (h["run"], config):
            self._identity, self._config, self._side = h["run"], config, None
            self._features = self._reading = None
        if self.settings.name not in h["clients"]:
            raise BadInputError(
                f"the server does not know a client '{self.settings.name}'; add it to server.yaml"
            )
        self._index, self._columns = int(h["clients"].index(self.settings.name)), int(h["columns"])
        self._clients = len(h["clients"])
        if self._reading is None:  # computing features may take long; the server asks again
            self._reading = ThreadPoolExecutor(1).submit(self._own_features)
        try:
            _, _, _, signature = self._reading.result(READING_SECONDS)
        except TimeoutError:
            raise WireError(
                f"{NOT_READY}: client '{self.settings.name}' is still computing its features"
            ) from None
        except BaseException:
            self._reading = None  # a file that was missing may be there the next time
            raise
        width = self._own_features()[2][0].shape[-1]
        if self._told != self._identity:  # what leaves, by this client's own reckoning
            self._told = self._identity
            for line in self._leaves(h["clients"], width):
                logger.info("%s", line)
        return Packet({"name": self.settings.name, "signature": signature, "width": width}, {})

    def _leaves(self, names: Sequence[str], width: int) -> list[str]:
        """The payload manifest of these settings, in words."""
        config = self._known()
        algorithm = build_algorithm(config, len(names))
        state = algorithm.init(Roster(tuple(names), (None,) * len(names)))
        whitener = Whitener(torch.zeros(width), torch.zeros(width, config.model.inputs))
        return describe(manifest(algorithm, state, whitener), self.settings.secure_only)

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
        write_atomically(self._file("whitening"), whitener.to_bytes())
        self._side = None
        return Packet({"whitening": self._whitening_digest()}, {})

    def _on_train(self, packet: Packet) -> Packet:
        """One local round. Asked for the same round again, it starts from the same private state
        and answers the same."""
        side, number = self._sides()[0], int(packet.header["round"])
        fixed = (PROTOTYPES,) if self._known().prototypes.kind == "fixed" else ()
        broadcast = broadcast_of(number, packet.tensors, fixed)
        tables = self._tables_before(number)
        if "label" in packet.tensors:
            tables["label"] = packet.tensors["label"].view(1)
        ((_, update),) = side.train(broadcast, [0], tables)
        sent = reply_of(update, broadcast.params, side.contract)
        self._save_tables(number, tables, tables | update.private)
        return Packet({"round": number}, sent)

    def _on_posterior(self, packet: Packet) -> Packet:
        _, found = self._sides()[0].posteriors(
            section(packet.tensors, "params"), withhold=packet.header["withhold"]
        )
        return Packet({}, {k: v[0] for k, v in found._asdict().items()})

    def _on_moments(self, packet: Packet) -> Packet:
        side, params = self._sides()[0], section(packet.tensors, "params")
        found = side.moments(params, packet.tensors["centre"], withhold=packet.header["withhold"])
        return Packet({}, dict(found._asdict()))

    def _on_scores(self, packet: Packet) -> Packet:
        found = self._sides()[0].scores(section(packet.tensors, "params"), populations_of(packet))
        return Packet({}, dict(found._asdict()))

    def _on_settle(self, packet: Packet) -> Packet:
        """Note which component this client belongs to; the answer stays here."""
        own = self._sides()[0].settle(section(packet.tensors, "params"), populations_of(packet)[0])
        write_atomically(self._file("settled"), save(own))
        return Packet({}, {})

    def _on_validate(self, packet: Packet) -> Packet:
        """Accuracy and negative log-likelihood on the pairs that this client holds out of training;
        zeros if it has none."""
        train, held = self._sides()
        populations = populations_of(packet)
        predictor = VariationalPredictor(
            train.selector,
            section(packet.tensors, "params"),
            populations[0] if populations else None,
            self._known().inference.kind,
        )
        found = validation(predictor, train.store, held.store, torch.full((1,), -1))
        return Packet({}, dict(found._asdict()))

    def _known(self) -> Config:
        if self._config is None:
            raise WireError(f"{UNGREETED}: the client has been restarted")
        return self._config

    def _own_features(self) -> tuple[ClientPairs, ClientPairs, list[Tensor], str]:
        """Training and validation pairs, their features, and the backbone's signature; computed
        once, then from the cache."""
        config = self._known()
        if self._features is None:
            pairs = without_duplicates(read_pairs(self._data, self.settings.split).pairs)
            if len(pairs) < 2:
                raise BadInputError(
                    f"{self._data}: holds {len(pairs)} pair, but a client needs at least 2"
                )
            train, held = split_off(
                ClientPairs(self.settings.name, None, tuple(pairs)),
                config.data.validation_share,
                config.seed,
            )
            table = FeatureCache(config.features).pairs([*train.pairs, *held.pairs])
            parts = list(table.values.split([len(train.pairs), len(held.pairs)]))
            self._features = (train, held, parts, table.signature)
        return self._features

    def _sides(self) -> tuple[SimulatedClients, SimulatedClients]:
        """The client's side of the algorithm over its training pairs, and over those it holds
        out."""
        config, digest = self._known(), self._whitening_digest()
        if not digest:
            raise WireError(f"{UNGREETED}: the client has not been sent the whitening")
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
            raise WireError(
                f"{path}: damaged: {error}; remove it to start this client afresh"
            ) from error
        last = int(saved["round"])
        if number < last:
            raise WireError(
                f"round {number} was asked for, but round {last} has been trained already: a"
                " replayed request"
            )
        return section(saved, "before" if number == last else "after")

    def _save_tables(self, number: int, before: Params, after: Params) -> None:
        tensors = {"round": torch.tensor(number)} | under("before", before) | under("after", after)
        write_atomically(
            self._file("private"), save({k: v.contiguous().clone() for k, v in tensors.items()})
        )
