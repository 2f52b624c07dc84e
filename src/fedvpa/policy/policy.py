"""A policy pi(y | x, z): a base language model, a LoRA adapter, a conditioner, and the preferences
that have names.

| file | what |
|---|---|
| `policy.json` | base model, form of conditioning, z of each named preference, the selector's run |
| `adapter/` | the LoRA adapter, as PEFT writes it |
| `conditioner.safetensors` | the map from z to the adapter's gates, to soft tokens or to a shift |
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fedvpa.data.thoughts import without_thought
from fedvpa.errors import BadInputError
from fedvpa.features.chat import ChatFormat
from fedvpa.features.loading import load_causal_model
from fedvpa.policy.card import PolicyCard, load_card
from fedvpa.policy.conditioning import (
    PREFERENCE,
    PreferenceConditioner,
    attach,
    padding_first,
    read_conditioner,
)
from fedvpa.policy.sampling import ShrinkingSampler
from fedvpa.records import Message


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn; temperature 0 is greedy."""

    max_new_tokens: int = 128
    temperature: float = 0.8
    top_p: float = 0.95
    batch: int = 32
    whole: bool = False
    """Cut a response that the limit ended back to its last whole sentence or line."""


class Drawn(NamedTuple):
    """A batch of responses: which prompts, the texts, which of them ended by themselves, and how
    many tokens were drawn."""

    rows: list[int]
    texts: list[str]
    ended: list[bool]
    tokens: int


