"""Rewards without a latent: one for all (`fedavg-btl`), U to vote (`fedbiscuit`), one per true
group (`oracle-group`, and `oracle-bayes`, which has to infer a user's group), one per user
(`local`), and one for all that every user fine-tunes (`fedavg-btl+finetune`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import logsigmoid

from fedvpa.errors import BadInputError
from fedvpa.federated.aggregators import ServerOptimiser, WeightedMean
from fedvpa.federated.algorithm import Payload, tensor_payload
from fedvpa.federated.batch import ClientStore
from fedvpa.federated.draws import stream
from fedvpa.federated.local import LocalSettings, require_finite, train_locally
from fedvpa.federated.objective import RewardObjective, RoundContext
from fedvpa.federated.simulation import Simulation
from fedvpa.functional.preference import mean_choice_loss, predictive_margin
from fedvpa.selector.reward import SharedReward
from fedvpa.types import PairBatch, Params, ServerState


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

    store: ClientStore
    reward: SharedReward
    local: LocalSettings
    simulation: Simulation
    server: ServerOptimiser = field(default_factory=ServerOptimiser)
    aggregation: Literal["uniform", "samples"] = "uniform"
    sharing: Literal["shared", "best", "group", "none"] = "shared"
    selectors: int = 1
    regroup_every: int = 5
    finetune_steps: int = 0
    infer_group: bool = False

    def init(self) -> ServerState:
        """Fresh selectors."""
        generator = stream(self.local.seed, "init")
        each = [self.reward.init(generator) for _ in range(self.selectors)]
        params = {name: torch.stack([p[name] for p in each]) for name in each[0]}
        count = len(self.store)
        if self.sharing == "group":
            assignment = self.store.group_index()[1]
            if (assignment < 0).any():
                nobody = self.store.names[int((assignment < 0).nonzero()[0])]
                raise BadInputError(
                    f"oracle-group needs the true group of every client; '{nobody}' has none"
                )
        elif self.sharing == "best":
            assignment = torch.randperm(count, generator=generator) % self.selectors
        else:
            assignment = torch.zeros(count, dtype=torch.long)
        return ServerState(0, params, self.server.init(params), {"assignment": assignment}, {})

    def apply(
        self, state: ServerState, cohort: Sequence[int]
    ) -> tuple[ServerState, dict[str, float]]:
        """One round.

        Raises:
            NonFiniteUpdateError: a client's update holds NaN or Inf; the state is left as it was.
        """
        if self.sharing == "none":
            return replace(state, round=state.round + 1), {}
        if self.sharing == "best" and state.round and state.round % self.regroup_every == 0:
            state = self._regroup(state, cohort)
        per_client = sum(value[0].numel() for value in state.params.values())
        chunks = self.simulation.chunks(cohort, per_client)
        assignment = state.clients["assignment"]
        means, loss = [WeightedMean() for _ in range(self.selectors)], 0.0
        for chunk, (trained, losses) in zip(
            chunks, self.simulation.map(lambda c: self.local_round(state, c), chunks)
        ):
            index = torch.tensor(chunk)
            weight = (
                torch.ones(len(chunk))
                if self.aggregation == "uniform"
                else self.store.sizes[index].float()
            )
            loss += float(losses["loss"].sum())
            for u in assignment[index].unique().tolist():
                start = {name: value[u] for name, value in state.params.items()}
                means[u].add(start, trained, weight * (assignment[index] == u))
        zero = {name: torch.zeros_like(value[0]) for name, value in state.params.items()}
        each = [m.mean() if m.total else zero for m in means]
        update = {name: torch.stack([e[name] for e in each]) for name in state.params}
        params, slots = self.server.apply(state.params, state.optimiser, update)
        return replace(state, round=state.round + 1, params=params, optimiser=slots), {
            "loss": loss / len(cohort)
        }

    def local_round(
        self, state: ServerState, chunk: Sequence[int]
    ) -> tuple[Params, dict[str, Tensor]]:
        """Train these clients side by side, each from its own selector."""
        index = torch.tensor(chunk)
        names = [self.store.names[c] for c in chunk]
        start = {
            name: value[state.clients["assignment"][index]] for name, value in state.params.items()
        }
        result = train_locally(
            RewardObjective(self.reward), start, self.store.batch(index), names, state.round,
            self.local,
            _no_context(len(chunk)), check_each_step=self.simulation.debug,
        )  # fmt: skip
        require_finite(result.params, names, state.round)
        return result

    def _regroup(self, state: ServerState, cohort: Sequence[int]) -> ServerState:
        """Assign the cohort to selectors in equal numbers, at the least total loss."""
        pairs = self.store.batch(cohort)
        losses = []
        with torch.no_grad():
            for u in range(self.selectors):
                params = {name: value[u] for name, value in state.params.items()}
                losses.append(
                    mean_choice_loss(self.reward.margin(params, pairs), pairs.mask.float())
                )
        places = -(-len(cohort) // self.selectors)
        cost = torch.stack(losses, 1).repeat_interleave(places, 1)
        rows, columns = linear_sum_assignment(cost.numpy())
        assignment = state.clients["assignment"].clone()
        assignment[torch.tensor(cohort)[torch.as_tensor(rows)]] = torch.as_tensor(columns) // places
        return replace(state, clients={"assignment": assignment})

    def finalise(self, state: ServerState) -> ServerState:
        """Nothing is left to do."""
        return state

    def predictor(
        self, state: ServerState
    ) -> SharedPredictor | GroupPredictor | BayesPredictor | FittedPredictor:
        """How users are served."""
        if self.infer_group:
            counts = torch.bincount(state.clients["assignment"], minlength=self.selectors).float()
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
        one = {name: value[0] for name, value in state.params.items()}
        rows = tensor_payload(state.params if self.sharing == "best" else one, "down")
        rows += tensor_payload(one, "up", "delta.")
        if self.sharing == "best":
            rows.append(
                Payload("loss under every selector", (self.selectors,), 4 * self.selectors, "up")
            )
        return [*rows, Payload("number of pairs", (), 8, "up")]


def _no_context(clients: int) -> RoundContext:
    none = torch.full((clients,), -1)
    return RoundContext(None, None, None, none, none, 0.0, 0.0)


@dataclass(frozen=True)
class SharedPredictor:
    """One reward for everybody, or the vote of several; a user's state is empty."""

    reward: SharedReward
    params: Params

    def adapt(self, context: PairBatch, group: Int[Tensor, "u"]) -> Float[Tensor, "u 0"]:
        """Nothing to adapt."""
        return self.neutral(context.mask.shape[0])

    @torch.no_grad()
    def margin(self, state: Float[Tensor, "u 0"], target: PairBatch) -> Float[Tensor, "u n"]:
        """The reward's margin; of several selectors, the log-odds of the share of votes, (votes
        + 1/2) / (U + 1)."""
        count = next(iter(self.params.values())).shape[0]
        each = [
            self.reward.margin({n: v[u] for n, v in self.params.items()}, target)
            for u in range(count)
        ]
        if count == 1:
            return each[0]
        votes = (torch.stack(each) > 0).float().sum(0)
        return torch.logit((votes + 0.5) / (count + 1))

    def neutral(self, users: int) -> Float[Tensor, "u 0"]:
        """Empty."""
        return torch.zeros(users, 0)


