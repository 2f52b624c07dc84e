"""The server's engine and what surrounds it: tokens per second, waiting, posteriors, questions.

python -m benchmarks.serving speed [--model smollm2] [--json FILE]: a policy of random adapters
(what they write is of no matter), 1, 8 and 32 users with a z each, beside the same engine with one
z for all, beside the bare base model and beside Transformers' `generate`; medians of `--repeats`.
python -m benchmarks.serving users RUN --pairs FILE [--json FILE]: a user's posterior from 16 pairs,
read and from features; and how soon a group is certain when the next question is the one that tells
most, beside questions drawn at random. FILE has pairs of users of known groups, on which RUN was
not trained.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from fedvpa.data.reading import read_pairs
from fedvpa.evaluation.statistics import interval
from fedvpa.experiment.preferences import named_preferences
from fedvpa.experiment.use import PreferenceModel
from fedvpa.features.loading import load_causal_model
from fedvpa.files import plain_json
from fedvpa.policy.batching import BatchingEngine
from fedvpa.policy.conditioning import PreferenceConditioner, attach
from fedvpa.policy.engine import Drawing, Request, draw, stream
from fedvpa.policy.policy import Policy
from fedvpa.records import Message, PreferencePair
from fedvpa.serving.people import SURE
from fedvpa.serving.questions import information

ASKED = (
    "How do I keep bread fresh?", "Why is the sky blue?", "Tell me about the tides of the sea.",
    "What is a good way to learn to swim?", "How does a bicycle stay upright?",
)  # fmt: skip
LATENT, RANK = 4, 16
USERS, QUESTIONS = 20, 24


def speed(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Tokens per second, and seconds to the first token."""
    loaded = load_causal_model(arguments.model, None, "cpu")
    bare = Policy(loaded.module.eval(), loaded.tokenizer)
    bare.stops = []
    generate = "bare base model, Transformers' generate"
    rows = [{"what": generate, "tokens_per_second": _plain(bare, arguments.tokens)}]
    rows += _alternating({"bare base model": (bare, lambda i: None)}, arguments)
    policy = _policy(loaded)
    own = torch.randn(64, LATENT, generator=torch.Generator().manual_seed(0))
    each = {"one z for all": (policy, lambda i: own[0]), "a z each": (policy, lambda i: own[i])}
    return rows + _alternating(each, arguments)


def _policy(loaded: Any) -> Policy:
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(loaded.module, config)
    preferences = torch.eye(LATENT)
    attach(model, PreferenceConditioner.gates(torch.zeros(LATENT), 1.0, preferences, RANK))
    policy = Policy(model.eval(), loaded.tokenizer)
    policy.stops = []
    return policy


def _alternating(
    ways: dict[str, tuple[Policy, Callable[[int], Any]]], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Medians of each way to ask, the ways taking turns."""
    found: dict[str, dict[int, list[float]]] = {w: {1: [], 8: [], 32: []} for w in ways}
    for _ in range(arguments.repeats):
        for count in (1, 8, 32):
            for what, (policy, z) in ways.items():
                engine = BatchingEngine(policy, rows=32)
                asked = [
                    Request(_prompt(i), z(i), Drawing(arguments.tokens, seed=i))
                    for i in range(count)
                ]
                began = time.perf_counter()
                tokens = sum(answer.tokens for answer in draw(engine, asked))
                found[what][count].append(tokens / (time.perf_counter() - began))
                engine.close()
    rows = []
    for what, (policy, z) in ways.items():
        median = {n: round(statistics.median(v), 1) for n, v in found[what].items()}
        first = _first(policy, z(0))
        print(what, median, first, flush=True)
        rows.append({"what": what, "tokens_per_second": median, "first_token_seconds": first})
    return rows


def _first(policy: Policy, z: Any) -> float:
    """Seconds to the first token of one user."""
    engine, found = BatchingEngine(policy), list[float]()
    for i in range(5):
        began = time.perf_counter()
        pieces = stream(engine, Request(_prompt(i), z, Drawing(4, seed=i)))
        next(pieces)
        found.append(time.perf_counter() - began)
        pieces.close()
    engine.close()
    return round(statistics.median(found), 3)


def _plain(policy: Policy, tokens: int) -> dict[int, float]:
    """The library's own loop, without a seed per row."""
    found = {}
    for count in (1, 8, 32):
        began = time.perf_counter()
        ids = [policy.prompt_ids(_prompt(i)) for i in range(count)]
        width = max(map(len, ids))
        batch = torch.tensor([[0] * (width - len(r)) + r for r in ids])
        mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in ids])
        with torch.inference_mode():
            policy.model.generate(
                input_ids=batch, attention_mask=mask, do_sample=True, temperature=0.8, top_p=0.95,
                min_new_tokens=tokens, max_new_tokens=tokens, pad_token_id=0,
            )  # fmt: skip
        found[count] = round(count * tokens / (time.perf_counter() - began), 1)
    print("generate", found, flush=True)
    return found


