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
from safetensors import SafetensorError
from torch import Tensor

from fedvpa.errors import RunError
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


def section(tensors: Params, name: str) -> Params:
    """The tensors called ``name/...``, by the rest of their names."""
    return {
        key.partition("/")[2]: value
        for key, value in tensors.items()
        if key.partition("/")[0] == name
    }


def under(name: str, tensors: Params) -> Params:
    """Inverse of `section`."""
    return {f"{name}/{key}": value for key, value in tensors.items()}


SCALES: dict[str, float] = {
    "delta": 4.0, "loss": 64.0, "size": 4096.0, "labelled": 1.0, "weight": 1.0, "total": 64.0,
    "squared": 256.0,
    "variance": 64.0, "scale": 64.0, "moment": 4096.0, "pairs": 4096.0, "clients": 1.0,
    "accuracy": 1.0, "nll": 64.0,
    "outer": 1024.0,
}  # fmt: skip
"""Largest magnitude, in a secure sum, of one client's numbers of each name; they are rounded to
2^-21 of it."""


def _scale(name: str) -> float:
    first, _, last = name.partition("/")
    return SCALES[last if first == "moments" else first]


def flatten(tensors: Params) -> bytes:
    """All numbers in the order of their names, divided by their scales, as float32.

    Raises:
        WireError: a number is not finite or exceeds its scale; it would be cut off, and the sum
            would be wrong.
    """
    parts = []
    for name in sorted(tensors):
        value = tensors[name].double() / _scale(name)
        if not value.isfinite().all() or (value.numel() and float(value.abs().max()) > 1):
            raise WireError(
                f"'{name}' holds a number that is not finite or beyond {_scale(name):g}, what a"
                " secure sum carries"
            )
        parts.append(value.reshape(-1))
    return torch.cat(parts).float().numpy().astype("<f4").tobytes()


def unflatten(
    vector: Float[Tensor, "n"], shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> Params:
    """Inverse of `flatten`, for a sum over clients."""
    names = sorted(shapes)
    parts = vector.split([math.prod(shapes[name]) for name in names])
    return {
        name: (part * _scale(name)).to(dtype).view(shapes[name]) for name, part in zip(names, parts)
    }
