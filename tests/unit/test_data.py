"""Reading, checking and dividing preference records."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedvpa.config import PersonasConfig
from fedvpa.data.inspection import inspect_pairs
from fedvpa.data.partition import Partitioner, corrupt, split_off, without_duplicates
from fedvpa.data.personas import (
    ATTRIBUTES,
    CANDIDATES,
    candidates,
    group_vectors,
    measure,
    personas,
    prompts,
    respond,
    user_vector,
)
from fedvpa.data.preferences import pairs_of
from fedvpa.data.reading import read_pairs
from fedvpa.errors import BadInputError, RecordError
from fedvpa.records import Message, PreferencePair

HH = {"chosen": "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: tea?\n\nAssistant: yes",
      "rejected": "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: tea?\n\nAssistant: no"}  # fmt: skip


def pair(i: int, group: str | None = None, client: str | None = None) -> PreferencePair:
    return PreferencePair((Message("user", f"question {i}"),), "yes", "no", client, group, f"f:{i}")


def test_every_format_gives_the_same_pair() -> None:
    turns = [{"role": "user", "content": "tea?"}]
    yes, no = [{"role": "assistant", "content": "yes"}], [{"role": "assistant", "content": "no"}]
    records = [
        {"prompt": "tea?", "chosen": "yes", "rejected": "no"},
        {"prompt": turns, "chosen": yes, "rejected": no},
        {"chosen": turns + yes, "rejected": turns + no},
        {"chosen": "tea? yes", "rejected": "tea? no"},
        {
            "chosen": "\n\nHuman: tea?\n\nAssistant: yes",
            "rejected": "\n\nHuman: tea?\n\nAssistant: no",
        },
    ]
    for record in records:
        found = pairs_of(record, "f:1")[0]
        assert (found.prompt, found.chosen, found.rejected) == (
            (Message("user", "tea?"),),
            "yes",
            "no",
        )
    long = pairs_of(HH | {"client_id": 7, "group": "kind"}, "f:1")[0]
    assert [m.role for m in long.prompt] == ["user", "assistant", "user"]
    assert (long.client_id, long.group) == ("7", "kind")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"chosen": "a"}, "missing key 'rejected'"),
        ([1, 2], "expected an object, found a list"),
        ({"prompt": "p", "chosen": "same", "rejected": "same "}, "identical responses"),
        ({"prompt": "p", "chosen": "x", "rejected": " "}, "empty response in 'rejected'"),
        (HH | {"rejected": "\n\nHuman: other\n\nAssistant: no"}, "different prompts"),
        ({"prompt": "p", "chosen": 3, "rejected": "x"}, "wrong type: 'chosen' is a number"),
        ({"prompt": "p", "chosen": float("nan"), "rejected": "x"}, "empty response in 'chosen'"),
        (HH | {"chosen": "\n\nHuman: hi"}, "no final assistant turn in 'chosen'"),
        ({"prompt": "", "chosen": "x", "rejected": "y"}, "no user turn"),
        ({"prompt": "p", "chosen": "x\ud800", "rejected": "y"}, "undecodable characters"),
        (HH | {"client_id": [1]}, "wrong type: 'client_id'"),
        (
            {
                "chosen": [{"role": "robot", "content": "x"}],
                "rejected": [{"role": "user", "content": "x"}],
            },
            "needs a role",
        ),
        (
            {
                "chosen": [{"role": "user", "content": "x"}],
                "rejected": [{"role": "user", "content": "x"}],
            },
            "no final assistant",
        ),
    ],
)
def test_bad_records_are_refused_with_place_and_reason(record: object, reason: str) -> None:
    with pytest.raises(RecordError, match=reason) as error:
        pairs_of(record, "file.jsonl:9")
    assert str(error.value).startswith("file.jsonl:9: ")


def test_files_of_every_kind_and_groups_by_folder(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(4)]
    text = "\n".join(map(json.dumps, rows)) + "\n\n"
    (tmp_path / "x" / "kind").mkdir(parents=True)
    (tmp_path / "y" / "kind").mkdir(parents=True)
    (tmp_path / "blunt").mkdir()
    (tmp_path / "x/kind/train.jsonl").write_text(text)
    (tmp_path / "y/kind/train.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "blunt/train.parquet")
    (tmp_path / "blunt/test.jsonl").write_text(text)
    found = read_pairs(str(tmp_path), "train")
    assert found.groups == ["blunt", "x/kind", "y/kind"]
    assert len(found.pairs) == 12
    assert len(read_pairs(str(tmp_path)).pairs) == 16
    with pytest.raises(BadInputError, match=r"no file called dev\.\*; found: test, train"):
        read_pairs(str(tmp_path), "dev")


def test_few_empty_replies_are_skipped_and_counted_but_many_are_refused(tmp_path: Path) -> None:
    good = [json.dumps({"prompt": f"p{i}", "chosen": "a", "rejected": "b"}) for i in range(300)]
    empty, missing = (
        json.dumps({"prompt": "p", "chosen": "", "rejected": "b"}),
        json.dumps({"prompt": "p"}),
    )
    file = tmp_path / "d.jsonl"
    file.write_text("\n".join([*good, empty, empty]))
    found = read_pairs(str(file))
    assert len(found.pairs) == 300
    assert found.skipped == {"empty response in 'chosen'": 2}
    assert found.first_skipped[0].startswith(f"{file}:301: ")
    with pytest.raises(RecordError, match=":301: "):
        read_pairs(str(file), on_bad_record="error")
    file.write_text("\n".join([*good[:50], empty]))
    with pytest.raises(RecordError, match=r":51: empty response.*1 of 51"):
        read_pairs(str(file))
    file.write_text("\n".join([*good, missing]))
    with pytest.raises(RecordError, match=":301: missing key"):
        read_pairs(str(file))
    assert read_pairs(str(file), on_bad_record="skip").skipped.total() == 1


def test_inspection_finds_duplicates_contradictions_and_leaks(tmp_path: Path) -> None:
    rows = [("p", "a", "b"), ("p", "a", "b"), ("p", "b", "a"), ("q", "a", "b")]
    for name, keep in (("train", rows), ("test", rows[:1])):
        lines = [json.dumps(dict(zip(("prompt", "chosen", "rejected"), r))) for r in keep]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    found = inspect_pairs(read_pairs(str(tmp_path), "train"), read_pairs(str(tmp_path), "test"))
    assert (found["pairs"], found["duplicates"], found["contradictions"]) == (4, 2, 1)
    assert found["leaks"] == {"pairs": 1, "prompts": 1}


def test_group_ratio_gives_minorities_and_equal_sizes() -> None:
    pairs = [pair(i, "a" if i < 100 else "b") for i in range(200)]
    clients = Partitioner(10, group_ratio="90:10")(pairs, 0)
    assert [c.group for c in clients].count("b") == 1
    assert {len(c.pairs) for c in clients} == {11}
    with pytest.raises(BadInputError, match="each of the 2 groups"):
        Partitioner(10, group_ratio="1:2:3")(pairs, 0)
    with pytest.raises(BadInputError, match="use fewer clients"):
        Partitioner(150)(pairs, 0)


def test_opposed_groups_may_judge_the_same_pairs() -> None:
    pairs = [pair(i, "a") for i in range(8)] + [pair(i, "b").reversed() for i in range(8)]
    clients = Partitioner(2)([*pairs, *pairs[:3]], 0)
    assert [len(c.pairs) for c in clients] == [8, 8]


def test_mirrored_clients_hold_the_same_pairs_reversed() -> None:
    clients = Partitioner(4, protocol="mirrored")([pair(i, "a") for i in range(20)], 0)
    assert [c.group for c in clients] == ["a", "a-mirrored"] * 2
    assert [p.reversed() for p in clients[0].pairs] == list(clients[1].pairs)
    assert len(clients[0].pairs) == 10


def test_mixed_clients_hold_the_share_of_foreign_pairs() -> None:
    clients = Partitioner(8, "mixed", mixing=0.25)([pair(i, "ab"[i % 2]) for i in range(160)], 0)
    for client in clients:
        assert sum(p.group != client.group for p in client.pairs) == 5
    assert len({p.source for c in clients for p in c.pairs}) == 160


def test_dirichlet_concentration_rules_how_mixed_clients_are() -> None:
    pairs = [pair(i, "ab"[i % 2]) for i in range(400)]

    def purity(alpha: float) -> float:
        clients = Partitioner(20, "dirichlet", dirichlet_alpha=alpha)(pairs, 0)
        return float(
            np.mean([sum(p.group == c.group for p in c.pairs) / len(c.pairs) for c in clients])
        )

    assert purity(0.05) > 0.9
    assert purity(100.0) < 0.7


def test_natural_ids_are_kept_and_too_small_ones_left_out() -> None:
    pairs = [pair(i, None, f"u{i % 3}") for i in range(9)] + [pair(99, None, "lonely")]
    assert [c.name for c in Partitioner(10)(pairs, 0)] == ["u0", "u1", "u2"]
    with pytest.raises(BadInputError, match="has no client_id, as"):
        Partitioner(10, "natural")([pair(1)], 0)


def test_mirrored_clients_are_as_many_as_asked_for_where_ids_are_fewer() -> None:
    pairs = [pair(i, None, f"u{i % 8}") for i in range(80)]
    assert len(Partitioner(10, protocol="mirrored")(pairs, 0)) == 10
    assert len(Partitioner(0, protocol="mirrored")(pairs, 0)) == 16


def test_validation_pairs_are_disjoint_and_all_pairs_are_kept() -> None:
    client = Partitioner(1)([pair(i) for i in range(23)], 0)[0]
    train, held = split_off(client, 0.1, 0)
    assert (len(train.pairs), len(held.pairs)) == (21, 2)
    assert {*train.pairs, *held.pairs} == set(client.pairs)
    twice = without_duplicates([pair(1), pair(1).reversed(), pair(2)])
    assert [p.source for p in twice] == ["f:1", "f:2"]


def test_personas_follow_their_true_vectors() -> None:
    settings = PersonasConfig(groups=4, pairs=40, noise=0.0, spread=0.2)
    clients = personas(settings, range(8), seed=3)
    assert personas(settings, [5], seed=3)[0] == clients[5]
    v = group_vectors(4)
    np.testing.assert_allclose(v[0], -v[1])
    low = clients[0].pairs + clients[4].pairs  # group 0 wants concise replies
    assert clients[0].group == "concise"
    shorter = [len(p.chosen.split()) < len(p.rejected.split()) for p in low]
    assert np.mean(shorter) > 0.65
    np.testing.assert_allclose(user_vector(settings, 4, 3)[1], v[0], atol=1.0)
    assert len(prompts()) >= 400
    assert len({p.prompt for c in clients for p in c.pairs}) > 150


def test_every_attribute_is_measured_exactly() -> None:
    generator = np.random.default_rng(0)
    for k, (name, _, _) in enumerate(ATTRIBUTES):
        for prompt in prompts()[::37]:
            a = generator.choice([-1, 1], len(ATTRIBUTES))
            low, high = a.copy(), a.copy()
            low[k], high[k] = -1, 1
            # how a style is worded varies; its measure must still tell the poles apart
            if name != "length":
                assert (
                    measure(respond(prompt, low, generator))[name]
                    < measure(respond(prompt, high, generator))[name]
                )
    words = {
        s: np.mean(
            [measure(respond(p, [s, 1, 1, 1, 1], generator))["length"] for p in prompts()[::9]]
        )
        for s in (-1, 1)
    }
    assert words[1] > 1.6 * words[-1]


def test_personas_choose_among_fixed_candidates_and_test_prompts_are_new() -> None:
    assert candidates(prompts()[3]) is candidates(prompts()[3])
    kinds = {tuple(kind.tolist()) for kind, _ in candidates(prompts()[3])}
    assert len(kinds) == CANDIDATES
    texts = {text for prompt in prompts() for _, text in candidates(prompt)}
    train, test = (
        personas(PersonasConfig(pairs=12), range(6), seed, split)
        for seed, split in ((4, "train"), (5, "test"))
    )
    for clients in (train, test):
        assert {text for c in clients for p in c.pairs for text in (p.chosen, p.rejected)} <= texts
    assert not {p.prompt for c in train for p in c.pairs} & {
        p.prompt for c in test for p in c.pairs
    }
    with pytest.raises(BadInputError, match="at most"):
        personas(PersonasConfig(pairs=5000), range(1), 0)


def test_corrupted_clients_are_marked_and_their_labels_spoilt() -> None:
    clients = Partitioner(10)([pair(i, "ab"[i % 2]) for i in range(400)], 0)
    for kind, least, most in (("reversed", 1.0, 1.0), ("random", 0.3, 0.7)):
        spoilt = corrupt(clients, 0.2, kind, 0)
        assert [c.corrupted for c in spoilt].count(True) == 2
        for before, after in zip(clients, spoilt):
            flipped = sum(a == b.reversed() for a, b in zip(after.pairs, before.pairs)) / len(
                before.pairs
            )
            assert (least <= flipped <= most) if after.corrupted else after == before
    assert corrupt(clients, 0.0, "random", 0) == clients
