"""FedVPL in plain lines: a federation of variational selectors on the library's parts.

What `fedvpa train --method fedvpl` does, without the machinery around it: the parameters after
every round are the same (tests/examples holds them together).

    python examples/02_fedvpl.py
"""

from __future__ import annotations

import torch
from toy import two_groups

from fedvpa.federated.batch import ClientStore
from fedvpa.federated.local import LocalSettings, stack, train_locally
from fedvpa.federated.objective import RoundContext, VariationalObjective
from fedvpa.federated.priors.gaussian import GaussianPrior
from fedvpa.federated.random import stream
from fedvpa.selector.encoder import Encoder
from fedvpa.selector.heads.bilinear import BilinearHead
from fedvpa.selector.selector import Selector
from fedvpa.types import PairBatch, Params

ROUNDS, COHORT, SEED = 15, 8, 0
SELECTOR = Selector(Encoder(8, 4, (), shrinkage=4.0), BilinearHead(8, 4))
OBJECTIVE = VariationalObjective(SELECTOR, GaussianPrior())
LOCAL = LocalSettings(SEED, steps=20, learning_rate=0.01)


def client_update(params: Params, pairs: PairBatch, name: str, round_number: int) -> Params:
    """The change that one client's local steps make: all that it sends."""
    nobody = torch.full((1,), -1)
    context = RoundContext(None, None, None, nobody, nobody, kl_weight=0.002, pull_weight=0.0)
    result = train_locally(
        OBJECTIVE.given(context), stack(params, 1), pairs, [name], round_number, LOCAL
    )
    return {key: value[0] - params[key] for key, value in result.params.items()}


def server_round(params: Params, store: ClientStore, round_number: int) -> Params:
    """Broadcast, local rounds of a cohort, and the mean of what comes back (FedAvg)."""
    order = torch.randperm(len(store), generator=stream(SEED, "cohort", round_number))
    updates = [
        client_update(params, store.batch([c]), store.names[c], round_number)
        for c in sorted(order[:COHORT].tolist())
    ]
    mean = {key: torch.stack([u[key] for u in updates]).mean(0) for key in params}
    return {key: params[key] + mean[key] for key in params}


def train(store: ClientStore, rounds: int = ROUNDS) -> Params:
    """All rounds, from fresh parameters."""
    params = SELECTOR.init(stream(SEED, "init"))
    for round_number in range(rounds):
        params = server_round(params, store, round_number)
    return params


def accuracy(params: Params, context: PairBatch, targets: PairBatch) -> tuple[float, float]:
    """Share of target pairs that are predicted, under a user's own z and under that of a user of
    the other group."""
    z = SELECTOR.posterior(params, context, context.mask).mean
    other = z.roll(1, 0)  # the groups alternate
    right = [(SELECTOR.margin(params, each, targets) > 0).float().mean() for each in (z, other)]
    return float(right[0]), float(right[1])


if __name__ == "__main__":
    trained = train(two_groups(clients=12, pairs=20))
    # users who were not there in training: a z from ten of their pairs, scored on the other ten
    unseen = two_groups(clients=20, pairs=20).batch(range(12, 20))
    context = PairBatch(*(v if v is None else v[:, :10] for v in unseen))
    targets = PairBatch(*(v if v is None else v[:, 10:] for v in unseen))
    own, other = accuracy(trained, context, targets)
    print(f"unseen users: {own:.2f} under their own z, {other:.2f} under the other group's")
