"""How a latent preference reaches the policy: soft prefix tokens that are a learned map of z, or a shift of every input
embedding (the FedVPA-GP paper's form). Without a z the policy's inputs are left exactly as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Form = Literal["prefix", "shift"]

CONDITIONER = "conditioner.safetensors"
"""File that holds a conditioner's weights."""

GAIN = 50.0
"""Standard deviations of the embeddings that one unit of a conditioner's weights stands for."""

PREFERENCE = "preference"
"""Name under which z travels in a batch, [rows, d]."""


class PreferenceConditioner(nn.Module):
    """z [b, d] to k soft tokens [b, k, H], or to one shift [b, 1, H] that is added to every input embedding.

    z enters as u = (z - centre) / scale, so that learning does not depend on the selector's units. Soft tokens start as the
    embedding of `anchor` (the begin- or end-of-text token, which a model has learned to look past) plus a small random map of
    u; a shift starts at zero. Weights are in units of `GAIN` standard deviations of the embeddings, so that a step of Adam that
    suits the adapter moves the few numbers that z has to work through far enough.
    """

    centre: Tensor
    scale: Tensor
    unit: Tensor
    bias: Tensor

    def __init__(
        self, centre: Float[Tensor, "d"], scale: float, anchor: Float[Tensor, "h"], unit: float, form: Form = "prefix",
        tokens: int = 8, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.form, self.tokens = form, tokens if form == "prefix" else 1
        self.register_buffer("centre", centre.float().clone())
        self.register_buffer("scale", torch.tensor(float(scale)))
        self.register_buffer("unit", torch.tensor(float(unit)))
        start = anchor.float().expand(self.tokens, -1) if form == "prefix" else torch.zeros(1, anchor.shape[-1])
        self.register_buffer("bias", start.clone())
        generator = torch.Generator().manual_seed(seed)
        std = 0.3 / GAIN if form == "prefix" else 0.0
        shape = (self.tokens, anchor.shape[-1], centre.shape[-1])
        self.weight = nn.Parameter(torch.randn(shape, generator=generator) * std)
        self.offset = nn.Parameter(torch.zeros(self.tokens, anchor.shape[-1]))

    def forward(self, z: Float[Tensor, "b d"]) -> Float[Tensor, "b k h"]:
        """Soft tokens, or the shift."""
        u = (z.float() - self.centre) / self.scale
        steered = torch.einsum("khd,bd->bkh", self.weight, u) + self.offset
        return self.bias + self.unit * GAIN * steered

    def embed(
        self,
        z: Float[Tensor, "b d"],
        embedded: Float[Tensor, "b t h"],
        attention_mask: Int[Tensor, "b t"],
        labels: Int[Tensor, "b t"] | None = None,
    ) -> dict[str, Tensor]:
        """Model inputs under z; soft tokens go to the front, are attended to, and are never predicted (label -100)."""
        extra = self(z).to(embedded.dtype)
        if self.form == "shift":
            out = {"inputs_embeds": embedded + extra, "attention_mask": attention_mask}
            return out if labels is None else out | {"labels": labels}
        front = attention_mask.new_ones(attention_mask.shape[0], self.tokens)
        out = {
            "inputs_embeds": torch.cat([extra, embedded], 1),
            "attention_mask": torch.cat([front, attention_mask], 1),
        }
        if labels is not None:
            out["labels"] = torch.cat([labels.new_full(front.shape, -100), labels], 1)
        return out


def attach(model: nn.Module, conditioner: PreferenceConditioner) -> None:
    """Make `model(..., preference=z)` mean `model` under z; a call without `preference` is not touched.

    The conditioner becomes a submodule, so its parameters are trained with the model's.
    """
    model.add_module("conditioner", conditioner)
    model.register_forward_pre_hook(_condition, with_kwargs=True)


def _condition(model: Any, arguments: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    z = given.pop(PREFERENCE, None)
    if z is None:
        return arguments, given
    ids = given.pop("input_ids")
    embedded = model.get_input_embeddings()(ids)
    mask = given.pop("attention_mask", torch.ones_like(ids))
    return arguments, given | model.conditioner.embed(z, embedded, mask, given.pop("labels", None))


def save_conditioner(conditioner: PreferenceConditioner, folder: Path) -> None:
    """Write its weights aside, then into place: a folder that holds the file holds all of it."""
    aside = folder / f".{CONDITIONER}.part"
    save_file({name: value.detach().cpu().contiguous() for name, value in conditioner.state_dict().items()}, aside)
    aside.replace(folder / CONDITIONER)


def load_conditioner(conditioner: PreferenceConditioner, folder: Path) -> None:
    """Read the weights that `save_conditioner` wrote."""
    conditioner.load_state_dict(load_file(folder / CONDITIONER))
