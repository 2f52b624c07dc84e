"""Users: their comparisons, what follows from them, and what to ask them next."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fedvpa.data.memory import pairs_from
from fedvpa.errors import BadInputError
from fedvpa.experiment.preferences import named_preferences
from fedvpa.experiment.use import PreferenceModel, UserPreference
from fedvpa.records import Item, Message, PreferencePair
from fedvpa.serving.access import DeniedError
from fedvpa.serving.store import Comparison, Store

REMEMBERED = 1000
"""Users whose posterior is kept in memory."""
SURE = 0.95
"""A group is certain from this probability on."""


class People:
    """What the server knows of its users.

    Args:
        selector: infers preferences; it keeps no features.
        store: the database.
        texts: whether the texts of comparisons are kept.
        most: comparisons of a user.
        secret: signs preferences that users keep themselves (None: there are none).
    """

    def __init__(
        self, selector: PreferenceModel, store: Store, texts: bool = True, most: int = 500,
        secret: bytes | None = None,
    ) -> None:  # fmt: skip
        self.selector, self.store = selector, store
        self._texts, self._most, self._secret = texts, most, secret
        self._known: OrderedDict[str, tuple[tuple[int, int], UserPreference]] = OrderedDict()
        # of what is known; and of the selector's model, through which one job at a time goes
        self._lock, self._reading = threading.Lock(), threading.Lock()
        self.names: dict[str, Tensor] = (
            {} if selector.prototypes is None else named_preferences(selector)
        )

    @property
    def run(self) -> str:
        """Identity of the run."""
        return self.selector.run.identity

    # -- the selector's model

    def read(self, pairs: Sequence[PreferencePair]) -> tuple[Tensor, Tensor]:
        """Features [n, 2, h] and orders [n] of comparisons (see `PreferenceModel.read`)."""
        with self._reading:
            return self.selector.read(pairs)

    def rewards(
        self, prompt: Sequence[Message], texts: Sequence[str], z: Float[Tensor, "d"]
    ) -> list[float]:
        """Reward of each answer under z."""
        items = [Item(tuple(prompt), text or " ") for text in texts]
        with self._reading:
            return list(self.selector.score(items, z).tolist())

    # -- comparisons

    def add(self, user: str, pairs: Sequence[PreferencePair]) -> int:
        """Keep comparisons; how many of them are new.

        Raises:
            BadInputError: too many, or texts that the backbone refuses.
        """
        features, orders = self.read(pairs)
        added = 0
        for pair, feature, order in zip(pairs, features, orders.tolist()):
            texts = None
            if self._texts:
                texts = {
                    "messages": [m._asdict() for m in pair.prompt],
                    "chosen": pair.chosen, "rejected": pair.rejected,
                }  # fmt: skip
            added += self.store.add(
                user,
                Comparison(pair.content_key(), self._signature, order > 0, feature, texts),
                self._most,
            )
        return added

    @property
    def _signature(self) -> str:
        return self.selector.run.data.signature

    def of(self, user: str) -> list[Comparison]:
        """The comparisons of a user, oldest first; those that another backbone has read are read
        anew, where their texts are kept.

        Raises:
            DeniedError: 409: they cannot be.
        """
        found = self.store.comparisons(user)
        for i, comparison in enumerate(found):
            if comparison.signature == self._signature:
                continue
            if comparison.texts is None:
                raise DeniedError(
                    409, "of_another_backbone",
                    f"the comparisons of '{user}' were read by another backbone, and their texts"
                    " were not kept; forget the user, and ask again",
                )  # fmt: skip
            pair = _pair(comparison.texts)
            features, orders = self.read([pair])
            self.store.replace(comparison.id, features[0], self._signature)
            found[i] = Comparison(
                comparison.digest, self._signature, bool(orders[0] > 0), features[0],
                comparison.texts, comparison.id, comparison.at,
            )  # fmt: skip
        return found

    def forget(self, user: str) -> bool:
        """Nothing of the user is left; False where nothing was there."""
        with self._lock:
            self._known.pop(user, None)
        return self.store.forget(user)

    # -- posteriors

    def preference(self, user: str) -> UserPreference:
        """The user's posterior; with no comparisons, the prior."""
        state = self.store.state(user)
        with self._lock:
            known = self._known.get(user)
            if known is not None and known[0] == state:
                self._known.move_to_end(user)
                return known[1]
        found = self.selector.inferred(*_stacked(self.of(user)))
        with self._lock:
            self._known[user] = (state, found)
            while len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        return found

    def inferred(self, pairs: Sequence[PreferencePair]) -> UserPreference:
        """The posterior of comparisons that are kept nowhere."""
        return self.selector.inferred(*self.read(pairs))

    def described(self, user: str) -> dict[str, Any]:
        """All that is known of a user: posterior, shares of the named preferences, how sure, the
        comparisons, and how far each has moved the posterior's mean."""
        comparisons, found = self.of(user), self.preference(user)
        influence = self.selector.influence(*_stacked(comparisons)).tolist()
        rows: list[dict[str, Any]] = [
            {"id": c.id, "at": c.at, "moved": moved} | (c.texts or {})
            for c, moved in zip(comparisons, influence)
        ]
        most = max(rows, key=lambda row: float(row["moved"]), default=None)
        return self.summary(found) | {
            "comparisons": rows, "moved_most": None if most is None else most["id"],
            "map": self.map_of(found),
            "saved": sorted(self.store.saved(user)),
        }  # fmt: skip

    def summary(self, found: UserPreference) -> dict[str, Any]:
        """A posterior: z, its standard deviations, shares of the groups, how sure; in words."""
        shares = dict(zip(self.names, found.probability))
        sure = max(shares.values(), default=None)
        sides = None if shares else self._sides(found)
        words = "nothing is known yet"
        if found.pairs and shares:
            name = max(shares, key=lambda n: shares[n])
            words = f"{_percent(shares[name])} sure that '{name}' comes nearest"
        elif found.pairs and sides:
            side = max(sides, key=lambda n: sides[n])
            words = f"{_percent(sides[side])} sure of leaning to '{side}'"
        elif found.pairs:
            words = "this run's users do not differ measurably"
        return found.to_json() | {
            "shares": shares or sides or {}, "sure": sure if shares else None,
            "certain": sure is not None and sure >= SURE, "words": words,
        }  # fmt: skip

    def _sides(self, found: UserPreference) -> dict[str, float]:
        """Of users who differ by degree: how probable each end of each direction is."""
        sides: dict[str, float] = {}
        for name, end in self.names.items():
            length = end.norm().clamp_min(1e-9)
            mean = float((found.mean - self.selector.neutral) @ end / length)
            spread = float((found.sigma * end / length).norm().clamp_min(1e-9))
            sides[name] = float(torch.special.ndtr(torch.tensor(mean / spread)))
        return sides

    # -- preferences that users keep

    def signing(self) -> bytes:
        """The secret of tokens.

        Raises:
            DeniedError: 501: the server has none.
        """
        if self._secret is None:
            raise DeniedError(501, "no_secret", "this server signs no preferences; start it with"
                              " --secret FILE")  # fmt: skip
        return self._secret

    def token(self, found: UserPreference) -> str:
        """A posterior that the user keeps: this server needs to store nothing.

        Raises:
            DeniedError: 501: the server has no secret to sign with.
        """
        secret = self.signing()
        body = json.dumps({"run": self.run, "z": found.mean.tolist(), "pairs": found.pairs})
        text = base64.urlsafe_b64encode(body.encode()).decode()
        return f"{text}.{_signed(secret, text)}"

    def from_token(self, token: str) -> Float[Tensor, "d"]:
        """z of a token.

        Raises:
            DeniedError: 400: not one that this server has signed; 409: of another run; 501: the
                server signs none.
        """
        text, _, signature = token.partition(".")
        signed = _signed(self.signing(), text).encode()
        if not hmac.compare_digest(signed, signature.encode()):
            raise DeniedError(400, "bad_token", "preference.token: not signed by this server")
        body = json.loads(base64.urlsafe_b64decode(text))
        if body["run"] != self.run:
            raise DeniedError(
                409, "of_another_run", "preference.token: was inferred by another run, where z"
                " means something else; send the comparisons to /v1/preferences again",
            )  # fmt: skip
        return torch.tensor(body["z"])

    def save(self, user: str, name: str, z: Float[Tensor, "d"]) -> None:
        """Keep a preference under the user's own name for it."""
        self.store.save(user, name, self.run, z.tolist())

    def saved(self, user: str, name: str) -> Float[Tensor, "d"] | None:
        """z of a preference that the user has saved (None: no such name).

        Raises:
            DeniedError: 409: it was saved under another run.
        """
        found = self.store.saved(user).get(name)
        if found is None:
            return None
        if found[0] != self.run:
            raise DeniedError(
                409, "of_another_run",
                f"'{name}' was saved under another run, where z means something else; save it"
                " again",
            )  # fmt: skip
        return torch.tensor(found[1])

    def map_of(self, found: UserPreference) -> dict[str, Any] | None:
        """Two dimensions in which the named preferences differ most: where they are, and where the
        user is, with standard deviations; None where none has a name."""
        if not self.names:
            return None
        ends = torch.stack(list(self.names.values())) - self.selector.neutral
        axes = torch.linalg.svd(ends, full_matrices=False).Vh[:2]
        spread = (axes.square() @ found.sigma.square()).sqrt()
        return {
            "named": dict(zip(self.names, (ends @ axes.T).tolist())),
            "me": (axes @ (found.mean - self.selector.neutral)).tolist(),
            "spread": spread.tolist(),
        }


