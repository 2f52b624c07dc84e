"""Published preference data sets whose rows are no comparisons yet, as their documents describe
them; the person who chose is the client.

Each reader turns the rows of one data set into records that `fedvpa.data.preferences` reads.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedvpa.data.json_rows import Rows
from fedvpa.data.preferences import Form, pairs_of
from fedvpa.data.reading import HUB, PairSet, hub_rows, local_path, members_of
from fedvpa.data.tables import rows_of
from fedvpa.errors import BadInputError, RecordError, UnusableRecordError

Record = dict[str, Any]
Records = Iterator[tuple[str, Record]]
_TRUE = ("true", "1", "1.0")
EMPTY = "EMPTY STRING"
"""How PRISM and Community Alignment write a reply without text."""


def prism(rows: Rows) -> Records:
    """PRISM (Kirk et al., 2024, arXiv 2404.16019), ``utterances.jsonl``: a row per response, with a
    score from 1 to 100. Responses to one turn make pairs by score; a later turn follows the chosen
    responses to those before it."""
    turns: dict[str, dict[int, list[tuple[str, Record]]]] = defaultdict(lambda: defaultdict(list))
    for where, row in rows:
        _need(row, where, "conversation_id", "user_id", "turn", "user_prompt", "model_response")
        turns[str(row["conversation_id"])][int(row["turn"])].append((where, row))
    for by_turn in turns.values():
        history: list[Record] = []
        for _, answers in sorted(by_turn.items()):
            where, first = answers[0]
            said = [*history, {"role": "user", "content": first["user_prompt"]}]
            usable = [a for _, a in answers if a["model_response"] not in (None, "", EMPTY)]
            yield (
                where,
                {
                    "prompt": said,
                    "completions": [_reply(a["model_response"]) for a in usable],
                    "scores": [a.get("score") for a in usable],
                    "client_id": first["user_id"],
                },
            )
            chosen = next((a for a in usable if str(a.get("if_chosen")).lower() in _TRUE), None)
            if chosen is None:  # what follows cannot be told
                break
            history = [*said, *_reply(chosen["model_response"])]


def multipref(rows: Rows) -> Records:
    """MultiPref (Miranda et al., 2024, arXiv 2410.19133): every comparison with the overall
    preference of several annotators."""
    for where, row in rows:
        _need(row, where, "text", "completion_a", "completion_b")
        pair = (row["completion_a"], row["completion_b"])
        for kind in ("normal_worker_annotations", "expert_worker_annotations"):
            for told in row.get(kind) or []:
                said = str(told.get("overall_pref"))
                better = {"A": "a", "B": "b"}.get(said[:1]) if "better" in said else "tie"
                yield where, _choice(row["text"], pair, better, told.get("evaluator"))


def community_alignment(rows: Rows) -> Records:
    """Community Alignment (Zhang et al., 2025, arXiv 2507.09650): up to four turns, at each of
    which an annotator prefers one of four responses."""
    for where, row in rows:
        _need(row, where, "annotator_id", "first_turn_prompt")
        history: list[Record] = []
        for turn in ("first", "second", "third", "fourth"):
            asked, said = row.get(f"{turn}_turn_prompt"), row.get(f"{turn}_turn_preferred_response")
            answers = {
                f"response_{letter}": row.get(f"{turn}_turn_response_{letter}") for letter in "abcd"
            }
            answers = {k: v for k, v in answers.items() if v not in (None, "", EMPTY)}
            if not asked or said not in answers:
                break
            prompt = [*history, {"role": "user", "content": asked}]
            best = answers.pop(said)
            others = [_reply(text) for text in answers.values() if text != best]
            if others:
                yield where, {"prompt": prompt, "chosen": _reply(best), "rejected": others,
                              "client_id": row["annotator_id"]}  # fmt: skip
            history = [*prompt, *_reply(best)]


def chatbot_arena(rows: Rows) -> Records:
    """Chatbot Arena conversations (Zheng et al., 2023, arXiv 2306.05685): two conversations that
    begin alike, and which of them the judge preferred."""
    for where, row in rows:
        _need(row, where, "conversation_a", "conversation_b", "winner", "judge")
        two = (row["conversation_a"], row["conversation_b"])
        yield where, _choice(None, two, {"model_a": "a", "model_b": "b"}.get(row["winner"], "tie"),
                             row["judge"])  # fmt: skip


def summarize(rows: Rows) -> Records:
    """Summaries with human feedback (Stiennon et al., 2020, arXiv 2009.01325), ``comparisons``: two
    summaries of a post, and which of them a worker chose."""
    for where, row in rows:
        _need(row, where, "info", "summaries", "choice", "worker")
        info, two = row["info"], row["summaries"]
        if not isinstance(info, Mapping) or not isinstance(two, list) or len(two) != 2:
            raise RecordError(where, "'info' or 'summaries' is not of the documented shape")
        title = f"{info['title']}\n\n" if info.get("title") else ""
        post = f"Summarize:\n\n{title}{info.get('post') or info.get('article') or ''}"
        pair = (two[0].get("text"), two[1].get("text"))
        better = {0: "a", 1: "b"}.get(row["choice"])
        yield where, _choice(post, pair, better, row["worker"])


def _choice(prompt: str | None, pair: tuple[Any, Any], better: str | None, who: Any) -> Record:
    return {"prompt": prompt, "response_a": pair[0], "response_b": pair[1], "preference": better,
            "client_id": who}  # fmt: skip


def _reply(text: str) -> list[Record]:
    return [{"role": "assistant", "content": text}]


def _need(row: Any, where: str, *keys: str) -> None:
    if isinstance(row, RecordError):
        raise row
    missing = [key for key in keys if not isinstance(row, Mapping) or key not in row]
    if missing:
        found = ", ".join(sorted(map(str, row)))[:120] if isinstance(row, Mapping) else "no columns"
        raise RecordError(where, f"missing key '{missing[0]}'", f"found: {found}")


def _watched(rows: Rows, place: list[str]) -> Rows:
    """The rows; `place` holds where the last one was."""
    for where, row in rows:
        place[0] = where
        yield where, row


def _take(records: Records, form: Form, found: PairSet) -> None:
    for where, record in records:
        try:
            found.pairs += pairs_of(record, where, form)
        except UnusableRecordError as error:
            found.skipped[error.reason] += 1
            found.first_skipped += [str(error)] * (len(found.first_skipped) < 10)


@dataclass(frozen=True)
class Published:
    """A data set: what it is, and how its rows become records."""

    about: str
    read: Callable[[Rows], Records]


DATASETS: dict[str, Published] = {
    "prism": Published("PRISM, utterances.jsonl: scored responses per turn and user", prism),
    "multipref": Published("MultiPref: several annotators per comparison", multipref),
    "community-alignment": Published(
        "Community Alignment: one of four responses, per turn and annotator", community_alignment
    ),
    "chatbot-arena": Published(
        "Chatbot Arena conversations: two conversations and their judge", chatbot_arena
    ),
    "summarize": Published("summarize-from-feedback, comparisons: workers' choices", summarize),
}
"""Data sets by the name that ``fedvpa data convert --from`` takes."""


def read_published(
    name: str, source: str | Path, split: str | None = None, score_margin: float = 0.0
) -> PairSet:
    """The pairs of a published data set.

    Args:
        name: one of `DATASETS`.
        source: the file (or folder, or archive) as it is published, or ``hf://`` and its name.
        split: only files called ``SPLIT.*``; a Hub dataset's split.
        score_margin: scores have to differ by more than this.

    Raises:
        BadInputError: no such data set or file, or rows of another shape.
    """
    if name not in DATASETS:
        raise BadInputError(f"--from: no data set '{name}' (known: {', '.join(DATASETS)})")
    source, found = str(source), PairSet([])
    if source.startswith(HUB):
        parts = [hub_rows(source.removeprefix(HUB), split or "train")]
    else:
        members, found.notes = members_of(local_path(source), source, split)
        parts = [rows_of(member) for member in members]
    form = Form(score_margin=score_margin)
    for rows in parts:
        place = [source]
        try:
            _take(DATASETS[name].read(_watched(rows, place)), form, found)
        except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            raise RecordError(
                place[0], f"a row that is not of the documented shape of {name}",
                f"{type(error).__name__}: {error}"[:120],
            ) from error  # fmt: skip
    if not found.pairs:
        raise BadInputError(f"{source}: no usable pair of {name} in it")
    return found
