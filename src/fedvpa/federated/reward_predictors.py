"""How users are served by rewards without a latent: alike, by their true group, by Bayes' rule over
the groups, or by a reward that is fitted to their own pairs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from fedvpa.federated.local import LocalSettings, train_locally
from fedvpa.federated.objective import RewardLoss
from fedvpa.functional.preference import predictive_margin
from fedvpa.selector.reward import SharedReward
from fedvpa.types import PairBatch, Params


@dataclass(frozen=True)
class SharedPredictor:
    """One reward for everybody, or the vote of several; a user's state is empty."""

    reward: SharedReward
    params: Params

    def adapt(self, context: PairBatch, group: Int[Tensor, "u"]) -> Float[Tensor, "u 0"]:
        """An empty state for every user: the reward is the same for all."""
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
        local = replace(self.local, batch_size=0)
        result = train_locally(RewardLoss(self.reward), start, context, names, 0, local)
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
