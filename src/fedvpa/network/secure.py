"""Secure sums: SecAgg+ (Bell et al., 2020) between Flower's client mod and this server, on the
message API.

Flower's own server side of the protocol needs the legacy workflow and can only average model
parameters. This one sums any vector: setup (public keys), shares of the secrets, masked vectors,
and the shares that remove what masks are left. The server holds masked individual vectors and their
sum, nothing else. Survivors of a dropout reconstruct the masks of those who dropped out; with fewer
than the threshold of them nothing can be opened.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

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
from fedvpa.network.masks import keystream, masks_for
from fedvpa.network.records import Broken
from fedvpa.network.wire import RECORD, WireError

logger = logging.getLogger("fedvpa")

T = TypeVar("T")

LEVELS = 1 << 22
"""Levels that the range from -1 to 1 is divided into."""
MODULUS = 1 << 32
MOST_CLIENTS = 1000
SEARCH_SECONDS = 30.0
"""How long it is looked for whose shares are wrong."""
MOST_SHARE = 1 << 14
"""Bytes of one share of a secret, encrypted or not."""
LEAST_CLIENTS = 3
"""A sum over two tells each the other's part."""

Exchange = Callable[[Mapping[int, RecordDict]], Mapping[int, RecordDict | str | Broken]]


class SecureSumError(RunError):
    """The sum cannot be opened, and nothing is known of it. `culprits`: nodes that sent what no
    client of this program sends, and what that was."""

    def __init__(self, message: str, culprits: Mapping[int, str] | None = None) -> None:
        self.culprits = dict(culprits or {})
        super().__init__(message)


class Summed(NamedTuple):
    """An opened sum: the nodes that are in it, its values, and the nodes that sent what no client
    of this program sends (they are in it only if their masked numbers were sound)."""

    nodes: list[int]
    values: Float[Tensor, "n"]
    culprits: dict[int, str]


