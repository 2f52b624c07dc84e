"""How a latent preference reaches the policy. Without a z the policy is exactly the base model.

| form | what z does |
|---|---|
| gate | scales the ranks of the LoRA adapter: the weights under z are W + B diag(g(z)) A |
| prefix | becomes k soft tokens before the conversation (Li and Liang, 2021, *Prefix-tuning*) |
| shift | becomes one vector that is added to every input embedding (the FedVPA-GP paper's form) |

All three are affine in z. With gates, an adapter of one preference is an ordinary LoRA adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Form = Literal["gate", "prefix", "shift"]

CONDITIONER = "conditioner.safetensors"
"""File that holds a conditioner's weights."""

GAIN = 50.0
"""Standard deviations of the embeddings that one unit of a prefix's or shift's weights stands
for."""

PREFERENCE = "preference"
"""Name under which z travels in a batch, [rows, d]."""


class PreferenceConditioner(nn.Module):
    """z [b, d] to an effect [b, k, w]: gates [b, 1, rank], soft tokens [b, k, H] or a shift [b, 1,
    H].

    The effect is start + unit (weight u + offset) with u = (z - centre) / scale, so that learning
    does not depend on the selector's units. `start` [k, w] and `weight` [k, w, d] are where it
    begins; see `gates`, `soft_tokens` and `shift`.
    """

    centre: Tensor
    scale: Tensor
    unit: Tensor
    start: Tensor

    def __init__(
        self, form: Form, centre: Float[Tensor, "d"], scale: float, start: Float[Tensor, "k w"],
        weight: Float[Tensor, "k w d"], unit: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.form: Form = form
        self.register_buffer("centre", centre.float().clone())
        self.register_buffer("scale", torch.tensor(float(scale)))
        self.register_buffer("unit", torch.tensor(float(unit)))
        self.register_buffer("start", start.float().clone())
        self.weight = nn.Parameter(weight.float().clone())
        self.offset = nn.Parameter(torch.zeros_like(start, dtype=torch.float32))
        self._effect: Tensor | None = None
        self._held = False

    @classmethod
    def gates(
        cls, centre: Float[Tensor, "d"], scale: float, preferences: Float[Tensor, "m d"], rank: int
    ) -> PreferenceConditioner:
        """Half the ranks start with gate 1 for everybody, the others with a gate that differs
        between preferences as much as it can: the principal directions of the m preferences, in
        turn, at a root-mean-square gate of 1 over them. Where the preferences do not differ, all
        gates start at 1, and the adapter is a plain LoRA adapter."""
        u = (preferences.float() - centre.float()) / scale
        _, size, directions = torch.linalg.svd(u - u.mean(0), full_matrices=False)
        kept = size > 1e-4 * max([1.0, *size[:1].tolist()])
        steered = rank // 2 if kept.any() else 0
        start, weight = torch.ones(1, rank), torch.zeros(1, rank, centre.shape[-1])
        for at in range(steered):
            own = at % int(kept.sum())
            row = directions[own] * (len(u) ** 0.5 / size[own])
            weight[0, at], start[0, at] = row, -row @ u.mean(0)
        return cls("gate", centre, scale, start, weight, 1.0)

    @classmethod
    def soft_tokens(
        cls,
        centre: Float[Tensor, "d"],
        scale: float,
        anchor: Float[Tensor, "h"],
        std: float,
        tokens: int,
        seed: int,
    ) -> PreferenceConditioner:
        """Tokens start as the embedding `anchor` (of the begin- or end-of-text token, which a model
        has learned to look past) plus a small random map of u. Weights are in units of `GAIN`
        standard deviations `std` of the embeddings, so that a step of Adam that suits the adapter
        moves the few numbers that z has to work through far enough."""
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn((tokens, anchor.shape[-1], centre.shape[-1]), generator=generator) * (
            0.3 / GAIN
        )
        return cls("prefix", centre, scale, anchor.expand(tokens, -1), weight, GAIN * std)

    @classmethod
    def shift(
        cls, centre: Float[Tensor, "d"], scale: float, width: int, std: float
    ) -> PreferenceConditioner:
        """A shift starts at zero; its units are those of `soft_tokens`."""
        return cls(
            "shift",
            centre,
            scale,
            torch.zeros(1, width),
            torch.zeros(1, width, centre.shape[-1]),
            GAIN * std,
        )

    def forward(self, z: Float[Tensor, "b d"]) -> Float[Tensor, "b k w"]:
        """The effect of z."""
        u = (z.float() - self.centre) / self.scale
        return self.start + self.unit * (torch.einsum("kwd,bd->bkw", self.weight, u) + self.offset)

    def embed(
        self,
        z: Float[Tensor, "b d"],
        embedded: Float[Tensor, "b t h"],
        attention_mask: Int[Tensor, "b t"],
        labels: Int[Tensor, "b t"] | None = None,
    ) -> dict[str, Tensor]:
        """Model inputs with soft tokens in front, which are attended to and never predicted (label
        -100)."""
        soft = self(z).to(embedded.dtype)
        front = attention_mask.new_ones(soft.shape[:2])
        out = {
            "inputs_embeds": torch.cat([soft, embedded], 1),
            "attention_mask": torch.cat([front, attention_mask], 1),
        }
        if labels is not None:
            out["labels"] = torch.cat([labels.new_full(front.shape, -100), labels], 1)
        return out

    @contextmanager
    def holding(self, z: Float[Tensor, "b d"]) -> Iterator[None]:
        """Gates or shift of these rows hold for every call of the model, until it is left."""
        with self.holding_effect(self(z)):
            yield

    @contextmanager
    def holding_effect(self, effect: Float[Tensor, "b k w"]) -> Iterator[None]:
        """The same of gates or shifts themselves (soft tokens stand before the conversation, and
        are none of its calls' matter)."""
        self._effect, self._held = effect, True
        try:
            yield
        finally:
            self._effect, self._held = None, False

    def keep(self, rows: Int[Tensor, "k"]) -> None:
        """Of the rows that are held, only these go on."""
        if self._effect is not None:
            self._effect = self._effect[rows]

    def before(
        self, model: Any, arguments: tuple[Any, ...], given: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward pre-hook of the model: takes `preference` off its arguments, and makes it
        count."""
        z = given.pop(PREFERENCE, None)
        if self.form == "prefix" and z is not None:
            ids = given.pop("input_ids")
            embedded = model.get_input_embeddings()(ids)
            mask = given.pop("attention_mask", torch.ones_like(ids))
            given |= self.embed(z, embedded, mask, given.pop("labels", None))
        elif self.form != "prefix" and not self._held:
            # stays until the next call: checkpointing computes twice
            self._effect = None if z is None else self(z)
        return arguments, given

    def on_embedding(self, _: Any, __: Any, out: Float[Tensor, "b t h"]) -> Float[Tensor, "b t h"]:
        """Forward hook of the input embedding (shift)."""
        return out if self._effect is None else out + self._effect.to(out.dtype)

    def on_ranks(self, _: Any, __: Any, out: Float[Tensor, "b t r"]) -> Float[Tensor, "b t r"]:
        """Forward hook of a LoRA layer's A (gate)."""
        return out if self._effect is None else out * self._effect.to(out.dtype)


def padding_first(
    embedded: Float[Tensor, "b t h"], mask: Int[Tensor, "b t"]
) -> tuple[Float[Tensor, "b t h"], Int[Tensor, "b t"]]:
    """The same rows with all padding on the left: a sliding window counts columns, so that none may
    stand between soft tokens and a conversation."""
    order = mask.argsort(dim=1, stable=True)
    return embedded.gather(1, order.unsqueeze(-1).expand_as(embedded)), mask.gather(1, order)


def attach(model: Any, conditioner: PreferenceConditioner) -> None:
    """Make `model(..., preference=z)` mean `model`, a PEFT model, under z; a call without
    `preference` is not touched.

    The conditioner becomes a submodule, so its parameters are trained with the model's.
    """
    if conditioner.form == "shift":
        model.get_input_embeddings().register_forward_hook(conditioner.on_embedding)
    elif conditioner.form == "gate":
        for module in list(model.modules()):
            for ranks in getattr(module, "lora_A", {}).values():
                ranks.register_forward_hook(conditioner.on_ranks)
    model.add_module("conditioner", conditioner)
    model.register_forward_pre_hook(conditioner.before, with_kwargs=True)


def save_conditioner(conditioner: PreferenceConditioner, folder: Path) -> None:
    """Write its weights aside, then into place: a folder that holds the file holds all of it."""
    aside = folder / f".{CONDITIONER}.part"
    save_file(
        {
            name: value.detach().cpu().contiguous()
            for name, value in conditioner.state_dict().items()
        },
        aside,
    )
    aside.replace(folder / CONDITIONER)


def load_conditioner(conditioner: PreferenceConditioner, folder: Path) -> None:
    """Read the weights that `save_conditioner` wrote."""
    conditioner.load_state_dict(load_file(folder / CONDITIONER))


def read_conditioner(folder: Path, form: Form) -> PreferenceConditioner:
    """The conditioner that `save_conditioner` wrote."""
    found = load_file(folder / CONDITIONER)
    conditioner = PreferenceConditioner(
        form,
        found["centre"],
        float(found["scale"]),
        found["start"],
        found["weight"],
        float(found["unit"]),
    )
    conditioner.load_state_dict(found)
    return conditioner
