"""The clients of a Bayes method, wherever they are: what the server asks of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from fedvpa.federated.bayes.bounded import Bounded
from fedvpa.federated.bayes.messages import Judged, Outline, Slopes
from fedvpa.federated.bayes.models import Models, Width
from fedvpa.federated.components import Moments
from fedvpa.types import Params, Population


@runtime_checkable
class BayesSide(Protocol):
    """Every answer is a sum over clients."""

    def __len__(self) -> int: ...

    def outline(self, by_prompt: bool, folds: Int[Tensor, "t"]) -> Outline:
        """First moments of all clients' pairs, without each of these folds."""
        ...

    def slopes(
        self, models: Sequence[Models], cohort: Sequence[int], round_number: int, by_prompt: bool
    ) -> Iterator[tuple[Int[Tensor, "c"], list[Slopes]]]:
        """Who of the cohort answered, in parts, and their sums for every element of `models`."""
        ...

    def moments(self, models: Models, centre: Float[Tensor, "t m d"], by_prompt: bool) -> Moments:
        """Moments of all clients' posterior means under given centres, by one model of
        directions."""
        ...

    def judge(
        self, models: Sequence[Models], widths: Sequence[Sequence[Width]], by_prompt: bool,
        reference: int,
    ) -> Judged:  # fmt: skip
        """What every model says of the targets of its own folds, at each of its widths;
        differences are from the option `reference`."""
        ...

    def bounded(
        self, models: Sequence[Models], cohort: Sequence[int], round_number: int
    ) -> Iterator[tuple[Int[Tensor, "c"], Bounded]]:
        """Under differential privacy: who of the cohort answered, in parts, and the sums of their
        bounded gradients. Folds are by prompt."""
        ...

    def gains(
        self, models: Sequence[Models], widths: Sequence[Sequence[Width]]
    ) -> Float[Tensor, "w"]:
        """Under differential privacy: the sum of what each option gains over the first one, within
        bounds, on targets of the models' own folds."""
        ...

    def settle(self, params: Params, population: Population) -> Params:
        """Let every client note which component it belongs to; its row of the tables, where these
        are kept here."""
        ...
