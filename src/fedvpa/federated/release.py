"""Releases: what the server lets through of a round, the mean update or noised sums.

A release with privacy on is noised before anything else reads it. Numbers and costs are in
`fedvpa.federated.accounting`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fedvpa.federated.accounting import FLOOR, Privacy
from fedvpa.federated.aggregators import Aggregator, Total
from fedvpa.federated.algorithm import Clients
from fedvpa.federated.components import ITERATIONS, RESTARTS, Ask, Moments
from fedvpa.federated.random import stream
from fedvpa.types import Params, ServerState

Normal = Callable[[torch.Size], Tensor]
"""Draws independent standard normal numbers of a shape."""
NoiseOf = Callable[..., Normal]
"""The source of the noise of one release, by the release's name."""


def secret_normal(shape: torch.Size) -> Tensor:
    """Standard normal numbers that nobody can draw again: Box-Muller in float64 on 53 bits each of
    the system's entropy.

    (Torch's generator on the CPU keeps 32 bits of its seed, which can be tried out: the sum would
    tell.)
    """
    half = (math.prod(shape) + 1) // 2
    raw = np.frombuffer(os.urandom(16 * half), dtype="<u8").reshape(2, half) >> np.uint64(11)
    first, second = (raw.astype(np.float64) + 0.5) * 2.0**-53
    radius, angle = np.sqrt(-2 * np.log(first)), 2 * np.pi * second
    both = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[: math.prod(shape)]
    return torch.from_numpy(both).float().view(shape)


def seeded_normal(generator: torch.Generator) -> Normal:
    """Repeatable normal numbers, for a simulation."""
    return lambda shape: torch.randn(shape, generator=generator)


def seeded_noise(seed: int) -> NoiseOf:
    """Noise that a simulation repeats."""
    return lambda *name: seeded_normal(stream(seed, "noise", *name))


def secret_noise(*name: object) -> Normal:
    """Noise of a real release, of the system's entropy."""
    return secret_normal


class Sums(NamedTuple):
    """What the clients of a round answered beside their parameters, added up."""

    moments: Moments | None = None
    labelled: Float[Tensor, "m"] | None = None

    def plus(self, moments: Moments | None, labelled: Tensor | None) -> Sums:
        """With the rows of more clients, [r, m(, d)] and [r, m]."""
        if moments is not None:
            part = Moments(*(value.sum(0) for value in moments))
            moments = part if self.moments is None else self.moments.plus(part)
        if labelled is not None:
            labelled = labelled.sum(0)
            labelled = labelled if self.labelled is None else self.labelled + labelled
        return Sums(
            self.moments if moments is None else moments,
            self.labelled if labelled is None else labelled,
        )


class FitLimits(NamedTuple):
    """How far a fit of components may go: starts, iterations, and the number of clients that a
    component must exceed to count."""

    restarts: int = RESTARTS
    iterations: int = ITERATIONS
    least: float = 0.0


FREELY = FitLimits()
"""Where an exchange costs nothing but time."""


@runtime_checkable
class Release(Protocol):
    """Decides what is known of a round and of a fit: everything, or noised sums."""

    @property
    def hides_cohort(self) -> bool:
        """Whether nobody may know who took part."""
        ...

    @property
    def round_floor(self) -> float:
        """Components of a round with no more clients than this are not believed."""
        ...

    @property
    def limits(self) -> FitLimits:
        """Bounds of a fit: starts, iterations, smallest component."""
        ...

    def require(self, rounds: int) -> None:
        """Stop before a release that may not be made."""
        ...

    def update(
        self, aggregator: Aggregator, total: Total, start: Params, sums: Sums, round_number: int
    ) -> tuple[Params, Sums]:
        """The mean update of a round, and its sums."""
        ...

    def asking(self, state: ServerState, clients: Clients) -> Ask:
        """Asks all clients for their moments under the state's model, for one fit."""
        ...

    def row(self, rounds: int) -> dict[str, float]:
        """Columns of the history that the release adds."""
        ...


@dataclass(frozen=True)
class PlainRelease:
    """No protection: the server reads every sum as it was sent."""

    hides_cohort: bool = False
    round_floor: float = 0.0
    limits: FitLimits = FREELY

    def require(self, rounds: int) -> None:
        """Allow every round."""

    def update(
        self, aggregator: Aggregator, total: Total, start: Params, sums: Sums, round_number: int
    ) -> tuple[Params, Sums]:
        """The aggregated update of the round, and its sums.

        Raises:
            ValueError: nobody sent an update.
        """
        return aggregator.result(total), sums

    def asking(self, state: ServerState, clients: Clients) -> Ask:
        """The clients' sums."""
        return lambda centre, withhold=False: clients.moments(
            state.params, centre, withhold=withhold
        )

    def row(self, rounds: int) -> dict[str, float]:
        """No columns."""
        return {}


