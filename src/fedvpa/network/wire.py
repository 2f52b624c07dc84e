"""What travels: named tensors and a small JSON header, in one safetensors blob; no pickle."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor

from fedvpa.errors import RunError
from fedvpa.federated.exchanges import EXCHANGES, Layout, field_of
from fedvpa.types import Params

logger = logging.getLogger("fedvpa")


class WireError(RunError):
    """A message cannot be read, or does not hold what it should: its sender does not keep to the
    protocol."""


RECORD = "fedvpa"
"""Name of the record of Flower's messages that holds a blob."""
MOST_HEADER = 1 << 22
"""Bytes of a blob's table of contents, the header with the settings included."""
MOST_NUMBERS = 1 << 34
"""Entries of one tensor."""


BY_ROUND = frozenset({"train", "slopes", "bounded"})
"""Requests whose answer is that of a round, whatever else they hold."""


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


def subject(identity: str, packet: Packet) -> str:
    """What the numbers of a reply are a function of: the run and the round, or the tensors that a
    request of this kind has."""
    kind = str(packet.header["kind"])
    about = hashlib.sha256(f"{identity}|{kind}|".encode())
    if kind in BY_ROUND:
        about.update(str(packet.header["round"]).encode())
        return about.hexdigest()
    about.update(str(bool(packet.header.get("withhold"))).encode())
    sections = tuple(f.section.rstrip("*") for f in EXCHANGES[kind].request)
    for name in sorted(n for n in packet.tensors if n.startswith(sections)):
        value = packet.tensors[name]
        about.update(f"|{name}|{tuple(value.shape)}|{value.dtype}|".encode())
        about.update(value.contiguous().reshape(-1).numpy().tobytes())
    return about.hexdigest()


def flatten(kind: str, tensors: Params) -> bytes:
    """All numbers of a reply in the order of their names, divided by their bounds, as float32.

    A number beyond its bound is cut off, and one that is not finite is 0: to refuse would tell the
    server, in the clear, how large a number is that it may only know as part of a sum. The client's
    own log says so.
    """
    parts = []
    for name in sorted(tensors):
        bound = field_of(kind, name).bound
        value = tensors[name].double() / bound
        kept = value.nan_to_num(0.0, 0.0, 0.0).clamp(-1.0, 1.0)
        if not torch.equal(kept, value):
            logger.warning(
                "'%s' holds numbers that are not finite or beyond %g, what a secure sum carries;"
                " they are cut off", name, bound,
            )  # fmt: skip
        parts.append(kept.reshape(-1))
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
