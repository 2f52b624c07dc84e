"""Between packets and the records of the algorithm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedvpa.federated.messages import section
from fedvpa.network.wire import Packet, WireError, unpack
from fedvpa.types import Params, Population


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


def numbered(populations: Sequence[Population]) -> Params:
    """Populations as tensors of one packet."""
    return {
        f"population{i}/{name}": value
        for i, p in enumerate(populations)
        for name, value in p._asdict().items()
    }


def populations_of(packet: Packet) -> list[Population]:
    """Inverse of `numbered`."""
    found: list[Any] = []
    while table := section(packet.tensors, f"population{len(found)}"):
        found.append(Population(**table))
    return found
