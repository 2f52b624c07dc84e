"""Rewards without a latent: one for all (`fedavg-btl`), U to vote (`fedbiscuit`), one per true
group (`oracle-group`, and `oracle-bayes`, which has to infer a user's group), one per user
(`local`), and one for all that every user fine-tunes (`fedavg-btl+finetune`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fedvpa.config import Config
from fedvpa.errors import BadInputError
from fedvpa.federated.aggregators import ServerOptimiser, Total, WeightedMean, build_server
from fedvpa.federated.batch import ClientStore, Roster
from fedvpa.federated.exchanges import Payload, tensor_payload
from fedvpa.federated.local import LocalSettings, build_local, require_finite, train_locally
from fedvpa.federated.objective import RewardLoss
from fedvpa.federated.random import stream
from fedvpa.federated.release import NoiseOf
from fedvpa.federated.reward_predictors import (
    BayesPredictor,
    FittedPredictor,
    GroupPredictor,
    SharedPredictor,
)
from fedvpa.federated.simulation import Chunk, Simulation, build_simulation
from fedvpa.functional.preference import mean_choice_loss
from fedvpa.parts import resolve
from fedvpa.selector.reward import SharedReward
from fedvpa.types import Params, ServerState


@dataclass(frozen=True)
class RewardClients:
    """The clients of `store`, in this process, with a reward that has no latent."""

    store: ClientStore
    reward: SharedReward
    local: LocalSettings
    simulation: Simulation

    def __len__(self) -> int:
        return len(self.store)

    @property
    def roster(self) -> Roster:
        """Names and groups of the clients."""
        return self.store.roster

    def train(
        self, state: ServerState, cohort: Sequence[int]
    ) -> Iterator[
        tuple[Int[Tensor, "c"], Params, dict[str, Float[Tensor, "c"]], Float[Tensor, "c"]]
    ]:
        """Local rounds in chunks: who, their parameters [c, ...], losses, and numbers of pairs.

        Raises:
            NonFiniteUpdateError: a client's update holds NaN or Inf.
        """
        per_client = sum(value[0].numel() for value in state.params.values())
        sizes = self.store.sizes[torch.tensor(cohort)].tolist()
        chunks = self.simulation.chunks(cohort, sizes, per_client)
        answers = self.simulation.map(lambda chunk: self._round(state, chunk), chunks)
        for chunk, (trained, losses) in zip(chunks, answers):
            index = torch.tensor(chunk.clients)
            yield index, trained, losses, self.store.sizes[index].float()

    def _round(
        self, state: ServerState, chunk: Chunk
    ) -> tuple[Params, dict[str, Float[Tensor, "c"]]]:
        """Train these clients side by side, each from its own selector."""
        index, names = torch.tensor(chunk.clients), [self.store.names[c] for c in chunk.clients]
        pairs = self.store.batch(index, chunk.width)
        own = state.clients["assignment"][index]
        start = {name: value[own] for name, value in state.params.items()}
        result = train_locally(
            RewardLoss(self.reward), start, pairs, names, state.round, self.local,
            check_each_step=self.simulation.debug,
        )  # fmt: skip
        require_finite(result.params, names, state.round)
        return result

    @torch.no_grad()
    def losses(self, state: ServerState, cohort: Sequence[int]) -> Float[Tensor, "c u"]:
        """Each client's loss under every selector."""
        pairs = self.store.batch(cohort)
        each = []
        for u in range(_selectors(state)):
            params = {name: value[u] for name, value in state.params.items()}
            each.append(mean_choice_loss(self.reward.margin(params, pairs), pairs.mask.float()))
        return torch.stack(each, 1)


