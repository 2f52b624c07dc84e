"""What travels: named tensors and a small JSON header, in one safetensors blob; no pickle."""

from __future__ import annotations

import json
import math
import struct
from typing import Any, NamedTuple

import safetensors.torch
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from fedvpa.errors import RunError
from fedvpa.federated.exchanges import Layout, field_of
from fedvpa.types import Params


class WireError(RunError):
    """A message cannot be read, or does not hold what it should."""


NOT_READY = "not ready yet"
"""Begins the error of a client that should be greeted again a little later."""
UNGREETED = "not greeted"
"""Begins the error of a client that has to be greeted (again) first."""


class Packet(NamedTuple):
    """One request or reply."""

    header: dict[str, Any]
    tensors: Params


def pack(packet: Packet) -> bytes:
    """Header and tensors in one blob."""
    tensors = {name: value.detach().contiguous().clone() for name, value in packet.tensors.items()}
    return safetensors.torch.save(tensors, metadata={"fedvpa": json.dumps(packet.header)})


def unpack(blob: bytes) -> Packet:
    """Inverse of `pack`.

    Raises:
        WireError: not such a blob.
    """
    try:
        (length,) = struct.unpack("<Q", blob[:8])
        metadata = json.loads(blob[8 : 8 + length]).get("__metadata__", {})
        header = json.loads(metadata["fedvpa"])
        if not isinstance(header, dict):
            raise TypeError("the header is no mapping")
        return Packet(header, safetensors.torch.load(blob))
    except (
        SafetensorError,
        struct.error,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:
        raise WireError(f"not a fedvpa message: {type(error).__name__}: {error}") from error


def flatten(kind: str, tensors: Params) -> bytes:
    """All numbers of a reply in the order of their names, divided by their bounds, as float32.

    Raises:
        WireError: a number is not finite or exceeds its bound; it would be cut off, and the sum
            would be wrong.
    """
    parts = []
    for name in sorted(tensors):
        bound = field_of(kind, name).bound
        value = tensors[name].double() / bound
        if not value.isfinite().all() or (value.numel() and float(value.abs().max()) > 1):
            raise WireError(
                f"'{name}' holds a number that is not finite or beyond {bound:g}, what a secure sum"
                " carries"
            )
        parts.append(value.reshape(-1))
    return torch.cat(parts).float().numpy().astype("<f4").tobytes()


def unflatten(kind: str, vector: Float[Tensor, "n"], shapes: Layout) -> Params:
    """Inverse of `flatten`, for a sum over clients."""
    names = sorted(shapes)
    parts = vector.split([math.prod(shapes[name][0]) for name in names])
    found: Params = {}
    for name, part in zip(names, parts):
        shape, dtype = shapes[name]
        found[name] = (part * field_of(kind, name).bound).to(dtype).view(shape)
    return found