@dataclass(frozen=True)
class PrivateRelease:
    """Noised sums, also of nobody; what they cost is accounted for (see `Privacy`)."""

    privacy: Privacy
    noise: NoiseOf
    hides_cohort: bool = True

    @property
    def round_floor(self) -> float:
        """Fewer clients than this may be noise."""
        return FLOOR * self.privacy.noise

    @property
    def limits(self) -> FitLimits:
        """A fit's releases cost: few starts and iterations."""
        p = self.privacy
        return FitLimits(p.fit_starts, p.fit_iterations, FLOOR * p.fit_noise)

    def require(self, rounds: int) -> None:
        """Stop before a release that the budget does not allow.

        Raises:
            BudgetError: saying what it would cost.
        """
        self.privacy.require(rounds, self.privacy.fits)

    def update(
        self, aggregator: Aggregator, total: Total, start: Params, sums: Sums, round_number: int
    ) -> tuple[Params, Sums]:
        """Noised sums, divided by the number of clients that a round has on average."""
        p, draw = self.privacy, self.noise("round", round_number)
        added = total.sums or {name: torch.zeros_like(value) for name, value in start.items()}
        std = p.noise * p.clip
        noised = {name: value + std * draw(value.shape) for name, value in added.items()}
        found, labelled = sums
        if found is not None:
            found = noised_moments(p, found, p.noise, draw)
        if labelled is not None:
            labelled = (labelled + p.noise * draw(labelled.shape)).clamp_min(0.0)
        return {name: value / p.expected for name, value in noised.items()}, Sums(found, labelled)

    def asking(self, state: ServerState, clients: Clients) -> Ask:
        """The clients' sums, each exchange with noise of its own."""
        releases = count()

        def ask(centre: Float[Tensor, "t m d"], withhold: bool = False) -> Moments:
            found = clients.moments(state.params, centre, withhold=withhold)
            draw = self.noise("fit", state.round, next(releases))
            return noised_moments(self.privacy, found, self.privacy.fit_noise, draw)

        return ask

    def row(self, rounds: int) -> dict[str, float]:
        """Epsilon of so many rounds, and of the fits of the whole run."""
        return {"epsilon": self.privacy.epsilon(rounds, self.privacy.fits)}

    def with_lost(self, rounds: int, fits: int) -> PrivateRelease:
        """The same after a crash that undid so many rounds and fits: they count all the same."""
        return replace(self, privacy=replace(self.privacy, lost_rounds=rounds, lost_fits=fits))


def noised_moments(privacy: Privacy, found: Moments, noise: float, draw: Normal) -> Moments:
    """Moments of clipped latents with noise, of what deviation the accounting presumes, projected
    to what such moments can be."""
    p = privacy
    bounds = (1.0, p.latent_clip, p.latent_clip**2, p.variance_clip)
    noised = Moments(*(v + noise * b * draw(v.shape) for v, b in zip(found, bounds)))
    return projected(privacy, noised, noise)


def projected(privacy: Privacy, noised: Moments, noise: float) -> Moments:
    """The moments, as moments of clipped latents can be.

    A mean of latents within the ball is within it; a spread that is less than the noise of its
    centre cannot be told from it. Only noised sums are read, so that this costs no privacy
    (post-processing: Dwork & Roth, 2014, prop. 2.1).
    """
    p = privacy
    weight = noised.weight.clamp_min(0.0)
    wide = weight.unsqueeze(-1)
    count = wide.clamp_min(1e-6)
    centre = _within(noised.total / count, p.latent_clip)
    floor = (noise * p.latent_clip / count.clamp_min(1.0)).square()
    least, most = centre.square() + floor, p.latent_clip**2 + floor
    square = (noised.squared / count).maximum(least).minimum(most)
    spread = (noised.variance / count).clamp(0.0, p.variance_clip)
    return Moments(weight, wide * centre, wide * square, wide * spread)


def clipped_latent(
    privacy: Privacy, mean: Float[Tensor, "c d"], variance: Float[Tensor, "c d"]
) -> tuple[Float[Tensor, "c d"], Float[Tensor, "c d"]]:
    """Means within `latent_clip` and variances within `variance_clip` (L2 norms)."""
    return _within(mean, privacy.latent_clip), _within(variance, privacy.variance_clip)


def _within(x: Float[Tensor, "*c d"], bound: float) -> Float[Tensor, "*c d"]:
    return x * (bound / x.norm(dim=-1, keepdim=True).clamp_min(1e-12)).clamp_max(1.0)


def build_release(privacy: Privacy | None, noise: NoiseOf) -> PlainRelease | PrivateRelease:
    """The release of the settings."""
    return PlainRelease() if privacy is None else PrivateRelease(privacy, noise)
