"""Conversations and replies as token ids, the way a model's own chat template asks for them.

What is done to a text is noted (`Note`), so that it can be counted: a turn merged or folded because
the template refuses it, a beginning that was cut, a thought that was left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import IntFlag
from typing import Any, NamedTuple

from fedvpa.data.thoughts import THOUGHTS, without_thought
from fedvpa.errors import BadInputError
from fedvpa.records import Message

PREPARATION = 2
"""Version of how texts are prepared: part of every feature's signature, as other token ids give
other features."""

Turns = tuple[Message, ...]


class Note(IntFlag):
    """What was done to a prompt or a reply before the model reads it."""

    NONE = 0
    PROMPT_CUT = 1
    REPLY_CUT = 2
    MERGED = 4
    FOLDED = 8
    SPECIAL = 16
    THOUGHT = 32


IN_WORDS = {
    Note.PROMPT_CUT: "prompt was longer than features.max_prompt_tokens: its oldest turns were cut",
    Note.REPLY_CUT: "reply was longer than features.max_response_tokens: its end was cut",
    Note.MERGED: "turns of one speaker in a row were merged, as the chat template refuses them",
    Note.FOLDED: "the system turn was put into the first user turn, as the chat template has none",
    Note.SPECIAL: "a special token stood in a text: it was read as text",
    Note.THOUGHT: "a thought (<think>...) at the beginning of a reply was left out",
}
"""Each note, as it is counted in a run's record."""


def counted(notes: Iterable[Note]) -> Counter[str]:
    """How often each thing was done, in words."""
    found: Counter[str] = Counter()
    for note, times in Counter(notes).items():
        found.update({IN_WORDS[part]: times for part in note})
    return found


class Prepared(NamedTuple):
    """Token ids of a prompt and of a reply to it, and what was done to them."""

    prompt: list[int]
    reply: list[int]
    notes: Note


