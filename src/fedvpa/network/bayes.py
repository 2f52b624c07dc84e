"""The clients of a Bayes method as its server sees them across a network.

Every answer is a sum over a client's pairs, and the server reads the sum over clients alone: one by
one in the clear, where each answer is checked, or as secure sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedvpa.federated.bayes.bounded import Bounded
from fedvpa.federated.bayes.joined import joined, joined_widths, parted_slopes, sizes_of
from fedvpa.federated.bayes.messages import Judged, Outline, Slopes
from fedvpa.federated.bayes.models import Models, Width
from fedvpa.federated.components import Moments
from fedvpa.network.checks import checked_bounded, checked_slopes, within
from fedvpa.network.clients import Networked
from fedvpa.network.wire import Packet
from fedvpa.types import Params


class NetworkedBayes(Networked):
    """The clients of a federation, as `FederatedBayes` reads them."""

    def outline(self, by_prompt: bool, folds: Int[Tensor, "t"]) -> Outline:
        """Sum over everybody who is connected and answers."""
        tensors = {"fold": folds} | _flag(by_prompt)
        shapes = self._layout("outline", t=len(folds), p=self.config.model.inputs)
        return Outline(**self._sum("outline", {}, tensors, shapes))

    def slopes(
        self, models: Sequence[Models], cohort: Sequence[int], round_number: int, by_prompt: bool
    ) -> Iterator[tuple[Int[Tensor, "c"], list[Slopes]]]:
        """Sums over those of the cohort who answer; each reply is checked before it counts.

        Raises:
            CohortError: too few usable replies, after all attempts.
        """
        tensors, header = joined(models) | _flag(by_prompt), {"round": round_number}
        shapes = self._layout("slopes", **self._sizes(models))
        if self.settings.secure:
            taken: list[int] = []
            _, found = self._secure_sum("slopes", header, tensors, shapes, cohort, taken)
            yield torch.tensor(taken), parted_slopes(found, models)
            return
        names = self.settings.clients

        def check(place: int, packet: Packet) -> Packet:
            return checked_slopes(packet, models, shapes, round_number, names[place])

        for place, packet in self._answers("slopes", header, cohort, tensors, check=check):
            yield torch.tensor([place]), parted_slopes(packet.tensors, models)

    def moments(self, models: Models, centre: Float[Tensor, "t m d"], by_prompt: bool) -> Moments:
        """Sum over everybody who is connected and answers."""
        s, m, d = centre.shape
        tensors = joined([models]) | _flag(by_prompt) | {"centre": centre}
        return Moments(
            **self._sum("clusters", {}, tensors, self._layout("clusters", s=s, m=m, d=d))
        )

    def judge(
        self, models: Sequence[Models], widths: Sequence[Sequence[Width]], by_prompt: bool,
        reference: int,
    ) -> Judged:  # fmt: skip
        """Sum over everybody who is connected and answers."""
        tensors = joined(models) | joined_widths(widths) | _flag(by_prompt)
        tensors |= {"reference": torch.tensor(reference)}
        shapes = self._layout("judge", w=sum(len(own) for own in widths))
        return Judged(**self._sum("judge", {}, tensors, shapes))

    def bounded(
        self, models: Sequence[Models], cohort: Sequence[int], round_number: int
    ) -> Iterator[tuple[Int[Tensor, "c"], Bounded]]:
        """Sums over those of the cohort who answer; each reply is checked before it counts."""
        tensors, header = joined(models), {"round": round_number}
        shapes = self._layout("bounded", **self._sizes(models))
        if self.settings.secure:
            taken: list[int] = []
            _, found = self._secure_sum("bounded", header, tensors, shapes, cohort, taken)
            yield torch.tensor(taken), Bounded(**found)
            return
        names, clip = self.settings.clients, self.config.privacy.clip

        def check(place: int, packet: Packet) -> Packet:
            return checked_bounded(packet, shapes, round_number, clip, names[place])

        for place, packet in self._answers("bounded", header, cohort, tensors, check=check):
            yield torch.tensor([place]), Bounded(**packet.tensors)

    def gains(
        self, models: Sequence[Models], widths: Sequence[Sequence[Width]]
    ) -> Float[Tensor, "w"]:
        """Sum over everybody who is connected and answers."""
        tensors = joined(models) | joined_widths(widths)
        shapes = self._layout("gains", w=sum(len(own) for own in widths))
        return self._sum("gains", {}, tensors, shapes)["gain"]

    def _believe(self, kind: str, found: Params, client: str) -> None:
        super()._believe(kind, found, client)
        if kind == "gains":
            within(found["gain"].norm(), self.config.privacy.gain_clip, client)

    def _sizes(self, models: Sequence[Models]) -> dict[str, int]:
        structures = [m.structure for m in models]
        return sizes_of(structures, len(models[0].fold), self.config.model.inputs)


def _flag(by_prompt: bool) -> Params:
    return {"by_prompt": torch.tensor(int(by_prompt))}
