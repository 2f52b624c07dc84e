"""What the server's side of a federation needs of the network, and expects of those on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from fedvpa.foreign import harmless
from fedvpa.network.records import Broken
from fedvpa.network.wire import WireError


class Expected(NamedTuple):
    """The features that the clients of a run read: the backbone's signature, and their width. The
    server knows them for itself; no client's word counts."""

    signature: str
    width: int

    def check(self, name: str, header: Mapping[str, Any]) -> None:
        """Refuse a client of other features.

        Raises:
            WireError: saying what it says.
        """
        signature, width = header.get("signature"), header.get("width")
        if not isinstance(signature, str) or _without_type(signature) != _without_type(
            self.signature
        ):
            raise WireError(
                f"client '{name}' reads its features from another backbone, or from other weights"
                f" or another layer of it: {harmless(signature)}, not {self.signature}"
            )
        if width != self.width or isinstance(width, bool):
            raise WireError(
                f"client '{name}' has features of width {harmless(width, 20)}, not {self.width}"
            )


def _without_type(signature: str) -> str:
    """A signature less the number type that the backbone computes in, which is the machine's."""
    return "|".join(part for part in signature.split("|") if part not in ("bfloat16", "float32"))


@runtime_checkable
class Transport(Protocol):
    """Carries blobs to nodes and back."""

    def nodes(self) -> list[int]:
        """Nodes that are connected."""
        ...

    def ask(
        self, blobs: Mapping[int, bytes], enough: int, seconds: float | None = None
    ) -> dict[int, bytes | str | Broken]:
        """Replies by node: a blob, why there is none, or how it is broken. Waits for all (for
        `seconds` at the most, if given); once `enough` are there, for a grace period more."""
        ...

    def ask_sum(self, blobs: Mapping[int, bytes], size: int, least: int) -> Sum:
        """The secure sum of the flat vectors of `size` numbers that nodes answer with; none is
        opened over fewer than `least` of them."""
        ...


@runtime_checkable
class Sum(Protocol):
    """An opened sum: who is in it, its values, and who deviated from the protocol, and how."""

    @property
    def nodes(self) -> list[int]: ...

    @property
    def values(self) -> Float[Tensor, "n"]: ...

    @property
    def culprits(self) -> dict[int, str]: ...
