"""``fedvpa align``, ``feddpo``, ``generate``, ``export`` and ``chat``: train a policy that z
steers, and use it."""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import torch

from fedvpa.cli.console import Reporter, add_common, emit_json
from fedvpa.cli.options import add_flat_settings, flat_settings_given
from fedvpa.data.reading import read_pairs
from fedvpa.errors import BadInputError
from fedvpa.experiment.use import PreferenceModel
from fedvpa.files import claim, write_atomically
from fedvpa.policy.export import export_adapter, export_merged
from fedvpa.policy.policy import PolicyCard, Sampling, load_card, load_policy
from fedvpa.policy.prompts import read_prompts
from fedvpa.policy.settings import AlignConfig, FedDPOConfig, TrainingConfig
from fedvpa.records import Message

_MMAP_MAX, _TRIM_THRESHOLD, _TOP_PAD = -4, -1, -2  # malloc.h


def register(commands: Any) -> None:
    """Add the commands."""
    one = commands.add_parser(
        "align", help="train a policy that a selector's preferences steer", allow_abbrev=False
    )
    one.add_argument("directory", metavar="RUN", help="a trained run with prototypes (fedvpa-gp)")
    one.add_argument(
        "--prompts",
        required=True,
        metavar="SOURCE",
        help="public: personas, .txt, .jsonl, or preference pairs",
    )
    one.add_argument("--split", help="only files called SPLIT.*")
    _training_flags(one, AlignConfig)
    one.set_defaults(run=run_align)

    fed = commands.add_parser(
        "feddpo",
        help="baseline: one policy by federated DPO on the clients' pairs",
        allow_abbrev=False,
    )
    fed.add_argument("directory", metavar="RUN", help="a run whose clients and pairs are used")
    _training_flags(fed, FedDPOConfig)
    fed.set_defaults(run=run_feddpo)

    many = commands.add_parser(
        "generate", help="responses of a policy under a preference", allow_abbrev=False
    )
    many.add_argument("directory", metavar="DIR", help="what `fedvpa align` made")
    many.add_argument("--prompts", required=True, metavar="SOURCE")
    many.add_argument("--split", help="only files called SPLIT.*")
    many.add_argument(
        "--limit",
        type=int,
        default=0,
        help="at most this many prompts, picked at random (default: all)",
    )
    many.add_argument(
        "--responses", required=True, metavar="FILE", help="jsonl to write: prompt and response"
    )
    _sampling_flags(many)
    add_common(many)
    many.set_defaults(run=run_generate)

    export = commands.add_parser(
        "export",
        help="write a policy with one preference built in, for plain transformers",
        allow_abbrev=False,
    )
    export.add_argument("directory", metavar="DIR", help="what `fedvpa align` made")
    export.add_argument("--out", required=True, metavar="FOLDER")
    export.add_argument(
        "--format", choices=["merged", "peft", "all"], default="merged",
        help="a whole model, a PEFT adapter, or both for every named preference (default: merged)",
    )  # fmt: skip
    _preference_flags(export)
    add_common(export)
    export.set_defaults(run=run_export)

    talk = commands.add_parser(
        "chat", help="talk to a policy under a preference", allow_abbrev=False
    )
    talk.add_argument("directory", metavar="DIR", help="what `fedvpa align` made")
    _sampling_flags(talk)
    add_common(talk)
    talk.set_defaults(run=run_chat)


def _training_flags(parser: argparse.ArgumentParser, config: type[TrainingConfig]) -> None:
    parser.add_argument("--out", required=True, metavar="DIR", help="where the policy goes")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run")
    add_flat_settings(parser, config)
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="write the summary as JSON"
    )
    add_common(parser)


def _sampling_flags(parser: argparse.ArgumentParser) -> None:
    which = _preference_flags(parser)
    which.add_argument("--off", action="store_true", help="the base model itself")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.7, help="0: greedy (default: 0.7)")
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")


def _preference_flags(parser: argparse.ArgumentParser) -> Any:
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--prefer", metavar="NAME", help="a named preference, or neutral")
    which.add_argument("--mix", metavar="A=0.3,B=0.7", help="a weighted mean of named preferences")
    which.add_argument(
        "--user", metavar="FILE", help="comparisons of a user, whose z the selector infers"
    )
    which.add_argument("--z", metavar="FILE", help="z as `fedvpa personalize --json` writes it")
    return which


