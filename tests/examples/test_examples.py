"""The examples run, and say what they are to show."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedvpa.config import build_config
from fedvpa.experiment.build import build_method
from fedvpa.federated.algorithm import sample_cohort

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def _as_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


def run(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def test_one_client_learns_from_its_episode(capsys: pytest.CaptureFixture[str]) -> None:
    out = run("01_one_client.py", capsys)
    before, after = (float(x) for x in re.findall(r"(?:before|after): ([\d.]+)", out))
    assert after < 0.5 < before


def test_fedvpl_in_plain_lines_is_the_library_s() -> None:
    """The parameters after three rounds are those of `--method fedvpl`."""
    plain = runpy.run_path(str(EXAMPLES / "02_fedvpl.py"))
    store = plain["two_groups"](clients=12, pairs=20)
    config = build_config(
        {
            "method": "fedvpl", "model": {"inputs": 8, "latent": 4},
            "federation": {"cohort": 8, "local_steps": 20, "learning_rate": 0.01},
        }
    )  # fmt: skip
    algorithm, clients = build_method(config, store)
    state = algorithm.init(store.roster)
    for _ in range(3):
        state, _ = algorithm.apply(state, clients, sample_cohort(0, state.round, 12, 8))
    for name, value in plain["train"](store, rounds=3).items():
        torch.testing.assert_close(value, state.params[name], atol=1e-5, rtol=1e-4)
    assert len((EXAMPLES / "02_fedvpl.py").read_text().splitlines()) <= 100


def test_own_parts_from_outside_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    said = run("04_own_parts.py", capsys).splitlines()[-1]
    own, other = map(float, re.findall(r"\d\.\d\d", said))
    assert own > 0.85
    assert other < 0.25


@pytest.mark.slow
def test_train_personalise_and_score_from_python(tmp_path: Path) -> None:
    script = EXAMPLES / "03_train_personalize_score.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, check=True,
        env=os.environ | {"FEDVPA_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    own, other = (
        float(re.search(rf"accuracy, {key}: ([\d.]+)", done.stdout)[1])  # type: ignore[index]
        for key in ("own", "other_group")
    )
    assert own > other
    mine = re.search(r"mine: +\[([-\d.]+), ([-\d.]+)\]", done.stdout)
    assert mine is not None
    assert float(mine[2]) > float(mine[1])  # the longer reply, as the user chose
    assert "Loading" not in done.stderr
