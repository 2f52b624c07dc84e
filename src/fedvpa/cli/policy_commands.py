"""``fedvpa generate``, ``export`` and ``chat``: use a policy that z steers."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import torch

from fedvpa.console import Reporter
from fedvpa.data.reading import read_pairs
from fedvpa.errors import BadInputError
from fedvpa.experiment.use import PreferenceModel
from fedvpa.files import claim, file_name, plain_json, write_atomically
from fedvpa.foreign import harmless_lines
from fedvpa.policy.card import PolicyCard, load_card
from fedvpa.policy.export import export_adapter, export_merged
from fedvpa.policy.policy import Sampling, load_policy
from fedvpa.policy.prompts import read_prompts
from fedvpa.records import Message


def run_generate(arguments: argparse.Namespace, reporter: Reporter) -> int:
    """Write a response to every prompt."""
    if arguments.limit < 0:
        raise BadInputError("--limit: at least 0")
    policy, card = load_policy(arguments.directory, arguments.device)
    z = _wanted_z(arguments, card)
    sampling = _sampling(arguments)
    found = read_prompts(arguments.prompts, arguments.split, 1 << 20, policy.format)
    prompts = found.some(arguments.limit, arguments.seed)
    texts = [""] * len(prompts)
    rows = None if z is None else z.expand(len(prompts), -1)
    done = 0
    with reporter.progress("responses") as bar:
        for batch in policy.sample(prompts, rows, sampling, arguments.seed):
            for i, answer in zip(batch.rows, batch.texts):
                texts[i] = answer
            done += len(batch.rows)
            bar.update(done, len(prompts))
    lines = [
        json.dumps({"prompt": [m._asdict() for m in prompt], "response": text}, ensure_ascii=False)
        for prompt, text in zip(prompts, texts)
    ]
    write_atomically(Path(arguments.responses), ("\n".join(lines) + "\n").encode())
    reporter.say(f"{arguments.responses}: {len(prompts)} responses")
    return 0


def run_export(arguments: argparse.Namespace, reporter: Reporter) -> int:
    """Write plain models, PEFT adapters, or both."""
    card, out = load_card(Path(arguments.directory)), Path(arguments.out)
    claim(out)
    if arguments.format == "all":
        if arguments.prefer or arguments.mix or arguments.user or arguments.z:
            raise BadInputError(
                "--format all writes every named preference; leave --prefer, --mix, --user and"
                " --z out"
            )
        jobs = [
            (kind, name, card.z(name), out / f"{file_name(name)}-{kind}")
            for name in card.preferences
            for kind in ("merged", "peft")
        ]
    else:
        jobs = [(arguments.format, arguments.prefer, _chosen_z(arguments, card), out)]
    for kind, name, z, folder in jobs:
        policy, _ = load_policy(arguments.directory)
        write = export_merged if kind == "merged" else export_adapter
        write(policy, z, folder, card, name or "")
        # the folder's name need not be the preference's
        built_in = {"preference": name, "z": z.tolist()}
        write_atomically(folder / "preference.json", plain_json(built_in))
        loader = (
            "transformers' AutoModelForCausalLM"
            if kind == "merged"
            else "peft's AutoPeftModelForCausalLM (see README.md)"
        )
        reporter.say(f"{folder}: load it with {loader}")
    return 0


def run_chat(arguments: argparse.Namespace, reporter: Reporter) -> int:
    """Read turns from standard input until it ends; answers go to standard output."""
    policy, card = load_policy(arguments.directory, arguments.device)
    z, sampling = _wanted_z(arguments, card), _sampling(arguments)
    reporter.say(
        f"preferences: {', '.join(card.preferences)}; /prefer NAME, /mix A=0.3,B=0.7, /off, /reset,"
        " /quit"
    )
    history: list[Message] = []
    while True:
        if sys.stdin.isatty():
            reporter.console.print("> ", end="")
        line = sys.stdin.readline()
        if not line or line.strip() == "/quit":
            return 0
        text = line.strip()
        if text.startswith("/"):
            try:
                z, history = _switch(text, card, z, history)
            except BadInputError as error:
                reporter.say(str(error))
            continue
        if not text:
            continue
        history.append(Message("user", text))
        answer = policy.respond(history, z, sampling, arguments.seed + len(history))
        history.append(Message("assistant", answer))
        sys.stdout.write(harmless_lines(answer) + "\n")
        sys.stdout.flush()


def _switch(
    text: str, card: PolicyCard, z: torch.Tensor | None, history: list[Message]
) -> tuple[torch.Tensor | None, list[Message]]:
    """Preference and history after a command within a conversation, as ``/prefer NAME``."""
    command, _, value = text.partition(" ")
    if command == "/prefer":
        return card.z(value.strip()), history
    if command == "/mix":
        return card.mix(parse_weights(value)), history
    if command == "/off":
        return None, history
    if command == "/reset":
        return z, []
    raise BadInputError(
        f"unknown command {command} (known: /prefer NAME, /mix A=0.3,B=0.7, /off, /reset, /quit)"
    )


def _wanted_z(arguments: argparse.Namespace, card: PolicyCard) -> torch.Tensor | None:
    return None if arguments.off else _chosen_z(arguments, card)


def _chosen_z(arguments: argparse.Namespace, card: PolicyCard) -> torch.Tensor:
    if arguments.mix:
        return card.mix(parse_weights(arguments.mix))
    if arguments.user:
        return posterior_mean(arguments.user, card)
    if arguments.z:
        return _checked(selector_of(card).read_z(arguments.z), card)
    return card.z(arguments.prefer or "neutral")


def posterior_mean(file: str, card: PolicyCard) -> torch.Tensor:
    """z that the policy's selector infers from a file of comparisons.

    Raises:
        BadInputError: unreadable, or the selector is gone or of another latent.
    """
    return _checked(selector_of(card).personalize(read_pairs(file).pairs).mean, card)


def selector_of(card: PolicyCard) -> PreferenceModel:
    """The selector that a policy was trained with.

    Raises:
        BadInputError: it is gone, or another run stands in its place.
    """
    model = PreferenceModel(card.selector)
    if card.run and model.run.identity != card.run:
        raise BadInputError(
            f"{card.selector}: is another run than the one that this policy was trained with; its z"
            " would mean something else to the policy"
        )
    return model


def _checked(z: torch.Tensor, card: PolicyCard) -> torch.Tensor:
    if card.latent == 0:
        raise BadInputError(
            "the policy has one preference for everybody and reads no z; use --prefer"
            f" {next(iter(card.preferences))}"
        )
    if z.shape != (card.latent,):
        raise BadInputError(
            f"z has {z.numel()} dimensions, but the policy was trained with {card.latent}"
        )
    return z


def parse_weights(text: str) -> dict[str, float]:
    """``helpful=0.3,harmless=0.7``.

    Raises:
        BadInputError: anything else.
    """
    weights = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        try:
            if not math.isfinite(float(value)):
                raise ValueError(value)
            weights[name.strip()] = float(value)
        except ValueError as error:
            raise BadInputError(
                f"'{part.strip()}' is not NAME=WEIGHT, as in helpful=0.3,harmless=0.7"
            ) from error
    return weights


def _sampling(arguments: argparse.Namespace) -> Sampling:
    for name, least in (("max_new_tokens", 1), ("temperature", 0)):
        if not least <= getattr(arguments, name) < math.inf:
            raise BadInputError(f"--{name.replace('_', '-')}: at least {least}")
    if not 0 < arguments.top_p <= 1:
        raise BadInputError("--top-p: above 0, at most 1")
    return Sampling(arguments.max_new_tokens, arguments.temperature, arguments.top_p)
