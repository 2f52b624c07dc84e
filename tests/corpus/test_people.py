"""Whose pairs they are: clients by id, all of them; seen and unseen users of any files; nobody's
pairs are scored as somebody's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedvpa.cli.main import main
from fedvpa.config import build_config
from fedvpa.data.partition import Partitioner
from fedvpa.data.sources import source_of
from fedvpa.errors import BadInputError
from tests.conftest import WORDS
from tests.corpus.files import lines
from tests.unit.test_data import pair

FLAGS = ["--layer", "2", "--dtype", "float32", "--rounds", "3", "--local-steps", "2", "--inputs",
         "4", "--latent", "4", "--method", "fedvpl"]  # fmt: skip


def write(file: Path, users: list[Any], first: int = 0, pairs: int = 8) -> Path:
    rows = [
        {"prompt": f"{WORDS[i % 5]} {WORDS[(first + i) % 13]} {u % 7}", "client_id": name,
         "chosen": f"yes {WORDS[(i + u) % 9]} {first}", "rejected": f"no {WORDS[i % 7]} {i}"}
        for u, name in enumerate(users) for i in range(pairs)
    ]  # fmt: skip
    file.write_bytes(lines(*rows))
    return file


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Path) -> Path:
    """A run on six users, their test pairs, other users, and pairs of nobody."""
    write(tmp_path / "train.jsonl", [f"u{i}" for i in range(6)])
    write(tmp_path / "test.jsonl", [f"u{i}" for i in range(6)], first=3)
    write(tmp_path / "others.jsonl", [f"v{i}" for i in range(5)], first=5)
    write(tmp_path / "nobody.jsonl", [None, None], first=7)
    out = ["--backbone", str(tiny_model), "--out", str(tmp_path / "run"), "--quiet"]
    assert main(["train", "--data", str(tmp_path / "train.jsonl"), *out, *FLAGS]) == 0
    return tmp_path


def evaluated(folder: Path, *arguments: str) -> dict[str, Any]:
    command = ["evaluate", str(folder / "run"), "--repeats", "1", "--context", "4", *arguments]
    assert main([*command, "--quiet"]) == 0
    found: dict[str, Any] = json.loads((folder / "run" / "eval.json").read_text())
    return found


def test_every_client_id_is_a_client_unless_fewer_are_asked_for(folder: Path) -> None:
    assert len(json.loads((folder / "run" / "data.json").read_text())["clients"]) == 6
    pairs = [pair(i, None, f"u{i % 50}") for i in range(200)] + [pair(999, None, "lonely")]
    every, few, many = Partitioner(), Partitioner(12), Partitioner(70)
    assert len(every(pairs, 0)) == 50
    assert every.told(pairs, every(pairs, 0)) == (
        "1 of 51 client ids have fewer than 2 pairs, and are left out",
    )
    assert "12 of 50 clients are used, as was asked for" in few.told(pairs, few(pairs, 0))
    assert "70 clients were asked for; the data have 50" in many.told(pairs, many(pairs, 0))


def test_seen_clients_are_evaluated_alone_and_beside_users_of_another_file(folder: Path) -> None:
    alone = evaluated(folder, "--data", str(folder / "test.jsonl"))
    assert alone["data"]["unseen_clients"] == 0
    assert alone["accuracy"] == {}
    assert alone["seen"]["accuracy"]["own"]["n"] == 6
    assert "seen clients" in (folder / "run" / "report.html").read_text()
    both = evaluated(
        folder, "--data", str(folder / "test.jsonl"), "--unseen", str(folder / "others.jsonl")
    )
    assert (both["data"]["unseen_clients"], both["accuracy"]["own"]["n"]) == (5, 5)
    assert both["seen"]["accuracy"] == alone["seen"]["accuracy"]
    assert both["data"]["held_out_pairs_by"] == "id"


def test_pairs_of_strangers_and_of_nobody_are_no_seen_client_s(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strangers = evaluated(folder, "--data", str(folder / "others.jsonl"))
    assert strangers["seen"] is None
    assert strangers["data"]["unseen_clients"] == 5
    nobody = evaluated(folder, "--data", str(folder / "nobody.jsonl"), "--clients", "2")
    assert nobody["seen"] is None
    capsys.readouterr()
    unseen = ["--unseen", str(folder / "test.jsonl"), "--data", str(folder / "others.jsonl")]
    assert main(["evaluate", str(folder / "run"), *unseen]) == 2
    assert "every client id in it was trained on" in capsys.readouterr().err


def test_compare_takes_unseen_users_of_their_own_file_and_checks_all_files_first(
    folder: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder / "compare"
    command = [
        "compare", "--methods", "fedvpl,fedavg-btl", "--seeds", "0", "--data",
        str(folder / "train.jsonl"), "--backbone", str(tiny_model), "--out", str(out),
        "--context", "4", "--test-data", str(folder / "test.jsonl"), *FLAGS[:-2],
    ]  # fmt: skip
    assert main([*command, "--unseen-data", str(folder / "gone.jsonl")]) == 2
    assert "gone.jsonl: no such file" in capsys.readouterr().err
    assert not out.exists()
    assert main([*command, "--unseen-data", str(folder / "others.jsonl")]) == 0
    table = (out / "results.md").read_text()
    assert "| unseen |" in table
    # nobody unseen at all
    assert main([*command[:-1], command[-1], "--out", str(folder / "alone")]) == 0
    assert "| unseen |" not in (folder / "alone" / "results.md").read_text()


def test_rows_without_an_id_beside_rows_with_one_are_refused_or_few(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    some = [{"prompt": f"tea {i}?", "chosen": "yes", "rejected": "no", "client_id": f"u{i % 4}"}
            for i in range(200)]  # fmt: skip
    stray = {"prompt": "milk?", "chosen": "yes", "rejected": "no"}
    data = build_config({"data": {"source": str(file)}}).data
    file.write_bytes(lines(*some, stray))
    found = source_of(data).training(0)
    assert len(found.clients) == 4
    assert "1 record left out, without a client_id" in found.notes
    file.write_bytes(lines(*some[:20], stray))
    with pytest.raises(BadInputError, match=r"p.jsonl:21: has no client_id, as 1 of 21 records"):
        source_of(data).training(0)
    by_group = data.model_copy(update={"partition": "group", "clients": 3})
    assert len(source_of(by_group).training(0).clients) == 3


def test_training_says_what_its_data_can_bear(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "few.jsonl", ["a", "b", "c"], pairs=6)
    command = ["train", "--data", str(tmp_path / "few.jsonl"), "--backbone", str(tiny_model)]
    assert main([*command, *FLAGS, "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().err
    assert "3 clients, 15 training pairs (5 to 5 per client, median 5), 3 for validation" in said
    assert "few pairs: 15 are 3.8 per whitened dimension" in said
    assert "(95 %, 3 clients)" in said


def test_a_file_with_its_own_column_names_serves_a_user_and_shows_preferences(
    folder: Path, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FEDVPA_CACHE", str(runs / "cache"))
    file, run = folder / "own.jsonl", str(runs / "one")
    rows = [{"question": f"tea {i}?", "liked": "yes please", "other": "no"} for i in range(6)]
    file.write_bytes(lines(*rows))
    named = [
        "--column",
        "prompt=question",
        "--column",
        "chosen=liked",
        "--column",
        "rejected=other",
    ]
    for command in (["personalize", run, "--pairs"], ["preferences", run, "--data"]):
        assert main([*command, str(file)]) == 2
        assert "own.jsonl:1" in capsys.readouterr().err
        assert main([*command, str(file), *named]) == 0
        assert "Traceback" not in capsys.readouterr().err
