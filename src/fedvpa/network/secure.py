"""Secure sums: SecAgg+ (Bell et al., 2020) between Flower's client mod and this server, on the
message API.

Flower's own server side of the protocol needs the legacy workflow and can only average model
parameters. This one sums any vector: setup (public keys), shares of the secrets, masked vectors,
and the shares that remove what masks are left. The server holds masked individual vectors and their
sum, nothing else. Survivors of a dropout reconstruct the masks of those who dropped out; with fewer
than the threshold of them nothing can be opened.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import ConfigRecord, RecordDict
from flwr.common import bytes_to_ndarray
from flwr.common.secure_aggregation.crypto.shamir import combine_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.supercore.primitives.asymmetric import bytes_to_private_key, bytes_to_public_key
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from fedvpa.errors import RunError
from fedvpa.network.masks import keystream

LEVELS = 1 << 22
"""Levels that the range from -1 to 1 is divided into."""
MODULUS = 1 << 32
MOST_CLIENTS = 1000
LEAST_CLIENTS = 3
"""A sum over two tells each the other's part."""

Exchange = Callable[[Mapping[int, RecordDict]], Mapping[int, RecordDict | str]]


class SecureSumError(RunError):
    """Too many clients dropped out: the sum cannot be opened, and nothing is known of it."""


def secure_sum(
    requests: Mapping[int, RecordDict], size: int, exchange: Exchange, least: int = 0
) -> tuple[list[int], Float[Tensor, "n"]]:
    """Who took part, and the sum of their vectors of `size` entries within -1 and 1 (each rounded
    at random to 2^-21).

    A sum over fewer than `least` clients is not opened: opening another one of the same vectors
    would show their difference.

    Raises:
        SecureSumError: fewer clients than that, or than the threshold (two thirds, at least three),
            are left, or one of them answers what cannot be read.
    """
    try:
        return _secure_sum(requests, size, exchange, least)
    except SecureSumError:
        raise
    except Exception as error:  # shares, keys or vectors that a client made up
        raise SecureSumError(
            f"a client answered what cannot be read ({type(error).__name__}: {error})"
        ) from error


