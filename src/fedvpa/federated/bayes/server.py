"""The server's side of a Bayes method (M9).

Every round sums one gradient per client and takes a step of the server's optimiser (FedOpt: Reddi
et al., 2021) and a step of EM on the prior. While order, penalty and width are not known,
candidates are trained side by side, each also without each fold of the contents, and judged by
these folds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedvpa.federated.aggregators import ServerOptimiser
from fedvpa.federated.batch import Roster
from fedvpa.federated.bayes.choice import Option, Verdict, widths_of
from fedvpa.federated.bayes.joined import sizes_of
from fedvpa.federated.bayes.messages import Slopes, added
from fedvpa.federated.bayes.models import (
    FEW_PAIRS,
    GROUPS,
    KINDS,
    Models,
    Structure,
    Width,
    packed,
    structures,
    trained_of,
    unpacked,
)
from fedvpa.federated.bayes.search import BEGUN, KEPT, Search
from fedvpa.federated.bayes.side import BayesSide
from fedvpa.federated.bayes.start import over
from fedvpa.federated.components import ITERATIONS, RESTARTS
from fedvpa.federated.exchanges import EVERY_ROUND, FITTED, ONCE, Payload, payload_rows
from fedvpa.selector.bayes import BILINEAR, SHARED, WEIGHT, BayesPredictor, BayesSelector
from fedvpa.types import Params, Population, ServerState

MOST_GROUPS = max(GROUPS)
SEARCHED = "every round of the search, at most"
DAMPING = 1 / 3
"""How far a population step moves the prior towards the cohort's posteriors."""
GUESS = 0.5
"""Width that is served before any has been judged."""


