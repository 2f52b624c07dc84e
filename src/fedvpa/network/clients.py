"""The clients as the server sees them across a network: what is asked of them, and what of their
answers is believed."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedvpa.config import Config
from fedvpa.errors import BadInputError, RunError
from fedvpa.evaluation.protocol import Validation
from fedvpa.features.whitening import Whitener, WhiteningSums
from fedvpa.federated.components import Moments
from fedvpa.federated.exchanges import EXCHANGES, Layout, field_of, layout, update_layout
from fedvpa.federated.messages import (
    Broadcast,
    Contract,
    Scores,
    Update,
    tensors_of,
    under,
    update_of,
)
from fedvpa.network.checks import checked_update, expected, sensible
from fedvpa.network.records import numbered, opened
from fedvpa.network.settings import ServerSettings
from fedvpa.network.wire import NOT_READY, UNGREETED, Packet, WireError, pack, unflatten
from fedvpa.types import Params, Population, Posterior

logger = logging.getLogger("fedvpa")


MOST_TIMES_MEDIAN = 5.0
"""A client counts for at most so many times the median of its cohort, where clients are weighted by
their pairs."""
MOST_WIDTH = 1 << 16
REFUSED_SECONDS = 30.0
"""A node that was refused may try again after so long: what was wrong with it may have been put
right."""


class CohortError(RunError):
    """Too few clients are connected, or answered in time."""


@runtime_checkable
class Transport(Protocol):
    """Carries blobs to nodes and back."""

    def nodes(self) -> list[int]:
        """Nodes that are connected."""
        ...

    def ask(self, blobs: Mapping[int, bytes], enough: int) -> dict[int, bytes | str]:
        """Replies by node: a blob, or why there is none. Waits for all; once `enough` are there,
        for a grace period more."""
        ...

    def ask_sum(
        self, blobs: Mapping[int, bytes], size: int, least: int
    ) -> tuple[list[int], Float[Tensor, "n"]]:
        """Who took part, and the secure sum of the flat vectors that they answered with; none is
        opened over fewer than `least` clients."""
        ...


@dataclass
class NetworkedClients:
    """The clients of a roster, reached over a transport. A client is known by its place in the
    roster."""

    settings: ServerSettings
    config: Config
    transport: Transport
    run: str
    contract: Contract
    columns: int = 0
    whitener: Whitener | None = None
    _place: dict[int, int] = field(default_factory=dict)
    _again: dict[int, float] = field(default_factory=dict)
    bound: dict[str, int] = field(default_factory=dict)
    signature: str = ""
    width: int = 0
    traffic: dict[str, int] = field(default_factory=lambda: {"down": 0, "up": 0})

    def __len__(self) -> int:
        return len(self.settings.clients)

    def online(self) -> list[int]:
        """Places of the clients that are connected and have been greeted, in ascending order."""
        nodes = self.transport.nodes()
        now = time.monotonic()
        fresh = [n for n in nodes if n not in self._place and now >= self._again.get(n, 0.0)]
        if fresh:
            self._greet(fresh)
        return sorted({self._place[n] for n in nodes if n in self._place})

    def wait(self, patience: float) -> list[int]:
        """Wait until enough clients are connected.

        Raises:
            CohortError: they were not within `patience` seconds.
        """
        wanted = self.settings.min_clients or len(self)
        end = time.monotonic() + patience
        said = -1
        while len(found := self.online()) < wanted:
            if len(found) != said:
                said = len(found)
                logger.info(
                    "%d of %d clients are connected; waiting for %d", said, len(self), wanted
                )
            if time.monotonic() > end:
                missing = [name for i, name in enumerate(self.settings.clients) if i not in found]
                raise CohortError(
                    f"{len(found)} clients are connected after {patience:.0f} s, {wanted} are"
                    " needed; missing: " + ", ".join(missing[:5])
                )
            time.sleep(0.5)
        return found

    def _greet(self, nodes: Sequence[int]) -> None:
        """Tell new nodes the settings; learn who they are; hand out the whitening to those that
        lack it."""
        header = {
            "kind": "hello", "run": self.run, "config": self.config.model_dump(mode="json"),
            "clients": list(self.settings.clients), "columns": self.columns,
        }  # fmt: skip
        blob = pack(Packet(header, {}))
        lacking = []
        for node, reply in self._ask(dict.fromkeys(nodes, blob)).items():
            try:
                packet = opened(reply)
                place = self._admitted(node, packet.header)
            except WireError as error:
                waits = NOT_READY in str(error)
                self._again[node] = time.monotonic() + (1.0 if waits else REFUSED_SECONDS)
                logger.warning(
                    "node %d %s: %s", node, "is waited for" if waits else "is refused", error
                )
                continue
            self._place[node] = place
            logger.info("client '%s' is connected", self.settings.clients[place])
            lacking.append(node)
        if self.whitener is not None and lacking:
            self._hand_out(lacking)

    def _admitted(self, node: int, header: dict[str, Any]) -> int:
        name = str(header.get("name"))
        if name not in self.settings.clients:
            raise WireError(
                f"calls itself '{name}', which is not one of the clients in server.yaml"
            )
        place = self.settings.clients.index(name)
        if self.bound and self.bound.get(name) != node:
            raise WireError(
                f"calls itself '{name}', but its key is not the one that '{name}' was registered"
                " with"
            )
        holders = [n for n, p in self._place.items() if p == place and n != node]
        if any(n in self.transport.nodes() for n in holders):
            raise WireError(
                f"calls itself '{name}', but a client of that name is connected already"
            )
        for n in holders:
            del self._place[n]
        signature = str(header.get("signature"))
        if self.signature and signature != self.signature:
            raise WireError(
                f"client '{name}' reads its features from another backbone, or from other weights"
                " of it"
            )
        width = header.get("width")
        if (
            not isinstance(width, int)
            or not 0 < width <= MOST_WIDTH
            or (self.width and width != self.width)
        ):
            raise WireError(
                f"client '{name}' has features of width {width!r}"
                + (f", not {self.width}" if self.width else "")
            )
        self.signature, self.width = signature, width
        return place

    def fit_whitening(self) -> Whitener:
        """From the sums of everybody who is connected; handed out to them."""
        shapes = self._layout("whitening")
        if self.settings.secure:  # a secure sum carries numbers of a known size
            count, logs = self._secure_sum("scale", {}, {}, self._layout("scale"))
            scale = (logs["scale"] / count).exp()
            found = self._sum("whitening", {}, {"scale": scale}, shapes)
            found |= {
                "moment": found["moment"] * scale[0].unsqueeze(0) * scale[0].unsqueeze(1),
                "total": found["total"] * scale[1],
            }
        else:
            found = self._sum("whitening", {}, {}, shapes)
        return self.hand_out(Whitener.from_sums(WhiteningSums(**found), self.config.model.inputs))

    def hand_out(self, whitener: Whitener) -> Whitener:
        """Send a whitening to everybody who is connected, and from now on to everybody who
        connects."""
        self.whitener = whitener
        self._hand_out([n for n in self.transport.nodes() if n in self._place])
        return whitener

    def _hand_out(self, nodes: Sequence[int]) -> None:
        assert self.whitener is not None
        tensors = {"centre": self.whitener.centre, "projection": self.whitener.projection}
        blob = pack(Packet({"kind": "prepare"}, tensors))
        for node, reply in self._ask(dict.fromkeys(nodes, blob)).items():
            try:
                opened(reply)
            except WireError as error:
                logger.warning(
                    "client '%s' could not be prepared: %s",
                    self.settings.clients[self._place.pop(node)],
                    error,
                )

    def train(
        self, broadcast: Broadcast, cohort: Sequence[int], tables: Params
    ) -> Iterator[tuple[Int[Tensor, "c"], Update]]:
        """One round with those of the cohort who answer; each reply is checked before it counts.

        Raises:
            CohortError: fewer than `min_replies` usable replies, after all attempts.
        """
        tensors, header = tensors_of(broadcast), {"round": broadcast.round}
        if self.settings.secure:
            yield self._train_secretly(broadcast, header, cohort, tensors)
            return
        own: dict[int, Params] = {}
        if broadcast.price is None:
            own = {place: {"label": tables["label"][place]} for place in cohort}
        latent, names = self.config.model.latent, self.settings.clients
        found = self._answers(
            "train", header, cohort, tensors, own,
            check=lambda place, p: checked_update(
                p, broadcast, names[place], self.contract, latent
            ),
        )  # fmt: skip
        most = self._most_pairs([packet for _, packet in found])
        for place, packet in found:
            sent = packet.tensors
            if self.contract.size and float(sent["size"]) > most:
                name, size = names[place], float(sent["size"])
                logger.warning(
                    "client '%s' says it holds %g pairs; it counts as %g", name, size, most
                )
                sent = sent | {"size": torch.tensor(most)}
            yield torch.tensor([place]), update_of(sent, broadcast.params)

    def _most_pairs(self, packets: Sequence[Packet]) -> float:
        """The largest number of pairs that counts: a few times the cohort's median, so that nobody
        outweighs it by a lie."""
        if not self.contract.size:
            return math.inf
        return MOST_TIMES_MEDIAN * float(torch.stack([p.tensors["size"] for p in packets]).median())

    def _train_secretly(
        self, broadcast: Broadcast, header: dict[str, Any], cohort: Sequence[int], tensors: Params
    ) -> tuple[Int[Tensor, "c"], Update]:
        """The cohort's answers added up: one row for all of it."""
        shapes = update_layout(broadcast, self.contract, {"d": self.config.model.latent})
        taken: list[int] = []
        count, found = self._secure_sum("train", header, tensors, shapes, cohort, taken)
        means = {
            name: value / count if field_of("train", name).reduce == "mean" else value
            for name, value in found.items()
        }
        return torch.tensor(taken), update_of(means, broadcast.params, count)

    def posteriors(
        self, params: Params, *, withhold: bool = False
    ) -> tuple[Int[Tensor, "c"], Posterior]:
        """Those of everybody who is connected and answers."""
        header, shapes = {"withhold": withhold}, self._layout("posterior")
        found = self._everybody("posterior", header, under("params", params), shapes)
        index = torch.tensor([place for place, _ in found])
        return index, Posterior(
            *(torch.stack([t[name] for _, t in found]) for name in Posterior._fields)
        )

    def moments(
        self, params: Params, centre: Float[Tensor, "t m d"], *, withhold: bool = False
    ) -> Moments:
        """Sum over everybody who is connected and answers."""
        t, m, _ = centre.shape
        tensors = under("params", params) | {"centre": centre}
        shapes = self._layout("moments", t=t, m=m)
        return Moments(**self._sum("moments", {"withhold": withhold}, tensors, shapes))

    def scores(self, params: Params, populations: Sequence[Population]) -> Scores:
        """Sum over everybody who is connected and answers."""
        tensors = under("params", params) | numbered(populations)
        return Scores(
            **self._sum("scores", {}, tensors, self._layout("scores", t=len(populations)))
        )

    def settle(self, params: Params, population: Population) -> Params:
        """Every client notes its component for itself: nothing comes back."""
        self._everybody("settle", {}, under("params", params) | numbered([population]), {})
        return {}

    def validate(self, params: Params, population: Population | None) -> dict[str, float]:
        """Mean accuracy and NLL of the clients on pairs that they hold out."""
        tensors = under("params", params) | ({} if population is None else numbered([population]))
        found = self._sum("validate", {}, tensors, self._layout("validate"))
        return Validation(**found).row()

    def _layout(self, kind: str, **sizes: int) -> Layout:
        """Names, shapes and types of a reply."""
        known = {"d": self.config.model.latent, "h": self.width}
        return layout(EXCHANGES[kind].reply, known | sizes)

    def _sum(self, kind: str, header: dict[str, Any], tensors: Params, shapes: Layout) -> Params:
        if self.settings.secure:
            return self._secure_sum(kind, header, tensors, shapes)[1]
        found = self._everybody(kind, header, tensors, shapes)
        return {name: torch.stack([t[name] for _, t in found]).sum(0) for name in shapes}

    def _secure_sum(
        self, kind: str, header: dict[str, Any], tensors: Params, shapes: Layout,
        places: Sequence[int] | None = None,
        taken: list[int] | None = None,
    ) -> tuple[int, Params]:  # fmt: skip
        """How many took part, and the sum of what they answered; nobody's own answer is seen.

        Raises:
            CohortError: no sum could be opened in all attempts.
        """
        size = sum(math.prod(shape) for shape, _ in shapes.values())
        for _ in range(self.settings.attempts):
            online = set(self.wait(self.settings.timeout))
            node_of = {place: node for node, place in self._place.items()}
            chosen = [p for p in (self.online() if places is None else places) if p in online]
            blob = pack(Packet({"kind": kind, "secure": True, **header}, tensors))
            try:
                nodes, vector = self.transport.ask_sum(
                    {node_of[p]: blob for p in chosen}, size, self.settings.min_replies
                )
            except RunError as error:  # nothing was opened
                logger.warning("%s: %s; asking again", kind, error)
                self._forget([node_of[p] for p in chosen])
                continue
            self._forget([node_of[p] for p in chosen if node_of[p] not in nodes])
            self.traffic["down"] += len(blob) * len(chosen)
            self.traffic["up"] += 8 * (size + 1) * len(nodes)  # masked numbers travel as int64
            if taken is not None:
                taken[:] = sorted(p for p in chosen if node_of[p] in nodes)
            found = unflatten(kind, vector, shapes)
            return len(nodes), expected(found, shapes, "the sum over all")
        raise CohortError(
            f"'{kind}': no secure sum in {self.settings.attempts} attempts; nothing of this round"
            " was used"
        )

    def _everybody(
        self, kind: str, header: dict[str, Any], tensors: Params, shapes: Layout
    ) -> list[tuple[int, Params]]:
        """Ask everybody who is connected; their tensors, checked."""
        clients = self.settings.clients

        def check(place: int, packet: Packet) -> Packet:
            found = expected(packet.tensors, shapes, clients[place])
            sensible(kind, found, clients[place])
            return Packet(packet.header, found)

        found = self._answers(kind, header, self.online(), tensors, check=check)
        return [(place, packet.tensors) for place, packet in found]

    def _answers(
        self, kind: str, header: dict[str, Any], places: Sequence[int],
        tensors: Params | None = None,
        own: Mapping[int, Params] | None = None, check: Any = None,
    ) -> list[tuple[int, Packet]]:  # fmt: skip
        """Usable answers by place, in ascending order; asks again those who failed while there are
        too few.

        Raises:
            CohortError: too few after all attempts; nobody's answer has been used.
        """
        shared = tensors or {}
        usable: dict[int, Packet] = {}
        wanted = min(self.settings.min_replies or len(places), len(places))
        for attempt in range(self.settings.attempts):
            if attempt:
                logger.warning(
                    "%s: %d of %d replies that are needed; asking again", kind, len(usable), wanted
                )
                self.wait(self.settings.timeout)
            self.online()
            node_of = {place: node for node, place in self._place.items()}
            asked = {node_of[p]: p for p in places if p not in usable and p in node_of}
            blobs = {
                node: pack(Packet({"kind": kind, **header}, shared | (own or {}).get(place, {})))
                for node, place in asked.items()
            }
            for node, reply in self._ask(blobs, max(1, wanted - len(usable))).items():
                place = asked[node]
                try:
                    packet = opened(reply)
                    usable[place] = packet if check is None else check(place, packet)
                except WireError as error:
                    logger.warning(
                        "%s: the reply of '%s' does not count: %s",
                        kind,
                        self.settings.clients[place],
                        error,
                    )
                    if UNGREETED in str(error):
                        self._place.pop(node, None)
            if len(usable) >= wanted and usable:
                return sorted(usable.items())
        missing = [self.settings.clients[p] for p in places if p not in usable]
        raise CohortError(
            f"'{kind}': {len(usable)} usable replies after {self.settings.attempts} attempts,"
            f" {wanted} are needed; missing: {', '.join(missing[:5])}; nothing of this round was"
            " used, and the run can be resumed"
        )

    def _forget(self, nodes: Sequence[int]) -> None:
        """Greet these again before they are asked the next time: they may have been restarted."""
        for node in nodes:
            self._place.pop(node, None)

    def _ask(self, blobs: Mapping[int, bytes], enough: int | None = None) -> dict[int, bytes | str]:
        if not blobs:
            return {}
        found = self.transport.ask(blobs, len(blobs) if enough is None else enough)
        self.traffic["down"] += sum(len(blob) for blob in blobs.values())
        self.traffic["up"] += sum(
            len(reply) for reply in found.values() if isinstance(reply, bytes)
        )
        return found

    def check_backbone(self, signature: str) -> None:
        """Refuse to go on with clients of another backbone than the run was begun with.

        Raises:
            BadInputError: they are.
        """
        if signature and self.signature and signature != self.signature:
            raise BadInputError(
                "the clients' features come from another backbone than when this run was begun"
            )
