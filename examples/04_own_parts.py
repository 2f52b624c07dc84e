"""A prior and a reward head of one's own, from outside the package: one file, no registration.

The settings name them as ``module:NAME``. This file is such a module (``parts_of_mine``).

    python examples/04_own_parts.py
"""

from __future__ import annotations

import sys

import torch

from fedvpa import Part, build_config
from fedvpa.experiment.build import build_method
from fedvpa.federated.priors import Prior
from fedvpa.types import PairBatch, Params, Posterior

# the settings refer to this file as a module
sys.modules["parts_of_mine"] = sys.modules[__name__]


class WidePrior(Prior):
    """N(0, s^2 I): a prior of a fixed density overrides the KL and nothing else."""

    scale = 3.0

    def kl(self, posterior: Posterior, prior, logit, client, noise, uniform):  # type: ignore[no-untyped-def]
        """KL(N(mu, sigma^2) || N(0, s^2)) in closed form, in nats."""
        variance = posterior.log_var.exp()
        scaled = (variance + posterior.mean.square()) / self.scale**2
        return 0.5 * (scaled - 1 - posterior.log_var + 2 * torch.tensor(self.scale).log()).sum(-1)


class DiagonalHead:
    """Margin = sum_i (w_i + u_i z_i) dh_i: z scales single features, so d has to equal p."""

    needs_common = False

    def __init__(self, latent: int) -> None:
        self.latent = latent

    def init(self, generator: torch.Generator) -> Params:
        """Fresh parameters; z has an effect from the start, or the latent collapses."""
        effect = 0.3 * torch.ones(self.latent)
        return {"reward.weight": torch.zeros(self.latent), "reward.effect": effect}

    def margin(self, params: Params, z: torch.Tensor, batch: PairBatch) -> torch.Tensor:
        """Reward margin of every pair under z."""
        direction = params["reward.weight"] + params["reward.effect"] * z
        return (batch.difference @ direction.unsqueeze(-1)).squeeze(-1)


WIDE = Part("N(0, 9 I)", build=lambda *, config, clients: WidePrior())
DIAGONAL = Part("z scales features", build=lambda *, config: DiagonalHead(config.model.latent))

if __name__ == "__main__":
    from toy import two_groups

    config = build_config(
        {
            "method": "fedvpl",
            "prior": {"kind": "parts_of_mine:WIDE"},
            "model": {"conditioning": "parts_of_mine:DIAGONAL", "inputs": 8, "latent": 8},
            "federation": {"rounds": 10, "local_steps": 20, "learning_rate": 0.02},
        }
    )
    store = two_groups(clients=12, pairs=20)
    algorithm, clients = build_method(config, store)
    state = algorithm.init(store.roster)
    for _ in range(config.federation.rounds):
        state, losses = algorithm.apply(state, clients, range(len(store)))
    print({name: round(value, 3) for name, value in losses.items()})
    predictor = algorithm.predictor(state)
    pairs = store.batch(range(len(store)))
    z = predictor.adapt(pairs, torch.full((len(store),), -1))
    own, other = predictor.margin(z, pairs), predictor.margin(z.roll(1, 0), pairs)
    print(f"own z: {float((own > 0).float().mean()):.2f}", end=", ")
    print(f"the other group's: {float((other > 0).float().mean()):.2f}")
