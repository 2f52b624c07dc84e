"""Between packets and the records of the algorithm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from fedvpa.errors import RunError
from fedvpa.federated.messages import section
from fedvpa.network.codes import REASONS
from fedvpa.network.wire import Packet, WireError, unpack
from fedvpa.types import Params, Population


class Broken(NamedTuple):
    """A reply that not even Flower can read."""

    why: str


class NoAnswerError(RunError):
    """A client did not answer in time, or says that it cannot; `code` is what it says."""

    def __init__(self, message: str, code: str = "") -> None:
        self.code = code
        super().__init__(message)


def opened(reply: bytes | str | Broken) -> Packet:
    """The packet of a reply.

    Raises:
        WireError: the sender does not keep to the protocol.
        NoAnswerError: there is none, or the client says that it cannot answer.
    """
    if isinstance(reply, Broken):
        raise WireError(f"a message that cannot be read ({reply.why})")
    if isinstance(reply, str):
        raise NoAnswerError(reply)
    packet = unpack(reply)
    if packet.header.get("ok") is not True:
        code = packet.header.get("code")
        if not isinstance(code, str) or code not in REASONS:
            raise WireError("neither an answer nor a code that says why there is none")
        raise NoAnswerError(f"{REASONS[code]} [{code}]; its own log says more", code)
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
