"""Questions where there is no bank: two freshly drawn answers whose comparison tells most."""

from __future__ import annotations

import random
from itertools import combinations
from typing import Any

import torch

from fedvpa.data.personas import prompts
from fedvpa.policy.engine import Drawing, Request, draw
from fedvpa.records import Message, PreferencePair
from fedvpa.serving.model import Served
from fedvpa.serving.people import information

DRAFTS, TOKENS = 4, 72
"""Answers that are drawn for a question, and their length at most."""


def fresh_question(served: Served, user: str, seed: int) -> dict[str, Any] | None:
    """A prompt, and those two of a few answers to it that tell most of the user; None where all
    answers are the same.

    Answers are drawn under different named preferences in turn, where z reaches the model.
    """
    people = served.people
    prompt = (Message("user", random.Random(seed).choice(prompts())),)
    ends = list(served.named.values())
    requests = [
        Request(
            prompt, ends[i % len(ends)] if served.steers and ends else None,
            Drawing(TOKENS, temperature=1.0, seed=seed + i),
        )
        for i in range(DRAFTS)
    ]  # fmt: skip
    texts = sorted({answer.text.strip() for answer in draw(served.engine, requests)} - {""})
    pairs = [PreferencePair(prompt, a, b) for a, b in combinations(texts, 2)]
    if not pairs:
        return None
    z, weight = people.possible(people.preference(user))
    gain = information(people.margins(pairs, z), weight)
    best = int(gain.argmax())
    a, b = pairs[best].chosen, pairs[best].rejected
    if torch.randint(2, (1,), generator=torch.Generator().manual_seed(seed)).item():
        a, b = b, a
    return {
        "question": None, "messages": [m._asdict() for m in prompt], "a": a, "b": b,
        "information": float(gain[best]),
    }  # fmt: skip