def _secure_sum(
    requests: Mapping[int, RecordDict], size: int, exchange: Exchange, least: int
) -> tuple[list[int], Float[Tensor, "n"]]:
    nodes = list(requests)
    if not LEAST_CLIENTS <= len(nodes) <= MOST_CLIENTS:
        raise SecureSumError(
            f"{len(nodes)} clients: secure sums take from {LEAST_CLIENTS} to {MOST_CLIENTS}"
        )
    threshold = max(LEAST_CLIENTS, -(-2 * len(nodes) // 3))
    random.SystemRandom().shuffle(nodes)
    setup = {
        Key.STAGE: Stage.SETUP, Key.SAMPLE_NUMBER: len(nodes), Key.SHARE_NUMBER: len(nodes),
        Key.THRESHOLD: threshold,
        Key.CLIPPING_RANGE: 1.0, Key.TARGET_RANGE: LEVELS, Key.MOD_RANGE: MODULUS,
        Key.MAX_WEIGHT: 1.0,
    }  # fmt: skip
    keys, sources, ciphertexts = _shared_keys(exchange, nodes, setup, threshold)
    sharers = list(sources)
    messages = {}
    for node in sharers:
        stage = {
            Key.STAGE: Stage.COLLECT_MASKED_VECTORS,
            Key.CIPHERTEXT_LIST: ciphertexts[node],
            Key.SOURCE_LIST: sources[node],
        }
        messages[node] = RecordDict({**requests[node], RECORD_KEY_CONFIGS: ConfigRecord(stage)})
    replies = _stage(exchange, messages, threshold, Key.MASKED_PARAMETERS)
    masked = {node: _vector(reply, size) for node, reply in replies.items()}
    active = list(masked)
    if len(active) < least:
        raise SecureSumError(
            f"{len(active)} clients are left, {least} are asked for: the sum is not opened"
        )
    dead = [node for node in sharers if node not in masked]
    content = {
        Key.STAGE: Stage.UNMASK,
        Key.ACTIVE_NODE_ID_LIST: active,
        Key.DEAD_NODE_ID_LIST: dead,
    }
    told = (Key.NODE_ID_LIST, Key.SHARE_LIST)
    replies = _stage(exchange, {node: _message(content) for node in active}, threshold, *told)
    total = np.sum(list(masked.values()), axis=0)
    opened = (total - _masks(replies, active, dead, keys, threshold, total.shape)) & (MODULUS - 1)
    # the first entry is the sum of weights (LEVELS each), the rest are levels above -1
    if opened[0] != (len(active) * LEVELS) & (MODULUS - 1):
        raise SecureSumError(
            "the masks do not cancel: the sum cannot be opened (has a client answered twice?)"
        )
    values = opened[1:].astype(np.float64) * (2.0 / LEVELS) - len(active)
    return active, torch.from_numpy(values)


def _shared_keys(
    exchange: Exchange, nodes: list[int], setup: Mapping[str, Any], threshold: int
) -> tuple[dict[int, list[bytes]], dict[int, list[int]], dict[int, list[bytes]]]:
    """The first two stages: everybody's public keys, and for every client that is left the shares
    of others' secrets, with whose they are."""
    replies = _stage(
        exchange,
        {node: _message(setup) for node in nodes},
        threshold,
        Key.PUBLIC_KEY_1,
        Key.PUBLIC_KEY_2,
    )
    keys = {
        node: [reply[Key.PUBLIC_KEY_1], reply[Key.PUBLIC_KEY_2]] for node, reply in replies.items()
    }
    content = {str(node): pair for node, pair in keys.items()} | {Key.STAGE: Stage.SHARE_KEYS}
    shared = (Key.DESTINATION_LIST, Key.CIPHERTEXT_LIST)
    replies = _stage(exchange, {node: _message(content) for node in keys}, threshold, *shared)
    sources: dict[int, list[int]] = {node: [] for node in replies}
    ciphertexts: dict[int, list[bytes]] = {node: [] for node in replies}
    for source, reply in replies.items():
        for target, ciphertext in zip(reply[Key.DESTINATION_LIST], reply[Key.CIPHERTEXT_LIST]):
            if target in sources:
                sources[target].append(source)
                ciphertexts[target].append(ciphertext)
    return keys, sources, ciphertexts


def _masks(
    replies: Mapping[int, Any], active: list[int], dead: list[int], keys: Mapping[int, list[bytes]],
    threshold: int,
    shape: tuple[int, ...],
) -> NDArray[np.int64]:  # fmt: skip
    """What is left of the masks in the sum: the own mask of everybody who is there, and the
    pairwise masks with those who are not (the others cancel)."""
    shares: dict[int, list[bytes]] = {node: [] for node in [*active, *dead]}
    for reply in replies.values():
        for owner, share in zip(reply[Key.NODE_ID_LIST], reply[Key.SHARE_LIST]):
            if owner in shares:
                shares[owner].append(share)
    total = np.zeros(shape, dtype=np.int64)
    for node, parts in shares.items():
        if len(parts) < threshold:
            raise SecureSumError(
                f"{len(parts)} shares of a secret are left, {threshold} are needed"
            )
        secret = combine_shares(parts[:threshold])
        if node in active:
            total += keystream(secret, MODULUS, [shape])[0]
            continue
        for other in active:
            shared = generate_shared_key(
                bytes_to_private_key(secret), bytes_to_public_key(keys[other][0])
            )
            mask = keystream(shared, MODULUS, [shape])[0]
            total += mask if other > node else -mask
    return total


def _message(stage: Mapping[str, Any]) -> RecordDict:
    return RecordDict({RECORD_KEY_CONFIGS: ConfigRecord(dict(stage))})


def _stage(
    exchange: Exchange, messages: Mapping[int, RecordDict], threshold: int, *needs: str
) -> dict[int, Any]:
    """One stage; the configuration records of those who answered with what it needs."""
    found, failed = {}, []
    for node, reply in exchange(messages).items():
        if isinstance(reply, str):
            failed.append(reply)
        elif RECORD_KEY_CONFIGS in reply.config_records and set(needs) <= set(
            reply.config_records[RECORD_KEY_CONFIGS]
        ):
            found[node] = reply.config_records[RECORD_KEY_CONFIGS]
        else:
            failed.append(f"node {node} answered what it was not asked")
    if len(found) < threshold:
        why = f" (one of them: {failed[0]})" if failed else ""
        raise SecureSumError(
            f"{len(found)} of {len(messages)} clients are left, {threshold} are needed{why}"
        )
    return found


def _vector(reply: Any, size: int) -> NDArray[np.int64]:
    parts = [bytes_to_ndarray(blob) for blob in reply[Key.MASKED_PARAMETERS]]
    flat = np.concatenate([np.asarray(part, dtype=np.int64).reshape(-1) for part in parts])
    if flat.shape != (size + 1,):
        raise SecureSumError(
            f"a client sent {flat.size - 1} masked numbers, not {size}; nobody can tell the sum"
            " without it"
        )
    return flat
