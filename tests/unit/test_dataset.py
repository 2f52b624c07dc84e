"""From a configuration to clients: who is unseen, and what nobody trains on."""

from __future__ import annotations

import json
from pathlib import Path

from fedvpa.config import build_config
from fedvpa.data.sources import source_of
from fedvpa.experiment.dataset import training_data


def write_users(file: Path, users: list[str], first: int = 0, named: bool = True) -> None:
    rows = [
        {
            "prompt": f"{user} asks {first + i}",
            "chosen": f"yes {i}",
            "rejected": f"no {i}",
            "client_id": user if named else None,
        }
        for user in users
        for i in range(12)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))


def test_a_client_that_was_trained_on_is_never_unseen(tmp_path: Path) -> None:
    write_users(tmp_path / "train.jsonl", ["ann", "bob"])
    write_users(tmp_path / "test.jsonl", ["ann", "bob", "cy"], first=50)
    config = build_config({"data": {"source": str(tmp_path), "split": "train"}})
    train = training_data(config).train
    seen = {c.name for c in train}
    evaluation = config.data.model_copy(update={"split": "test"})
    source = source_of(evaluation.model_copy(update={"clients": 10}))
    unseen = source.unseen(0, 8, seen).clients
    assert [c.name for c in unseen] == ["cy"]
    assert [len(c.pairs) for c in source.held_out(0, train)] == [12, 12]
    write_users(tmp_path / "test.jsonl", ["ann", "bob"], first=50)
    assert source_of(evaluation).unseen(0, 8, seen).clients == []
    write_users(tmp_path / "test.jsonl", ["di", "ed"], first=50)
    assert source_of(evaluation).held_out(0, train) == []  # strangers
    write_users(tmp_path / "test.jsonl", ["di", "ed"], first=50, named=False)
    assert source_of(evaluation).held_out(0, train) == []  # nobody's


def test_no_client_trains_on_a_validation_pair_of_another_not_even_reversed(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"question {i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(80)
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {
        "source": str(tmp_path),
        "protocol": "mirrored",
        "clients": 4,
        "validation_share": 0.25,
    }
    data = training_data(build_config({"data": settings}))
    trained = {p.content_key() for c in data.train for p in c.pairs}
    held = [p for c in data.validation for p in c.pairs]
    assert len(held) == 40
    assert not trained & {p.content_key() for p in held}


def test_unseen_personas_are_new_users_and_seen_ones_keep_their_taste() -> None:
    config = build_config({"data": {"clients": 3, "personas": {"pairs": 6}}})
    train = training_data(config).train
    two = config.data.model_copy(update={"clients": 2})
    unseen = source_of(two).unseen(config.seed, 4, {c.name for c in train}).clients
    assert not {c.name for c in unseen} & {c.name for c in train}
    again = source_of(config.data).held_out(config.seed, train)
    assert [(c.name, c.group) for c in again] == [(c.name, c.group) for c in train]
    assert not {p for c in again for p in c.pairs} & {p for c in train for p in c.pairs}


def test_mirrored_seen_clients_are_scored_on_reversed_held_out_pairs_of_their_group(
    tmp_path: Path,
) -> None:
    for group in ("a", "b"):
        (tmp_path / group).mkdir()
        for split, count in (("train", 16), ("test", 8)):
            rows = [
                {"prompt": f"{split} {group} {i}", "chosen": f"yes {i}", "rejected": f"no {i}"}
                for i in range(count)
            ]
            (tmp_path / group / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {
        "source": str(tmp_path),
        "split": "train",
        "protocol": "mirrored",
        "clients": 8,
        "validation_share": 0,
    }
    config = build_config({"data": settings})
    seen = training_data(config).train
    assert sorted({c.group for c in seen}) == ["a", "a-mirrored", "b", "b-mirrored"]
    held = source_of(config.data.model_copy(update={"split": "test"})).held_out(0, seen)
    assert [(c.name, c.group) for c in held] == [(c.name, c.group) for c in seen]
    for plain, mirrored in zip(held[::2], held[1::2]):
        assert len(plain.pairs) == 4
        assert [p.reversed() for p in plain.pairs] == list(mirrored.pairs)
        assert {p.group for p in plain.pairs} == {plain.group}
