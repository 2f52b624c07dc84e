"""Real processes on loopback, TLS and node keys on: the federation equals the simulator, and
survives what happens to it."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fedvpa.checkpoint import load_checkpoint
from fedvpa.config import build_config
from fedvpa.data.preferences import to_record
from fedvpa.data.reading import read_pairs
from fedvpa.experiment.train import train
from fedvpa.network.project import init_project
from fedvpa.records import PreferencePair
from tests.e2e.federation import Federation
from tests.e2e.loop import BAYES

pytestmark = pytest.mark.slow

TRAINING: dict[str, Any] = {
    "method": "fedvpl+anchors",
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


WIDE = BAYES | {"population": {"structure": "directions"}}


@pytest.mark.parametrize(("given", "secure"), [(TRAINING, False), (BAYES, False), (WIDE, True)])
def test_equals_the_simulator(
    given: dict[str, Any], secure: bool, pair_file: Path, tiny_model: Path, tmp_path: Path
) -> None:
    training = given | {"features": {"backbone": str(tiny_model), "layer": 2, "dtype": "float32"}}
    own = pairs_of(pair_file, 3 if given is TRAINING else 6)
    with Federation(tmp_path / "f", own, training, secure=secure) as federation:
        federation.start()
        assert federation.wait(400) == 0, federation.out()
        said = federation.said()
    together = tmp_path / "together.jsonl"
    lines = [
        json.dumps(to_record(replace(pair, client_id=name)))
        for name, pairs in own.items()
        for pair in pairs
    ]
    together.write_text("\n".join(lines) + "\n")
    here_too = {"data": {"source": str(together), "clients": len(own)}, "out": str(tmp_path / "s")}
    prior = {"prior": {"kind": "components"}} if given is TRAINING else {}
    train(build_config(prior, training, here_too))
    # secure sums round every number to a part of its range
    tolerance = {"atol": 2e-2, "rtol": 2e-2} if secure else {"atol": 1e-6, "rtol": 1e-6}
    there = load_checkpoint(federation.run / "checkpoint.safetensors")
    here = load_checkpoint(tmp_path / "s" / "checkpoint.safetensors")
    assert there.finished
    for section in ("params", "population"):
        a, b = getattr(there.state, section), getattr(here.state, section)
        assert a.keys() == b.keys()
        assert a
        for name in a:
            torch.testing.assert_close(
                a[name], b[name], **tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )
    # the simulator validates on pairs alone that no client trains on; with six there are none
    for name in ["loss", "validation_accuracy"] if given is TRAINING else ["loss"]:
        told = [row[name] for row in there.history]
        assert told == pytest.approx([row[name] for row in here.history], rel=tolerance["rtol"])
    assert "what travels between a client and the server, and nothing else" in said


def test_secure_sums_over_processes(pair_file: Path, tiny_model: Path, tmp_path: Path) -> None:
    """SecAgg+ between real nodes: what the server holds of a client is masked, and the model learns
    all the same."""
    training = {
        "method": "fedvpl+ortho", "model": {"inputs": 4, "latent": 2},
        "prototypes": {"start_round": 1, "modes": 1},
        "federation": {"rounds": 2, "local_steps": 4, "validate_every": 9},
        "features": {"backbone": str(tiny_model), "layer": 2, "dtype": "float32"},
    }  # fmt: skip
    own = pairs_of(pair_file, 3)
    with Federation(tmp_path / "f", own, training, secure=True) as federation:
        federation.start()
        assert federation.wait(400) == 0, federation.out()
    found = load_checkpoint(federation.run / "checkpoint.safetensors")
    assert found.finished
    together = tmp_path / "together.jsonl"
    lines = [
        json.dumps(to_record(replace(pair, client_id=name)))
        for name, pairs in own.items()
        for pair in pairs
    ]
    together.write_text("\n".join(lines) + "\n")
    here = {"data": {"source": str(together), "clients": 3}, "out": str(tmp_path / "s")}
    train(build_config({"prior": {"kind": "components"}}, training, here))
    expected = load_checkpoint(tmp_path / "s" / "checkpoint.safetensors").state.params
    for name, value in found.state.params.items():
        torch.testing.assert_close(
            value, expected[name], atol=1e-3, rtol=1e-2, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_survives_kills_and_refuses_strangers(
    pair_file: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """A client killed in a round and started again, one that stands still, a server killed with
    -9 and started again: no round is lost or counted twice. Meanwhile a node of an unknown key,
    and one that does not trust the server's certificate, are not let in."""
    training = {
        "method": "fedvpl", "prior": {"kind": "gaussian"}, "model": {"inputs": 6, "latent": 3},
        "prototypes": {"modes": 2},
        "federation": {"rounds": 8, "local_steps": 4, "validate_every": 9, "checkpoint_every": 1},
        "features": {"backbone": str(tiny_model), "layer": 2, "dtype": "float32"},
    }  # fmt: skip
    own = pairs_of(pair_file, 3)
    settings = {"min_clients": 2, "min_replies": 2, "grace": 1.0, "timeout": 15.0}
    others = init_project(tmp_path / "other", ["stranger", "doubter"], port=1)
    with Federation(tmp_path / "f", own, training, **settings) as federation:
        federation.start()
        for home in others:
            given = yaml.safe_load((home / "client.yaml").read_text())
            server = yaml.safe_load((federation.homes[0] / "client.yaml").read_text())["server"]
            (home / "client.yaml").write_text(yaml.safe_dump(given | {"server": server}))
            (home / "pairs.jsonl").write_text("{}\n")
        # the stranger trusts the server, but its key is not registered
        (others[0] / "ca.crt").write_text((federation.homes[0] / "ca.crt").read_text())
        federation.wait_for("round 1 of 8")
        strangers = [
            federation.launch(["client", str(home), "--patience", "6"], home / "client.out")
            for home in others
        ]
        federation.kill(federation.clients["client-1"])
        federation.wait_for("round 3 of 8")
        federation.start_client("client-1")
        federation.wait_for("round 4 of 8")
        assert federation.server is not None
        federation.kill(federation.server)
        federation.start_server()
        federation.wait_for("goes on after round")
        slow = federation.clients["client-2"]
        os.killpg(slow.pid, signal.SIGSTOP)  # slower than any round waits for
        federation.wait_for("round 6 of 8")
        os.killpg(slow.pid, signal.SIGCONT)
        assert federation.wait(300) == 0, federation.out()
        assert [process.wait(60) for process in strangers] == [1, 1]
    found = load_checkpoint(federation.run / "checkpoint.safetensors")
    assert found.finished
    assert [row["round"] for row in found.history] == list(range(1, 9))
    said = federation.said()
    assert "goes on after round" in said
    assert said.count("client 'client-1' is connected") >= 2
    assert "stranger" not in said
    assert "doubter" not in said
    for home in others:
        assert "has not taken" in (home / "client.out").read_text()
