"""A run whose files were truncated, swapped, retyped or edited: a sentence that names the file, or
the very answer of the whole run; never a traceback, never another answer."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fedvpa.checkpoint import _digest
from fedvpa.cli.main import main
from fedvpa.data.reading import read_pairs
from fedvpa.errors import FedvpaError
from fedvpa.experiment.opening import with_checksum
from fedvpa.experiment.use import PreferenceModel
from fedvpa.types import digest_of

CHECKPOINT, WHITENING = "checkpoint.safetensors", "whitening.safetensors"


def answer(run: Path, data: Path) -> list[float]:
    """z and a score."""
    model = PreferenceModel(run)
    me = model.personalize(read_pairs(data / "kind" / "test.jsonl").pairs[:6])
    return [*me.mean.tolist(), *model.score([("tea is", "very good")], me).tolist()]


def damaged(runs: Path, place: Path, damage: Callable[[Path], None]) -> str:
    """What opening a damaged copy says; empty where it answers as the whole one does."""
    copy = place / "copy"
    shutil.copytree(runs / "one", copy)
    damage(copy)
    try:
        found = answer(copy, runs / "data")
    except FedvpaError as error:
        assert str(copy) in str(error)
        return str(error)
    finally:
        shutil.rmtree(copy)
    assert found == answer(runs / "one", runs / "data")
    return ""


def retold(edit: Callable[[dict[str, Any]], Any], file: str) -> Callable[[Path], None]:
    """Edits a JSON file, with a checksum that fits."""

    def damage(run: Path) -> None:
        content = edit(json.loads((run / file).read_text()))
        (run / file).write_text(json.dumps(with_checksum(content)))

    return damage


def reformed(
    file: str, tensors: Callable[[dict[str, Any]], Any] = dict,
    header: Callable[[dict[str, Any]], Any] | None = None,
) -> Callable[[Path], None]:  # fmt: skip
    """Edits a file of tensors, with a digest that fits."""

    def damage(run: Path) -> None:
        with safe_open(run / file, framework="pt") as opened:
            metadata = opened.metadata()
            found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        found = tensors(found)
        if file == WHITENING:
            metadata["digest"] = digest_of(found)
        else:
            told = (header or dict)(json.loads(metadata["fedvpa"]))
            if isinstance(told, dict):
                told["digest"] = _digest(told, found)
            metadata = {"fedvpa": json.dumps(told)}
        save_file(found, run / file, metadata)

    return damage


def first_float(found: dict[str, Any]) -> str:
    return next(name for name in sorted(found) if found[name].is_floating_point())


def unsigned(file: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Edits the bytes of a file, and nothing else."""
    return lambda run: (run / file).write_bytes(change((run / file).read_bytes())) and None


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a number of a checkpoint is another": (
        unsigned(CHECKPOINT, lambda raw: raw[:-3] + bytes([raw[-3] ^ 1]) + raw[-2:]),
        "does not hold what was written"),
    "a number of the whitening is another": (
        unsigned(WHITENING, lambda raw: raw[:-3] + bytes([raw[-3] ^ 1]) + raw[-2:]),
        "does not hold what was written"),
    "a client is called otherwise": (
        unsigned("data.json", lambda raw: raw.replace(b"client-0001", b"client-0009")),
        "is not what was written"),
    "a tensor is missing": (
        reformed(CHECKPOINT, lambda t: {n: v for n, v in t.items() if n != first_float(t)}),
        "it has no tensor",
    ),
    "a tensor too many": (
        reformed(CHECKPOINT, lambda t: t | {"params/more": torch.zeros(1)}), "that is not known"),
    "a section too many": (
        reformed(CHECKPOINT, lambda t: t | {"x/y": torch.zeros(1)}), "damaged checkpoint"),
    "another shape": (
        reformed(CHECKPOINT, lambda t: t | {first_float(t): torch.zeros(3, 3, 3)}), "call for"),
    "another type": (
        reformed(CHECKPOINT, lambda t: t | {first_float(t): t[first_float(t)].long()}), "call for"),
    "NaN in a parameter": (
        reformed(CHECKPOINT, lambda t: t | {first_float(t): t[first_float(t)] * torch.nan}),
        "holds NaN or Inf"),
    "components differ in number": (
        reformed(CHECKPOINT, lambda t: t | {"population/weight": torch.ones(7)}), "in number"),
    "a round that is text": (
        reformed(CHECKPOINT, header=lambda h: h | {"round": "x"}), "damaged checkpoint"),
    "a history of text": (
        reformed(CHECKPOINT, header=lambda h: h | {"history": ["x"]}), "checkpoint: history"),
    "a history without rounds": (
        reformed(CHECKPOINT, header=lambda h: h | {"history": [{}]}), "a row without its round"),
    "a header that is a list": (
        reformed(CHECKPOINT, header=lambda h: [1]), "not a fedvpa checkpoint"),
    "another fingerprint": (
        reformed(CHECKPOINT, header=lambda h: h | {"fingerprint": "x"}), "of another run"),
    "NaN in the whitening": (
        reformed(WHITENING, lambda t: t | {"projection": t["projection"] * torch.nan}), "NaN"),
    "a whitening of another width": (
        reformed(WHITENING, lambda t: t | {"projection": torch.zeros(32, 5)}), "do not fit"),
    "a whitening of integers": (
        reformed(WHITENING, lambda t: t | {"centre": t["centre"].long()}), "do not fit"),
    "a whitening of other names": (
        reformed(WHITENING, lambda t: {"a": t["centre"]}), "it holds a"),
    "no clients": (retold(lambda d: d | {"clients": []}, "data.json"), "data.json: damaged"),
    "clients that are a number": (retold(lambda d: d | {"clients": 3}, "data.json"), "damaged"),
    "a client without a name": (
        retold(lambda d: d | {"clients": [{"group": None}]}, "data.json"), "clients.0.name"),
    "one client less": (
        retold(lambda d: d | {"clients": d["clients"][1:]}, "data.json"), "call for"),
    "data of an earlier version": (
        retold(lambda d: {k: v for k, v in d.items() if k != "identity"}, "data.json"),
        "train the run again"),
    "another backbone": (
        retold(lambda d: d | {"signature": "x"}, "data.json"), "made in another way"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_run_names_the_file(name: str, runs: Path, tmp_path: Path) -> None:
    damage, says = DAMAGES[name]
    assert says in damaged(runs, tmp_path, damage)


@pytest.mark.parametrize("file", ["config.yaml", "data.json", CHECKPOINT, WHITENING])
def test_a_file_of_another_run_is_known_for_one(file: str, runs: Path, tmp_path: Path) -> None:
    assert damaged(
        runs, tmp_path, lambda run: shutil.copy(runs / "two" / file, run / file) and None
    )


@pytest.mark.parametrize(
    "edit", ["layer: 2->layer: 1", "inputs: 8->inputs: 7", "latent: 4->latent: [4"]
)
def test_edited_settings_are_known_for_edited(edit: str, runs: Path, tmp_path: Path) -> None:
    before, _, after = edit.partition("->")

    def damage(run: Path) -> None:
        text = (run / "config.yaml").read_text()
        assert before in text
        (run / "config.yaml").write_text(text.replace(before, after, 1))

    assert "config.yaml" in damaged(runs, tmp_path, damage)


def test_files_cut_flipped_or_swapped_at_random_never_answer_otherwise(
    runs: Path, tmp_path: Path
) -> None:
    chance, said = random.Random(0), 0
    names = sorted(p.name for p in (runs / "one").iterdir() if p.is_file())
    for trial in range(60):
        name = chance.choice(names)

        def damage(run: Path, name: str = name, kind: int = trial % 4) -> None:
            raw = bytearray((run / name).read_bytes())
            if kind == 0:
                raw = raw[: chance.randrange(len(raw))]
            elif kind == 1:
                raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
            elif kind == 2:
                raw = bytearray((run / chance.choice(names)).read_bytes())
            else:
                raw += b"\0" * 7
            (run / name).write_bytes(raw)

        said += bool(damaged(runs, tmp_path, damage))
    assert said > 20


def test_a_run_that_lost_a_file_is_not_trained_on_in_silence(runs: Path, tmp_path: Path) -> None:
    for name in ("data.json", WHITENING):
        copy = tmp_path / name
        shutil.copytree(runs / "one", copy)
        (copy / name).unlink()
        assert main(["train", "--resume", "--out", str(copy), "--quiet"]) == 1
    copy = tmp_path / "whole"
    shutil.copytree(runs / "one", copy)
    before = (copy / "manifest.json").read_bytes()
    assert main(["train", "--resume", "--out", str(copy), "--quiet"]) == 0
    assert (copy / "manifest.json").read_bytes() == before


def test_a_cache_that_is_deleted_between_two_halves_changes_the_last_bits_at_most(
    runs: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedvpa.checkpoint import load_checkpoint
    from fedvpa.config import build_config
    from fedvpa.experiment.train import train

    def stop(done: int, *_: object) -> None:
        if done == 2:
            raise KeyboardInterrupt

    given = {
        "method": "fedvpl", "data": {"source": str(runs / "data"), "split": "train", "clients": 4},
        "features": {"backbone": str(tiny_model), "layer": 2, "dtype": "float32"},
        "model": {"inputs": 8, "latent": 4}, "federation": {"rounds": 4, "local_steps": 3},
    }  # fmt: skip
    monkeypatch.setenv("FEDVPA_CACHE", str(tmp_path / "cache"))
    whole = train(build_config(given, {"out": str(tmp_path / "whole")}))
    config = build_config(given, {"out": str(tmp_path / "broken")})
    with pytest.raises(KeyboardInterrupt):
        train(config, on_round=stop)
    shutil.rmtree(tmp_path / "cache")
    broken = train(config, resume=True)
    one, two = (load_checkpoint(r.root / CHECKPOINT).state.params for r in (whole, broken))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-4, rtol=1e-3)
