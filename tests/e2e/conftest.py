"""A project folder with clients in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedvpa.data.preferences import to_record
from fedvpa.data.reading import read_pairs
from fedvpa.network.daemon import Client
from fedvpa.network.settings import ClientSettings
from tests.e2e.loop import TRAINING, Loop, Make


@pytest.fixture
def make(pair_file: Path, tiny_model: Path, tmp_path: Path) -> Make:
    """A project folder and its clients."""

    def build(
        count: int = 4, training: dict[str, Any] | None = None, **server: Any
    ) -> tuple[Path, Loop]:
        pairs = read_pairs(str(pair_file), "train").pairs
        half = len(pairs) // 2
        names = [f"client-{k}" for k in range(count)]
        clients = {}
        for k, name in enumerate(names):
            home = tmp_path / "clients" / name
            home.mkdir(parents=True, exist_ok=True)
            own = (pairs[:half], pairs[half:])[k % 2][k // 2 :: (count + 1) // 2][:12]
            (home / "pairs.jsonl").write_text("".join(json.dumps(to_record(p)) + "\n" for p in own))
            clients[100 + k] = Client(
                ClientSettings(name=name, data="pairs.jsonl", backbone=str(tiny_model)), home
            )
        given = (
            TRAINING | {"features": {"backbone": str(tiny_model), "layer": 2}} | (training or {})
        )
        settings = {"clients": names, "timeout": 1.0, "attempts": 2, "training": given} | server
        (tmp_path / "server.yaml").write_text(yaml.safe_dump(settings))
        return tmp_path / "server.yaml", Loop(clients)

    return build
