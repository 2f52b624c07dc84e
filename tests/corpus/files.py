"""Small files as people have them, written anew for every test, with what each of them must give:
pairs, or the sentence that refuses it. Nothing in them is copied from any report."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq

Pair = tuple[list[tuple[str, str]], str, str]
"""Turns of the prompt as (role, text), chosen, rejected."""
TEA: Pair = ([("user", "tea?")], "yes", "no")
FEW = 120
"""Records beside one that cannot be used: it is under 1 % of them."""


@dataclass(frozen=True)
class Case:
    """A file.

    Args:
        name: of the file, or the folder.
        content: its bytes, or what makes the folder.
        pairs: what it gives, in order (None: only their number counts, which `count` says).
        refused: part of the sentence that refuses it.
        clients: ids of the pairs' clients.
        skipped: reasons and counts of what is left out.
        noted: part of what is said of how it was understood.
        options: further arguments of `read_pairs`.
    """

    name: str
    content: bytes | Callable[[Path], None]
    pairs: list[Pair] | None = None
    refused: str = ""
    count: int = 0
    clients: list[str | None] | None = None
    skipped: dict[str, int] = field(default_factory=dict)
    noted: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        """Write it into the folder."""
        path = folder / self.name
        if callable(self.content):
            self.content(path)
        else:
            path.write_bytes(self.content)
        return path


def lines(*records: Any) -> bytes:
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()


def said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def plain(n: int, **more: Any) -> dict[str, Any]:
    return {"prompt": f"tea {n}?", "chosen": "yes", "rejected": "no", **more}


def hh(chosen: str, rejected: str, prompt: str = "tea?") -> dict[str, str]:
    begin = f"\n\nHuman: {prompt}\n\nAssistant: "
    return {"chosen": begin + chosen, "rejected": begin + rejected}


def many(*odd: Any) -> bytes:
    return lines(*(plain(n) for n in range(FEW)), *odd)


def parquet(rows: list[dict[str, Any]], schema: Any = None) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema), sink)
    return sink.getvalue()


def arrow(rows: list[dict[str, Any]], stream: bool) -> bytes:
    sink, table = io.BytesIO(), pa.Table.from_pylist(rows)
    if not stream:
        feather.write_feather(table, sink)
    else:
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    return sink.getvalue()


def sheet(rows: list[dict[str, Any]], delimiter: str = ",") -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for group in ("kind", "blunt"):
            archive.writestr(f"mine/{group}/train.jsonl", lines(plain(1)))
        archive.writestr("mine/README.md", "words")
        archive.writestr("__MACOSX/mine/._train.jsonl", b"\0")


def encrypted(path: Path) -> None:
    zipped(path)
    raw = bytearray(path.read_bytes())
    for at in range(len(raw) - 4):  # bit 0 of the flags, locally and in the directory
        if raw[at : at + 4] == b"PK\3\4":
            raw[at + 6] |= 1
        if raw[at : at + 4] == b"PK\1\2":
            raw[at + 8] |= 1
    path.write_bytes(raw)


def folder_with_others(path: Path) -> None:
    path.mkdir()
    (path / "train.jsonl").write_bytes(lines(plain(1), plain(2)))
    (path / "truth.json").write_text(json.dumps({"vectors": {"a": [1, 2]}}, indent=2))
    (path / "responses.jsonl").write_bytes(lines({"prompt": "tea?", "response": "yes"}))
    (path / "README.md").write_text("words")
    (path / ".#train.jsonl").symlink_to("nobody@nowhere.123")
    (path / "gone.jsonl").symlink_to(path / "nothing")


TURNS = [said("user", "tea?")]
YES, NO = [said("assistant", "yes")], [said("assistant", "no")]
CHAT: Pair = ([("user", "hi"), ("assistant", "hello"), ("user", "tea?")], "yes", "no")
ASK = "\r\n\r\nHuman: hi \r\n\r\nAssistant:  hello\r\n \r\nHuman: tea?\r\n\r\nAssistant: "
BOT = "User: hi\nBot: hello\nUser: tea?\nBot: "
MARK = "### Human: hi\n### Assistant: hello\n### Human: tea?\n### Assistant: "
CODE = "\n    def f():\n        return 1\n"

CASES = [
    # transcripts
    Case("hh-crlf.jsonl", lines({"chosen": " " + ASK + "yes", "rejected": ASK + "no"}), [CHAT]),
    Case(
        "user-bot.jsonl", lines(*[{"chosen": BOT + "yes", "rejected": BOT + "no"}] * 2),
        [CHAT, CHAT], noted="'User:' and 'Bot:' are read as the turns",
    ),
    Case("marked.jsonl", lines({"chosen": MARK + "yes", "rejected": MARK + "no"}), [CHAT]),
    Case(
        "two-dialects.jsonl",
        lines({"chosen": BOT + "yes", "rejected": BOT + "no"}, hh("yes", "no")),
        refused="two-dialects.jsonl:2: tags of turns differ within the source",
    ),
    Case(
        "tags-in-one-of-many.jsonl",
        lines(plain(1), {"chosen": BOT + "yes", "rejected": BOT + "no"}),
        refused="tags-in-one-of-many.jsonl:2: tags of turns differ",
    ),
    Case(
        "tags-within-lines.jsonl",
        lines({"chosen": "USER: tea? ASSISTANT: yes", "rejected": "USER: tea? ASSISTANT: no"}),
        refused="tags-within-lines.jsonl:1: 'chosen' looks like a conversation in one text",
    ),
    Case(
        "rendered.jsonl",
        lines({"chosen": "<|im_start|>user\ntea?<|im_end|>yes", "rejected": "<|im_start|>no"}),
        refused="rendered.jsonl:1: 'chosen' looks like a conversation in one text",
    ),
    Case(
        "human-is-a-word.jsonl",
        lines({"prompt": "Human: is a species", "chosen": "yes", "rejected": "no"}),
        [([("user", "Human: is a species")], "yes", "no")],
    ),
    Case(
        "hh-prompt.jsonl",
        lines({"prompt": "\n\nHuman: tea?\n\nAssistant:", "chosen": " yes", "rejected": " no"}),
        [TEA],
    ),
    Case(
        "hh-answer-line.jsonl", lines(hh("yes", "no", "tea?\nAnswer: yes or no")),
        [([("user", "tea?\nAnswer: yes or no")], "yes", "no")],
    ),
    Case("hh-beginning.jsonl", lines(hh("yes", "yes, please")), [(*TEA[:1], "yes", "yes, please")]),
    Case(
        "transcript-and-prompt.jsonl", lines(hh("yes", "no") | {"prompt": "tea?"}), [TEA],
    ),
    # conversations
    Case(
        "binarized.jsonl",
        lines({
            "prompt": "tea?", "prompt_id": "7", "chosen": TURNS + YES, "rejected": TURNS + NO,
            "messages": TURNS + YES, "score_chosen": 8.0, "score_rejected": 2.0,
        }),
        [TEA],
    ),
    Case(
        "two-beginnings.jsonl",
        lines({"prompt": "milk?", "chosen": TURNS + YES, "rejected": TURNS + NO}),
        refused="two-beginnings.jsonl:1: 'prompt' is not what 'chosen' and 'rejected' begin with",
    ),
    Case(
        "parts.jsonl",
        lines({
            "prompt": [said("developer", "be kind"), said("user", [
                {"type": "text", "text": "te"}, {"type": "text", "text": "a?"}])],
            "chosen": YES, "rejected": NO,
        }),
        [([("system", "be kind"), ("user", "tea?")], "yes", "no")],
    ),
    Case(
        "one-tool-turn.jsonl",
        many(
            {"prompt": [*TURNS, said("tool", "42")], "chosen": YES, "rejected": NO},
        ),
        count=FEW, skipped={"a turn of a tool in 'prompt'": 1},
    ),
    Case(
        "one-null.jsonl",
        many({"prompt": TURNS, "chosen": YES, "rejected": [said("assistant", None)]}),
        count=FEW, skipped={"a turn without text in 'rejected'": 1},
    ),
    Case(
        "one-picture.jsonl",
        many({"prompt": [said("user", [{"type": "image_url"}])], "chosen": YES, "rejected": NO}),
        count=FEW, skipped={"a part that is no text in message 0 of 'prompt'": 1},
    ),
    Case(
        "only-tools.jsonl", lines({"prompt": [said("tool", "42")], "chosen": YES, "rejected": NO}),
        refused="only-tools.jsonl:1: a turn of a tool in 'prompt'",
    ),
    Case(
        "sharegpt.json",
        json.dumps([{
            "conversations": [{"from": "human", "value": "tea?"}], "system": "be kind",
            "chosen": {"from": "gpt", "value": "yes"}, "rejected": {"from": "gpt", "value": "no"},
        }], indent=1).encode(),
        [([("system", "be kind"), ("user", "tea?")], "yes", "no")],
    ),
    Case(
        "alpaca.jsonl",
        lines({"instruction": "Drink:", "input": "tea?", "chosen": "yes", "rejected": "no"}),
        [([("user", "Drink:\ntea?")], "yes", "no")],
    ),
    Case(
        "question.jsonl",
        lines({"system": "be kind", "question": "tea?", "chosen": "The yes", "rejected": "The no"}),
        [([("system", "be kind"), ("user", "tea?")], "The yes", "The no")],
    ),
    Case(
        "prefill.jsonl",
        lines({"prompt": [*TURNS, said("assistant", "I say")],
               "chosen": [said("assistant", " yes")], "rejected": [said("assistant", " no")]}),
        [([("user", "tea?"), ("assistant", "I say")], " yes", " no")],
    ),
    # texts
    Case(
        "beginning.jsonl", lines({"chosen": "tea? yes", "rejected": "tea? yes, please"}),
        [([("user", "tea?")], "yes", "yes, please")],
    ),
    Case(
        "chinese.jsonl", lines({"chosen": "茶好喝吗？很好。", "rejected": "茶好喝吗？不好。"}),
        [([("user", "茶好喝吗？")], "很好。", "不好。")],
    ),
    Case(
        "code.jsonl", lines({"prompt": "code?", "chosen": CODE, "rejected": "\tx = 1\n"}),
        [([("user", "code?")], "    def f():\n        return 1", "\tx = 1")],
    ),
    Case(
        "code-in-hh.jsonl", lines(hh(CODE, "no", "code?")),
        [([("user", "code?")], "    def f():\n        return 1", "no")],
    ),
    Case(
        "separators.jsonl",
        lines({"prompt": "a\u2028b", "chosen": "c\u2029d", "rejected": "e\u0085f"}),
        [([("user", "a\u2028b")], "c\u2029d", "e\u0085f")],
    ),
    Case("bom.jsonl", b"\xef\xbb\xbf" + lines(plain(1)), count=1),
    # several replies, ratings, labels
    Case(
        "two-rejected.jsonl", lines(plain(0) | {"prompt": "tea?", "rejected": ["no", "never"]}),
        [TEA, (*TEA[:2], "never")],
    ),
    Case(
        "scores.jsonl",
        lines({"prompt": "tea?", "completions": ["yes", "no", "eh"], "scores": [5, 1, 4.5]}),
        [TEA, ([("user", "tea?")], "eh", "no")], options={"score_margin": 1.0},
    ),
    Case(
        "ultrafeedback.jsonl",
        lines({"instruction": "tea?", "completions": [
            {"response": "no", "overall_score": 2.0, "model": "m"},
            {"response": "yes", "overall_score": 7.5, "model": "n"}]}),
        [TEA],
    ),
    Case(
        "distilabel.jsonl",
        lines({"instruction": "tea?", "generations": ["yes", "no"], "ratings": ["5", "1"]}), [TEA],
    ),
    Case(
        "kto.jsonl", lines({"prompt": "tea?", "completion": "yes", "label": True}),
        refused="a comparison needs two responses to one prompt",
    ),
    Case(
        "a-or-b.jsonl",
        lines(
            {"prompt": "tea?", "response_a": "no", "response_b": "yes", "preference": "B"},
            {"prompt": "tea?", "response_a": "yes", "response_b": "no", "preference": 0},
            {"prompt": "tea?", "response_a": "yes", "response_b": "no", "preference": "tie"},
        ),
        [TEA, TEA], skipped={"no preference between the two responses": 1},
    ),
    Case(
        "one-or-two.jsonl",
        lines({"prompt": "tea?", "response_a": "no", "response_b": "yes", "preference": 2}),
        refused="one-or-two.jsonl:1: preference '2' is not understood",
    ),
    # people
    Case(
        "floats.jsonl",
        lines(plain(1, client_id=3.0), plain(2, client_id=3), plain(3, client_id="3"),
              plain(4, client_id=None)),
        count=4, clients=["3", "3", "3", None],
    ),
    Case("half.jsonl", lines(plain(1, client_id=0.5)), refused="'client_id' is a number"),
    Case(
        "other-names.jsonl",
        lines({"q": "tea?", "good": "yes", "bad": "no", "user_id": 7}), [TEA], clients=["7"],
        options={"columns": {
            "prompt": "q", "chosen": "good", "rejected": "bad", "client_id": "user_id"}},
    ),
    Case(
        "unread-people.jsonl", lines(plain(1, user_id=7)), count=1, clients=[None],
        noted="column 'user_id' looks like a person's id and is not read",
    ),
    Case(
        "no-such-column.jsonl", lines(plain(1)), options={"columns": {"client_id": "who"}},
        refused="no-such-column.jsonl:1: no column 'who' (for client_id)",
    ),
    Case("nul.jsonl", lines(plain(1, client_id="a\0b")), refused="control characters"),
    Case("digits.jsonl", lines(plain(1, client_id=10**400)), refused="or too many, in 'client_id'"),
    # kinds of files
    Case("pairs.csv", sheet([plain(1, client_id=3, note="a\nb"), plain(2, client_id="", note="")]),
         count=2, clients=["3", None]),
    Case("pairs.tsv.gz", gzip.compress(sheet([plain(1)], "\t")), count=1),
    Case(
        "pandas.csv", sheet([{"chosen": str(TURNS + YES), "rejected": json.dumps(TURNS + NO)}]),
        [TEA],
    ),
    Case("ragged.csv", b"prompt,chosen,rejected\ntea?,yes,no,what\n",
         refused="ragged.csv:2: 4 cells under 3 names"),
    Case("quotes.csv", b'prompt,chosen,rejected\n"te"a?,yes,no\n', refused="quotes.csv:2: not CSV"),
    Case("twice.csv", b"prompt,chosen,chosen\na,b,c\n", refused="two columns are called 'chosen'"),
    Case("latin.csv", "prompt,chosen,rejected\nté,yes,no\n".encode("latin-1"),
         refused="latin.csv:2: undecodable bytes (not UTF-8 at byte 1"),
    Case("pairs.feather", arrow([plain(1), plain(2)], stream=False), count=2),
    Case("pairs.arrow", arrow([plain(1), plain(2)], stream=True), count=2),
    Case("cut.arrow", arrow([plain(1)], stream=True)[:-30][:200], refused="damaged Arrow file"),
    Case("mine.zip", zipped, count=2),
    Case("locked.zip", encrypted, refused="the archive is encrypted"),
    Case("broken.zip", b"PK\3\4 nothing", refused="broken.zip: damaged zip archive"),
    Case(
        "times.parquet",
        parquet([plain(1) | {"when": 2**62, "took": 2**62}], pa.schema([
            ("prompt", pa.string()), ("chosen", pa.string()), ("rejected", pa.string()),
            ("when", pa.timestamp("us")), ("took", pa.duration("s"))])),
        count=1,
    ),
    Case("list.json", b"[\n" + lines(plain(1)).strip() + b"]", count=1),
    Case("broken-list.json", b"[\n{}\n,]", refused="broken-list.json:3: not JSON"),
    Case("object.json", json.dumps(plain(1), indent=2).encode(), count=1),
    Case(
        "twice.jsonl", b'{"prompt": "tea?", "chosen": "yes", "chosen": "no", "rejected": "eh"}\n',
        refused="twice.jsonl:1: key 'chosen' stands twice in one object",
    ),
    Case("deep.jsonl", b"[" * 5000 + b"\n", refused="not JSON"),
    Case(
        "folder", folder_with_others, count=2,
        noted="truth.json: not read: it holds no records of comparisons",
    ),
]  # fmt: skip


def invalid_utf8(path: Path) -> None:
    """A Parquet file with a text column that holds no UTF-8."""
    bad = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")]
    )
    columns = [pa.array(["tea?"]), bad, pa.array(["no"])]
    pq.write_table(pa.Table.from_arrays(columns, ["prompt", "chosen", "rejected"]), path)


CASES.append(Case("utf8.parquet", invalid_utf8, refused="utf8.parquet:1: column 'chosen' cannot"))