def run_align(arguments: argparse.Namespace, reporter: Reporter) -> int:
    """Sample, choose, train; print the counts."""
    from fedvpa.policy.align import align  # with TRL, which is slow to import

    config = flat_settings_given(arguments, AlignConfig)
    _keep_freed_memory()
    with reporter.stages() as on_stage:
        result = align(
            arguments.directory, arguments.prompts, arguments.out, config, split=arguments.split,
            resume=arguments.resume,
            on_stage=on_stage,
        )  # fmt: skip
    summary = result.summary
    reporter.say(
        f"{summary['prompts_used']} prompts; left out: {summary['prompts_skipped'] or 'none'}"
    )
    for number, row in enumerate(summary["iterations"]):
        reporter.say(
            f"iteration {number}: pairs {row['pairs']}, {row['dropped_under_margin']} dropped under"
            f" the margin; loss {row['loss']:.3f}, preference accuracy"
            f" {row['preference_accuracy']:.2f}"
        )
    names = ", ".join(summary["preferences"])
    reporter.say(
        f"{result.root}: preferences {names}; {summary['seconds']:.0f} s; next: fedvpa chat"
        f" {result.root} --prefer ..."
    )
    emit_json(arguments.json, summary)
    return 0


def run_feddpo(arguments: argparse.Namespace, reporter: Reporter) -> int:
    """Train the baseline."""
    from fedvpa.policy.federated_dpo import feddpo  # with TRL, which is slow to import

    config = flat_settings_given(arguments, FedDPOConfig)
    _keep_freed_memory()
    with reporter.stages() as on_stage:
        result = feddpo(
            arguments.directory, arguments.out, config, resume=arguments.resume, on_stage=on_stage
        )
    reporter.say(
        f"{result.root}: {config.rounds} rounds, {result.summary['seconds']:.0f} s; one policy,"
        " preference 'shared'"
    )
    emit_json(arguments.json, result.summary)
    return 0


def _keep_freed_memory() -> None:
    """Have the C library keep large blocks that were freed: training on a CPU otherwise gives
    hundreds of MiB back to the system and asks for them again in every step, and pages that come
    back are zeroed (docs/alignment.md has the figures)."""
    if sys.platform != "linux":
        return
    tune = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
    if tune is not None:
        for option, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 2**28)):
            tune(option, value)


def run_generate(arguments: argparse.Namespace, reporter: Reporter) -> int:
    """Write a response to every prompt."""
    policy, card = load_policy(arguments.directory, arguments.device)
    z = _wanted_z(arguments, card)
    sampling = _sampling(arguments)
    found = read_prompts(
        arguments.prompts, arguments.split, 1 << 20, lambda p: len(policy.prompt_ids(p))
    )
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
            (kind, card.z(name), out / f"{name}-{kind}")
            for name in card.preferences
            for kind in ("merged", "peft")
        ]
    else:
        jobs = [(arguments.format, _chosen_z(arguments, card), out)]
    for kind, z, folder in jobs:
        policy, _ = load_policy(arguments.directory)
        (export_merged if kind == "merged" else export_adapter)(policy, z, folder)
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
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()


def _switch(
    text: str, card: PolicyCard, z: torch.Tensor | None, history: list[Message]
) -> tuple[torch.Tensor | None, list[Message]]:
    """What a command within a conversation changes."""
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
        return _checked(PreferenceModel(card.selector).read_z(arguments.z), card)
    return card.z(arguments.prefer or "neutral")


def posterior_mean(file: str, card: PolicyCard) -> torch.Tensor:
    """z that the policy's selector infers from a file of comparisons.

    Raises:
        BadInputError: unreadable, or the selector is gone or of another latent.
    """
    return _checked(PreferenceModel(card.selector).personalize(read_pairs(file).pairs).mean, card)


def _checked(z: torch.Tensor, card: PolicyCard) -> torch.Tensor:
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
            weights[name.strip()] = float(value)
        except ValueError as error:
            raise BadInputError(
                f"'{part.strip()}' is not NAME=WEIGHT, as in helpful=0.3,harmless=0.7"
            ) from error
    return weights


def _sampling(arguments: argparse.Namespace) -> Sampling:
    for name, least in (("max_new_tokens", 1), ("temperature", 0)):
        if getattr(arguments, name) < least:
            raise BadInputError(f"--{name.replace('_', '-')}: at least {least}")
    if not 0 < arguments.top_p <= 1:
        raise BadInputError("--top-p: above 0, at most 1")
    return Sampling(arguments.max_new_tokens, arguments.temperature, arguments.top_p)