class ChatFormat:
    """How a tokenizer's conversations are written.

    A model with a chat template reads what the template makes of a prompt, up to where the answer
    begins; a prompt that ends with an assistant turn is continued. A model without one reads
    ``User: ... Assistant: ...``, prompt and reply tokenised together, behind the tokens that its
    tokenizer puts first.

    Args:
        tokenizer: a Transformers tokenizer.
        name: the model's, for messages.
        thinking: passed to the chat template as ``enable_thinking``.
    """

    def __init__(self, tokenizer: Any, name: str, *, thinking: bool = False) -> None:
        self._tokenizer, self._name, self._thinking = tokenizer, name, thinking
        self._special = _special_tokens(tokenizer)
        self._first, self._last = _added(tokenizer)
        self.end = _end_of_turn(tokenizer)
        """Ids that close a reply."""

    @property
    def identity(self) -> str:
        """Everything here that decides which ids a text becomes."""
        template = self._tokenizer.chat_template
        return f"{PREPARATION}|{template}|{self._thinking}|{self._first}|{self._last}|{self.end}"

    @property
    def opens_thought(self) -> bool:
        """Whether the template begins the answer with a thought, which the reply then ends."""
        if not self._tokenizer.chat_template:
            return False
        text, _ = self._written((Message("user", "Is rain wet?"),))
        return any(text.rstrip().endswith(begin) for begin, _ in THOUGHTS)

    def has_special(self, text: str) -> bool:
        """Whether a special token's name stands in a text."""
        return any(token in text for token in self._special)

    def prompt(self, turns: Turns, most: int | None = None) -> tuple[list[int], Note]:
        """Ids of a conversation up to where the answer begins, at most `most` of them: the oldest
        turns go first, then text of the oldest turn that is left; system turn, headers and first
        tokens stay.

        Raises:
            BadInputError: the template refuses the conversation, with merged turns as well.
        """
        _, ids, notes = self._fitting(turns, most)
        return ids, notes

    def pair(self, turns: Turns, reply: str, most_prompt: int, most_reply: int) -> Prepared:
        """Ids of a prompt and of a reply to it, closed by the end of the turn.

        Raises:
            BadInputError: as `prompt`.
        """
        kept, ids, notes = self._fitting(turns, most_prompt)
        text = without_thought(reply)
        notes |= Note.THOUGHT if text != reply else Note.NONE
        notes |= Note.SPECIAL if self.has_special(text) else Note.NONE
        room = max(1, most_reply - len(self.end))
        if self._tokenizer.chat_template or notes & Note.SPECIAL or not self._tokenizer.is_fast:
            apart = "" if self._tokenizer.chat_template or turns[-1].role == "assistant" else " "
            answer = self._ids(apart + text)
        else:
            ids, answer = self._together(kept, text)
        notes |= Note.REPLY_CUT if len(answer) > room else Note.NONE
        return Prepared(ids, answer[:room] + self.end, notes)

    def accepted(self, turns: Turns) -> Turns:
        """The conversation in the form that the template takes.

        Raises:
            BadInputError: it takes none.
        """
        return next(given for given, _, _ in self._forms(turns))

    # what fits

    def _fitting(self, turns: Turns, most: int | None) -> tuple[Turns, list[int], Note]:
        """The turns that are kept, their ids, and what was done."""
        ids, notes = self._rendered(turns)
        if most is None or len(ids) <= most:
            return turns, ids, notes
        # 1. Whole turns, oldest first; what is left begins with a user, as templates want it.
        head = tuple(m for m in turns[:1] if m.role == "system")
        rest = turns[len(head) :]
        while len(ids) > most and any(m.role == "user" for m in rest[1:]):
            rest = rest[1:]
            while rest[0].role != "user":
                rest = rest[1:]
            ids, done = self._rendered(head + rest)
            notes |= done
        notes |= Note.PROMPT_CUT
        if len(ids) <= most:
            return head + rest, ids, notes
        # 2. A system turn that fills more than half of the room loses its end: it says at its
        #    beginning what it is about.
        if head:
            bare = (rest[0]._replace(content=""), *rest[1:])
            frame = self._length((head[0]._replace(content=""), *bare))
            share = frame + max(0, most - frame) // 2
            head = (_cut(head[0], lambda turn: self._length((turn, *bare)) <= share),)
        # 3. The oldest other turn loses its beginning: the reply answers what is said last.
        later = rest[1:]
        oldest = _cut(
            rest[0], lambda turn: self._length((*head, turn, *later)) <= most, end_stays=True
        )
        kept = (*head, oldest, *later)
        # 4. So does a prefill that is too long by itself, down to one character: templates refuse
        #    an empty one.
        if kept[-1].role == "assistant":
            before = kept[:-1]
            prefill = _cut(
                kept[-1], lambda turn: self._length((*before, turn)) <= most, 1, end_stays=True
            )
            kept = (*before, prefill)
        ids, done = self._rendered(kept)
        return kept, ids[-most:], notes | done

    # from turns to ids

    def _length(self, turns: Turns) -> int:
        return len(self._rendered(turns)[0])

    def _rendered(self, turns: Turns) -> tuple[list[int], Note]:
        hidden, stand_ins = self._hidden(turns)
        text, notes = self._written(hidden)
        first = [] if self._tokenizer.chat_template else self._first
        notes |= Note.SPECIAL if stand_ins else Note.NONE
        return first + self._ids_around(text, stand_ins), notes

    def _written(self, turns: Turns) -> tuple[str, Note]:
        """The conversation as text: as it is if the template takes it, else with turns merged, or
        the system turn folded into the user's."""
        if not self._tokenizer.chat_template:
            return _plainly(turns), Note.NONE
        return next((text, notes) for _, text, notes in self._forms(turns))

    def _forms(self, turns: Turns) -> Iterator[tuple[Turns, str, Note]]:
        """What the template takes of `_acceptable`, with the text that it makes of it."""
        refusal: Exception | None = None
        for given, notes in _acceptable(turns):
            try:
                text = self._by_template(given)
            except Exception as error:  # templates raise jinja2 errors of their own choosing
                refusal = refusal or error
            else:
                yield given, text, notes
        raise BadInputError(
            f"the chat template of {self._name} refuses a prompt: {refusal}"
        ) from refusal

    def _by_template(self, turns: Turns) -> str:
        continues = turns[-1].role == "assistant"
        text: str = self._tokenizer.apply_chat_template(
            [m._asdict() for m in turns], tokenize=False, add_generation_prompt=not continues,
            continue_final_message=continues, enable_thinking=self._thinking,
        )  # fmt: skip
        return text

    def _together(self, turns: Turns, reply: str) -> tuple[list[int], list[int]]:
        """Prompt and reply tokenised as one text; a token that reaches into the reply is of it."""
        prompt = _plainly(turns)
        apart = "" if turns[-1].role == "assistant" else " "
        found = self._tokenizer(
            prompt + apart + reply, add_special_tokens=False, return_offsets_mapping=True
        )
        ids, ends = list(found["input_ids"]), [end for _, end in found["offset_mapping"]]
        begin = next((i for i, end in enumerate(ends) if end > len(prompt)), len(ids))
        return self._first + ids[:begin], ids[begin:]

    # special tokens within texts

    def _hidden(self, turns: Turns) -> tuple[Turns, dict[str, str]]:
        """The turns with the names of special tokens in their texts replaced, so that they can be
        told from the template's own tokens; and what each replacement stands for."""
        if not any(self.has_special(m.content) for m in turns):
            return turns, {}
        everything = "".join(m.content for m in turns)
        free = (chr(c) for c in range(0xE000, 0xF8FF) if chr(c) not in everything)
        stand_ins = {next(free): token for token in self._special if token in everything}
        out = []
        for turn in turns:
            content = turn.content
            for stand_in, token in stand_ins.items():
                content = content.replace(token, stand_in)
            out.append(turn._replace(content=content))
        return tuple(out), stand_ins

    def _ids_around(self, text: str, stand_ins: dict[str, str]) -> list[int]:
        ids: list[int] = []
        begin = 0
        for at, character in enumerate(text):
            if character in stand_ins:
                ids += self._plain_ids(text[begin:at]) + self._ids(stand_ins[character])
                begin = at + 1
        return ids + self._plain_ids(text[begin:])

    def _plain_ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def _ids(self, text: str) -> list[int]:
        """Ids of a text in which no special token counts as one."""
        if not self.has_special(text):
            return self._plain_ids(text)
        ids = list(
            self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        )
        special = {self._tokenizer.convert_tokens_to_ids(token) for token in self._special}
        if not special & set(ids):
            return ids
        # a tokenizer that cannot be told so: nothing special is left of a name in two pieces
        token = next(t for t in self._special if t in text)
        before, _, after = text.partition(token)
        return [
            i for part in (before, token[:1], token[1:], after) if part for i in self._ids(part)
        ]