@dataclass(frozen=True)
class FederatedReward:
    """FedAvg of Bradley-Terry rewards. Parameters hold a leading axis: the selector (U of them; 1
    for `fedavg-btl`).

    * `shared`: everyone trains the only one (FedBis; Wu et al., 2025).
    * `best`: FedBiscuit. At first every client trains a selector drawn at random; every
      `regroup_every` rounds the clients are assigned anew to the selectors that fit their pairs
      best, in equal numbers; users are served by majority vote.
    * `group`: every client trains the one of its true group, an upper bound. With `infer_group` the
      groups are known in training only, and users are served by Bayes' rule over the groups'
      rewards given their context: what no inference of the group from these pairs, under these
      rewards, could be expected to beat.
    * `none`: nothing is shared; a user's reward is fitted to its own context alone (`local`).
    """

    reward: SharedReward
    local: LocalSettings
    server: ServerOptimiser = field(default_factory=ServerOptimiser)
    aggregation: Literal["uniform", "samples"] = "uniform"
    sharing: Literal["shared", "best", "group", "none"] = "shared"
    selectors: int = 1
    regroup_every: int = 5
    finetune_steps: int = 0
    infer_group: bool = False

    def init(self, roster: Roster) -> ServerState:
        """Fresh selectors; with `group`, one per true group of the roster.

        Raises:
            BadInputError: with `group`, a client whose group is not known.
        """
        generator = stream(self.local.seed, "init")
        names, index = roster.group_index()
        number = max(1, len(names)) if self.sharing == "group" else self.selectors
        each = [self.reward.init(generator) for _ in range(number)]
        params = {name: torch.stack([p[name] for p in each]) for name in each[0]}
        assignment = torch.zeros_like(index)
        if self.sharing == "group":
            if (index < 0).any():
                nobody = roster.names[int((index < 0).nonzero()[0])]
                raise BadInputError(
                    f"oracle-group needs the true group of every client; '{nobody}' has none"
                )
            assignment = index
        elif self.sharing == "best":
            assignment = torch.randperm(len(roster.names), generator=generator) % number
        return ServerState(0, params, self.server.init(params), {"assignment": assignment}, {})

    def apply(
        self, state: ServerState, clients: RewardClients, cohort: Sequence[int]
    ) -> tuple[ServerState, dict[str, float]]:
        """One round.

        Raises:
            NonFiniteUpdateError: a client's update holds NaN or Inf; the state is left as it was.
        """
        if self.sharing == "none":
            return replace(state, round=state.round + 1), {}
        if self.sharing == "best" and state.round and state.round % self.regroup_every == 0:
            state = self._regroup(state, clients, cohort)
        assignment = state.clients["assignment"]
        number = _selectors(state)
        mean, totals, loss = WeightedMean(), [Total()] * number, 0.0
        for index, trained, losses, size in clients.train(state, cohort):
            weight = torch.ones(index.numel()) if self.aggregation == "uniform" else size
            loss += float(losses["loss"].sum())
            for u in assignment[index].unique().tolist():
                start = {name: value[u] for name, value in state.params.items()}
                totals[u] = mean.add(totals[u], start, trained, weight * (assignment[index] == u))
        zero = {name: torch.zeros_like(value[0]) for name, value in state.params.items()}
        each = [mean.result(total) if total.weight else zero for total in totals]
        update = {name: torch.stack([e[name] for e in each]) for name in state.params}
        params, slots = self.server.apply(state.params, state.optimiser, update)
        state = replace(state, round=state.round + 1, params=params, optimiser=slots)
        return state, {"loss": loss / len(cohort)}

    def _regroup(
        self, state: ServerState, clients: RewardClients, cohort: Sequence[int]
    ) -> ServerState:
        """Assign the cohort to selectors in equal numbers, at the least total loss."""
        number = _selectors(state)
        places = -(-len(cohort) // number)
        cost = clients.losses(state, cohort).repeat_interleave(places, 1)
        rows, columns = linear_sum_assignment(cost.numpy())
        assignment = state.clients["assignment"].clone()
        assignment[torch.tensor(cohort)[torch.as_tensor(rows)]] = torch.as_tensor(columns) // places
        return replace(state, clients={"assignment": assignment})

    def finalise(self, state: ServerState, clients: RewardClients) -> ServerState:
        """The state as it is: a reward without a latent has no population."""
        return state

    def predictor(
        self, state: ServerState
    ) -> SharedPredictor | GroupPredictor | BayesPredictor | FittedPredictor:
        """The predictor that serves users under the state's rewards."""
        if self.infer_group:
            counts = torch.bincount(
                state.clients["assignment"], minlength=_selectors(state)
            ).float()
            return BayesPredictor(self.reward, state.params, counts / counts.sum())
        if self.sharing == "group":
            return GroupPredictor(self.reward, state.params)
        if self.sharing == "none":
            steps = replace(self.local, steps=self.local.steps * max(1, state.round))
            return FittedPredictor(self.reward, state.params, steps)
        if self.finetune_steps:
            return FittedPredictor(
                self.reward, state.params, replace(self.local, steps=self.finetune_steps)
            )
        return SharedPredictor(self.reward, state.params)

    def payload(self, state: ServerState) -> list[Payload]:
        """All that travels."""
        if self.sharing == "none":
            return []
        number = _selectors(state)
        one = {name: value[0] for name, value in state.params.items()}
        rows = tensor_payload(state.params if self.sharing == "best" else one, "down")
        rows += tensor_payload(one, "up", "delta.")
        if self.sharing == "best":
            rows.append(Payload("loss under every selector", (number,), 4 * number, "up"))
        return [*rows, Payload("number of pairs", (), 8, "up")]


def _selectors(state: ServerState) -> int:
    """Number of rewards in a state (the leading axis of its parameters)."""
    return next(iter(state.params.values())).shape[0]


def build(
    *, config: Config, clients: int, noise: NoiseOf | None = None,
    finetune: bool = False, sharing: Literal["shared", "best", "group", "none"] = "shared",
    infer_group: bool = False,
) -> FederatedReward:  # fmt: skip
    """The server's side of a reward method; nothing of it depends on the number of clients, and
    nothing is noised."""
    f = config.federation
    return FederatedReward(
        _reward(config), build_local(config), build_server(config), f.aggregation,
        sharing=sharing, selectors=f.selectors if sharing == "best" else 1,
        regroup_every=f.regroup_every, finetune_steps=f.finetune_steps if finetune else 0,
        infer_group=infer_group,
    )  # fmt: skip


def build_clients(
    *, config: Config, store: ClientStore, total: int, identity: Int[Tensor, "c"] | None = None,
    mlp: bool = False,
) -> RewardClients:  # fmt: skip
    """The clients of `store`."""
    return RewardClients(store, _reward(config), build_local(config), build_simulation(config))


def _reward(config: Config) -> SharedReward:
    reward: SharedReward = resolve(config.entry.reward)(config=config)
    return reward
