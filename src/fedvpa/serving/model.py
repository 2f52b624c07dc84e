"""The model that is served: its names, and under which preference an answer is drawn."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fedvpa.errors import BadInputError
from fedvpa.experiment.use import PreferenceModel
from fedvpa.features.loading import load_causal_model
from fedvpa.policy.batching import BatchingEngine
from fedvpa.policy.card import CARD, PolicyCard, load_card
from fedvpa.policy.engine import Engine
from fedvpa.policy.policy import Policy, load_policy
from fedvpa.serving.access import Caller, DeniedError
from fedvpa.serving.people import People
from fedvpa.serving.questions import Bank
from fedvpa.serving.settings import ServingSettings
from fedvpa.serving.shapes import Wanted
from fedvpa.serving.store import Store

FAMILY = "fedvpa"
BASE, MINE, NEUTRAL = "base", "mine", "neutral"
"""Models beside the named preferences: without any preference, the user's own, and nobody's."""


@dataclass(frozen=True)
class Preference:
    """What an answer is drawn under: z (None: none), where it comes from, and what says so."""

    z: Float[Tensor, "d"] | None
    source: str
    said: dict[str, Any] = field(default_factory=dict)

    def told(self, drafts: int) -> dict[str, Any]:
        """What a response says of it."""
        z = None if self.z is None else [round(v, 6) for v in self.z.tolist()]
        return {"source": self.source, **self.said, "z": z, "best_of": drafts}


@dataclass(frozen=True)
class Served:
    """A policy with its selector, or a bare base model with a selector that chooses drafts.

    Args:
        engine: draws answers.
        people: users, by the selector.
        bank: what they can be asked.
        steers: whether z reaches the engine's model (else it chooses among drafts alone).
        named: z of every preference that has a name.
        neutral: z of somebody of whom nothing is known.
    """

    engine: Engine
    people: People
    bank: Bank
    steers: bool
    named: dict[str, Tensor]
    neutral: Float[Tensor, "d"]

    @property
    def models(self) -> list[str]:
        """Names of all models."""
        names = [BASE, *self.named, *([MINE] if self.named else []), NEUTRAL]
        return [f"{FAMILY}/{name}" for name in names]

    def preference(
        self, model: str, wanted: Wanted | None, user: str | None, caller: Caller
    ) -> Preference:
        """Which preference a request asks for: what `preference` says, else what the model's name
        says.

        Raises:
            DeniedError: 404 no such model, 400 no such preference, 403 another user's.
        """
        # 1. The model must be one, whatever else is said.
        if model not in self.models:
            raise DeniedError(
                404, "model_not_found",
                f"no model '{model}' (known: {', '.join(self.models)})",
            )  # fmt: skip
        name = model.removeprefix(f"{FAMILY}/")
        # 2. A preference that is given outright comes first.
        if wanted is not None and (given := wanted.model_dump(exclude_none=True)):
            if len(given) > 1:
                raise DeniedError(
                    400, "invalid_value", "preference: give one of name, mix, z, token"
                )
            return self._given(wanted, user, caller)
        # 3. Else the model's name.
        if name == BASE:
            return Preference(None, BASE)
        if name != MINE:
            return Preference(self._of_name(name), "name", {"name": name})
        owner = self._user(user, caller)
        found = self.people.preference(owner)
        return Preference(found.mean, MINE, {"user": owner, "pairs": found.pairs})

    def _given(self, wanted: Wanted, user: str | None, caller: Caller) -> Preference:
        try:
            if wanted.token is not None:
                return Preference(self.people.from_token(wanted.token), "token")
            if wanted.mix is not None:
                return Preference(self._mixed(wanted.mix), "mix", {"mix": wanted.mix})
            if wanted.z is not None:
                z = torch.tensor(wanted.z)
                if z.shape != self.neutral.shape or not z.isfinite().all():
                    raise BadInputError(f"z has {len(self.neutral)} finite numbers")
                return Preference(z, "z")
            assert wanted.name is not None
            if wanted.name in (*self.named, NEUTRAL):
                return Preference(self._of_name(wanted.name), "name", {"name": wanted.name})
            if user or caller.user:
                saved = self.people.saved(self._user(user, caller), wanted.name)
                if saved is not None:
                    return Preference(saved, "saved", {"name": wanted.name})
            known = ", ".join([*self.named, NEUTRAL])
            raise BadInputError(f"no preference '{wanted.name}' (known: {known}, and saved ones)")
        except BadInputError as error:
            raise DeniedError(400, "invalid_value", f"preference: {error}") from error

    def _mixed(self, weights: dict[str, float]) -> Float[Tensor, "d"]:
        total = sum(weights.values())
        if not weights or not min(weights.values()) >= 0 or not 0 < total < float("inf"):
            raise BadInputError(
                "mix: weights that are not negative and do not sum to zero, as {'helpful': 0.3,"
                " 'harmless': 0.7}"
            )
        parts = [self._of_name(name) * (w / total) for name, w in weights.items()]
        return torch.stack(parts).sum(0)

    def _of_name(self, name: str) -> Float[Tensor, "d"]:
        if name == NEUTRAL:
            return self.neutral
        if name not in self.named:
            raise BadInputError(
                f"no preference '{name}' (known: {', '.join([*self.named, NEUTRAL])})"
            )
        return self.named[name]

    def _user(self, user: str | None, caller: Caller) -> str:
        """Whose preference `mine` is: the key's user, or whom an administrator names."""
        found = user or caller.user
        if found is None:
            raise DeniedError(400, "missing_user", "user: say whose preference is meant")
        return caller.of_user(found)

    def close(self) -> None:
        """End what runs, and close the database."""
        self.engine.close()
        self.people.store.close()


def open_served(settings: ServingSettings) -> Served:
    """A policy's folder, or a run's.

    Raises:
        BadInputError: neither is there; the policy's selector is gone or another one; the base
            model, the bank, the secret or the database cannot be used.
    """
    folder = Path(settings.directory)
    secret, device = settings.signing_secret(), _device(settings.device)
    card = load_card(folder) if (folder / CARD).exists() else None
    selector = _selector(folder, card)
    store = Store(settings.url)
    try:
        people = People(
            selector, store, settings.texts == "keep", settings.most_comparisons, secret,
        )  # fmt: skip
        bank = Bank(people, settings.bank)
        if card is not None:
            policy, _ = load_policy(folder, device)
            named = {name: card.z(name) for name in card.preferences}
            neutral = card.z(NEUTRAL)
        else:
            name = settings.base or selector.run.config.features.backbone
            loaded = load_causal_model(name, None, device)
            policy = Policy(loaded.module.eval(), loaded.tokenizer)
            named, neutral = people.names, selector.neutral
        engine = BatchingEngine(policy, settings.rows, settings.waiting)
    except BaseException:
        store.close()
        raise
    return Served(engine, people, bank, card is not None, named, neutral)


def _selector(folder: Path, card: PolicyCard | None) -> PreferenceModel:
    if card is None:
        return PreferenceModel(folder, keep=False)
    if card.latent == 0:
        raise BadInputError(
            f"{folder}: was made with one reward for everybody, and no z steers it; serve a policy"
            " of a selector (`fedvpa align` on a run of fedvpa-gp)"
        )
    selector = PreferenceModel(card.selector, keep=False)
    if card.run and selector.run.identity != card.run:
        raise BadInputError(
            f"{card.selector}: is another run than the one that {folder} was trained with; its z"
            " would mean something else to the policy"
        )
    return selector


def _device(name: str) -> str:
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"
