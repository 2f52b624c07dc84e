"""A client's local round (M8), for one client or for many stacked along a leading axis.

This function is all that a client does with its data; a simulator and a networked client call the
same one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fedvpa.config import Config
from fedvpa.errors import NonFiniteUpdateError
from fedvpa.federated.episodes import Episodes, local_draws
from fedvpa.federated.objective import Loss
from fedvpa.functional.segments import summed
from fedvpa.types import PairBatch, Params, Posterior

logger = logging.getLogger("fedvpa")


@dataclass(frozen=True)
class LocalSettings:
    """How a client trains: steps, batches, its optimiser."""

    seed: int
    steps: int = 30
    batch_size: int = 0
    context_share: float = 0.7
    optimiser: Literal["adam", "sgd"] = "adam"
    learning_rate: float = 0.003
    momentum: float = 0.0
    weight_decay: float = 0.0


class LocalResult(NamedTuple):
    """Stacked parameters [c, ...] after the local steps, and the mean of every loss term over them,
    [c]."""

    params: Params
    losses: dict[str, Float[Tensor, "c"]]


def train_locally(
    loss: Loss,
    params: Params,
    pairs: PairBatch,
    names: Sequence[str],
    round_number: int,
    settings: LocalSettings,
    *,
    fixed: Params | None = None,
    check_each_step: bool = False,
) -> LocalResult:
    """Run the local steps of c clients side by side; `params` hold a leading client axis (see
    `stack`), and so do those that the loss reads but no step changes (`fixed`). `pairs` are a row
    per client, or blocks with an owner.

    The clients' losses are summed before the backward pass: they share no parameter, so each one's
    gradient is its own, and an element-wise optimiser on the stack is c separate optimisers. Where
    all of them share one set of parameters (a leading axis of 1), the losses are averaged.

    Raises:
        NonFiniteUpdateError: with `check_each_step`, the first loss that is NaN or Inf, with
            client, round and step.
    """
    # 1. All randomness of the round, each client's from a stream of its own.
    sizes = summed(pairs.mask.sum(-1), pairs.owner)
    draws = local_draws(settings.seed, round_number, names, sizes, settings.steps, loss.draws)
    episodes = Episodes(pairs, draws.order, settings.batch_size, settings.context_share)
    # 2. Local copies that gradients flow to.
    leaves = {name: value.detach().clone().requires_grad_(True) for name, value in params.items()}
    optimiser = _optimiser(list(leaves.values()), settings)
    pooled = len(names) > 1 and all(value.shape[0] == 1 for value in params.values())
    # 3. The steps; losses are kept, because a mean over them is what a client reports.
    losses: dict[str, list[Tensor]] = {}
    for step in range(settings.steps):
        read = leaves | fixed if fixed else leaves
        terms = loss(read, episodes[step], draws.latent[step], draws.gumbel[step])
        optimiser.zero_grad(set_to_none=True)
        (terms["loss"].mean() if pooled else terms["loss"].sum()).backward()
        optimiser.step()
        for name, value in terms.items():
            losses.setdefault(name, []).append(value.detach())
        if check_each_step:
            _check(terms, names, round_number, step)
    trained = {name: leaf.detach() for name, leaf in leaves.items()}
    return LocalResult(trained, {name: torch.stack(each).mean(0) for name, each in losses.items()})


def stack(params: Params, clients: int) -> Params:
    """Give every parameter a leading axis: the same values for each of `clients` clients (no
    copy)."""
    return {name: value.expand(clients, *value.shape) for name, value in params.items()}


def require_finite(params: Params, names: Sequence[str], round_number: int) -> None:
    """Refuse an update that holds NaN or Inf.

    Raises:
        NonFiniteUpdateError: naming the client, the round and the tensor.
    """
    total = sum(value.flatten(1).sum(1) for value in params.values())  # NaN and Inf survive a sum
    if isinstance(total, Tensor) and total.isfinite().all():
        return
    for name, value in params.items():
        finite = value.flatten(1).isfinite().all(1)
        if not finite.all():
            client = names[int((~finite).nonzero()[0])]
            raise NonFiniteUpdateError(
                f"client '{client}' sent NaN or Inf in '{name}' in round {round_number}; the round"
                " was not applied (lower federation.learning_rate, or look with"
                " --federation.backend sequential)"
            )


def silenced(
    start: Params, trained: Params, posterior: Posterior, names: Sequence[str]
) -> tuple[Params, Posterior]:
    """Under differential privacy, clients whose numbers are not finite answer that nothing has
    changed, with the latent of nobody: whether a round is stopped must not depend on one of them.
    `trained` [c, ...]."""
    everything = [*trained.values(), posterior.mean, posterior.log_var]
    fine = torch.stack([v.flatten(1).isfinite().all(1) for v in everything]).all(0)
    if fine.all():
        return trained, posterior
    bad = [name for name, good in zip(names, fine.tolist()) if not good]
    logger.warning("%d clients have numbers that are not finite, and add nothing", len(bad))
    calm = {
        n: torch.where(fine.view(-1, *[1] * start[n].dim()), value, start[n])
        for n, value in trained.items()
    }
    row = fine.unsqueeze(-1)
    nobody = torch.zeros_like(posterior.mean)
    return calm, Posterior(*(torch.where(row, value, nobody) for value in posterior))


def build_local(config: Config) -> LocalSettings:
    """Local training as the settings say."""
    f = config.federation
    return LocalSettings(
        config.seed, f.local_steps, f.batch_size, f.context_share, f.optimiser, f.learning_rate,
        f.momentum, f.weight_decay,
    )  # fmt: skip


def _optimiser(leaves: list[Tensor], settings: LocalSettings) -> torch.optim.Optimizer:
    if settings.optimiser == "adam":
        return torch.optim.Adam(
            leaves, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        )
    return torch.optim.SGD(
        leaves,
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def _check(terms: dict[str, Tensor], names: Sequence[str], round_number: int, step: int) -> None:
    for name, value in terms.items():
        finite = value.isfinite()
        if not finite.all():
            client = names[int((~finite).nonzero()[0])]
            raise NonFiniteUpdateError(
                f"client '{client}', round {round_number}, local step {step}: the loss term"
                f" '{name}' is not finite"
            )
