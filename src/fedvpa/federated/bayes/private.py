"""The server's side of a Bayes method under client-level differential privacy.

All that is released are noised sums of bounded contributions: a gradient per client per round
(DP-FedAvg: McMahan et al., 2018, arXiv 1710.06963), and once what each width gains on held-out
targets. What the search of `server` reads of the clients beyond that is given by the settings
(number of directions, penalty) or left out: directions start at random, groups are not looked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fedvpa.federated.batch import Roster
from fedvpa.federated.bayes.bounded import Bounded
from fedvpa.federated.bayes.joined import sizes_of
from fedvpa.federated.bayes.models import (
    KINDS,
    Models,
    Structure,
    Width,
    packed,
    trained_of,
    unpacked,
)
from fedvpa.federated.bayes.server import FederatedBayes
from fedvpa.federated.bayes.side import BayesSide
from fedvpa.federated.content import ALL
from fedvpa.federated.exchanges import EVERY_ROUND, FITTED, Payload, payload_rows
from fedvpa.federated.random import stream
from fedvpa.federated.release import PrivateRelease
from fedvpa.types import Population, ServerState

START = 0.3
"""Length of each direction before the first round."""
EFFECTS = (0.25, 0.5, 1.0, 2.0)
"""Factors on the effect of z that are judged; a shared reward stands beside."""


@dataclass(frozen=True)
class PrivateBayes(FederatedBayes):
    """The server.

    Args:
        release: bounds and noise.
        judges: whether the width is chosen, by a fold of the contents that is kept from the models.
        order: number of directions.
        ridge: weight of the squared parameters, per pair.
    """

    release: PrivateRelease
    judges: bool
    order: int
    ridge: float

    def init(self, roster: Roster) -> ServerState:
        """A shared reward of zero, and random directions."""
        state, starts = super().init(roster), self.search.starts
        fold = torch.tensor([0 if self.judges else ALL])
        p, ones = starts.inputs, torch.ones(1, starts.inputs)
        trained = []
        for s in self._structures:
            drawn = torch.randn(s.order, p, generator=stream(starts.seed, "init"))
            bilinear = START * torch.linalg.qr(drawn.T).Q.T * (s.kind != "shared")
            size = torch.tensor([[1, s.order, KINDS.index(s.kind)]])
            trained.append(Models(
                torch.zeros(1, p), bilinear.unsqueeze(0), torch.zeros(1, 1, s.order),
                torch.ones(1, 1), torch.ones(1, 1), fold, size, torch.tensor([s.ridge]), ones,
            ))  # fmt: skip
        slots = [self.server.init(trained_of(models)) for models in trained]
        return replace(state, components=packed(trained, slots, {}))

    @property
    def _structures(self) -> list[Structure]:
        return [
            Structure("shared", 1, self.ridge), Structure("directions", self.order, self.ridge)
        ]  # fmt: skip

    def apply(
        self, state: ServerState, clients: BayesSide, cohort: Sequence[int]
    ) -> tuple[ServerState, dict[str, float]]:
        """One round.

        Raises:
            BudgetError: the privacy budget does not allow the round.
        """
        # 1. What this round will release must be allowed before any client is asked.
        self.release.require(state.round + 1)
        trained, slots = unpacked(state.components)
        # 2. The sum of the cohort's bounded gradients, also of nobody's; from here on only what
        # has noise is read.
        total = Bounded(
            torch.stack([torch.zeros_like(m.weight) for m in trained]),
            torch.cat([torch.zeros_like(m.bilinear) for m in trained], 1),
        )
        for _, found in clients.bounded(trained, cohort, state.round) if cohort else ():
            total = Bounded(*(a + b for a, b in zip(total, found)))
        privacy, draw = self.release.privacy, self.release.noise("round", state.round)
        std = privacy.noise * privacy.clip
        mean = Bounded(*((v + std * draw(v.shape)) / privacy.expected for v in total))
        # 3. A step each; the number of clients that a round has on average stands for theirs.
        each = mean.bilinear.split([m.shape[1] for m in trained], 1)
        for i, models in enumerate(trained):
            trained[i], slots[i] = self._stepped(models, slots[i], mean.weight[i], each[i])
        # who took part is private, too
        tables = {name: table.clone() for name, table in state.clients.items()}
        tables["seen"][:] = state.round
        state = replace(
            state, round=state.round + 1, clients=tables,
            components=packed(trained, slots, state.components),
        )  # fmt: skip
        return self._served(state), self.release.row(state.round)

    def finalise(self, state: ServerState, clients: BayesSide) -> ServerState:
        """The width of the greatest gain is chosen; a gain of less than one standard deviation (of
        the noise, and of clients whose gains are as different as their bound allows) is none, and
        a shared reward is served."""
        trained, _ = unpacked(state.components)
        shared, personal = trained
        width = 0.0 if self.search.effect == "auto" else self.search.effect
        if self.judges:
            privacy, draw = self.release.privacy, self.release.noise("fit", state.round)
            options = [[Width(0.0)], [Width(e) for e in EFFECTS]]
            total = clients.gains(trained, options)[1:]
            noised = total + privacy.fit_noise * privacy.gain_clip * draw(total.shape)
            most = privacy.gain_clip * math.hypot(privacy.fit_noise, math.sqrt(privacy.clients))
            width = EFFECTS[int(noised.argmax())] if float(noised.max()) > most else 0.0
        chosen = personal if width else shared
        state = replace(state, components=packed(
            [chosen, shared], [], {"width": torch.tensor(Width(width))}
        ))  # fmt: skip
        state = self._served(state)
        own = clients.settle(state.params, Population(**state.population))
        return replace(state, clients=state.clients | own)

    def payload(self, state: ServerState) -> list[Payload]:
        """Bounded gradients and gains up, models down."""
        sizes = sizes_of(self._structures, 1, self.selector.inputs)
        rows = payload_rows({"bounded": (EVERY_ROUND, sizes)}, set(), {})
        if self.judges:
            rows += payload_rows({"gains": (FITTED, sizes | {"w": 1 + len(EFFECTS)})}, set(), {})
        served = {"params": state.params}
        return rows + payload_rows(
            {"settle": (FITTED, {"m": 1, "d": self.selector.latent})}, set(), served
        )