def secure_sum(
    requests: Mapping[int, RecordDict], size: int, exchange: Exchange, least: int = 0
) -> Summed:
    """The sum of the vectors of `size` entries within -1 and 1 (each rounded at random to 2^-21) of
    those who take part.

    A client that deviates from the protocol counts as one that drops out. A sum over fewer than
    `least` clients is not opened: opening another one of the same vectors would show their
    difference.

    Raises:
        SecureSumError: fewer clients than that, or than the threshold (two thirds, at least three),
            are left, or the masks do not cancel.
    """
    nodes = list(requests)
    if not LEAST_CLIENTS <= len(nodes) <= MOST_CLIENTS:
        raise SecureSumError(
            f"{len(nodes)} clients: secure sums take from {LEAST_CLIENTS} to {MOST_CLIENTS}"
        )
    threshold = max(LEAST_CLIENTS, -(-2 * len(nodes) // 3))
    random.SystemRandom().shuffle(nodes)
    stages = _Stages(exchange, threshold, {})
    # 1. Public keys, and shares of everybody's secrets for everybody else.
    keys, sources, ciphertexts = _shared_keys(stages, nodes, threshold)
    # 2. Masked vectors.
    messages = {}
    for node in sources:
        stage = {
            Key.STAGE: Stage.COLLECT_MASKED_VECTORS,
            Key.CIPHERTEXT_LIST: ciphertexts[node],
            Key.SOURCE_LIST: sources[node],
        }
        messages[node] = RecordDict({**requests[node], RECORD_KEY_CONFIGS: ConfigRecord(stage)})
    masked = stages.run(messages, lambda node, said: _vector(said, size))
    active, dead = list(masked), [node for node in sources if node not in masked]
    if len(active) < least:
        raise SecureSumError(
            f"{len(active)} clients are left, {least} are asked for: the sum is not opened",
            stages.culprits,
        )
    # 3. Shares that remove what masks are left.
    content = {
        Key.STAGE: Stage.UNMASK,
        Key.ACTIVE_NODE_ID_LIST: active,
        Key.DEAD_NODE_ID_LIST: dead,
    }
    owners = {*active, *dead}
    replies = stages.run(
        {node: _message(content) for node in active}, lambda node, said: _shares(said, owners)
    )
    opening = _Opening(active, dead, keys, threshold)
    blob = requests[nodes[0]].config_records[RECORD]["blob"]
    with masks_for(blob if isinstance(blob, bytes) else b""):
        opened = opening.of(np.sum(list(masked.values()), axis=0), replies, stages.culprits)
    values = opened[1:].astype(np.float64) * (2.0 / LEVELS) - len(active)
    return Summed(active, torch.from_numpy(values), stages.culprits)


@dataclass
class _Stages:
    """Runs the stages of one sum; `culprits` are those who sent what cannot be."""

    exchange: Exchange
    threshold: int
    culprits: dict[int, str]

    def run(
        self, messages: Mapping[int, RecordDict], read: Callable[[int, Any], T]
    ) -> dict[int, T]:
        """What `read` makes of the configuration records that came back.

        Raises:
            SecureSumError: fewer than the threshold are left.
        """
        found, failed = dict[int, T](), list[str]()
        for node, reply in self.exchange(messages).items():
            if isinstance(reply, str):
                failed.append(reply)
                continue
            try:
                if isinstance(reply, Broken):
                    raise WireError(reply.why)
                found[node] = read(node, reply.config_records[RECORD_KEY_CONFIGS])
            except Exception as error:  # a client chose what is read here, and so what it raises
                self.culprits[node] = f"not an answer to this stage ({type(error).__name__})"
        if len(found) < self.threshold:
            why = f" (one of them: {failed[0]})" if failed else ""
            raise SecureSumError(
                f"{len(found)} of {len(messages)} clients are left, {self.threshold} are"
                f" needed{why}",
                self.culprits,
            )
        return found


def _shared_keys(
    stages: _Stages, nodes: list[int], threshold: int
) -> tuple[dict[int, list[bytes]], dict[int, list[int]], dict[int, list[bytes]]]:
    """The first two stages: everybody's public keys, and for every client that is left the shares
    of others' secrets, with whose they are."""
    setup = {
        Key.STAGE: Stage.SETUP, Key.SAMPLE_NUMBER: len(nodes), Key.SHARE_NUMBER: len(nodes),
        Key.THRESHOLD: threshold,
        Key.CLIPPING_RANGE: 1.0, Key.TARGET_RANGE: LEVELS, Key.MOD_RANGE: MODULUS,
        Key.MAX_WEIGHT: 1.0,
    }  # fmt: skip
    keys = stages.run({node: _message(setup) for node in nodes}, lambda node, said: _keys(said))
    content = {str(node): pair for node, pair in keys.items()} | {Key.STAGE: Stage.SHARE_KEYS}
    replies = stages.run(
        {node: _message(content) for node in keys},
        lambda node, said: _for_others(said, set(keys) - {node}),
    )
    sources: dict[int, list[int]] = {node: [] for node in replies}
    ciphertexts: dict[int, list[bytes]] = {node: [] for node in replies}
    for source, shares in replies.items():
        for target, ciphertext in shares.items():
            if target in sources:
                sources[target].append(source)
                ciphertexts[target].append(ciphertext)
    return keys, sources, ciphertexts


@dataclass(frozen=True)
class _Opening:
    """Removes the masks that are left in a sum over `active`, to whom the `dead` had given keys."""

    active: list[int]
    dead: list[int]
    keys: Mapping[int, list[bytes]]
    threshold: int

    def of(
        self, total: NDArray[np.int64], replies: Mapping[int, Mapping[int, bytes]],
        culprits: dict[int, str],
    ) -> NDArray[np.int64]:  # fmt: skip
        """The sum. If somebody's shares are wrong, the sum is opened without them; nobody is
        blamed, because a wrong share is either its holder's doing or its dealer's.

        Raises:
            SecureSumError: with nobody left out the masks cancel.
        """
        used = self._sound(total, replies)
        if used is None:
            raise SecureSumError(
                "the masks do not cancel: the sum cannot be opened (more than one client has sent"
                " wrong shares, or one has masked its numbers wrongly)",
                culprits,
            )
        return (total - self._masks(used, total.shape)) & (MODULUS - 1)

    def _sound(
        self, total: NDArray[np.int64], replies: Mapping[int, Mapping[int, bytes]]
    ) -> Mapping[int, Mapping[int, bytes]] | None:
        """The replies, or all but one of them, with which the masks cancel: the first entry is the
        sum of weights, `LEVELS` each."""
        wanted = (len(self.active) * LEVELS) & (MODULUS - 1)
        end = time.monotonic() + SEARCH_SECONDS
        for left_out in (None, *replies):
            if left_out is not None and time.monotonic() > end:
                return None
            used = {node: shares for node, shares in replies.items() if node != left_out}
            if len(used) < self.threshold:
                return None
            try:
                first = (total[:1] - self._masks(used, (1,))) & (MODULUS - 1)
            # wrong shares make a secret that is no key, and libraries raise what they like
            except Exception as error:
                logger.debug("shares that make no key: %s", type(error).__name__)
                continue
            if int(first[0]) == wanted:
                return used
        return None

    def _masks(
        self, replies: Mapping[int, Mapping[int, bytes]], shape: tuple[int, ...]
    ) -> NDArray[np.int64]:
        """What is left of the masks in the sum: the own mask of everybody who is there, and the
        pairwise masks with those who are not (the others cancel)."""
        total = np.zeros(shape, dtype=np.int64)
        for node in (*self.active, *self.dead):
            shares = [reply[node] for reply in replies.values()]
            secret = combine_shares(shares[: self.threshold])
            if node in self.active:
                total += keystream(secret, MODULUS, [shape])[0]
                continue
            for other in self.active:
                shared = generate_shared_key(
                    bytes_to_private_key(secret), bytes_to_public_key(self.keys[other][0])
                )
                mask = keystream(shared, MODULUS, [shape])[0]
                total += mask if other > node else -mask
        return total


def _message(stage: Mapping[str, Any]) -> RecordDict:
    return RecordDict({RECORD_KEY_CONFIGS: ConfigRecord(dict(stage))})


def _keys(said: Any) -> list[bytes]:
    """A client's two public keys, which others have to be able to read."""
    pair = [said[Key.PUBLIC_KEY_1], said[Key.PUBLIC_KEY_2]]
    for key in pair:
        bytes_to_public_key(key)
    if pair[0] == pair[1]:
        raise ValueError("one key twice")
    return pair


def _for_others(said: Any, others: set[int]) -> dict[int, bytes]:
    """A share of the client's secrets for every other client, and for nobody else."""
    named, texts = list(said[Key.DESTINATION_LIST]), list(said[Key.CIPHERTEXT_LIST])
    if sorted(named) != sorted(others) or len(texts) != len(named):
        raise ValueError("shares for others than those who take part")
    if not all(isinstance(text, bytes) and len(text) < MOST_SHARE for text in texts):
        raise TypeError("a share that is none")
    return dict(zip(named, texts))


def _shares(said: Any, owners: set[int]) -> dict[int, bytes]:
    """One share of the secret of every client."""
    named, shares = list(said[Key.NODE_ID_LIST]), list(said[Key.SHARE_LIST])
    if sorted(named) != sorted(owners) or len(shares) != len(named):
        raise ValueError("shares of others than those who were asked for")
    if not all(isinstance(share, bytes) and 0 < len(share) < MOST_SHARE for share in shares):
        raise TypeError("a share that is none")
    return dict(zip(named, shares))


def _vector(said: Any, size: int) -> NDArray[np.int64]:
    """A client's masked numbers, the weight first."""
    parts = [bytes_to_ndarray(blob) for blob in said[Key.MASKED_PARAMETERS]]
    flat = np.concatenate([np.asarray(part, dtype=np.int64).reshape(-1) for part in parts])
    if flat.shape != (size + 1,) or flat.min() < 0 or flat.max() >= MODULUS:
        raise ValueError(f"{flat.size - 1} masked numbers, not {size}")
    return flat
