"""Reaching clients across a network: who is there, asking them, and asking again."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fedvpa.config import Config
from fedvpa.errors import RunError
from fedvpa.features.whitening import Whitener, WhiteningSums
from fedvpa.federated.aggregators import robust_of
from fedvpa.federated.components import Moments
from fedvpa.federated.exchanges import Layout
from fedvpa.federated.messages import Contract
from fedvpa.federated.robust import from_each, robust_moments, robust_whitening
from fedvpa.foreign import harmless
from fedvpa.network.checks import ENOUGH_TO_JUDGE, expected, outlying, sensible
from fedvpa.network.conduct import STRIKES, Conduct
from fedvpa.network.records import Broken, NoAnswerError, opened
from fedvpa.network.settings import ServerSettings
from fedvpa.network.transport import Expected, Transport
from fedvpa.network.wire import Packet, WireError, pack, unflatten
from fedvpa.types import Params

logger = logging.getLogger("fedvpa")


REFUSED_SECONDS = 30.0
"""A node that was refused may try again after so long: what was wrong with it may have been put
right. After every further refusal or silence it is twice as long."""
MOST_REFUSED_SECONDS = 3600.0
GREETING_SECONDS = 30.0
"""How long an answer to a greeting is waited for: nobody's silence may cost the others a round."""


class CohortError(RunError):
    """Too few clients are connected, or answered in time."""


