"""Real processes on loopback, TLS and node keys on: the federation equals the simulator, and survives what happens to it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedvpa.checkpoint import load_checkpoint
from fedvpa.config import build_config
from fedvpa.data.preferences import to_record
from fedvpa.data.reading import read_pairs
from fedvpa.experiment.train import train
from fedvpa.types import PreferencePair
from tests.e2e.federation import Federation

pytestmark = pytest.mark.slow

TRAINING: dict[str, Any] = {
    "method": "fedvpa-gp",
    "model": {"inputs": 6, "latent": 3},
    "prototypes": {"start_round": 2, "modes": 2},
    "federation": {"rounds": 3, "local_steps": 4, "validate_every": 1, "checkpoint_every": 1},
}


def pairs_of(folder: Path, count: int) -> dict[str, list[PreferencePair]]:
    """The pairs of two opposed groups, dealt to clients."""
    pairs = read_pairs(str(folder), "train").pairs
    names = [f"client-{k}" for k in range(count)]
    half = len(pairs) // 2
    sides = [pairs[:half], pairs[half:]]
    return {name: sides[k % 2][k // 2 :: (count + 1) // 2][:12] for k, name in enumerate(names)}


def test_equals_the_simulator(pair_file: Path, tiny_model: Path, tmp_path: Path) -> None:
    training = TRAINING | {"features": {"backbone": str(tiny_model), "layer": 2}}
    own = pairs_of(pair_file, 3)
    with Federation(tmp_path / "f", own, training) as federation:
        federation.start()
        assert federation.wait() == 0, federation.out()
        said = federation.said()
    together = tmp_path / "together.jsonl"
    lines = [json.dumps(to_record(replace(pair, client_id=name))) for name, pairs in own.items() for pair in pairs]
    together.write_text("\n".join(lines) + "\n")
    here_too = {"data": {"source": str(together), "clients": 3}, "out": str(tmp_path / "s")}
    train(build_config({"prior": {"kind": "components"}}, training, here_too))
    there = load_checkpoint(federation.run / "checkpoint.safetensors")
    here = load_checkpoint(tmp_path / "s" / "checkpoint.safetensors")
    assert there.finished
    for section in ("params", "population"):
        a, b = getattr(there.state, section), getattr(here.state, section)
        assert a.keys() == b.keys()
        assert a
        for name in a:
            torch.testing.assert_close(a[name], b[name], atol=1e-6, rtol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert [row["validation_accuracy"] for row in there.history] == pytest.approx(
        [row["validation_accuracy"] for row in here.history]
    )
    assert "what travels between a client and the server, and nothing else" in said
