"""What of a client's answer is believed: names, shapes, types, finiteness, size, and that it
belongs to this round."""

from __future__ import annotations

import torch

from fedvpa.federated.exchanges import Layout, update_layout
from fedvpa.federated.messages import Broadcast, Contract
from fedvpa.network.wire import Packet, WireError
from fedvpa.types import Params

LARGEST = 1e6
"""No parameter, latent or loss of a sane client is larger."""
MOST_PAIRS = 1e6
LARGEST_LATENT = 1e3


def expected(tensors: Params, shapes: Layout, client: str) -> Params:
    """The tensors, if they are those of `shapes` and sane.

    Raises:
        WireError: naming the client and what is wrong.
    """
    if tensors.keys() != shapes.keys():
        odd = sorted(tensors.keys() ^ shapes.keys())
        raise WireError(
            f"client '{client}': '{odd[0]}' is {'unexpected' if odd[0] in tensors else 'missing'}"
        )
    for name, (shape, dtype) in shapes.items():
        value = tensors[name]
        if tuple(value.shape) != tuple(shape):
            raise WireError(
                f"client '{client}': '{name}' has shape {tuple(value.shape)}, not {tuple(shape)}"
            )
        if value.dtype != dtype:
            raise WireError(f"client '{client}': '{name}' is {value.dtype}, not {dtype}")
        if not value.isfinite().all():
            raise WireError(f"client '{client}': '{name}' holds NaN or Inf")
        # sums over features in float64 are large
        largest = LARGEST if dtype == torch.float32 else 1e12
        if value.numel() and float(value.abs().max()) > largest:
            raise WireError(f"client '{client}': '{name}' holds values beyond {largest:g}")
    return {name: tensors[name] for name in shapes}


def checked_update(
    packet: Packet, broadcast: Broadcast, client: str, contract: Contract, latent: int
) -> Packet:
    """A reply to a training request, if it answers this round and holds what it should.

    Raises:
        WireError: naming the client and what is wrong.
    """
    if packet.header.get("round") != broadcast.round:
        raise WireError(
            f"client '{client}': answers round {packet.header.get('round')}, but this is round"
            f" {broadcast.round}"
        )
    shapes = update_layout(broadcast, contract, {"d": latent})
    found = expected(packet.tensors, shapes, client)
    for name in ("moments/weight", "labelled"):
        if name in found and (
            float(found[name].min()) < 0 or abs(float(found[name].sum()) - 1) > 1e-4
        ):
            raise WireError(f"client '{client}': '{name}' is not one client's share")
    if contract.size and not 1 <= float(found["size"]) <= MOST_PAIRS:
        raise WireError(f"client '{client}': says it holds {float(found['size']):g} pairs")
    return Packet(packet.header, found)


def sensible(kind: str, found: Params, client: str) -> None:
    """Refuse numbers of the right shape that no client could have arrived at.

    Raises:
        WireError: naming the client and what is wrong.
    """
    fine = True
    if kind == "moments":
        weight = found["weight"]
        one = (weight == 0).logical_or(weight == 1).all() and bool((weight.sum(-1) == 1).all())
        inside = (found["total"].abs() <= weight.unsqueeze(-1) * LARGEST_LATENT).all()
        fine = bool(
            one and inside and (found["squared"] >= 0).all() and (found["variance"] >= 0).all()
        )
    elif kind in ("scores", "validate"):
        fine = float(found["clients"]) in (0.0, 1.0) and bool(
            (found.get("accuracy", torch.zeros(())) <= 1).all()
        )
    elif kind == "whitening":
        moment, pairs = found["moment"], float(found["pairs"])
        symmetric = bool((moment - moment.T).abs().max() <= 1e-6 * moment.abs().max() + 1e-12)
        fine = symmetric and 1 <= pairs <= MOST_PAIRS
        fine = fine and float(torch.linalg.eigvalsh(moment)[0]) >= -1e-6 * float(
            moment.diagonal().sum()
        )
    if not fine:
        raise WireError(
            f"client '{client}': its answer to '{kind}' is not one that a client could have"
        )