@dataclass(frozen=True)
class FederatedBayes:
    """The server; `clients` are an argument.

    Args:
        selector: sizes.
        server: step on the mean gradient.
        search: what is tried, and what goes on.
    """

    selector: BayesSelector
    server: ServerOptimiser
    search: Search

    def init(self, roster: Roster) -> ServerState:
        """Nothing is known."""
        p, d, number = self.selector.inputs, self.selector.latent, len(roster.names)
        params = {WEIGHT: torch.zeros(p), BILINEAR: torch.zeros(d, p), SHARED: torch.zeros(p)}
        tables = {name: torch.full((number,), -1) for name in ("seen", "label")}
        return ServerState(0, params, {}, tables, {})

    def apply(
        self, state: ServerState, clients: BayesSide, cohort: Sequence[int]
    ) -> tuple[ServerState, dict[str, float]]:
        """One round: gradients of the cohort, a step, and the prior's step."""
        # 1. Before the first round, starts from moments of all clients.
        if not state.components:
            trained, by_prompt = self.search.starts.candidates(clients)
            slots = [self.server.init(trained_of(models)) for models in trained]
            told = {"by_prompt": torch.tensor(int(by_prompt))}
            state = replace(state, components=packed(trained, slots, told))
        trained, slots = unpacked(state.components)
        # 2. The sums of the cohort.
        tables = {name: table.clone() for name, table in state.clients.items()}
        by_prompt, parts = bool(state.components["by_prompt"]), list[list[Slopes]]()
        for index, found in clients.slopes(trained, cohort, state.round, by_prompt):
            tables["seen"][index] = state.round
            parts.append(found)
        sums = [Slopes(*added([part[i] for part in parts])) for i in range(len(trained))]
        # 3. A step on the reward, then one on the prior.
        for i, (models, total) in enumerate(zip(trained, sums)):
            count = total.targets.clamp_min(1.0).view(-1, 1)
            weight, bilinear = total.weight / count, total.bilinear / count.unsqueeze(-1)
            models, slots[i] = self._stepped(models, slots[i], weight, bilinear)
            trained[i] = self._moved(models, total)
        state = replace(state, round=state.round + 1, clients=tables)
        # 4. While the search lasts, structures that are behind are left; then groups begin.
        if (keep := self.search.kept(state.round)) is not None:
            best = self.search.best(trained, clients, by_prompt, keep)
            trained, slots = [trained[i] for i in best], [slots[i] for i in best]
        if state.round == self.search.rounds:
            begun = self.search.groups(trained, clients, by_prompt, BEGUN)
            trained += begun
            slots += [self.server.init(trained_of(models)) for models in begun]
        components = packed(trained, slots, state.components)
        state = replace(state, components=components)
        row = _row(sums)
        return self._served(state), row

    def _stepped(
        self, models: Models, slots: Params, weight: Tensor, bilinear: Tensor
    ) -> tuple[Models, Params]:
        """A step of the server's optimiser on the mean gradients."""
        # in coordinates in which the penalty is a plain L2 norm
        ridge, scale = 2 * models.ridge.view(-1, 1), models.scale
        wide = scale.unsqueeze(-2)
        start = {WEIGHT: models.weight * scale, BILINEAR: models.bilinear * wide}
        weight = over(weight, scale) + ridge * start[WEIGHT]
        bilinear = over(bilinear, wide) + ridge.unsqueeze(-1) * start[BILINEAR]
        if models.structure.kind == "shared":  # z has no effect, whatever is sampled or sent
            bilinear = torch.zeros_like(bilinear)
        found, slots = self.server.apply(start, slots, {WEIGHT: -weight, BILINEAR: -bilinear})
        return models._replace(
            weight=over(found[WEIGHT], scale), bilinear=over(found[BILINEAR], wide)
        ), slots

    def _moved(self, models: Models, sums: Slopes) -> Models:
        """A step of EM on the prior, in coordinates that keep the centres where they are: the mean
        of a wide component goes into w; what groups like is W's alone, so that their centres stay
        orthogonal (M6)."""
        if models.shape[0] == 1:
            mean = sums.mode / sums.share.clamp_min(1.0).unsqueeze(-1)
            shift = DAMPING * mean @ models.bilinear
            return models._replace(weight=models.weight + shift.squeeze(1))
        new = (sums.share + 1) / (sums.share + 1).sum(-1, keepdim=True)
        share = models.share + DAMPING * (new - models.share)
        return models._replace(share=share)

    def finalise(self, state: ServerState, clients: BayesSide) -> ServerState:
        """Structure and width are chosen; every client notes where it belongs."""
        trained, _ = unpacked(state.components)
        by_prompt = bool(state.components["by_prompt"])
        found = self.search.result(trained, clients, by_prompt)
        rest = {"by_prompt": state.components["by_prompt"], "width": torch.tensor(found.width)}
        if found.verdict is not None:
            rest |= _told(found.given, found.verdict, found.at)
        components = packed([found.personal.at([0]), found.shared.at([0])], [], rest)
        state = self._served(replace(state, components=components))
        own = clients.settle(state.params, Population(**state.population))
        return replace(state, clients=state.clients | own)

    def _served(self, state: ServerState) -> ServerState:
        """Parameters and prior of the model that is served now, and the shared reward beside it."""
        trained, _ = unpacked(state.components)
        first = next((m for m in trained if m.structure.kind != "shared"), trained[0])
        if "width" in state.components:
            first, width = trained[0], Width(*state.components["width"].tolist())
        else:
            width = Width(GUESS if first.shape[0] == 1 else 1.0)
        beside = next(m for m in reversed(trained) if m.structure.kind == "shared")
        params, population = first.served(width, self.selector.latent)
        params |= {SHARED: beside.weight[0]}
        return replace(state, params=params, population=population._asdict())

    def predictor(self, state: ServerState) -> BayesPredictor:
        """The selector under the state's parameters."""
        found = Population(**state.population) if state.population else Population(
            torch.zeros(1, self.selector.latent), torch.ones(1), torch.ones(1)
        )  # fmt: skip
        return BayesPredictor(self.selector, state.params, found)

    def told(self, state: ServerState) -> dict[str, Any]:
        """Structure and width that are served, in words and figures; and, where they were searched,
        every structure that was judged last, at its best width."""
        components = state.components
        if "width" not in components:
            return {}
        served, _ = unpacked(components)
        structure, width = served[0].structure, components["width"].tolist()
        found: dict[str, Any] = {
            "kind": structure.kind, "order": structure.order, "ridge": structure.ridge,
            "white": structure.white, "width": width[0], "spread": width[1],
        }  # fmt: skip
        return found | ({"judged": _table(components)} if "choice/nll" in components else {})

    def payload(self, state: ServerState) -> list[Payload]:
        """All that travels, in sizes that a run has at the most: sums over a client's pairs up,
        models and centres down."""
        starts, p = self.search.starts, self.selector.inputs
        folds = 1 + starts.folds * starts.searched
        tried = structures(
            starts.kind, starts.order, starts.ridge, latent=self.selector.latent, inputs=p,
            pairs=FEW_PAIRS,
        )  # fmt: skip
        shared = [s for s in tried if s.kind == "shared"]
        wide = sorted((s for s in tried if s.kind != "shared"), key=lambda s: -s.order)
        numbers = starts.numbers(len(state.clients["seen"]))
        groups = [Structure("groups", m, 0.0) for m in numbers]
        last = [*shared[:1], *wide[: max(KEPT.values())], *groups[-BEGUN:]]
        judged = [*last, *(s for s in groups for _ in wide[: max(KEPT.values())])]
        fit = {"d": max((s.order for s in wide), default=1), "m": max(numbers, default=1)}
        known = {"t": folds, "p": p}
        # the first judgement has the most models, the last one the most widths
        widths = max(
            sum(len(widths_of(s, self.search.effect, last=True)) for s in some)
            for some in (tried, judged)
        )
        rows = payload_rows({"outline": (ONCE, known)}, set(), {})
        rows += payload_rows({"slopes": (SEARCHED, sizes_of(tried, folds, p))}, set(), {})
        rows += payload_rows({"slopes": (EVERY_ROUND, sizes_of(last, folds, p))}, set(), {})
        if numbers:
            sizes = sizes_of(wide[:1], 1, p) | fit | {"s": len(numbers) * RESTARTS}
            fits = 1 + max(KEPT.values())
            exchanges = f"{fits} times at most {ITERATIONS + 2} exchanges a fold, {FITTED}"
            rows += payload_rows({"clusters": (exchanges, sizes)}, set(), {})
        if starts.searched:
            each = [sizes_of(some, folds - 1, p) for some in (tried, judged)]
            sizes = {name: max(own[name] for own in each) for name in each[0]} | {"w": widths}
            rows += payload_rows({"judge": (FITTED, sizes)}, set(), {})
        served = {"params": state.params}
        return rows + payload_rows(
            {"settle": (FITTED, {"m": fit["m"], "d": self.selector.latent})}, set(), served
        )


