"""`policy.json`: what a policy is, by which its other files are known."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from fedvpa.errors import BadInputError
from fedvpa.files import plain_json, write_atomically
from fedvpa.policy.conditioning import CONDITIONER, Form

WEIGHTS = ("adapter/adapter_model.safetensors", CONDITIONER)
"""Files that hold a policy's weights, beside the base model's."""
PARTS = ("adapter/adapter_config.json", *WEIGHTS)
CARD = "policy.json"


@dataclass(frozen=True)
class PolicyCard:
    """Contents of `policy.json`: the base model, the named preferences, the selector's folder, the
    identity of the run that it was (``run``), and a hash of all this, but for the folder, and of
    the files of weights."""

    base: str
    revision: str
    form: Form
    preferences: dict[str, list[float]]
    neutral: list[float]
    centre: list[float]
    scale: float
    selector: str
    thinking: bool = False
    run: str = ""
    checksum: str = ""

    def z(self, name: str) -> Float[Tensor, "d"]:
        """z of a named preference, or of ``neutral``.

        Raises:
            BadInputError: no such preference; the known ones are listed.
        """
        if name == "neutral":
            return torch.tensor(self.neutral)
        if name not in self.preferences:
            raise BadInputError(
                f"no preference '{name}' (known: {', '.join([*self.preferences, 'neutral'])})"
            )
        return torch.tensor(self.preferences[name])

    def mix(self, weights: Mapping[str, float]) -> Float[Tensor, "d"]:
        """Weighted mean of named preferences; the weights are scaled to sum to one.

        Raises:
            BadInputError: an unknown name, or weights that are negative or sum to zero.
        """
        total = sum(weights.values())
        if not weights or not min(weights.values()) >= 0 or not 0 < total < math.inf:
            raise BadInputError(
                "a mix needs weights that are not negative and do not sum to zero, as"
                " helpful=0.3,harmless=0.7"
            )
        return torch.stack([self.z(name) * (w / total) for name, w in weights.items()]).sum(0)

    @property
    def latent(self) -> int:
        """Dimensions of z."""
        return len(self.neutral)


def save_card(card: PolicyCard, folder: Path) -> None:
    """Write `policy.json` beside the weights, with its checksum.

    Raises:
        OSError: a file of weights is missing, or the disk is full.
    """
    whole = replace(card, checksum=_checksum(card, folder))
    write_atomically(folder / CARD, plain_json(asdict(whole)))


def load_card(folder: Path) -> PolicyCard:
    """Read `policy.json`, and compare it and the weights beside it with its checksum.

    Raises:
        BadInputError: no policy there, not one of this version, or not as it was written.
    """
    file = folder / CARD
    try:
        card = TypeAdapter(PolicyCard).validate_json(file.read_bytes())
    except OSError as error:
        raise BadInputError(
            f"{folder}: no policy there (no {CARD}); make one with `fedvpa align`"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise BadInputError(
            f"{file}: damaged, or not of this version: {place}: {first['msg']}"
        ) from error
    try:
        found = _checksum(card, folder)
    except OSError as error:
        raise BadInputError(f"{error.filename}: cannot be read: {error.strerror}") from error
    if card.checksum != found:
        raise BadInputError(
            f"{folder}: {CARD} or one of {', '.join(PARTS)} is not what was written there, or is of"
            " an earlier version; make the policy again with `fedvpa align`"
        )
    return card


def _checksum(card: PolicyCard, folder: Path) -> str:
    """Hash of a card and of the weights beside it; where the selector is kept may change."""
    digest = hashlib.sha256(plain_json(asdict(replace(card, checksum="", selector=""))))
    for name in PARTS:
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()
