"""What travels: named tensors and a small JSON header, in one safetensors blob; no pickle."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor

from fedvpa.errors import RunError
from fedvpa.federated.exchanges import Layout, field_of
from fedvpa.network.codes import RefusedError
from fedvpa.types import Params


class WireError(RunError):
    """A message cannot be read, or does not hold what it should: its sender does not keep to the
    protocol."""


MOST_HEADER = 1 << 22
"""Bytes of a blob's table of contents, the header with the settings included."""
MOST_NUMBERS = 1 << 34
"""Entries of one tensor."""


class Packet(NamedTuple):
    """One request or reply."""

    header: dict[str, Any]
    tensors: Params


def pack(packet: Packet) -> bytes:
    """Header and tensors in one blob."""
    tensors = {name: value.detach().contiguous().clone() for name, value in packet.tensors.items()}
    return safetensors.torch.save(tensors, metadata={"fedvpa": json.dumps(packet.header)})


def unpack(blob: bytes) -> Packet:
    """Inverse of `pack`, for a blob from anybody.

    Raises:
        WireError: not such a blob. Whatever the blob makes a parser raise is this error.
    """
    try:
        (length,) = struct.unpack("<Q", blob[:8])
        if length > min(MOST_HEADER, len(blob)):
            raise ValueError(f"a table of contents of {length} bytes")
        contents = json.loads(blob[8 : 8 + length])
        header = json.loads(contents.pop("__metadata__")["fedvpa"])
        if not isinstance(header, dict):
            raise TypeError("the header is no mapping")
        for entry in contents.values():
            _check_shape(entry)
        return Packet(header, safetensors.torch.load(blob))
    # parsers of hostile input raise more than they say: RecursionError, RuntimeError, MemoryError
    except Exception as error:
        raise WireError(f"not a fedvpa message ({type(error).__qualname__})") from error


def _check_shape(entry: Mapping[str, Any]) -> None:
    """Refuse sizes that no tensor here has; a size of 0 would hide them from the count of bytes."""
    sizes = entry["shape"]
    if len(sizes) > 8 or any(not 0 <= size <= MOST_NUMBERS for size in sizes):
        raise ValueError("a tensor of such a shape")


def flatten(kind: str, tensors: Params) -> bytes:
    """All numbers of a reply in the order of their names, divided by their bounds, as float32.

    Raises:
        RefusedError: a number is not finite or exceeds its bound; it would be cut off, and the sum
            would be wrong.
    """
    parts = []
    for name in sorted(tensors):
        bound = field_of(kind, name).bound
        value = tensors[name].double() / bound
        if not value.isfinite().all() or (value.numel() and float(value.abs().max()) > 1):
            raise RefusedError(
                "range",
                f"'{name}' holds a number that is not finite or beyond {bound:g}, what a secure sum"
                " carries",
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
