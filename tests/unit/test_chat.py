"""Conversations as token ids: templates that refuse turns, special tokens in texts, what is cut,
thoughts, and models without a template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedvpa.data.thoughts import without_thought
from fedvpa.errors import BadInputError
from fedvpa.features.backbone import Backbone, Tap
from fedvpa.features.chat import IN_WORDS, ChatFormat, Note, counted
from fedvpa.records import Item, Message
from tests.conftest import WORDS

ALTERNATING = (
    "{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
"""Refuses a system turn, and two turns of one speaker in a row, as Gemma's and Mistral's do."""
THINKING = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
    "{% if add_generation_prompt and enable_thinking %}<think> {% endif %}"
)


def user(text: str) -> Message:
    return Message("user", text)


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


def with_template(tokenizer: Any, template: str | None, **more: Any) -> ChatFormat:
    tokenizer.chat_template = template
    return ChatFormat(tokenizer, "tiny", **more)


def text_of(tokenizer: Any, ids: list[int]) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(ids))


def test_turns_that_a_template_refuses_are_merged_or_folded_and_counted(tokenizer: Any) -> None:
    chat = with_template(tokenizer, ALTERNATING)
    ids, notes = chat.prompt((Message("system", "please help"), user("tea"), user("good")))
    assert text_of(tokenizer, ids) == "<user> please help tea good <end> <assistant>"
    assert notes == Note.FOLDED | Note.MERGED
    ids, notes = chat.prompt((user("tea"), Message("assistant", "yes"), user("good")))
    assert notes == Note.NONE
    assert set(counted([Note.FOLDED | Note.MERGED, Note.FOLDED]).values()) == {1, 2}
    assert all(note in IN_WORDS for note in Note)
    with pytest.raises(BadInputError, match="tiny refuses a prompt: roles must alternate"):
        chat.prompt((Message("assistant", "yes"), user("tea")))
    assert chat.accepted((user("a"), user("b"))) == (user("a\n\nb"),)


def test_a_refused_prompt_is_named_by_its_place(tiny_model: Path) -> None:
    backbone = Backbone(str(tiny_model), dtype=torch.float32)
    backbone.format._tokenizer.chat_template = ALTERNATING
    bad = Item((Message("assistant", "yes"), user("tea")), "good")
    with pytest.raises(BadInputError, match=r"^pairs.jsonl:7: the chat template of"):
        backbone.prepare([bad], ["pairs.jsonl:7"])


def test_a_prompt_that_ends_with_the_assistant_is_continued(tokenizer: Any) -> None:
    chat = with_template(tokenizer, tokenizer.chat_template)
    prepared = chat.pair((user("tea is"), Message("assistant", "very")), "good", 50, 50)
    assert text_of(tokenizer, prepared.prompt) == "<user> tea is <end> <assistant> very"
    assert text_of(tokenizer, prepared.reply) == "good <end>"


def test_special_tokens_in_a_text_are_text() -> None:
    """With a tokenizer that has words of their parts; it knows no other way than in two pieces."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<|end|>", "<", "|", "end", ">", "tea", "user", "assistant", ":"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", eos_token="<|end|>"
    )
    template = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} <|end|> {% endfor %}"
    chat = with_template(tokenizer, template)
    whole = chat.pair((user("tea <|end|> tea"),), "tea <|end|>", 50, 50)
    assert text_of(tokenizer, whole.prompt) == "user : tea < | end | > tea <|end|>"
    assert text_of(tokenizer, whole.reply) == "tea < | end | > <|end|>"
    assert whole.notes == Note.SPECIAL
    plain = chat.pair((user("tea"),), "tea", 50, 50)
    assert plain.notes == Note.NONE


def test_long_prompts_lose_whole_turns_and_keep_what_frames_them(tokenizer: Any) -> None:
    chat = with_template(tokenizer, tokenizer.chat_template)
    turns = (
        Message("system", "please help"), user("tea " * 9), Message("assistant", "yes " * 9),
        user("good " * 9),
    )  # fmt: skip
    ids, notes = chat.prompt(turns, 20)
    kept = " ".join(["good"] * 9)
    assert text_of(tokenizer, ids) == f"<system> please help <end> <user> {kept} <end> <assistant>"
    assert notes == Note.PROMPT_CUT
    ids, _ = chat.prompt((turns[0], user(" ".join(WORDS))), 11)
    last = " ".join(WORDS[-4:])
    assert text_of(tokenizer, ids) == f"<system> please help <end> <user> {last} <end> <assistant>"
    ids, _ = chat.prompt((Message("system", "tea " * 40), user("good bad")), 20)
    assert len(ids) <= 20
    assert text_of(tokenizer, ids).endswith("tea <end> <user> good bad <end> <assistant>")
    assert chat.prompt(turns, 100)[1] == Note.NONE


