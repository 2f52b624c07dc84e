"""The server's side of a Bayes method (M9).

Every round sums one gradient per client and takes a step of the server's optimiser (FedOpt: Reddi
et al., 2021) and a step of EM on the prior. While order, penalty and width are not known,
candidates are trained side by side, each also without each fold of the contents, and judged by
these folds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from fedvpa.config import Config
from fedvpa.federated.aggregators import ServerOptimiser, build_server
from fedvpa.federated.batch import Roster
from fedvpa.federated.bayes.choice import Option, Verdict, best_options, chosen, verdict, widths_of
from fedvpa.federated.bayes.clients import BayesClients
from fedvpa.federated.bayes.messages import Slopes, added
from fedvpa.federated.bayes.models import (
    FEW_PAIRS,
    GROUPS,
    KINDS,
    WIDTHS,
    Models,
    Structure,
    structures,
)
from fedvpa.federated.bayes.start import Starts, over
from fedvpa.federated.components import ITERATIONS, RESTARTS
from fedvpa.federated.exchanges import EVERY_ROUND, FITTED, ONCE, Payload
from fedvpa.selector.bayes import BILINEAR, SHARED, WEIGHT, BayesPredictor, BayesSelector
from fedvpa.types import Params, Population, ServerState

KEPT = {0.15: 12, 0.4: 6, 1.0: 3}
"""How many structures go on after so much of the search (successive halving: Jamieson & Talwalkar,
2016); the last ones are trained to the end, with their folds."""
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
        starts: what is tried.
        width: factor on the prior's standard deviation.
        search: rounds after which only the best structures go on.
    """

    selector: BayesSelector
    server: ServerOptimiser
    starts: Starts
    width: float | Literal["auto"] = "auto"
    search: int = 20

    def init(self, roster: Roster) -> ServerState:
        """Nothing is known."""
        p, d, number = self.selector.inputs, self.selector.latent, len(roster.names)
        params = {WEIGHT: torch.zeros(p), BILINEAR: torch.zeros(d, p), SHARED: torch.zeros(p)}
        tables = {name: torch.full((number,), -1) for name in ("seen", "label")}
        return ServerState(0, params, {}, tables, {})

    def apply(
        self, state: ServerState, clients: BayesClients, cohort: Sequence[int]
    ) -> tuple[ServerState, dict[str, float]]:
        """One round: gradients of the cohort, a step, and the prior's step."""
        # 1. Before the first round, starts from moments of all clients.
        if not state.components:
            trained, by_prompt = self.starts.candidates(clients)
            slots = [self.server.init(_trained(models)) for models in trained]
            told = {"by_prompt": torch.tensor(int(by_prompt))}
            state = replace(state, components=_packed(trained, slots, told))
        trained, slots = _unpacked(state.components)
        # 2. The sums of the cohort.
        tables = {name: table.clone() for name, table in state.clients.items()}
        by_prompt, parts = bool(state.components["by_prompt"]), list[list[Slopes]]()
        for index, found in clients.slopes(trained, cohort, state.round, by_prompt):
            tables["seen"][index] = state.round
            parts.append(found)
        sums = [Slopes(*added([part[i] for part in parts])) for i in range(len(trained))]
        # 3. A step on the reward, then one on the prior.
        for i, (models, total) in enumerate(zip(trained, sums)):
            models, slots[i] = self._stepped(models, slots[i], total)
            trained[i] = self._moved(models, total)
        components = _packed(trained, slots, state.components)
        state = replace(state, round=state.round + 1, clients=tables, components=components)
        # 4. While the search lasts, structures that are behind are left.
        keep = self._kept(state.round)
        if keep is not None and keep < len(trained) - 1:
            state = self._narrowed(state, clients, keep)
        row = _row(sums)
        return self._served(state), row

    def _stepped(self, models: Models, slots: Params, sums: Slopes) -> tuple[Models, Params]:
        """A step of the server's optimiser on the mean gradient per target."""
        count = sums.targets.clamp_min(1.0)
        # in coordinates in which the penalty is a plain L2 norm
        ridge, scale = 2 * models.ridge.view(-1, 1), models.scale
        wide = scale.unsqueeze(-2)
        start = {WEIGHT: models.weight * scale, BILINEAR: models.bilinear * wide}
        weight = over(sums.weight / count.view(-1, 1), scale) + ridge * start[WEIGHT]
        bilinear = over(sums.bilinear / count.view(-1, 1, 1), wide)
        bilinear = bilinear + ridge.unsqueeze(-1) * start[BILINEAR]
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

    def _judged(
        self, state: ServerState, clients: BayesClients, last: bool
    ) -> tuple[list[Option], Verdict]:
        """All options, and what clients say of them."""
        trained, _ = _unpacked(state.components)
        held = [models.at(slice(1, None)) for models in trained]
        widths = [widths_of(models.structure, self.width, last) for models in trained]
        by_prompt = bool(state.components["by_prompt"])
        given = [Option(m.structure, w) for m, own in zip(trained, widths) for w in own]
        return given, verdict(clients.judge(held, widths, by_prompt))

    def _kept(self, rounds: int) -> int | None:
        """How many structures go on after so many rounds (None: all that there are)."""
        ends = {max(1, round(self.search * share)): keep for share, keep in KEPT.items()}
        return ends.get(rounds)

    def _narrowed(self, state: ServerState, clients: BayesClients, keep: int) -> ServerState:
        """The best structures go on."""
        given, found = self._judged(state, clients, last=False)
        best = best_options(given, found, keep)
        trained, slots = _unpacked(state.components)
        kept = [i for s in best for i, models in enumerate(trained) if models.structure == s]
        components = _packed([trained[i] for i in kept], [slots[i] for i in kept], state.components)
        return replace(state, components=components)

    def finalise(self, state: ServerState, clients: BayesClients) -> ServerState:
        """Structure and width are chosen; every client notes where it belongs."""
        trained, _ = _unpacked(state.components)
        structure = [models.structure for models in trained]
        personal = next(i for i, s in enumerate(structure) if s.kind != "shared")
        shared = next(i for i, s in enumerate(structure) if s.kind == "shared")
        width, told = 1.0 if self.width == "auto" else self.width, Params()
        if len(trained[0].fold) > 1:
            given, found = self._judged(state, clients, last=True)
            at = chosen(given, found)
            told = _told(given, found, at)
            width = given[at].width
            ranked = best_options(given, found, 1)
            shared = structure.index(ranked[-1])
            # where a shared reward is as good, it is served, and z does nothing
            personal = structure.index(given[at].structure)
        kept = [trained[personal].at([0]), trained[shared].at([0])]
        rest = {"by_prompt": state.components["by_prompt"], "width": torch.tensor(width)}
        components = _packed(kept, [], rest | told)
        state = self._served(replace(state, components=components))
        return replace(state, clients=state.clients | clients.settle(kept[0]))

    def _served(self, state: ServerState) -> ServerState:
        """Parameters and prior of the model that is served now, and the shared reward beside it."""
        trained, _ = _unpacked(state.components)
        first = next((m for m in trained if m.structure.kind != "shared"), trained[0])
        if "width" in state.components:
            first, width = trained[0], float(state.components["width"])
        else:
            width = GUESS if first.shape[0] == 1 else 1.0
        beside = next(m for m in reversed(trained) if m.structure.kind == "shared")
        params, population = first.served(width)
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
        served, _ = _unpacked(components)
        structure, width = served[0].structure, float(components["width"])
        found: dict[str, Any] = {
            "kind": structure.kind, "order": structure.order, "ridge": structure.ridge,
            "white": structure.white, "width": width,
        }  # fmt: skip
        return found | ({"judged": _table(components)} if "choice/nll" in components else {})

    def payload(self, state: ServerState) -> list[Payload]:
        """All that travels, in sizes that a run has at the most: sums over a client's pairs up,
        models and centres down."""
        everything = structures(
            self.starts.kind, self.starts.order, self.starts.ridge, latent=self.selector.latent,
            inputs=self.selector.inputs, pairs=FEW_PAIRS, clients=3 * MOST_GROUPS,
        )  # fmt: skip
        last = sorted(everything, key=lambda s: s.order)[-max(KEPT.values()) - 1 :]
        p, t = self.selector.inputs, self.starts.folds + 1
        sums = Payload("outline: first moments without each fold", (t, p * p + 4 * p + 2),
                       4 * t * (p * p + 4 * p + 2), "up", ONCE)  # fmt: skip
        tried = (len(GROUPS) * RESTARTS, MOST_GROUPS, p)
        centres = [
            Payload(f"clusters: {what}", tried, 4 * factor * math.prod(tried), direction,
                    f"at most {ITERATIONS + 2} exchanges before the first round")
            for what, direction, factor in (("centres", "down", 1), ("moments of means", "up", 3))
        ]  # fmt: skip
        rounds = [
            Payload(name, (t, size), 4 * t * size, direction, when)
            for kept, when in ((everything, SEARCHED), (last, EVERY_ROUND))
            for size, name, direction in (
                (sum(_numbers(s, p) for s in kept), "models: rewards and priors", "down"),
                (sum(_numbers(s, p) + 4 for s in kept), "slopes: gradients and shares", "up"),
            )
        ]
        options = len(last) * len(WIDTHS)
        judged = Payload("judge: log-probabilities of held-out targets", (options, options + 3),
                         8 * options * (options + 3), "up", FITTED)  # fmt: skip
        return [sums, *centres, *rounds, judged]