class Policy:
    """A language model that a latent preference steers. `model` is the PEFT model with a
    conditioner attached, or the bare base model, which knows no z."""

    def __init__(self, model: Any, tokenizer: Any, thinking: bool = False) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.format = ChatFormat(tokenizer, "the base model", thinking=thinking)
        self._opens_thought = self.format.opens_thought
        generation = model.generation_config
        stops = (
            generation.eos_token_id
            if generation.eos_token_id is not None
            else tokenizer.eos_token_id
        )
        self.stops = sorted(
            {*(stops if isinstance(stops, list) else [stops]), *_turn_ends(tokenizer)}
        )

    @property
    def device(self) -> torch.device:
        """Torch device of the parameters."""
        return next(self.model.parameters()).device

    def prompt_ids(self, prompt: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, up to where the answer begins.

        Raises:
            BadInputError: the chat template refuses the conversation.
        """
        return self.format.prompt(tuple(prompt))[0]

    @torch.inference_mode()
    def sample(
        self,
        prompts: Sequence[Sequence[Message]],
        z: Float[Tensor, "n d"] | None,
        sampling: Sampling,
        seed: int,
    ) -> Iterator[Drawn]:
        """Yield batches of responses.

        z None is the base model itself, the adapter being switched off. A thought at the beginning
        of a response is left out; one that the limit cut off leaves nothing. A batch's randomness
        depends on the seed and on its first prompt's index alone, so that work can be taken up
        again.
        """
        ids = [self.prompt_ids(p) for p in prompts]
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        self.model.eval()
        for at in range(0, len(order), sampling.batch):
            index = order[at : at + sampling.batch]
            with torch.random.fork_rng(), self._adapter(z is not None):
                torch.manual_seed(seed * 1_000_003 + index[0])
                drawn = self._draw(
                    [ids[i] for i in index], None if z is None else z[index], sampling
                )
            texts = self.tokenizer.batch_decode(drawn, skip_special_tokens=True)
            stop = torch.isin(drawn, torch.tensor(self.stops, device=drawn.device))
            ended = stop.any(-1)
            length = int((stop.cumsum(-1) == 0).sum()) + int(ended.sum())
            texts = [without_thought(text, self._opens_thought).strip() for text in texts]
            if sampling.whole:
                texts = [
                    text if done else whole_sentences(text)
                    for text, done in zip(texts, ended.tolist())
                ]
            yield Drawn(index, texts, ended.tolist(), length)

    def respond(
        self,
        prompt: Sequence[Message],
        z: Float[Tensor, "d"] | None,
        sampling: Sampling,
        seed: int = 0,
    ) -> str:
        """One response."""
        row = None if z is None else z.unsqueeze(0)
        return next(self.sample([prompt], row, sampling, seed)).texts[0]

    @torch.inference_mode()
    def divergence(
        self, prompt: Sequence[Message], text: str, z: Float[Tensor, "d"] | None
    ) -> tuple[float, float]:
        """How far the policy is from the base model along a response, and what the base model
        thinks of it.

        Returns the mean over the response's tokens of KL(pi(. | y<t, x, z) || pi_ref(. | y<t, x)),
        and of -log pi_ref(y_t), both in nats; NaN for an empty response.
        """
        start = self.prompt_ids(prompt)
        answer = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not answer:
            return math.nan, math.nan
        ids = torch.tensor([start + answer], device=self.device)
        target = ids[0, len(start) :]
        self.model.eval()
        with self._adapter(False):
            plain = (
                self.model(input_ids=ids, logits_to_keep=len(answer) + 1)
                .logits[0, :-1]
                .float()
                .log_softmax(-1)
            )
        surprise = -float(plain.gather(-1, target[:, None]).mean())
        if z is None:
            return 0.0, surprise
        given = {"input_ids": ids, PREFERENCE: z.unsqueeze(0).to(self.device)}
        steered = (
            self.model(**given, logits_to_keep=len(answer) + 1)
            .logits[0, :-1]
            .float()
            .log_softmax(-1)
        )
        return float((steered.exp() * (steered - plain)).sum(-1).mean()), surprise

    def _draw(self, ids: list[list[int]], z: Tensor | None, sampling: Sampling) -> Tensor:
        pad = (
            self.tokenizer.pad_token_id
            if self.tokenizer.pad_token_id is not None
            else self.stops[0]
        )
        width = max(map(len, ids))
        tokens = torch.tensor([[pad] * (width - len(row)) + row for row in ids], device=self.device)
        mask = torch.tensor(
            [[0] * (width - len(row)) + [1] * len(row) for row in ids], device=self.device
        )
        given: dict[str, Any] = {"input_ids": tokens, "attention_mask": mask}
        sampler, held = ShrinkingSampler(sampling.temperature, sampling.top_p), nullcontext()
        if z is not None:
            conditioner, z = self.model.conditioner, z.to(self.device)
            if conditioner.form == "prefix":
                given = conditioner.embed(z, self.model.get_input_embeddings()(tokens), mask)
                rows = padding_first(given["inputs_embeds"], given["attention_mask"])
                given = dict(zip(("inputs_embeds", "attention_mask"), rows))
            else:
                sampler = ShrinkingSampler(sampling.temperature, sampling.top_p, conditioner.keep)
                held = conditioner.holding(z)
        with held:
            drawn: Tensor = self.model.generate(
                **given, custom_generate=sampler, do_sample=False, temperature=None, top_p=None,
                top_k=None,
                max_new_tokens=sampling.max_new_tokens, pad_token_id=pad, eos_token_id=self.stops,
            )  # fmt: skip
        return drawn

    def _adapter(self, on: bool) -> Any:
        if on or not hasattr(self.model, "disable_adapter"):
            return nullcontext()
        return self.model.disable_adapter()


def whole_sentences(text: str) -> str:
    """A text that was cut off, up to the end of its last whole sentence or line; all of it where it
    has none."""
    ends = [match.end() for match in re.finditer(r"[.!?][\"')\]]*(?=\s|$)|\n", text)]
    return text[: ends[-1]].rstrip() if ends else text


def _turn_ends(tokenizer: Any) -> list[int]:
    """Tokens that end a turn in well-known chat templates, where the tokenizer has them."""
    names = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>")
    known = tokenizer.get_vocab()
    return [known[name] for name in names if name in known]


def new_conditioner(
    card: PolicyCard, model: Any, tokenizer: Any, rank: int, tokens: int, seed: int = 0
) -> PreferenceConditioner:
    """An untrained conditioner for a base model and an adapter of this rank, or for that many soft
    tokens."""
    centre = torch.tensor(card.centre)
    if card.form == "gate":
        return PreferenceConditioner.gates(
            centre, card.scale, torch.tensor(list(card.preferences.values())), rank
        )
    table = model.get_input_embeddings().weight.detach().float()
    if card.form == "shift":
        return PreferenceConditioner.shift(centre, card.scale, table.shape[-1], float(table.std()))
    anchor = (
        tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    )
    return PreferenceConditioner.soft_tokens(
        centre, card.scale, table[anchor], float(table.std()), tokens, seed
    )


def load_policy(
    folder: str | Path, device: str = "cpu", dtype: torch.dtype | None = None
) -> tuple[Policy, PolicyCard]:
    """Open a policy that `fedvpa align` has made.

    Args:
        folder: the policy's folder.
        device: torch device of the model.
        dtype: number type of the base model (None: bfloat16 where it is native).

    Returns:
        The policy, and its card with the named preferences.

    Raises:
        BadInputError: no policy there, or its base model cannot be had or is another one than it
            was trained on.

    Example:
        >>> policy, card = load_policy("runs/policy")  # doctest: +SKIP
        >>> chat = [Message("user", "Is tea healthy?")]
        >>> policy.respond(chat, card.z("helpful"), Sampling(), seed=0)  # doctest: +SKIP
        'Yes, in moderation.'
    """
    from peft import PeftModel

    folder = Path(folder)
    card = load_card(folder)
    loaded = load_causal_model(card.base, dtype, device)
    if loaded.revision != card.revision:
        raise BadInputError(
            f"{folder}: was trained on other weights of '{card.base}' ({card.revision}) than are"
            f" found now ({loaded.revision})"
        )
    model: Any = PeftModel.from_pretrained(loaded.module, str(folder / "adapter"))
    attach(model, read_conditioner(folder, card.form).to(device))
    return Policy(model.eval(), loaded.tokenizer, card.thinking), card