def _prompt(i: int) -> list[Message]:
    return [Message("user", ASKED[i % len(ASKED)])]


def users(arguments: argparse.Namespace) -> dict[str, Any]:
    """Posteriors, and questions."""
    selector = PreferenceModel(arguments.run, keep=False)
    by_group: dict[str, list[PreferencePair]] = {}
    for pair in read_pairs(arguments.pairs).pairs:
        by_group.setdefault(str(pair.group), []).append(pair)
    some = next(iter(by_group.values()))[:17]
    selector.read(some[:1])  # loads the model
    began = time.perf_counter()
    features, orders = selector.read(some[:16])
    read = time.perf_counter() - began
    began = time.perf_counter()
    selector.inferred(features, orders)
    known = time.perf_counter() - began
    began = time.perf_counter()
    more, order = selector.read(some[16:17])
    selector.inferred(torch.cat([features, more]), torch.cat([orders, order]))
    update = time.perf_counter() - began
    out: dict[str, Any] = {
        "seconds_of_16_pairs": read + known, "seconds_from_features": known,
        "seconds_of_one_more": update,
    }  # fmt: skip
    print(out, flush=True)
    return out | {"questions": _questions(PreferenceModel(arguments.run), by_group)}


def _questions(
    selector: PreferenceModel, by_group: dict[str, list[PreferencePair]]
) -> dict[str, Any]:
    """Choices until the right group is certain, of questions that tell most, and at random."""
    names = named_preferences(selector)
    groups = [g for g in by_group if g in names]
    found: dict[str, dict[str, list[float]]] = {
        way: {"until_sure": [], "right_after_4": [], "right_after_8": []}
        for way in ("information", "random")
    }
    z = torch.stack(list(names.values()))
    for user in range(USERS):
        group, chance = groups[user % len(groups)], random.Random(user)
        bank = chance.sample(by_group[group], min(QUESTIONS, len(by_group[group])))
        features, orders = selector.read(bank)
        margins = selector.margins_of(features, orders, z)
        true = list(names).index(group)
        for way, rows in found.items():
            left, asked, sure = list(range(len(bank))), list[int](), len(bank) + 1
            while left:
                share = torch.tensor(selector.inferred(features[asked], orders[asked]).probability)
                if len(asked) in (4, 8):
                    rows[f"right_after_{len(asked)}"].append(float(share.argmax() == true))
                if share[true] >= SURE and sure > len(bank):
                    sure = len(asked)
                gain = information(margins[:, left], share)
                pick = left[int(gain.argmax())] if way == "information" else chance.choice(left)
                left.remove(pick)
                asked.append(pick)
            rows["until_sure"].append(float(sure))
    out = {
        way: {name: interval(values) for name, values in rows.items()}
        for way, rows in found.items()
    }
    pairs = zip(found["random"]["until_sure"], found["information"]["until_sure"])
    out["fewer_choices"] = {"until_sure": interval([a - b for a, b in pairs])}
    print(out, flush=True)
    return out


def main() -> None:
    """One of the two."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["speed", "users"])
    parser.add_argument("run", nargs="?", default="")
    parser.add_argument("--pairs", default="")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = speed(arguments) if arguments.what == "speed" else users(arguments)
    if arguments.json:
        arguments.json.write_bytes(plain_json(found))


if __name__ == "__main__":
    main()