def _numbers(structure: Structure, inputs: int) -> int:
    """Numbers of one model: reward, W, centres, variances and weights."""
    m = structure.order if structure.kind == "groups" else 1
    return inputs * (1 + structure.order) + m * (structure.order + 2)


def _trained(models: Models) -> Params:
    return {WEIGHT: models.weight, BILINEAR: models.bilinear}


def _packed(trained: Sequence[Models], slots: Sequence[Params], rest: Params) -> Params:
    """Candidates and the moments of their optimiser as tensors by name."""
    out = {n: v for n, v in rest.items() if not n.startswith(("model", "slot"))}
    for i, models in enumerate(trained):
        out |= {f"model{i}/{name}": value for name, value in models._asdict().items()}
    for i, own in enumerate(slots):
        out |= {f"slot{i}/{name}": value for name, value in own.items()}
    return out


def _unpacked(components: Params) -> tuple[list[Models], list[Params]]:
    """Inverse of `_packed`."""
    trained, slots = list[Models](), list[Params]()
    while f"model{len(trained)}/weight" in components:
        i = len(trained)
        trained.append(Models(*(components[f"model{i}/{name}"] for name in Models._fields)))
        prefix = f"slot{i}/"
        slots.append(
            {n.removeprefix(prefix): v for n, v in components.items() if n.startswith(prefix)}
        )
    return trained, slots


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
        "choice/error": found.error[at].float(),
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
            "width": float(components["choice/width"][i]),
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


def build(*, config: Config, clients: int, noise: Any = None) -> FederatedBayes:
    """The server's side of the settings' method."""
    p = config.population
    rounds = config.federation.rounds
    m, searches = config.model, p.width == "auto"
    starts = Starts(
        m.inputs, m.latent, p.structure, p.order, p.ridge, searches, p.folds, p.radius, p.spread,
        config.seed,
    )  # fmt: skip
    return FederatedBayes(
        BayesSelector(m.inputs, m.latent), build_server(config), starts, p.width,
        max(1, round(p.search * rounds)),
    )  # fmt: skip