def _percent(share: float) -> str:
    """Never 100 %: nobody is that sure.

    >>> _percent(0.87), _percent(0.9999)
    ('87 %', 'over 99 %')
    """
    return "over 99 %" if share > 0.99 else f"{share:.0%}".replace("%", " %")


def _stacked(
    comparisons: Sequence[Comparison],
) -> tuple[Float[Tensor, "n 2 h"], Float[Tensor, "n"]]:
    if not comparisons:
        return torch.zeros(0, 2, 0), torch.zeros(0)
    orders = torch.tensor([1.0 if c.first else -1.0 for c in comparisons])
    return torch.stack([c.features for c in comparisons]), orders


def _pair(texts: dict[str, Any]) -> PreferencePair:
    prompt = tuple(Message(m["role"], m["content"]) for m in texts["messages"])
    return PreferencePair(prompt, texts["chosen"], texts["rejected"])


def _signed(secret: bytes, text: str) -> str:
    digest = hmac.new(secret, text.encode(), hashlib.sha256).digest()
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")


def read_pair(messages: Sequence[Any], chosen: str, rejected: str) -> PreferencePair:
    """A comparison, as any record of a file is read.

    Raises:
        BadInputError: it compares nothing.
    """
    record = {"prompt": list(messages), "chosen": chosen, "rejected": rejected}
    found = pairs_from([record], "comparison")
    if len(found) != 1:
        raise BadInputError("comparison: compares nothing")
    return found[0]
