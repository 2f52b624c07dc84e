"""What to ask a user next: the comparison, of a bank or of fresh drafts, whose answer is expected
to tell most (expected information gain: Houlsby et al., 2011, arXiv 1112.5745)."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fedvpa.data.personas import prompts
from fedvpa.data.reading import read_pairs
from fedvpa.experiment.use import UserPreference
from fedvpa.policy.engine import Drawing, Request
from fedvpa.records import Message, PreferencePair
from fedvpa.serving.people import People

LATENTS = 64
"""Draws of z that stand for what is not known of a user yet."""
MOST_QUESTIONS = 500
"""Pairs of a bank that are read."""
DRAFTS, TOKENS = 4, 72
"""Answers that are drawn for a question without a bank, and their length at most."""


@dataclass(frozen=True)
class Question:
    """A comparison to ask: its number in the bank (None: drawn for this once), the prompt, two
    answers in an order that says nothing, and what the choice is expected to tell, in nats."""

    number: int | None
    prompt: tuple[Message, ...]
    a: str
    b: str
    gain: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "question": self.number, "messages": [m._asdict() for m in self.prompt],
            "a": self.a, "b": self.b, "information": self.gain,
        }  # fmt: skip


class Bank:
    """Pairs to ask about; their labels are not read.

    Args:
        people: the users.
        file: of pairs ('': there are none, and questions are drawn).

    Raises:
        BadInputError: the file cannot be read.
    """

    def __init__(self, people: People, file: str) -> None:
        self._people = people
        self._pairs = read_pairs(file).pairs[:MOST_QUESTIONS] if file else []
        self._read: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self._pairs)

    def answers(self, number: int) -> tuple[tuple[Message, ...], str, str] | None:
        """Prompt and answers A and B of a question; None: no such number."""
        if not 0 <= number < len(self):
            return None
        pair = self._pairs[number]
        # decided by a hash of the texts, whichever was chosen
        a, b = pair.chosen, pair.rejected
        return (pair.prompt, a, b) if pair.chosen_is_first() else (pair.prompt, b, a)

    def next(self, user: str, skipped: Collection[int] = ()) -> Question | None:
        """The question that tells most of the user, of those that are neither answered nor skipped;
        None where none is left. (Reads the bank's texts, the first time.)"""
        done = {c.digest for c in self._people.store.comparisons(user)}
        left = [
            i for i, pair in enumerate(self._pairs)
            if pair.content_key() not in done and i not in skipped
        ]  # fmt: skip
        if not left:
            return None
        if self._read is None:
            self._read = self._people.read(self._pairs)
        z, weight = possible(self._people, self._people.preference(user))
        features, orders = self._read
        margin = self._people.selector.margins_of(features[left], orders[left], z)
        gain = information(margin, weight)
        best = int(gain.argmax())
        found = self.answers(left[best])
        assert found is not None
        return Question(left[best], *found, float(gain[best]))


def draft_requests(ends: Sequence[Float[Tensor, "d"]], seed: int) -> list[Request]:
    """Requests for drafts of answers to a prompt of built-in ones: under these preferences in turn
    (none: of the base model)."""
    prompt = (Message("user", random.Random(seed).choice(prompts())),)
    return [
        Request(
            prompt, ends[i % len(ends)] if ends else None,
            Drawing(TOKENS, temperature=1.0, seed=seed + i),
        )
        for i in range(DRAFTS)
    ]  # fmt: skip


def telling(
    people: People, user: str, prompt: Sequence[Message], drafts: Sequence[str], seed: int
) -> Question | None:
    """Those two of a few drafts that tell most of the user; None where all are the same."""
    texts = sorted({text.strip() for text in drafts} - {""})
    pairs = [PreferencePair(tuple(prompt), a, b) for a, b in combinations(texts, 2)]
    if not pairs:
        return None
    z, weight = possible(people, people.preference(user))
    gain = information(people.selector.margins_of(*people.read(pairs), z), weight)
    best = int(gain.argmax())
    sides = [pairs[best].chosen, pairs[best].rejected]
    random.Random(seed).shuffle(sides)
    return Question(None, pairs[best].prompt, sides[0], sides[1], float(gain[best]))


def possible(
    people: People, found: UserPreference
) -> tuple[Float[Tensor, "s d"], Float[Tensor, "s"]]:
    """What z may be, and how probable each is: the groups, or draws from the posterior."""
    if found.probability:
        return torch.stack(list(people.names.values())), torch.tensor(found.probability)
    noise = torch.randn(LATENTS, len(found.mean), generator=torch.Generator().manual_seed(0))
    return found.mean + noise * found.sigma, torch.full((LATENTS,), 1 / LATENTS)


def information(margin: Float[Tensor, "s n"], weight: Float[Tensor, "s"]) -> Float[Tensor, "n"]:
    """Nats that the answer to each of n questions is expected to tell about which of s latents of
    these probabilities it is: H(E p) - E H(p), p the probability of the first response."""
    p = margin.sigmoid()
    return _entropy(weight @ p) - weight @ _entropy(p)


def _entropy(p: Tensor) -> Tensor:
    return torch.special.entr(p) + torch.special.entr(1 - p)
