"""Stage 2 as a user runs it: align, generate and chat, on a tiny random model."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest

from fedvpa.cli.main import main
from tests.conftest import write_groups
from tests.e2e.test_cli import flags

SMALL = [
    "--candidates", "4", "--max-new-tokens", "6", "--batch", "2", "--margin", "0.0", "--tokens", "2", "--rank", "2", "--epochs",
    "1", "--save-every", "2", "--dtype", "float32", "--iterations", "2",
]  # fmt: skip


@pytest.fixture(scope="module")
def aligned(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(data, selector run, policy)."""
    folder = tmp_path_factory.mktemp("align")
    os.environ["FEDVPA_CACHE"] = str(folder / "cache")
    data, run, out = write_groups(folder / "data"), folder / "run", folder / "policy"
    more = {"rounds": 12, "prototypes.start_round": 6, "learning-rate": 0.02}
    assert main(["train", "--data", str(data), "--split", "train", *flags(tiny_model, run, **more)]) == 0
    prompts = folder / "prompts.txt"
    prompts.write_text("is tea good\nplease help\nask a friend\nstop\nis tea good\n")
    command = ["align", str(run), "--prompts", str(prompts), "--base", str(tiny_model), "--out", str(out), *SMALL]
    assert main(command) == 0
    return data, run, out


def test_a_policy_knows_its_preferences_and_what_it_was_made_of(aligned: tuple[Path, Path, Path]) -> None:
    _, _, out = aligned
    card, summary = (json.loads((out / name).read_text()) for name in ("policy.json", "align.json"))
    assert sorted(card["preferences"]) == ["blunt", "kind"]
    assert (summary["prompts_used"], summary["prompts_skipped"]) == (4, {"repetition": 1})
    first, second = summary["iterations"]
    for row in (first, second):
        kept = sum(row["pairs"].values())
        assert kept + row["dropped_under_margin"] + row["dropped_without_two_responses"] == 8
    assert len((out / "work/iteration-0/candidates.jsonl").read_text().splitlines()) == 16
    assert {f.name for f in (out / "work/iteration-1").glob("candidates*")} == {"candidates-0.jsonl", "candidates-1.jsonl"}


def test_an_interrupted_alignment_goes_on_to_the_same_policy(
    aligned: tuple[Path, Path, Path], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, run, out = aligned
    asked = json.loads((out / "work/asked.json").read_text())
    again = tmp_path / "again"
    command = ["align", str(run), "--prompts", asked["prompts"], "--base", str(tiny_model), "--out", str(again), *SMALL]
    assert main([*command, "--resume"]) == 2
    assert "nothing to resume" in capsys.readouterr().err
    assert main(command) == 0
    weights = (again / "adapter/adapter_model.safetensors").read_bytes()
    assert weights == (out / "adapter/adapter_model.safetensors").read_bytes()
    assert main(command) == 2
    assert "not empty" in capsys.readouterr().err
    # as if killed while candidates were written, and in the middle of the second training
    candidates = again / "work/iteration-0/candidates.jsonl"
    candidates.write_bytes(candidates.read_bytes()[:-5])
    for path in sorted((again / "work/iteration-1/trained").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (again / "policy.json").unlink()
    assert main([*command, "--resume"]) == 0
    assert (again / "adapter/adapter_model.safetensors").read_bytes() == weights
    assert main([*command, "--resume", "--beta", "0.3"]) == 2
    assert "other settings" in capsys.readouterr().err


def test_generate_and_chat_under_every_kind_of_preference(
    aligned: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, _, out = aligned
    prompts, target = tmp_path / "p.txt", tmp_path / "r.jsonl"
    prompts.write_text("is tea good\nstop\n")
    greedy = ["--temperature", "0", "--max-new-tokens", "4"]
    texts = {}
    for name, choice in {
        "kind": ["--prefer", "kind"], "mix": ["--mix", "kind=1,blunt=0"], "off": ["--off"],
        "user": ["--user", str(data / "kind/test.jsonl")],
    }.items():  # fmt: skip
        command = ["generate", str(out), "--prompts", str(prompts), "--responses", str(target), *choice, *greedy]
        assert main(command) == 0
        rows = [json.loads(line) for line in target.read_text().splitlines()]
        assert [row["prompt"][-1]["content"] for row in rows] == ["is tea good", "stop"]
        texts[name] = [row["response"] for row in rows]
    assert texts["kind"] == texts["mix"]
    assert main(["export", str(out), "--prefer", "kind", "--out", str(tmp_path / "plain")]) == 0
    assert (tmp_path / "plain/model.safetensors").is_file()
    assert main(["export", str(out), "--prefer", "kind", "--out", str(tmp_path / "plain")]) == 2
    assert main(["generate", str(out), "--prompts", str(prompts), "--responses", str(target), "--prefer", "rude"]) == 2
    assert "no preference 'rude' (known: " in capsys.readouterr().err
    monkeypatch.setattr(
        "sys.stdin", io.StringIO("is tea good\n/prefer nobody\n/prefer blunt\n/reset\nis tea good\n/what\n/quit\n")
    )
    assert main(["chat", str(out), "--prefer", "kind", *greedy]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[0] == texts["kind"][0]
    assert "no preference 'nobody'" in said.err
    assert "unknown command /what" in said.err


def test_what_cannot_be_aligned_is_refused(
    aligned: tuple[Path, Path, Path], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run, _ = aligned
    empty = tmp_path / "empty.txt"
    empty.touch()
    out = tmp_path / "out"
    assert main(["align", str(run), "--prompts", str(empty), "--base", str(tiny_model), "--out", str(out)]) == 2
    assert "no usable prompt" in capsys.readouterr().err
    shared = tmp_path / "shared"
    values = {"backbone": tiny_model, "layer": 2, "dtype": "float32", "clients": 6, "rounds": 2, "inputs": 16, "out": shared}
    settings = [part for name, value in values.items() for part in (f"--{name}", str(value))]
    assert main(["train", "--data", str(data), "--split", "train", "--method", "fedavg-btl", *settings]) == 0
    prompts = tmp_path / "p.txt"
    prompts.write_text("stop\n")
    assert main(["align", str(shared), "--prompts", str(prompts), "--base", str(tiny_model), "--out", str(out)]) == 2
    assert "has no latent preference" in capsys.readouterr().err
    assert main(["align", str(run), "--prompts", str(prompts), "--out", str(out), "--candidates", "1"]) == 2
    assert "candidates: Input should be greater than or equal to 2" in capsys.readouterr().err
    assert main(["chat", str(run)]) == 2
    assert "no policy there" in capsys.readouterr().err
    assert not out.exists()
