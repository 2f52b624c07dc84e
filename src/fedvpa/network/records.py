"""Between packets and the records of the algorithm."""

from __future__ import annotations

from collections.abc import Sequence

from fedvpa.federated.clients import Update
from fedvpa.federated.components import Moments
from fedvpa.network.wire import Packet, WireError, section, unpack
from fedvpa.types import Params, Population, Posterior


def opened(reply: bytes | str) -> Packet:
    """The packet of a reply.

    Raises:
        WireError: there is none, it cannot be read, or it says that the client failed.
    """
    if isinstance(reply, str):
        raise WireError(reply)
    packet = unpack(reply)
    if not packet.header.get("ok"):
        raise WireError(str(packet.header.get("error", "failed without a reason")))
    return packet


def update(packet: Packet, params: Params) -> Update:
    """One client's answer in the form that the simulator's clients answer in."""
    delta, t = section(packet.tensors, "delta"), packet.tensors
    trained = {name: (params[name] + value).unsqueeze(0) for name, value in delta.items()}
    losses = {name: value.unsqueeze(0) for name, value in section(t, "loss").items()}
    posterior = section(t, "posterior")
    moments = section(t, "moments")
    return Update(
        trained,
        Posterior(**{k: v.unsqueeze(0) for k, v in posterior.items()}) if posterior else None,
        losses,
        {},
        t["size"].view(1) if "size" in t else None,
        Moments(**{k: v.unsqueeze(0) for k, v in moments.items()}) if moments else None,
        t["labelled"].unsqueeze(0) if "labelled" in t else None,
    )


def numbered(populations: Sequence[Population]) -> Params:
    """Populations as tensors of one packet."""
    return {
        f"population{i}/{name}": value
        for i, p in enumerate(populations)
        for name, value in p._asdict().items()
    }
