"""The records that travel between a client and the server, and their tensors by name.

Names, shapes and bounds of these tensors are declared in `fedvpa.federated.exchanges`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fedvpa.federated.components import Moments
from fedvpa.types import MixturePrior, Params, Population, Posterior

PROTOTYPES = "prototypes"
"""Name of the parameter that holds learned or fixed orthogonal prototypes."""
PRIOR_LOGIT = "private.prior_logit"
"""Name, in a local round, of a client's own logits of the mixture's weights."""


class Broadcast(NamedTuple):
    """What every client of a round is sent. `fixed` names parameters that are not trained."""

    round: int
    params: Params
    prior: MixturePrior | None = None
    anchors: Population | None = None
    price: Float[Tensor, "m"] | None = None
    fixed: tuple[str, ...] = ()

    @property
    def trainable(self) -> Params:
        """Parameters that clients change."""
        return {name: value for name, value in self.params.items() if name not in self.fixed}


class Update(NamedTuple):
    """What clients answer to a broadcast, and what they keep.

    A row stands for so many `clients`: one, or as many as a secure sum (or a pool of clients) has
    put together; then parameters and losses are their means, and everything else is their sum.
    `private` holds rows of the clients' own tables; they do not travel. `moments` are those of the
    clients' latents under the components that were broadcast, `labelled` the components that they
    chose.
    """

    params: Params
    losses: dict[str, Float[Tensor, "r"]]
    clients: Float[Tensor, "r"]
    private: Params
    posterior: Posterior | None = None
    size: Float[Tensor, "r"] | None = None
    moments: Moments | None = None
    labelled: Float[Tensor, "r m"] | None = None


class Scores(NamedTuple):
    """Sums over clients of their log-probabilities s of withheld choices under t populations: how
    many clients, the sum of s, and the sum of s s^T."""

    clients: Float[Tensor, ""]
    total: Float[Tensor, "t"]
    outer: Float[Tensor, "t t"]


@dataclass(frozen=True)
class Contract:
    """What a run's clients send in every round beside their parameters' change."""

    losses: bool = True
    posterior: bool = False
    size: bool = False
    moments: bool = False

    def given(self, broadcast: Broadcast) -> set[str]:
        """Conditions of the reply's fields in the round of this broadcast."""
        mixes = broadcast.prior is not None
        conditions = {
            "": True,
            "losses": self.losses,
            "posterior": self.posterior,
            "size": self.size,
            "moments": self.moments and mixes,
            "choices": mixes and broadcast.price is not None,
        }
        return {name for name, holds in conditions.items() if holds}


def tensors_of(broadcast: Broadcast) -> Params:
    """The tensors of a broadcast, by the names of its fields."""
    out = {f"params/{name}": value for name, value in broadcast.params.items()}
    if broadcast.prior is not None:
        out |= {f"prior/{name}": value for name, value in broadcast.prior._asdict().items()}
    if broadcast.anchors is not None:
        out |= {f"anchors/{name}": value for name, value in broadcast.anchors._asdict().items()}
    return out if broadcast.price is None else out | {"price": broadcast.price}


def broadcast_of(round_number: int, tensors: Params, fixed: tuple[str, ...] = ()) -> Broadcast:
    """Inverse of `tensors_of`."""
    prior, anchors = section(tensors, "prior"), section(tensors, "anchors")
    return Broadcast(
        round_number,
        section(tensors, "params"),
        MixturePrior(**prior) if prior else None,
        Population(**anchors) if anchors else None,
        tensors.get("price"),
        fixed,
    )


def reply_of(update: Update, start: Params, contract: Contract) -> Params:
    """The tensors that one client sends of its update (row 0), by the names of the reply's fields;
    nothing that the contract leaves out."""
    out = {f"delta/{name}": value[0] - start[name] for name, value in update.params.items()}
    if contract.losses:
        out |= {f"loss/{name}": value[0] for name, value in update.losses.items()}
    if contract.posterior and update.posterior is not None:
        out |= {f"posterior/{n}": v[0] for n, v in update.posterior._asdict().items()}
    if contract.size and update.size is not None:
        out["size"] = update.size[0]
    if update.moments is not None:
        out |= {f"moments/{n}": v[0] for n, v in update.moments._asdict().items()}
    if update.labelled is not None:
        out["labelled"] = update.labelled[0]
    return out


def update_of(tensors: Params, start: Params, count: int = 1) -> Update:
    """Inverse of `reply_of`: one row that stands for `count` clients."""
    rows = {name: value.unsqueeze(0) for name, value in tensors.items()}
    posterior, moments = section(rows, "posterior"), section(rows, "moments")
    return Update(
        {name: start[name] + value for name, value in section(rows, "delta").items()},
        section(rows, "loss"),
        torch.tensor([float(count)]),
        {},
        Posterior(**posterior) if posterior else None,
        rows.get("size"),
        Moments(**moments) if moments else None,
        rows.get("labelled"),
    )


def section(tensors: Params, name: str) -> Params:
    """The tensors called ``name/...``, by the rest of their names."""
    parts = {key: key.partition("/") for key in tensors}
    return {rest: tensors[key] for key, (first, _, rest) in parts.items() if first == name}


def under(name: str, tensors: Params) -> Params:
    """Inverse of `section`."""
    return {f"{name}/{key}": value for key, value in tensors.items()}
