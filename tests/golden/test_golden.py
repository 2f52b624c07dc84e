"""A pinned small trajectory of every method: a change of any number must be meant (run with
``--write-golden`` then)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.conftest import synthetic_store
from tests.equivalence.test_equivalence import VARIANTS, config_of, train

FILE = Path(__file__).with_name("trajectories.json")


@pytest.mark.parametrize("name", VARIANTS)
def test_trajectory_is_the_pinned_one(name: str, request: pytest.FixtureRequest) -> None:
    state = train(config_of(name), synthetic_store())
    summary = {
        key: float(value.double().square().mean().sqrt())
        for key, value in state.tensors().items()
        if value.numel()
    }
    pinned = json.loads(FILE.read_text()) if FILE.exists() else {}
    if request.config.getoption("--write-golden"):
        pinned[name] = summary
        FILE.write_text(json.dumps(pinned, indent=1, sort_keys=True) + "\n")
    assert pinned[name].keys() == summary.keys()
    for key, value in summary.items():
        torch.testing.assert_close(
            value, pinned[name][key], rtol=2e-3, atol=1e-4, msg=lambda m, k=key: f"{k}: {m}"
        )