def _cut(
    turn: Message, fits: Callable[[Message], bool], least: int = 0, end_stays: bool = False
) -> Message:
    """The turn with as many characters of its beginning, or its end, as fit (`least` in any case):
    by bisection."""
    if fits(turn):
        return turn
    text = turn.content

    def of_length(length: int) -> Message:
        own = text[len(text) - length :] if end_stays else text[:length]
        return turn._replace(content=own)

    low, high = min(least, len(text)), len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(of_length(middle)) else (low, middle - 1)
    return of_length(low)


def _acceptable(turns: Turns) -> Iterator[tuple[Turns, Note]]:
    """The conversation in the forms that templates take: as it is; turns of one speaker merged;
    the system's text in front of the first user turn, as the documents of models without a system
    role ask for; both."""
    yield turns, Note.NONE
    merged, folded = _merged(turns), _folded(turns)
    if merged != turns:
        yield merged, Note.MERGED
    if folded != turns:
        yield folded, Note.FOLDED
        both = _merged(folded)
        if both != folded:
            yield both, Note.FOLDED | Note.MERGED


def _merged(turns: Turns) -> Turns:
    out: list[Message] = []
    for turn in turns:
        if out and out[-1].role == turn.role:
            out[-1] = Message(turn.role, f"{out[-1].content}\n\n{turn.content}")
        else:
            out.append(turn)
    return tuple(out)


def _folded(turns: Turns) -> Turns:
    system = "\n\n".join(m.content for m in turns if m.role == "system")
    rest = [m for m in turns if m.role != "system"]
    at = next((i for i, m in enumerate(rest) if m.role == "user"), None)
    if not system or at is None:
        return turns
    rest[at] = Message("user", f"{system}\n\n{rest[at].content}")
    return tuple(rest)


def _plainly(turns: Sequence[Message]) -> str:
    """A conversation for a model without a chat template."""
    text = "".join(f"{m.role.capitalize()}: {m.content}\n\n" for m in turns)
    return text.removesuffix("\n\n") if turns[-1].role == "assistant" else text + "Assistant:"


def _special_tokens(tokenizer: Any) -> list[str]:
    """Names of the tokens that mean something else than their text, longest first."""
    added = tokenizer.added_tokens_decoder.values()
    names = {str(t.content) for t in added if t.special} | set(tokenizer.all_special_tokens)
    return sorted((name for name in names if name), key=lambda name: (-len(name), name))


def _added(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer puts before and behind a text by itself."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a", add_special_tokens=True)["input_ids"])
    for at in range(len(whole) - len(plain) + 1):
        if whole[at : at + len(plain)] == plain:
            return whole[:at], whole[at + len(plain) :]
    return [], []


def _end_of_turn(tokenizer: Any) -> list[int]:
    token = tokenizer.eos_token_id
    if token is None:
        token = tokenizer.sep_token_id
    return [] if token is None else [int(token)]