@dataclass(frozen=True)
class GroupPredictor:
    """The reward of the user's true group; a user's state is its group's index."""

    reward: SharedReward
    params: Params

    def adapt(self, context: PairBatch, group: Int[Tensor, "u"]) -> Float[Tensor, "u 1"]:
        """The true group."""
        return group.float().unsqueeze(-1)

    @torch.no_grad()
    def margin(self, state: Float[Tensor, "u 1"], target: PairBatch) -> Float[Tensor, "u n"]:
        """Margins under the groups' rewards; a group that was not trained gets the average of
        all."""
        count = next(iter(self.params.values())).shape[0]
        each = torch.stack(
            [
                self.reward.margin({n: v[u] for n, v in self.params.items()}, target)
                for u in range(count)
            ]
        )
        index = state.squeeze(-1).long()
        known = (index >= 0) & (index < count)
        own = each[index.where(known, torch.zeros_like(index)), torch.arange(index.numel())]
        return torch.where(known.unsqueeze(-1), own, each.mean(0))

    def neutral(self, users: int) -> Float[Tensor, "u 1"]:
        """No group."""
        return torch.full((users, 1), -1.0)


@dataclass(frozen=True)
class BayesPredictor:
    """The rewards of the true groups, weighed by Bayes' rule given a user's context; a user's
    state is the posterior."""

    reward: SharedReward
    params: Params
    prior: Float[Tensor, "g"]

    def adapt(self, context: PairBatch, group: Int[Tensor, "u"]) -> Float[Tensor, "u g"]:
        """Share of the clients in each group, times the likelihood of the user's choices; the true
        group is not read."""
        likelihood = (logsigmoid(self._margins(context)) * context.mask.unsqueeze(-1)).sum(-2)
        return torch.softmax(self.prior.log() + likelihood, -1)

    def margin(self, state: Float[Tensor, "u g"], target: PairBatch) -> Float[Tensor, "u n"]:
        """Log-odds under the posterior predictive."""
        return predictive_margin(state, self._margins(target))

    def neutral(self, users: int) -> Float[Tensor, "u g"]:
        """The prior."""
        return self.prior.expand(users, -1)

    @torch.no_grad()
    def _margins(self, pairs: PairBatch) -> Float[Tensor, "u n g"]:
        each = [{n: v[g] for n, v in self.params.items()} for g in range(self.prior.numel())]
        return torch.stack([self.reward.margin(params, pairs) for params in each], -1)


@dataclass(frozen=True)
class FittedPredictor:
    """A reward fitted to the user's context by local steps; a user's state is its flattened
    weights."""

    reward: SharedReward
    params: Params
    local: LocalSettings

    def adapt(self, context: PairBatch, group: Int[Tensor, "u"]) -> Float[Tensor, "u w"]:
        """Local steps from the shared weights on the context alone; without pairs these are
        kept."""
        users = context.mask.shape[0]
        if context.mask.shape[-1] == 0:
            return self.neutral(users)
        start = {
            name: value[0].expand(users, *value.shape[1:]) for name, value in self.params.items()
        }
        names = [f"user {u}" for u in range(users)]
        local = replace(self.local, batch_size=0, samples=1, latent=0)
        result = train_locally(
            RewardObjective(self.reward), start, context, names, 0, local, _no_context(users)
        )
        return torch.cat([value.flatten(1) for value in result.params.values()], -1)

    @torch.no_grad()
    def margin(self, state: Float[Tensor, "u w"], target: PairBatch) -> Float[Tensor, "u n"]:
        """Margins under each user's own weights."""
        shapes = {name: value.shape[1:] for name, value in self.params.items()}
        parts = state.split([shape.numel() for shape in shapes.values()], -1)
        own = {name: part.reshape(-1, *shape) for (name, shape), part in zip(shapes.items(), parts)}
        return self.reward.margin(own, target)

    def neutral(self, users: int) -> Float[Tensor, "u w"]:
        """The shared weights."""
        return torch.cat([value[0].flatten() for value in self.params.values()]).expand(users, -1)