def _told(given: Sequence[Option], found: Verdict, at: int) -> Params:
    """What was judged, for the run's record: a row per option, and the pick."""
    return {
        "choice/size": torch.tensor([
            [KINDS.index(o.structure.kind), o.structure.order] for o in given
        ]),
        "choice/ridge": torch.tensor([o.structure.ridge for o in given]),
        "choice/white": torch.tensor([o.structure.white for o in given]),
        "choice/width": torch.tensor([o.width for o in given]),
        "choice/nll": found.nll.float(),
        "choice/accuracy": found.accuracy.float(),
        "choice/error": found.error.float(),
        "choice/picked": torch.tensor(at),
        "choice/clients": torch.tensor(found.clients),
        "choice/pairs": torch.tensor(found.pairs),
    }  # fmt: skip


def _table(components: Params) -> list[dict[str, Any]]:
    """A row per structure that was judged, at its best width: nats and accuracy per held-out pair,
    and the standard error of its difference from the one that was picked."""
    picked = int(components["choice/picked"])
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for i in components["choice/nll"].argsort().tolist():
        kind, order = components["choice/size"][i].tolist()
        white = bool(components["choice/white"][i])
        key = (kind, order, round(float(components["choice/ridge"][i]), 9), white)
        row = {
            "kind": KINDS[kind], "order": order, "ridge": key[2], "white": white,
            "width": float(components["choice/width"][i][0]),
            "spread": float(components["choice/width"][i][1]),
            "nll": float(components["choice/nll"][i]),
            "accuracy": float(components["choice/accuracy"][i]),
            "error": float(components["choice/error"][i]), "picked": i == picked,
        }  # fmt: skip
        if key not in rows or i == picked:
            rows[key] = row
    return list(rows.values())


def _row(sums: Sequence[Slopes]) -> dict[str, float]:
    """Losses of the round, of the best candidate that reads all pairs."""
    each = [(float(s.loss[0] / s.targets[0].clamp_min(1)), s) for s in sums]
    loss, best = min(each, key=lambda pair: pair[0])
    clients = best.clients[0].clamp_min(1)
    return {"recon": loss, "loss": loss, "kl": float(best.divergence[0] / clients)}
