"""Published data sets, in small files of their documented shapes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from fedvpa.cli.main import main
from fedvpa.cli.parsers.data import PUBLISHED
from fedvpa.data.published import DATASETS, read_published
from fedvpa.data.reading import read_pairs
from fedvpa.errors import BadInputError
from tests.corpus.files import lines, said, sheet


def utterance(turn: int, reply: str, score: int, chosen: bool) -> dict[str, Any]:
    return {
        "utterance_id": "ut0", "interaction_id": f"int{turn}", "conversation_id": "c0",
        "user_id": "user7", "turn": turn, "within_turn_id": 0, "user_prompt": f"tea {turn}?",
        "model_response": reply, "model_name": "m", "score": score, "if_chosen": chosen,
    }  # fmt: skip


PRISM = [
    utterance(1, "two", 40, False), utterance(0, "no", 10, False), utterance(0, "yes", 90, True),
    utterance(0, "eh", 85, False), utterance(1, "one", 60, True),
    utterance(0, "EMPTY STRING", 1, False),
]  # fmt: skip
MULTIPREF = {
    "comparison_id": "x", "text": "tea?", "completion_a": "no", "completion_b": "yes",
    "normal_worker_annotations": [
        {"evaluator": "w1", "overall_pref": "B-is-clearly-better"},
        {"evaluator": "w2", "overall_pref": "Tie"}],
    "expert_worker_annotations": [{"evaluator": "w3", "overall_pref": "A-is-slightly-better"}],
}  # fmt: skip
COMMUNITY = {
    "conversation_id": 1, "annotator_id": 5, "first_turn_prompt": "tea?",
    "first_turn_response_a": "no", "first_turn_response_b": "yes", "first_turn_response_c": "eh",
    "first_turn_response_d": "yes", "first_turn_preferred_response": "response_b",
    "second_turn_prompt": "milk?", "second_turn_response_a": "one", "second_turn_response_b": "two",
    "second_turn_preferred_response": "response_a", "third_turn_prompt": "",
}  # fmt: skip


def arena(winner: str, judge: str) -> dict[str, Any]:
    asked = said("user", "tea?")
    return {
        "question_id": "q", "winner": winner, "judge": judge,
        "conversation_a": [asked, said("assistant", "yes")],
        "conversation_b": [asked, said("assistant", "no")],
    }  # fmt: skip


SUMMARIES = {
    "info": {"id": "t3", "post": "We drank tea.", "title": "Tea", "subreddit": "tea"},
    "summaries": [{"text": " No.", "policy": "ref"}, {"text": " Yes.", "policy": "sup"}],
    "choice": 1, "worker": "w9", "extra": {"confidence": 8},
}  # fmt: skip
TEA = [("user", "tea?")]
GIVES: dict[str, tuple[bytes, list[Any]]] = {
    "prism": (lines(*PRISM), [
        ([("user", "tea 0?")], "yes", "no", "user7"), ([("user", "tea 0?")], "yes", "eh", "user7"),
        ([("user", "tea 0?")], "eh", "no", "user7"),
        ([("user", "tea 0?"), ("assistant", "yes"), ("user", "tea 1?")], "one", "two", "user7")]),
    "multipref": (lines(MULTIPREF), [(TEA, "yes", "no", "w1"), (TEA, "no", "yes", "w3")]),
    "community-alignment": (sheet([COMMUNITY]), [
        (TEA, "yes", "no", "5"), (TEA, "yes", "eh", "5"),
        ([*TEA, ("assistant", "yes"), ("user", "milk?")], "one", "two", "5")]),
    "chatbot-arena": (lines(arena("model_a", "arena_user_1"), arena("tie (bothbad)", "a2"),
                            arena("model_b", "arena_user_3")),
                      [(TEA, "yes", "no", "arena_user_1"), (TEA, "no", "yes", "arena_user_3")]),
    "summarize": (lines(SUMMARIES), [
        ([("user", "Summarize:\n\nTea\n\nWe drank tea.")], "Yes.", "No.", "w9")]),
}  # fmt: skip


def told(pairs: Any) -> list[Any]:
    return [([tuple(m) for m in p.prompt], p.chosen, p.rejected, p.client_id) for p in pairs]


@pytest.mark.parametrize("name", sorted(GIVES))
def test_a_published_data_set_is_read_with_its_people(name: str, tmp_path: Path) -> None:
    raw, wanted = GIVES[name]
    file = tmp_path / ("data.csv" if name == "community-alignment" else "data.jsonl")
    file.write_bytes(raw)
    assert sorted(map(repr, told(read_published(name, file).pairs))) == sorted(map(repr, wanted))
    out = tmp_path / "out.jsonl.gz"
    assert main(["data", "convert", str(file), "--from", name, "--out", str(out)]) == 0
    assert told(read_pairs(out).pairs) == told(read_published(name, file).pairs)
    (tmp_path / "other.jsonl").write_bytes(lines({"prompt": "tea?"}))
    with pytest.raises(BadInputError, match=r"other.jsonl:1: missing key"):
        read_published(name, tmp_path / "other.jsonl")


def test_every_published_data_set_is_tested_and_offered() -> None:
    assert set(GIVES) == set(DATASETS) == set(PUBLISHED)


def test_scores_have_to_differ_by_the_margin(tmp_path: Path) -> None:
    (tmp_path / "u.jsonl").write_bytes(lines(*PRISM))
    found = told(read_published("prism", tmp_path / "u.jsonl", score_margin=50.0).pairs)
    assert [(c, r) for _, c, r, _ in found] == [("yes", "no"), ("eh", "no")]


@pytest.mark.parametrize("form", ["trl", "hh"])
def test_what_is_converted_reads_back_to_the_same_pairs(form: str, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    rows = [
        {"prompt": f"tea {i}?\n\n  or milk?", "chosen": "yes\n\n- a", "rejected": "no",
         "client_id": f"user {i}", "group": "kind"}
        for i in range(3)
    ]  # fmt: skip
    source.write_bytes(lines(*rows))
    out = tmp_path / "out.jsonl"
    command = ["data", "convert", str(source), "--to", form, "--out", str(out)]
    assert main(command) == 0
    before, after = read_pairs(source).pairs, read_pairs(out).pairs
    assert told(before) == told(after)
    assert [p.group for p in after] == ["kind"] * 3
    assert main(command) == 2  # it is there already


def test_what_a_form_cannot_hold_is_refused_or_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl.gz"
    tagged = {"prompt": "tea?", "chosen": "yes\n\nHuman: ha", "rejected": "no"}
    source.write_bytes(lines({"prompt": "milk?", "chosen": "yes", "rejected": "no"}, tagged))
    command = ["data", "convert", str(source), "--to", "hh", "--out", str(out)]
    assert main(command) == 2
    assert "in.jsonl:2: cannot be written as an HH-RLHF transcript" in capsys.readouterr().err
    assert not out.exists()
    assert main([*command, "--on-bad-record", "skip"]) == 0
    assert "left out: 1" in capsys.readouterr().err
    assert len(gzip.decompress(out.read_bytes()).splitlines()) == 1


def test_inspect_shows_records_as_they_were_understood(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"tea {i}?", "chosen": "yes\x1b[2J", "rejected": "no", "client_id": i % 2}
        for i in range(5)
    ]
    file.write_bytes(lines(*rows))
    assert main(["data", "inspect", str(file), "--json", str(tmp_path / "i.json")]) == 0
    shown = capsys.readouterr().err
    assert "  user:      tea 2?" in shown
    assert "  chosen:    yes\\x1b[2J" in shown
    assert "pairs per client id: 2 to 3, median 2.5; 0 pairs without one" in shown
    assert len(json.loads((tmp_path / "i.json").read_text())["examples"]) == 3
