"""The server's side of a Bayes method (M9).

Every round sums one gradient per client and takes a step of the server's optimiser (FedOpt: Reddi
et al., 2021) and a step of EM on the prior. While order, penalty and width are not known,
candidates are trained side by side, each also without each fold of the contents, and judged by
these folds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fedvpa.config import Config
from fedvpa.federated.aggregators import ServerOptimiser, build_server
from fedvpa.federated.batch import Roster
from fedvpa.federated.bayes.choice import Option, Verdict, best_options, chosen, verdict, widths_of
from fedvpa.federated.bayes.clients import BayesClients
from fedvpa.federated.bayes.messages import Outline, Slopes, added
from fedvpa.federated.bayes.models import ALL, KINDS, WHITE_INPUTS, Models, Structure, structures
from fedvpa.federated.components import fit
from fedvpa.federated.exchanges import Payload
from fedvpa.selector.bayes import BILINEAR, SHARED, WEIGHT, BayesPredictor, BayesSelector
from fedvpa.types import Params, Population, ServerState

KEPT = {0.15: 12, 0.4: 6, 1.0: 3}
"""How many structures go on after so much of the search (successive halving: Jamieson & Talwalkar,
2016); the last ones are trained to the end, with their folds."""
DAMPING = 1 / 3
"""How far a population step moves the prior towards the cohort's posteriors."""
LOGISTIC = 4.0
"""A unit of reward moves a choice's probability by a quarter at the most; so many times a mean
difference is a reward's direction, to first order."""
GUESS = 0.5
"""Width that is served before any has been judged."""
LEAST_SCALE = 1e-3
"""Inputs whose standard deviation is less than this share of the first one's are noise."""
SMALLEST = 1e-3
"""Smallest variance of a direction at the start."""


