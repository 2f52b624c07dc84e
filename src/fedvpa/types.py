"""Tensor records that cross the layers: batches of pairs, posteriors, priors, server state."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor


class PairBatch(NamedTuple):
    """Whitened features of padded sets of pairs; any leading axes `b`, up to `n` pairs each.

    `difference` is h(x, chosen) - h(x, rejected) and `common` their mean (kept only for rewards
    that read more than the difference). `order` is +1 where the chosen response was shown as option
    A and -1 as option B (only the `additive` reward reads it); `mask` is False on padding.

    With an `owner` the rows are blocks, in the order of their clients: so many of a client's pairs
    each, and the client's index (see `fedvpa.functional.segments`).
    """

    difference: Float[Tensor, "*b n p"]
    common: Float[Tensor, "*b n p"] | None
    order: Float[Tensor, "*b n"]
    mask: Bool[Tensor, "*b n"]
    owner: Int[Tensor, "b"] | None = None


class Posterior(NamedTuple):
    """Diagonal Gaussian over the latent preference z."""

    mean: Float[Tensor, "*b d"]
    log_var: Float[Tensor, "*b d"]


class MixturePrior(NamedTuple):
    """The federated mixture prior as broadcast (M3): peers' posteriors, their sizes, and which
    client each one is.

    `slot` is the column that belongs to a component in every client's private table of prior
    logits.
    """

    mean: Float[Tensor, "k d"]
    log_var: Float[Tensor, "k d"]
    size: Float[Tensor, "k"]
    client: Int[Tensor, "k"]
    slot: Int[Tensor, "k"]


class Population(NamedTuple):
    """Components fitted to the clients' posterior means: centres, spherical variances and
    weights."""

    mean: Float[Tensor, "m d"]
    variance: Float[Tensor, "m"]
    weight: Float[Tensor, "m"]


Params = dict[str, Tensor]
"""Named tensors. During local training each has one more, leading axis: the client."""


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Hash of tensors' names, types, shapes and values: by which a file of them is known to be as
    it was written."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class ServerState:
    """Everything the federation knows between rounds; tensors only, so that a checkpoint is
    complete.

    `optimiser` holds the server optimiser's moments, `clients` tables with one row per client
    (posterior means and log-variances, the round they were seen, labels, private prior logits,
    cluster assignments, personal parameters), `population` the fitted components (empty until there
    are any), `components` what is known of those of a prior that is fitted from sums.
    """

    round: int
    params: Params
    optimiser: Params
    clients: Params
    population: Params
    components: Params = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors under ``section/name``."""
        sections = {"params": self.params, "optimiser": self.optimiser, "clients": self.clients}
        sections |= {"population": self.population, "components": self.components}
        return {
            f"{section}/{name}": value
            for section, table in sections.items()
            for name, value in table.items()
        }

    @staticmethod
    def from_tensors(round_number: int, tensors: dict[str, Tensor]) -> ServerState:
        """Inverse of `tensors`."""
        sections: dict[str, Params] = {
            "params": {},
            "optimiser": {},
            "clients": {},
            "population": {},
            "components": {},
        }
        for key, value in tensors.items():
            section, _, name = key.partition("/")
            sections[section][name] = value
        return ServerState(round_number, **sections)
