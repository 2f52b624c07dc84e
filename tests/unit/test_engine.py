"""The engine: answers side by side are those drawn alone, whatever their z, whenever they come."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

from fedvpa.errors import BadInputError, RunError
from fedvpa.policy.batching import BatchingEngine
from fedvpa.policy.engine import (
    Answer,
    BusyError,
    Drawing,
    Engine,
    Piece,
    Request,
    TooLongError,
    draw,
    stream,
)
from fedvpa.policy.policy import Policy, Sampling
from fedvpa.policy.rows import draw_rows
from fedvpa.policy.sampling import draw_from_nucleus
from fedvpa.policy.transcript import Transcript
from fedvpa.records import Message
from tests.unit.test_alignment import FORMS, PROMPTS, policy_of

GREEDY = Drawing(tokens=6, temperature=0.0)
Z = [torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0]), None]


@pytest.fixture(scope="session")
def tiny_gemma(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A random Gemma 3 whose layers see two tokens back, but for every third one."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    torch.manual_seed(1)
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=3,
        sliding_window_pattern=3, max_position_embeddings=256, initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("tiny-gemma")
    Gemma3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def opened() -> Iterator[Callable[..., BatchingEngine]]:
    engines: list[BatchingEngine] = []

    def of(policy: Policy, **more: int) -> BatchingEngine:
        engines.append(BatchingEngine(policy, **more))
        return engines[-1]

    yield of
    for engine in engines:
        engine.close()


@pytest.mark.parametrize("family", ["llama", "gemma"])
@pytest.mark.parametrize("form", FORMS)
def test_users_of_different_z_share_a_batch_and_get_what_they_get_alone(
    form: str, family: str, opened: Callable[..., BatchingEngine], request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue("tiny_model" if family == "llama" else "tiny_gemma")
    policy = policy_of(folder, form, loud=0.5)
    policy.stops = [policy.tokenizer.eos_token_id]
    alone = [
        policy.respond(PROMPTS[i % 3], Z[i // 3], Sampling(6, 0.0)) for i in range(9)
    ]  # fmt: skip
    engine: Engine = opened(policy)
    found = draw(engine, [Request(PROMPTS[i % 3], Z[i // 3], GREEDY) for i in range(9)])
    assert [answer.text for answer in found] == alone
    assert len(set(alone)) > 3
    assert [a.prompt_tokens for a in found[:3]] == [len(policy.prompt_ids(p)) for p in PROMPTS]
    assert all(a.finish == ("length" if a.tokens == 6 else "stop") for a in found)
    assert engine.load == {"running": 0, "waiting": 0, "tokens": sum(a.tokens for a in found)}


def test_who_comes_late_changes_nothing_for_the_others(
    tiny_model: Path, opened: Callable[..., BatchingEngine]
) -> None:
    policy = policy_of(tiny_model, loud=0.5)
    policy.stops = []  # every answer has its full length
    long = Drawing(tokens=40, temperature=0.0)
    engine = opened(policy, rows=3)
    expected = draw(engine, [Request(PROMPTS[0], Z[0], long)])[0]
    pieces = stream(engine, Request(PROMPTS[0], Z[0], long))
    first = next(pieces)
    others = [Request(PROMPTS[1], Z[k % 3], Drawing(tokens=3 + k)) for k in range(5)]
    found: list[Answer] = []
    beside = threading.Thread(target=lambda: found.extend(draw(engine, others)))
    beside.start()
    assert first.text + "".join(p.text for p in pieces) == expected.text
    beside.join()
    assert [a.tokens for a in found] == [3, 4, 5, 6, 7]
    assert all(a.finish == "length" for a in found)


def test_a_seed_draws_the_same_whoever_is_beside(
    tiny_model: Path, opened: Callable[..., BatchingEngine]
) -> None:
    policy = policy_of(tiny_model, loud=0.5)
    policy.stops = []
    engine = opened(policy)
    mine = Request(PROMPTS[1], Z[0], Drawing(tokens=12, temperature=1.5, top_p=0.9, seed=7))
    alone = draw(engine, [mine])[0]
    crowd = [Request(PROMPTS[k % 3], Z[k % 3], Drawing(tokens=9, seed=k)) for k in range(4)]
    assert draw(engine, [*crowd, mine])[-1] == alone
    other = Request(PROMPTS[1], Z[0], Drawing(tokens=12, temperature=1.5, top_p=0.9, seed=8))
    assert draw(engine, [other])[0].text != alone.text


def test_a_reader_who_leaves_frees_the_row(
    tiny_model: Path, opened: Callable[..., BatchingEngine]
) -> None:
    policy = policy_of(tiny_model)
    policy.stops = []
    engine = opened(policy, rows=1)
    pieces = stream(engine, Request(PROMPTS[0], None, Drawing(tokens=200)))
    next(pieces)
    pieces.close()
    # or this one would wait for two hundred tokens
    assert draw(engine, [Request(PROMPTS[1], None, Drawing(tokens=1))])[0].tokens == 1
    assert engine.load["tokens"] < 150
    assert engine.load["running"] == 0


def test_no_more_wait_than_may_and_closing_ends_everybody(
    tiny_model: Path, opened: Callable[..., BatchingEngine]
) -> None:
    policy = policy_of(tiny_model)
    policy.stops = []
    engine, told = opened(policy, rows=1, waiting=2), list[Piece | Exception]()
    held = threading.Event()

    def slow(piece: Piece | Exception) -> None:
        told.append(piece)
        held.wait(10)

    engine.submit(Request(PROMPTS[0], None, Drawing(tokens=100)), slow)
    while not told:
        time.sleep(0.01)
    for _ in range(2):
        engine.submit(Request(PROMPTS[0], None, GREEDY), told.append)
    with pytest.raises(BusyError, match="2 requests wait already"):
        engine.submit(Request(PROMPTS[0], None, GREEDY), told.append)
    closing = threading.Thread(target=engine.close)
    closing.start()
    held.set()
    closing.join()
    ended = [p for p in told if isinstance(p, Piece) and p.finish]
    assert [p.finish for p in ended] == ["cancelled"] * 3
    with pytest.raises(RunError, match="closed"):
        engine.submit(Request(PROMPTS[0], None, GREEDY), told.append)


def test_what_cannot_be_answered_is_refused_at_once(
    tiny_model: Path, opened: Callable[..., BatchingEngine]
) -> None:
    policy = policy_of(tiny_model)
    engine = opened(policy)
    with pytest.raises(TooLongError, match=r"2\d\d tokens; the model's context has 256"):
        draw(engine, [Request([Message("user", "tea " * 280)])])
    policy.stops = []
    (full,) = draw(engine, [Request(PROMPTS[0], None, Drawing(tokens=300))])
    assert (full.prompt_tokens + full.tokens, full.finish) == (256, "length")
    with pytest.raises(BadInputError, match="3 dimensions, but the policy was trained with 2"):
        draw(engine, [Request(PROMPTS[0], torch.zeros(3), GREEDY)])
    bare = opened(Policy(policy.model.get_base_model(), policy.tokenizer))
    with pytest.raises(BadInputError, match="knows no z"):
        draw(bare, [Request(PROMPTS[0], torch.zeros(2), GREEDY)])


def test_a_failure_is_told_and_the_engine_goes_on(
    tiny_model: Path, opened: Callable[..., BatchingEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = opened(policy_of(tiny_model))

    def broken(*_: object, **__: object) -> None:
        raise ValueError("a secret text")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_logits", broken)
        with pytest.raises(RunError, match=r"failed: ValueError$"):
            draw(engine, [Request(PROMPTS[0], Z[0], GREEDY)])
    assert draw(engine, [Request(PROMPTS[0], Z[0], GREEDY)])[0].tokens > 0


def test_draws_follow_the_nucleus_of_each_row() -> None:
    g = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(1, 400, generator=g)
    many = logits.expand(20_000, -1)
    rows = [torch.Generator().manual_seed(k) for k in range(len(many))]
    for top_p, first in ((0.6, 256), (0.98, 20), (1.0, 256)):
        drawn = draw_rows(
            many, torch.full((len(many),), 0.9), torch.full((len(many),), top_p), rows, first
        )
        share = torch.bincount(drawn, minlength=400) / len(many)
        torch.manual_seed(0)
        other = draw_from_nucleus(many, 0.9, top_p)
        expected = torch.bincount(other, minlength=400) / len(many)
        assert (share - expected).abs().max() < 0.02
        if top_p < 1:
            assert set(drawn.tolist()) <= set(other.tolist())
    mixed = draw_rows(
        logits.expand(2, -1), torch.tensor([0.0, 1e-3]), torch.tensor([0.5, 0.5]), rows[:2]
    )
    assert mixed.tolist() == [int(logits.argmax())] * 2


class _Letters:
    """One token per byte."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize(
    ("text", "stop", "opened", "expected"),
    [
        ("Tea is good.", (), False, "Tea is good."),
        ("  Tea\n", (), False, "Tea\n"),
        ("Käse, 茶 🍵!", (), False, "Käse, 茶 🍵!"),
        ("Tea. END of it", ("END",), False, "Tea. "),
        ("Tea EN", ("END",), False, "Tea EN"),
        ("one\n\ntwo", ("\n\n", "zzz"), False, "one"),
        ("<think>\nhm END\n</think>\n\nYes.", ("END",), False, "Yes."),
        ("hm\n</think>\n\nYes.", (), True, "Yes."),
        ("<think>\nhm", (), False, ""),
        ("<thin ice", (), False, "<thin ice"),
        ("", (), False, ""),
    ],
)
def test_a_transcript_shows_the_answer_piece_by_piece(
    text: str, stop: tuple[str, ...], opened: bool, expected: str
) -> None:
    transcript, shown = Transcript(_Letters(), stop, opened), ""
    for byte in text.encode():
        shown += transcript.add(byte)
        assert expected.startswith(shown)  # what has been shown is never taken back
        if transcript.stopped:
            break
    assert shown + transcript.end() == expected