@dataclass(frozen=True)
class FederatedBayes:
    """The server; `clients` are an argument.

    Args:
        selector: sizes.
        server: step on the mean gradient.
        kind: one wide component of directions, narrow groups, or both are tried.
        order: how many directions or groups.
        ridge: weight of the squared parameters, per pair.
        width: factor on the prior's standard deviation.
        folds: of the contents.
        search: rounds after which only the best structures go on.
        radius: of the groups' centres, which are orthogonal.
        spread: standard deviation of a group.
        seed: of the starts of k-means.
    """

    selector: BayesSelector
    server: ServerOptimiser
    kind: Literal["auto", "directions", "groups"] = "auto"
    order: int | Literal["auto"] = "auto"
    ridge: float | Literal["auto"] = "auto"
    width: float | Literal["auto"] = "auto"
    folds: int = 3
    search: int = 20
    radius: float = 1.5
    spread: float = 0.14
    seed: int = 0

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
            state = replace(state, components=self._begun(clients))
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

    # -- the start

    def _begun(self, clients: BayesClients) -> Params:
        """Candidates at their starts: directions from the covariance between clients, groups from
        clusters of the clients' mean differences."""
        everything = clients.outline(True, torch.tensor([ALL]))
        by_prompt = bool(2 * everything.several >= everything.clients)
        tried = structures(
            self.kind, self.order, self.ridge, latent=self.selector.latent,
            inputs=self.selector.inputs, pairs=int(everything.pairs[0]),
            clients=int(everything.clients),
        )  # fmt: skip
        several = sum(s.kind != "shared" for s in tried) > 1
        open_ = several or self.width == "auto"
        fold = torch.tensor([ALL, *range(self.folds)] if open_ else [ALL])
        outline = clients.outline(by_prompt, fold)
        numbers = sorted({s.order for s in tried if s.kind == "groups"})
        centres = self._centres(clients, numbers, fold, by_prompt) if numbers else {}
        trained = [
            self._groups(s, fold, outline, centres[s.order]) if s.kind == "groups"
            else self._directions(s, fold, outline)
            for s in tried
        ]  # fmt: skip
        slots = [self.server.init(_trained(models)) for models in trained]
        return _packed(trained, slots, {"by_prompt": torch.tensor(int(by_prompt))})

    def _centres(
        self, clients: BayesClients, numbers: Sequence[int], fold: Tensor, by_prompt: bool
    ) -> dict[int, Tensor]:
        """Centres [t, m, p] of each number of clusters: found on all pairs, then the means without
        each fold."""

        def ask(centre: Tensor, withhold: bool = False) -> Any:
            return clients.moments(centre, ALL, by_prompt)

        found = fit(ask, self.selector.inputs, numbers, self.seed)
        out = {}
        for number in numbers:
            centre = found[number].total / found[number].weight.clamp_min(1e-9).unsqueeze(-1)
            each = []
            for f in fold.tolist():
                own = clients.moments(centre.unsqueeze(0), f, by_prompt)
                held = own.weight[0].unsqueeze(-1)
                each.append(torch.where(held > 0.5, own.total[0] / held.clamp_min(1), centre))
            out[number] = torch.stack(each)
        return out

    def _blank(self, structure: Structure, fold: Tensor, outline: Outline) -> Models:
        t, (p, d) = len(fold), (self.selector.inputs, self.selector.latent)
        m = structure.order if structure.kind == "groups" else 1
        size = torch.tensor([m, structure.order, KINDS.index(structure.kind)]).expand(t, 3)
        return Models(
            torch.zeros(t, p), torch.zeros(t, d, p), torch.zeros(t, m, d), torch.ones(t, m),
            torch.full((t, m), 1 / m), fold, size.clone(),
            torch.full((t,), structure.ridge), self._scale(structure, outline),
        )  # fmt: skip

    def _scale(self, structure: Structure, outline: Outline) -> Tensor:
        """The scale [t, p] of every input in which its penalty and its steps count."""
        if not structure.white:
            return torch.ones_like(outline.square)
        scale = (outline.square / outline.pairs.clamp_min(1).unsqueeze(-1)).sqrt()
        read = (torch.arange(scale.shape[-1]) < WHITE_INPUTS) & (scale > LEAST_SCALE)
        return torch.where(read, scale, 0.0)

    def _groups(
        self, structure: Structure, fold: Tensor, outline: Outline, centre: Tensor
    ) -> Models:
        """Narrow components at orthogonal centres; the rewards there are along the clusters'."""
        blank, m = self._blank(structure, fold, outline), structure.order
        blank.mean[:, :, :m] = self.radius * torch.eye(m)
        blank.variance[:] = self.spread**2
        towards = _over(centre, blank.scale.square().unsqueeze(-2))
        blank.bilinear[:, :m] = 0.5 * LOGISTIC / self.radius * towards
        return blank

    def _directions(self, structure: Structure, fold: Tensor, outline: Outline) -> Models:
        """One wide component along the leading directions in which clients differ."""
        blank, d = self._blank(structure, fold, outline), structure.order
        for t in range(len(fold)):
            mean = outline.total[t] / outline.pairs[t].clamp_min(1)
            scale = blank.scale[t]
            blank.weight[t] = 0.5 * LOGISTIC * _over(mean, scale.square())
            if structure.kind == "shared":
                continue
            cross = outline.cross[t] / outline.counted[t].clamp_min(1)
            half = outline.halves[t].mean(0) / outline.counted[t].clamp_min(1)
            between = _over(_over(cross - torch.outer(half, half), scale).T, scale)
            values, vectors = torch.linalg.eigh(LOGISTIC**2 * between.double())
            values, vectors = values.flip(0)[:d], vectors.flip(1)[:, :d]
            largest = vectors.abs().argmax(0)
            vectors = vectors * vectors[largest, torch.arange(d)].sign()
            spread = values.clamp_min(SMALLEST).sqrt()
            blank.bilinear[t, :d] = _over((0.7 * spread * vectors).T.float(), scale)
        return blank

    # -- a round

    def _stepped(self, models: Models, slots: Params, sums: Slopes) -> tuple[Models, Params]:
        """A step of the server's optimiser on the mean gradient per target."""
        count = sums.targets.clamp_min(1.0)
        # in coordinates in which the penalty is a plain L2 norm
        ridge, scale = 2 * models.ridge.view(-1, 1), models.scale
        wide = scale.unsqueeze(-2)
        start = {WEIGHT: models.weight * scale, BILINEAR: models.bilinear * wide}
        weight = _over(sums.weight / count.view(-1, 1), scale) + ridge * start[WEIGHT]
        bilinear = _over(sums.bilinear / count.view(-1, 1, 1), wide)
        bilinear = bilinear + ridge.unsqueeze(-1) * start[BILINEAR]
        found, slots = self.server.apply(start, slots, {WEIGHT: -weight, BILINEAR: -bilinear})
        return models._replace(
            weight=_over(found[WEIGHT], scale), bilinear=_over(found[BILINEAR], wide)
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

    # -- the choice

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
        """All that travels."""
        return []


def _over(value: Tensor, scale: Tensor) -> Tensor:
    """Divided by the inputs' scales; 0 where an input is not read."""
    return torch.where(scale > 0, value / scale.clamp_min(LEAST_SCALE**2), 0.0)


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
    return FederatedBayes(
        BayesSelector(config.model.inputs, config.model.latent), build_server(config), p.structure,
        p.order, p.ridge, p.width, p.folds, max(1, round(p.search * rounds)), p.radius, p.spread,
        config.seed,
    )  # fmt: skip
