"""The clients as the server sees them across a network: what is asked of them, and what of their
answers is believed."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedvpa.evaluation.protocol import Validation
from fedvpa.features.whitening import Whitener, WhiteningSums
from fedvpa.federated.components import Moments
from fedvpa.federated.exchanges import EXCHANGES, Layout, field_of, layout, update_layout
from fedvpa.federated.messages import Broadcast, Scores, Update, tensors_of, under, update_of
from fedvpa.network.checks import checked_update
from fedvpa.network.reach import Reach
from fedvpa.network.records import numbered
from fedvpa.network.wire import Packet
from fedvpa.types import Params, Population, Posterior

logger = logging.getLogger("fedvpa")

MOST_TIMES_MEDIAN = 5.0
"""A client counts for at most so many times the median of its cohort, where clients are weighted by
their pairs."""


class Networked(Reach):
    """The clients of a federation: what every method asks them."""

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
        m = self.config.model
        return self.hand_out(Whitener.from_sums(WhiteningSums(**found), m.inputs, m.white))

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
        known = {"d": self.config.model.latent, "h": self.features.width}
        return layout(EXCHANGES[kind].reply, known | sizes)


class NetworkedClients(Networked):
    """The clients of a federation, as the server's side of a variational selector reads them."""

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
        """Posteriors of the clients that are connected and answer."""
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
