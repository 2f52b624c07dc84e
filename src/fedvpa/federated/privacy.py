"""Client-level differential privacy: what one client contributes is clipped, sums over clients are
noised, and the privacy loss of everything that is released is accounted for together.

The mechanism of a round is that of DP-FedAvg (McMahan et al., 2018, arXiv 1710.06963): every client
takes part with the same probability q, independently; the sum of the clipped contributions gets
Gaussian noise and is divided by the *expected* number of clients. With a prior of components the
moments of the latent are part of the same contribution. Fitting the components asks everybody,
several times; these releases are composed with the rounds. Neighbours differ in one client, added
or removed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fedvpa.errors import BadInputError, RunError
from fedvpa.federated.components import Moments
from fedvpa.types import Params

MOMENT_BLOCKS = 4
"""Parts of a set of moments (weight, total, squared, variance), each clipped to its own bound."""


Normal = Callable[[torch.Size], Tensor]
"""Draws independent standard normal numbers of a shape."""


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


class BudgetError(RunError):
    """The privacy budget does not allow the next release."""


@dataclass(frozen=True)
class Privacy:
    """Bounds and noise; `rate` is the probability with which a client takes part in a round.

    Noise is in multiples of the bound of what it is added to: of a round's contributions, and
    (`fit_noise`) of those to a fit. `lost_rounds` and `lost_fits` were begun before a crash and may
    have been released: they count as if they had been.
    """

    rate: float
    clients: int
    clip: float = 1.0
    noise: float = 1.0
    latent_clip: float = 2.0
    variance_clip: float = 4.0
    fit_noise: float = 40.0
    fit_starts: int = 2
    fit_iterations: int = 3
    delta: float = 1e-5
    budget: float = math.inf
    moments_every_round: bool = False
    choices_every_round: bool = False
    lost_rounds: int = 0
    lost_fits: int = 0

    @property
    def expected(self) -> float:
        """Clients that a round has on average."""
        return self.rate * self.clients

    @property
    def blocks(self) -> int:
        """Parts of one client's contribution to a round, each within its bound: its norm is at most
        the root of this."""
        return 1 + MOMENT_BLOCKS * self.moments_every_round + self.choices_every_round

    @property
    def fit_releases(self) -> int:
        """Sums over all clients that a fit releases: the spread, every iteration, and the
        result."""
        return self.fit_iterations + 2

    def clipped_latent(
        self, mean: Float[Tensor, "c d"], variance: Float[Tensor, "c d"]
    ) -> tuple[Float[Tensor, "c d"], Float[Tensor, "c d"]]:
        """Means within `latent_clip` and variances within `variance_clip` (L2 norms)."""
        return _within(mean, self.latent_clip), _within(variance, self.variance_clip)

    def noised_params(self, sums: Params, draw: Normal) -> Params:
        """The round's sum of clipped updates, with noise."""
        std = self.noise * self.clip
        return {n: v + std * draw(v.shape) for n, v in sums.items()}

    def noised_moments(self, found: Moments, draw: Normal, *, fit: bool) -> Moments:
        """Moments of a round or of a fit, with noise; a sum of no clients is possible, a
        negative one is not."""
        noise = self.fit_noise if fit else self.noise
        bounds = (1.0, self.latent_clip, self.latent_clip**2, self.variance_clip)
        noised = [v + noise * b * draw(v.shape) for v, b in zip(found, bounds)]
        weight = noised[0].clamp_min(0.0)
        return Moments(weight, noised[1], noised[2].clamp_min(0.0), noised[3].clamp_min(0.0))

    def noised_choices(self, labelled: Float[Tensor, "m"], draw: Normal) -> Float[Tensor, "m"]:
        """How many clients chose each component, with noise."""
        return (labelled + self.noise * draw(labelled.shape)).clamp_min(0.0)

    def epsilon(self, rounds: int, fits: int) -> float:
        """Epsilon at `delta` of so many rounds and fits together."""
        rounds, fits = rounds + self.lost_rounds, fits + self.lost_fits
        if rounds == 0 and fits == 0:
            return 0.0
        if (self.noise == 0 and rounds) or (self.fit_noise == 0 and fits):
            return math.inf
        fit = self.fit_noise / math.sqrt(MOMENT_BLOCKS * self.fit_starts)
        return epsilon_of(
            self.rate,
            self.noise / math.sqrt(self.blocks),
            rounds,
            fit,
            fits * self.fit_releases,
            self.delta,
        )

    def require(self, rounds: int, fits: int) -> None:
        """Stop before a release that the budget does not allow.

        Raises:
            BudgetError: saying what it would cost.
        """
        if self.epsilon(rounds, fits) > self.budget:
            raise BudgetError(
                f"the privacy budget of epsilon {self.budget:g} (delta {self.delta:g}) is spent:"
                f" round {rounds} would take it to {self.epsilon(rounds, fits):.2f}"
            )


def _within(x: Float[Tensor, "c d"], bound: float) -> Float[Tensor, "c d"]:
    return x * (bound / x.norm(dim=-1, keepdim=True).clamp_min(1e-12)).clamp_max(1.0)


@lru_cache(maxsize=4096)
def epsilon_of(
    rate: float, noise: float, rounds: int, fit_noise: float, fits: int, delta: float
) -> float:
    """Epsilon of `rounds` Poisson-sampled Gaussian mechanisms and `fits` Gaussian ones, by their
    privacy loss distribution (Koskela et al., 2020; as in Google's dp-accounting).

    Raises:
        BadInputError: dp-accounting is not installed.
    """
    try:
        import dp_accounting
        from dp_accounting.pld import PLDAccountant
    except ImportError as error:
        raise BadInputError("privacy needs dp-accounting: pip install 'fedvpa[privacy]'") from error
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    if rounds:
        event = dp_accounting.GaussianDpEvent(noise)
        sampled = event if rate >= 1 else dp_accounting.PoissonSampledDpEvent(rate, event)
        accountant.compose(sampled, rounds)
    if fits:
        accountant.compose(dp_accounting.GaussianDpEvent(fit_noise), fits)
    return float(accountant.get_epsilon(delta))


def noise_for(privacy: Privacy, rounds: int, fits: int, epsilon: float) -> float:
    """The smallest round noise (to 1 %) whose rounds, with the fits, stay within `epsilon`.

    Raises:
        BadInputError: the fits alone cost more.
    """
    if fits and privacy.epsilon(0, fits) >= epsilon:
        raise BadInputError(
            f"the fits alone cost epsilon {privacy.epsilon(0, fits):.2f}; raise fit_noise"
            f" ({privacy.fit_noise:g}) or epsilon"
        )
    low, high = 0.2, 0.4
    while replace(privacy, noise=high).epsilon(rounds, fits) > epsilon:
        low, high = high, 2 * high
        if high > 1e4:
            raise BadInputError(f"no noise keeps {rounds} rounds within epsilon {epsilon:g}")
    while high / low > 1.01:
        middle = math.sqrt(low * high)
        if replace(privacy, noise=middle).epsilon(rounds, fits) > epsilon:
            low = middle
        else:
            high = middle
    return high
