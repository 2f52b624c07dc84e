"""Client-level differential privacy in numbers: bounds, noise, and what they cost.

The mechanism of a round is that of DP-FedAvg (McMahan et al., 2018, arXiv 1710.06963): every client
takes part with the same probability q, independently; the sum of the clipped contributions gets
Gaussian noise and is divided by the *expected* number of clients. With a prior of components the
moments of the latent are part of the same contribution. Fitting the components asks everybody,
several times; these releases are composed with the rounds. Neighbours differ in one client, added
or removed. The tensors are in `fedvpa.federated.release`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from fedvpa.config import Config
from fedvpa.errors import BadInputError, RunError

MOMENT_BLOCKS = 4
"""Parts of a set of moments (weight, total, squared, variance), each clipped to its own bound."""
FLOOR = 3.0
"""A component of no more clients than so many standard deviations of the noise may be noise."""


class BudgetError(RunError):
    """The privacy budget does not allow the next release."""


@dataclass(frozen=True)
class Privacy:
    """Bounds and noise of a run; `rate` is the probability that a client takes part in a round.

    Noise is in multiples of the bound of what it is added to: of a round's contributions, and
    (`fit_noise`) of those to a fit; a whole run makes `fits` of them, which count from the first
    round on. Where a prior is `judged` and not fitted, a fit is one sum with one bound.
    `lost_rounds` and `lost_fits` were begun before a crash and may have been released: they count
    as if they had been.
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
    fits: int = 2
    judged: bool = False
    gain_clip: float = 0.5
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
        """Sums over all clients that a fit releases: the spread, every iteration, and the result;
        of a judgement, one."""
        return 1 if self.judged else self.fit_iterations + 2

    def epsilon(self, rounds: int, fits: int) -> float:
        """Epsilon at `delta` of so many rounds and fits together."""
        rounds, fits = rounds + self.lost_rounds, fits + self.lost_fits
        if rounds == 0 and fits == 0:
            return 0.0
        if (self.noise == 0 and rounds) or (self.fit_noise == 0 and fits):
            return math.inf
        fit = self.fit_noise / math.sqrt(1 if self.judged else MOMENT_BLOCKS * self.fit_starts)
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


def privacy_of(config: Config, clients: int) -> Privacy | None:
    """Bounds and noise that the settings ask for, with so many clients; None where it is off.

    Raises:
        BadInputError: the noise of a fit would hide the components.
    """
    p = config.privacy
    if not p.enabled:
        return None
    known: dict[str, Any] = {
        "rate": min(1.0, (config.federation.cohort or clients) / clients), "clients": clients,
        "clip": p.clip, "noise": p.noise, "fit_noise": p.fit_noise, "delta": p.delta,
        "budget": p.budget or math.inf,
    }  # fmt: skip
    if config.entry.summed:
        fits = int(config.population.width == "auto")
        return Privacy(**known, fits=fits, judged=True, gain_clip=p.gain_clip)
    modes = 1 if config.prototypes.modes == "auto" else config.prototypes.modes
    if FLOOR * p.fit_noise * modes >= clients:
        raise BadInputError(
            f"privacy.fit_noise: noise of {p.fit_noise:g} hides components of about"
            f" {clients / modes:g} clients each; at most {clients / modes / FLOOR:.3g} for"
            f" {clients} clients and {modes} components (epsilon grows), or more clients"
        )
    anchored = config.prototypes.kind == "anchored"
    summed = config.prior.kind == "components" and not anchored
    return Privacy(
        **known,
        latent_clip=p.latent_clip,
        variance_clip=p.variance_clip,
        fits=1 if anchored else 2,
        moments_every_round=summed,
        choices_every_round=summed and config.prototypes.kind in ("learned", "fixed"),
    )


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
