"""The search for the structure: which candidates go on, when groups begin, and which one is served
at which width (M9)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from fedvpa.federated.bayes.choice import Option, Verdict, best_models, chosen, verdict, widths_of
from fedvpa.federated.bayes.models import Models, Width
from fedvpa.federated.bayes.side import BayesSide
from fedvpa.federated.bayes.start import Starts

KEPT = {0.4: 6, 1.0: 3}
"""How many structures go on after so much of the search (successive halving: Jamieson & Talwalkar,
2016); the last ones are trained to the end, with their folds."""
BEGUN = 2
"""Structures of groups that are trained from the end of the search on."""


class Found(NamedTuple):
    """What is served: the personal model at its width, and the shared reward beside it; and what
    was judged, where there was a choice: all options, what clients say of them, and the pick."""

    personal: Models
    width: Width
    shared: Models
    given: Sequence[Option] = ()
    verdict: Verdict | None = None
    at: int = 0


@dataclass(frozen=True)
class Search:
    """Compares candidates by targets of the folds that each one's parameters have not read.

    Args:
        starts: what is tried.
        effect: factor on the effect of z.
        rounds: when the search ends.
    """

    starts: Starts
    effect: float | Literal["auto"]
    rounds: int

    def kept(self, round_number: int) -> int | None:
        """How many structures go on after so many rounds (None: all that there are)."""
        ends = {max(1, round(self.rounds * share)): keep for share, keep in KEPT.items()}
        return ends.get(round_number)

    def best(
        self, trained: Sequence[Models], clients: BayesSide, by_prompt: bool, keep: int
    ) -> list[int]:
        """Which of the candidates go on: the best personal structures, and one shared reward."""
        if len(trained[0].fold) == 1:  # nothing to judge by, and nothing was left open
            return list(range(len(trained)))
        return best_models(*self._judged(trained, clients, by_prompt), keep)

    def groups(
        self, trained: Sequence[Models], clients: BayesSide, by_prompt: bool, keep: int = 0
    ) -> list[Models]:
        """Groups where the trained directions find clusters of clients; the best `keep` of them (0:
        all)."""
        numbers = self.starts.numbers(len(clients))
        wide = [models for models in trained if models.structure.kind == "directions"]
        found = [
            models
            for directions in (wide[:1] if keep else wide)
            for models in (
                self.starts.groups(clients, directions, by_prompt, numbers) if numbers else ()
            )
        ]
        if not keep or len(found) <= keep:
            return found
        if len(found[0].fold) == 1:
            return found[:keep]
        return [found[i] for i in best_models(*self._judged(found, clients, by_prompt), keep)]

    def result(self, trained: Sequence[Models], clients: BayesSide, by_prompt: bool) -> Found:
        """What is served, of all that was trained and of groups that are fitted to the population
        under it."""
        everything = [*trained, *self.groups(trained, clients, by_prompt)]
        if self.starts.kind == "groups":  # directions have served to find them
            everything = [m for m in everything if m.structure.kind != "directions"]
        if len(everything[0].fold) == 1:
            first = {m.structure.kind: m for m in reversed(everything)}
            shared = first.pop("shared")
            personal = next(iter(first.values()), shared)
            return Found(personal, Width(1.0 if self.effect == "auto" else self.effect), shared)
        given, found = self._judged(everything, clients, by_prompt, last=True)
        at = chosen(given, found)
        beside = best_models(given, found, 0)[0]
        # where a shared reward is as good, it is served, and z does nothing
        return Found(
            everything[given[at].model], given[at].width, everything[beside], given, found, at
        )

    def _judged(
        self, models: Sequence[Models], clients: BayesSide, by_prompt: bool, last: bool = False
    ) -> tuple[list[Option], Verdict]:
        """All options, and what clients say of them; errors are of the difference from the best
        one, and known of the `last` judgement."""
        held = [m.at(slice(1, None)) for m in models]
        widths = [widths_of(m.structure, self.effect, last) for m in models]
        given = [
            Option(m.structure, w, i) for i, (m, own) in enumerate(zip(models, widths)) for w in own
        ]
        found = verdict(clients.judge(held, widths, by_prompt, 0))
        if last:
            best = int(found.nll.argmin())
            found = verdict(clients.judge(held, widths, by_prompt, best))
        return given, found