@dataclass
class Reach:
    """The clients of a roster, reached over a transport. A client is known by its place in the
    roster."""

    settings: ServerSettings
    config: Config
    transport: Transport
    run: str = ""
    contract: Contract = field(default_factory=Contract)
    columns: int = 0
    whitener: Whitener | None = None
    _place: dict[int, int] = field(default_factory=dict)
    _again: dict[int, float] = field(default_factory=dict)
    _refusals: dict[int, int] = field(default_factory=dict)
    bound: Mapping[str, int] = field(default_factory=dict)
    features: Expected = field(default_factory=lambda: Expected("", 0))
    conduct: Conduct = field(default_factory=Conduct)
    traffic: dict[str, int] = field(default_factory=lambda: {"down": 0, "up": 0})

    def __len__(self) -> int:
        return len(self.settings.clients)

    def join(self, run: str, contract: Contract, columns: int) -> None:
        """From now on clients are greeted for this run. `contract`: what they send; `columns`: of
        the table of private logits."""
        self.run, self.contract, self.columns = run, contract, columns

    def online(self) -> list[int]:
        """Places of the clients that are connected and have been greeted, in ascending order."""
        nodes = self.transport.nodes()
        now = time.monotonic()
        out = {self.bound.get(name) for name in self.conduct.out}
        fresh = [
            n
            for n in nodes
            if n not in self._place and n not in out and now >= self._again.get(n, 0.0)
        ]
        if fresh:
            self._greet(fresh)
        here = {self._place[n] for n in nodes if n in self._place}
        return sorted(place for place in here if not self._is_out(place))

    def _is_out(self, place: int) -> bool:
        return self.conduct.is_out(self.settings.clients[place])

    def _blame(self, place: int, what: str, why: object) -> None:
        """Write down that a client does not keep to the protocol."""
        name = self.settings.clients[place]
        logger.warning("%s: the reply of '%s' does not count: %s", what, name, harmless(why))
        if self.conduct.blame(name, f"{what}: {why}"):
            logger.warning(
                "client '%s' is left out from now on: it has sent what no client of this program"
                " sends %d times (%s says what; remove it from there to let it back in)",
                name, STRIKES, self.conduct.path or "the run",
            )  # fmt: skip

    def _blame_all(self, culprits: Mapping[int, str], what: str) -> None:
        for node, why in culprits.items():
            if node in self._place:
                self._blame(self._place[node], what, why)

    def wait(self, patience: float) -> list[int]:
        """Wait until enough clients are connected.

        Raises:
            CohortError: they were not within `patience` seconds.
        """
        most = len(self) - len(self.conduct.out)
        wanted = min(self.settings.min_clients or most, most)
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
        for node, reply in self._ask(dict.fromkeys(nodes, blob), seconds=GREETING_SECONDS).items():
            try:
                place = self._admitted(node, self._opened_greeting(node, reply).header)
            except (WireError, NoAnswerError) as error:
                waits = getattr(error, "code", "") == "not-ready"
                if waits:
                    self._again[node] = time.monotonic() + 1.0
                else:
                    self._put_off(node)
                who = f"client '{self._owner(node)}'" if self._owner(node) else f"node {node}"
                done = "is waited for" if waits else "is refused"
                logger.warning("%s %s: %s", who, done, harmless(error))
                continue
            self._place[node] = place
            logger.info("client '%s' is connected", self.settings.clients[place])
            lacking.append(node)
        if self.whitener is not None and lacking:
            self._hand_out(lacking)

    def _put_off(self, node: int) -> None:
        """Greet this node again later."""
        times = self._refusals[node] = self._refusals.get(node, 0) + 1
        pause = min(MOST_REFUSED_SECONDS, REFUSED_SECONDS * 2.0 ** (times - 1))
        self._again[node] = time.monotonic() + pause

    def _opened_greeting(self, node: int, reply: bytes | str | Broken) -> Packet:
        """The answer to a greeting; who sends one that cannot be read is known by the key."""
        try:
            return opened(reply)
        except WireError as error:
            name = self._owner(node)
            if name:
                self._blame(self.settings.clients.index(name), "hello", error)
            raise

    def _owner(self, node: int) -> str:
        """The client that a node's key belongs to ('': not known)."""
        return next((name for name, own in self.bound.items() if own == node), "")

    def _admitted(self, node: int, header: dict[str, Any]) -> int:
        """The place of a node that has answered a greeting.

        Raises:
            WireError: it is not who it says, or its features are not those of this run.
        """
        name = str(header.get("name"))
        if name not in self.settings.clients:
            raise WireError(
                f"calls itself '{harmless(name, 40)}', which is not one of the clients in"
                " server.yaml"
            )
        if self.bound and self.bound.get(name) != node:
            raise WireError(
                f"calls itself '{name}', but its key is not the one that '{name}' was registered"
                " with"
            )
        place = self.settings.clients.index(name)
        holders = [n for n, p in self._place.items() if p == place and n != node]
        if any(n in self.transport.nodes() for n in holders):
            raise WireError(
                f"calls itself '{name}', but a client of that name is connected already"
            )
        for n in holders:
            del self._place[n]
        self.features.check(name, header)
        return place

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
        for node, reply in self._ask(dict.fromkeys(nodes, blob), seconds=GREETING_SECONDS).items():
            try:
                opened(reply)
                self._refusals.pop(node, None)
            except (WireError, NoAnswerError) as error:
                place = self._place.pop(node)
                name = self.settings.clients[place]
                logger.warning("client '%s' could not be prepared: %s", name, harmless(error))
                self._put_off(node)
                if isinstance(error, WireError):
                    self._blame(place, "prepare", error)

    def _sum(self, kind: str, header: dict[str, Any], tensors: Params, shapes: Layout) -> Params:
        if self.settings.secure:
            return self._secure_sum(kind, header, tensors, shapes)[1]
        each = [t for _, t in self._everybody(kind, header, tensors, shapes)]
        robust = robust_of(self.config)
        if robust is not None and kind == "whitening":
            return robust_whitening([WhiteningSums(**t) for t in each], robust)._asdict()
        if robust is not None and kind == "moments":
            rows = [Moments(**{n: v.unsqueeze(0) for n, v in t.items()}) for t in each]
            return robust_moments(*from_each(rows), tensors["centre"], robust)._asdict()
        return {name: torch.stack([t[name] for t in each]).sum(0) for name in shapes}

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
            blob = pack(Packet({"kind": kind, **header}, tensors))
            # as in the clear: 0 replies are all of the cohort
            least = min(self.settings.min_replies or len(chosen), len(chosen))
            try:
                summed = self.transport.ask_sum({node_of[p]: blob for p in chosen}, size, least)
            except RunError as error:  # nothing was opened
                logger.warning("%s: %s; asking again", kind, harmless(error))
                self._blame_all(getattr(error, "culprits", {}), kind)
                self._forget([node_of[p] for p in chosen])
                continue
            nodes = summed.nodes
            self._blame_all(summed.culprits, kind)
            self._forget([node_of[p] for p in chosen if node_of[p] not in nodes])
            self.traffic["down"] += len(blob) * len(chosen)
            self.traffic["up"] += 8 * (size + 1) * len(nodes)  # masked numbers travel as int64
            if taken is not None:
                taken[:] = sorted(p for p in chosen if node_of[p] in nodes)
            found = unflatten(kind, summed.values, shapes)
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
            self._believe(kind, found, clients[place])
            return Packet(packet.header, found)

        found = self._answers(kind, header, self.online(), tensors, check=check)
        return [(place, packet.tensors) for place, packet in found]

    def _believe(self, kind: str, found: Params, client: str) -> None:
        """Refuse numbers of the right shape that the client could not have arrived at."""
        sensible(kind, found, client)

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
        for attempt in range(self.settings.attempts):
            wanted = self._wanted(places)
            if attempt:
                logger.warning(
                    "%s: %d of %d replies that are needed; asking again", kind, len(usable), wanted
                )
                self.wait(self.settings.timeout)
            self.online()
            node_of = {place: node for node, place in self._place.items()}
            asked = {
                node_of[p]: p
                for p in places
                if p not in usable and p in node_of and not self._is_out(p)
            }
            blobs = {
                node: pack(Packet({"kind": kind, **header}, shared | (own or {}).get(place, {})))
                for node, place in asked.items()
            }
            for node, reply in self._ask(blobs, max(1, wanted - len(usable))).items():
                place = asked[node]
                try:
                    packet = opened(reply)
                    usable[place] = packet if check is None else check(place, packet)
                except NoAnswerError as error:
                    name = self.settings.clients[place]
                    logger.warning("%s: no answer of '%s': %s", kind, name, harmless(error))
                    if error.code == "not-greeted":
                        self._place.pop(node, None)
                except WireError as error:
                    self._blame(place, kind, error)
            self._drop_outlying(kind, usable)
            if len(usable) >= self._wanted(places) and usable:
                return sorted(usable.items())
        wanted = self._wanted(places)
        missing = [self.settings.clients[p] for p in places if p not in usable]
        raise CohortError(
            f"'{kind}': {len(usable)} usable replies after {self.settings.attempts} attempts,"
            f" {wanted} are needed; missing: {', '.join(missing[:5])}; nothing of this round was"
            " used, and the run can be resumed"
        )

    def _drop_outlying(self, kind: str, usable: dict[int, Packet]) -> None:
        """Answers that are out of all proportion to the others' do not count."""
        told = {place: packet.tensors for place, packet in usable.items()}
        for place, why in outlying(kind, told, self.config.model.latent).items():
            del usable[place]
            if len(told) >= ENOUGH_TO_JUDGE:
                self._blame(place, kind, why)
            else:
                name = self.settings.clients[place]
                logger.warning("%s: the reply of '%s' does not count: %s", kind, name, why)

    def _wanted(self, places: Sequence[int]) -> int:
        """How many of these have to answer."""
        those = sum(not self._is_out(place) for place in places)
        return min(self.settings.min_replies or those, len(places))

    def _forget(self, nodes: Sequence[int]) -> None:
        """Greet these again before they are asked the next time: they may have been restarted."""
        for node in nodes:
            self._place.pop(node, None)

    def _ask(
        self, blobs: Mapping[int, bytes], enough: int | None = None, seconds: float | None = None
    ) -> dict[int, bytes | str | Broken]:
        if not blobs:
            return {}
        found = self.transport.ask(blobs, len(blobs) if enough is None else enough, seconds)
        self.traffic["down"] += sum(len(blob) for blob in blobs.values())
        self.traffic["up"] += sum(
            len(reply) for reply in found.values() if isinstance(reply, bytes)
        )
        return found