@pytest.mark.parametrize(
    ("text", "opened", "left"),
    [
        ("<think>\nhm\n</think>\n\nyes", False, "yes"),
        ("hm</think>yes", True, "yes"),
        ("hm</think>\nyes", False, "yes"),
        ("say </think> then", False, "say </think> then"),
        ("<think> hm", False, ""),
        ("hm", True, ""),
        ("[THINK]hm[/THINK]yes", False, "yes"),
        ("yes, <think> is a tag </think>", False, "yes, <think> is a tag </think>"),
        ("    indented", False, "    indented"),
    ],
)
def test_thoughts_are_left_out(text: str, opened: bool, left: str) -> None:
    assert without_thought(text, opened) == left


def test_a_template_is_told_whether_to_think(tokenizer: Any) -> None:
    assert with_template(tokenizer, THINKING, thinking=True).opens_thought
    silent = with_template(tokenizer, THINKING)
    assert not silent.opens_thought
    prepared = silent.pair((user("tea"),), "<think> hm </think>good", 50, 50)
    assert text_of(tokenizer, prepared.reply) == "good <end>"
    assert prepared.notes == Note.THOUGHT
    assert silent.identity != with_template(tokenizer, THINKING, thinking=True).identity


def test_without_a_template_prompt_and_reply_are_one_text_behind_the_first_token() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    core.train_from_iterator(["User: tea is good\n\nAssistant: tea is good"] * 9, trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    chat = ChatFormat(tokenizer, "tiny")
    found = chat.pair((user("tea"),), "tea is good", 90, 90)
    whole = tokenizer("User: tea\n\nAssistant: tea is good")["input_ids"]
    assert found.prompt + found.reply == [*whole, 1]
    assert found.prompt[0] == 0
    assert tokenizer.decode(found.prompt[1:]) == "User: tea\n\nAssistant:"
    cut = chat.pair((user("tea is " * 60),), "good", 30, 90)
    assert cut.prompt[0] == 0
    assert len(cut.prompt) <= 30
    assert tokenizer.decode(cut.prompt[1:]).startswith("User:")


def test_what_is_noted_is_counted_with_and_without_the_cache(
    tiny_model: Path, tmp_path: Path
) -> None:
    from fedvpa.config import FeaturesConfig
    from fedvpa.features.cache import FeatureCache

    settings = FeaturesConfig(
        backbone=str(tiny_model), layer=2, dtype="float32", max_prompt_tokens=6
    )
    items = [Item((user("tea " * n),), "<think> hm </think>good") for n in (2, 9)]
    for _ in range(2):
        found = FeatureCache(settings, tmp_path / "f.sqlite").items(items)
        assert found.notes == {IN_WORDS[Note.THOUGHT]: 2, IN_WORDS[Note.PROMPT_CUT]: 1}
    assert Tap(2, "mean").pooling == "mean"


def test_damaged_rows_of_the_cache_are_computed_anew_and_blamed_on_the_cache(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import sqlite3

    from fedvpa.config import FeaturesConfig
    from fedvpa.features.cache import FeatureCache

    path = tmp_path / "f.sqlite"
    settings = FeaturesConfig(backbone=str(tiny_model), layer=2, dtype="float32")
    texts = [Item((user("tea"),), word) for word in ("good", "bad", "no")]
    before = FeatureCache(settings, path).items(texts)
    with sqlite3.connect(path) as database:
        rows = database.execute("SELECT key, value FROM text").fetchall()
        flipped = bytes([rows[0][1][0] ^ 1]) + rows[0][1][1:]
        for (key, _), value in zip(rows, (flipped, b"\x00\x00\xc0\x7f" * 32, b"")):
            database.execute("UPDATE text SET value = ? WHERE key = ?", (value, key))
    database.close()
    after = FeatureCache(settings, path).items(texts)
    assert after.computed == 3
    assert torch.equal(after.values, before.values)
    assert "3 features in the cache are damaged" in caplog.text
    assert FeatureCache(settings, path).items(texts).computed == 0
