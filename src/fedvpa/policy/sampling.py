"""A decoding loop for `generate(custom_generate=...)` that draws from the nucleus without sorting
the vocabulary, and leaves rows that have ended out of the batch. On a CPU both cost as much as the
model's own work when a batch's lengths differ.

Prompt, cache, logits processors and stopping criteria stay Transformers' own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

TOP = 256
"""Tokens that are looked at first: nearly every nucleus lies within them."""


def draw_from_nucleus(
    logits: Float[Tensor, "b v"], temperature: float, top_p: float
) -> Int[Tensor, "b"]:
    """One token of each row, from the smallest set of tokens whose probability reaches `top_p`
    (Holtzman et al., 2020, *The curious case of neural text degeneration*); temperature 0 is the
    most probable token.

    The set is found among the `TOP` likeliest tokens; rows whose set is larger are sorted. The draw
    is a Gumbel-max draw.
    """
    if temperature == 0:
        return logits.argmax(-1)
    scaled = logits / temperature
    if top_p == 1:
        return (scaled + _gumbel(scaled)).argmax(-1)
    total = scaled.logsumexp(-1, keepdim=True)
    best, index = scaled.topk(min(TOP, scaled.shape[-1]), dim=-1)
    chosen = index.gather(-1, _within(best, total, top_p))
    wide = (best - total).exp().sum(-1) < top_p
    if wide.any() and best.shape[-1] < scaled.shape[-1]:
        best, index = scaled[wide].sort(-1, descending=True)
        chosen[wide] = index.gather(-1, _within(best, total[wide], top_p))
    return chosen.squeeze(-1)


def _within(
    ordered: Float[Tensor, "b k"], total: Float[Tensor, "b 1"], top_p: float
) -> Int[Tensor, "b 1"]:
    """A draw among the first of `ordered` (descending logits) up to where their probability reaches
    `top_p`."""
    probability = (ordered - total).exp()
    before = probability.cumsum(-1) - probability
    return (
        (ordered + _gumbel(ordered))
        .masked_fill(before >= top_p, -torch.inf)
        .argmax(-1, keepdim=True)
    )


def _gumbel(like: Tensor) -> Tensor:
    return -torch.empty_like(like).exponential_().log()


class ShrinkingSampler:
    """The loop. `on_keep` is told which of the rows still there go on, when others are left out."""

    def __init__(
        self,
        temperature: float,
        top_p: float,
        on_keep: Callable[[Int[Tensor, "k"]], None] | None = None,
    ) -> None:
        self._temperature, self._top_p, self._on_keep = temperature, top_p, on_keep

    def __call__(
        self, model: Any, input_ids: Int[Tensor, "b t"], logits_processor: Any,
        stopping_criteria: Any, generation_config: Any,
        **kwargs: Any,
    ) -> Int[Tensor, "b n"]:  # fmt: skip
        """New tokens of every row, filled up with the padding token behind its end."""
        count = input_ids.shape[0]
        rows = torch.arange(count, device=input_ids.device)
        drawn: list[tuple[Tensor, Tensor]] = []
        done = torch.zeros_like(rows, dtype=torch.bool)
        first = True
        while True:
            given = model.prepare_inputs_for_generation(
                input_ids,
                next_sequence_length=None if first else 1,
                is_first_iteration=first,
                **kwargs,
            )
            outputs = model(**given, return_dict=True)
            kwargs = model._update_model_kwargs_for_generation(
                outputs, kwargs, is_encoder_decoder=False
            )
            if first:
                kwargs.pop("inputs_embeds", None)
            first = False
            logits = logits_processor(input_ids, outputs.logits[:, -1].float())
            token = draw_from_nucleus(logits, self._temperature, self._top_p)
            del outputs, logits
            drawn.append((rows[~done], token[~done]))
            input_ids = torch.cat([input_ids, token[:, None]], -1)
            done = done | stopping_criteria(input_ids, None)
            if done.all():
                break
            if done.sum() * 8 >= len(done):
                live = (~done).nonzero().squeeze(-1)
                input_ids, rows, done = input_ids[live], rows[live], done[live]
                kwargs = _keep(kwargs, live)
                if self._on_keep is not None:
                    self._on_keep(live)
        out = torch.full(
            (count, len(drawn)), int(generation_config.pad_token_id), device=input_ids.device
        )
        for step, (row, token) in enumerate(drawn):
            out[row, step] = token
        return out


def _keep(kwargs: dict[str, Any], live: Int[Tensor, "k"]) -> dict[str, Any]:
    """The rows of every batched tensor, and of the cache, that go on."""
    kwargs["cache"].batch_select_indices(live)
    tensors = {
        k: v[live]
        for k, v in kwargs.items()
        if isinstance(v, Tensor) and k in ("attention_mask", "position_ids")
    }
    return kwargs | tensors
