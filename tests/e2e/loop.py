"""The server's clients in this process, behind a transport that can fail and lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedvpa.network.daemon import Client
from fedvpa.network.secure import Summed
from fedvpa.network.wire import Packet, pack, unpack

Tamper = Callable[[int, Packet, Packet], Packet | bytes | str]
TRAINING: dict[str, Any] = {
    "method": "fedvpl+anchors", "model": {"inputs": 6, "latent": 3},
    "prototypes": {"start_round": 2, "modes": 2},
    "federation": {"rounds": 3, "local_steps": 4, "validate_every": 1, "checkpoint_every": 1},
}  # fmt: skip

BAYES: dict[str, Any] = {
    "method": "fedvpa-gp", "prototypes": {}, "model": {"inputs": 6, "latent": 4},
    "federation": {"rounds": 5, "validate_every": 1, "checkpoint_every": 1},
}  # fmt: skip
ASKED_BY_BAYES = ("outline", "slopes", "clusters", "judge")
"""Requests of that method alone."""


@dataclass
class Loop:
    """Carries blobs to clients in this process; `tamper(node, request, reply)` may change, spoil or
    lose a reply."""

    clients: dict[int, Client]
    tamper: Tamper = lambda node, request, reply: reply
    away: set[int] = field(default_factory=set)
    asked: list[tuple[int, str]] = field(default_factory=list)
    sent: list[Packet] = field(default_factory=list)

    def nodes(self) -> list[int]:
        return [n for n in self.clients if n not in self.away]

    def ask(
        self, blobs: Mapping[int, bytes], enough: int, seconds: float | None = None
    ) -> dict[int, bytes | str]:
        out: dict[int, bytes | str] = {}
        for node, blob in blobs.items():
            request = unpack(blob)
            self.asked.append((node, request.header["kind"]))
            reply = unpack(self.clients[node].answer(blob))
            self.sent.append(reply)
            changed = self.tamper(node, request, reply)
            out[node] = pack(changed) if isinstance(changed, Packet) else changed
        return out

    def ask_sum(self, blobs: Mapping[int, bytes], size: int, least: int) -> Summed:
        """As the secure sum does it, but for masks."""
        total, there = np.zeros(size), []
        for node, blob in blobs.items():
            self.asked.append((node, unpack(blob).header["kind"]))
            _, numbers = self.clients[node].numbers(blob)
            vector = np.frombuffer(numbers, dtype="<f4")
            assert vector.shape == (size,)
            total += vector
            there.append(node)
        assert len(there) >= least > 0
        return Summed(there, torch.from_numpy(total), {})


Make = Callable[..., tuple[Path, Loop]]
"""Makes a project folder and its clients."""
