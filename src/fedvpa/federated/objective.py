"""What a client minimises in a local step (M7), for stacked clients [c]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedvpa.federated.episodes import NO_NOISE, DrawSizes, Episode
from fedvpa.federated.messages import PRIOR_LOGIT, PROTOTYPES
from fedvpa.federated.priors import Prior
from fedvpa.functional.preference import mean_choice_loss
from fedvpa.functional.prototypes import orthonormality_loss, pull_loss
from fedvpa.functional.segments import spread
from fedvpa.selector.heads import DirectionalHead
from fedvpa.selector.reward import SharedReward
from fedvpa.selector.selector import Selector
from fedvpa.types import MixturePrior, Params, Population


@runtime_checkable
class Loss(Protocol):
    """Loss terms [c] of one local step; the entry `loss` is what is minimised."""

    @property
    def draws(self) -> DrawSizes:
        """How many random numbers a step reads."""
        ...

    def __call__(
        self,
        params: Params,
        episode: Episode,
        noise: Float[Tensor, "s c d"],
        uniform: Float[Tensor, "c k"],
    ) -> dict[str, Float[Tensor, "c"]]: ...


class RoundContext(NamedTuple):
    """What the server broadcasts besides the parameters, and each client's own place in it.

    `evidence` is what a client adds to the anchors: the log-likelihood of each of its choices under
    each of them, by the *broadcast* model (under its own, after a few local steps, every component
    would fit its pairs).
    """

    prior: MixturePrior | None
    anchors: Population | None
    evidence: Float[Tensor, "c n m"] | None
    label: Int[Tensor, "c"]
    client: Int[Tensor, "c"]
    kl_weight: float
    pull_weight: float


@dataclass(frozen=True)
class VariationalObjective:
    """L = L_recon + beta KL + lambda L_pull + gamma L_orthonorm (M7).

    Args:
        selector: encoder and reward head.
        prior: the prior of z, which gives the KL.
        orthonormal_weight: gamma.
        radius: radius s of the prototypes.
        single_pair: the published protocol, which LEAKS: z is inferred from the scored pair.
        reward_decay: L2 penalty on the reward's direction under z; the head must have one.
        samples: latent samples per step.
    """

    selector: Selector
    prior: Prior
    orthonormal_weight: float = 0.0
    radius: float = 5.0
    single_pair: bool = False
    reward_decay: float = 0.0
    samples: int = 1

    def given(self, context: RoundContext) -> VariationalLoss:
        """The loss of the clients of one round."""
        return VariationalLoss(self, context)


@dataclass(frozen=True)
class VariationalLoss:
    """The objective with a round's context."""

    of: VariationalObjective
    context: RoundContext

    @property
    def draws(self) -> DrawSizes:
        """Samples of z, and a number per component for the Gumbel weights."""
        prior = self.context.prior
        components = 0 if prior is None else prior.client.numel()
        return DrawSizes(self.of.samples, self.of.selector.encoder.latent, components)

    def __call__(
        self,
        params: Params,
        episode: Episode,
        noise: Float[Tensor, "s c d"],
        uniform: Float[Tensor, "c k"],
    ) -> dict[str, Float[Tensor, "c"]]:
        """Loss terms of one step."""
        if self.of.single_pair:
            return self._leaking(params, episode, noise, uniform)
        selector, context = self.of.selector, self.context
        target = episode.target.to(noise.dtype)
        posterior = selector.posterior(params, episode.pairs, episode.context)
        if context.anchors is not None and context.evidence is not None:
            evidence = episode.of(context.evidence)
            share = selector.combine(
                context.anchors, evidence, posterior.mean.detach(), episode.context,
                episode.pairs.owner,
            )  # fmt: skip
            z = share @ context.anchors.mean
            recon = self._recon(params, z, episode, target)
            pull = (posterior.mean - z).square().sum(-1)
            return self._total(params, recon + self._decay(params, z), None, pull)
        z = posterior.mean + (0.5 * posterior.log_var).exp() * noise
        recon = self._recon(params, z, episode, target).mean(0)
        if self.of.reward_decay:
            recon = recon + self._decay(params, z).mean(0)
        logit = params.get(PRIOR_LOGIT)
        kl = self.of.prior.kl(posterior, context.prior, logit, context.client, noise, uniform)
        return self._total(params, recon, kl, self._pull(params, z, context.label))

    def _recon(
        self, params: Params, z: Float[Tensor, "*s c d"], episode: Episode, target: Tensor
    ) -> Float[Tensor, "*s c"]:
        margin = self.of.selector.margin(params, z, episode.pairs)
        return mean_choice_loss(margin, target, episode.pairs.owner)

    def _total(
        self, params: Params, recon: Tensor, kl: Tensor | None, pull: Tensor | None
    ) -> dict[str, Float[Tensor, "c"]]:
        """The weighted sum, and its terms; a term that is off is not computed."""
        terms = {"recon": recon}
        loss = recon
        if kl is not None:
            terms["kl"] = kl
            loss = torch.add(loss, kl, alpha=self.context.kl_weight)
        if pull is not None:
            terms["pull"] = pull
            loss = torch.add(loss, pull, alpha=self.context.pull_weight)
        if PROTOTYPES in params:
            terms["orthonormality"] = orthonormality_loss(params[PROTOTYPES], self.of.radius)
            loss = torch.add(loss, terms["orthonormality"], alpha=self.of.orthonormal_weight)
        return terms | {"loss": loss}

    def _leaking(
        self, params: Params, episode: Episode, noise: Tensor, uniform: Tensor
    ) -> dict[str, Float[Tensor, "c"]]:
        """The published protocol: the z of every pair is inferred from that pair. It LEAKS the
        label that it then scores."""
        one = {k: v.unsqueeze(1) for k, v in params.items()}
        pairs, context, selector = episode.pairs, self.context, self.of.selector
        single = type(pairs)(
            pairs.difference.unsqueeze(-2),
            None if pairs.common is None else pairs.common.unsqueeze(-2),
            pairs.order.unsqueeze(-1),
            pairs.mask.unsqueeze(-1),
        )
        weight = pairs.mask.to(noise.dtype)
        posterior = selector.posterior(one, single, single.mask)
        z = posterior.mean + (0.5 * posterior.log_var).exp() * noise.unsqueeze(-2)
        margin = selector.margin(one, z, single).squeeze(-1)
        recon = mean_choice_loss(margin, weight).mean(0)
        wide = noise.unsqueeze(-2).expand_as(z)
        kl = self.of.prior.kl(
            posterior, context.prior, one.get(PRIOR_LOGIT), context.client.unsqueeze(-1), wide,
            uniform.unsqueeze(-2),
        )  # fmt: skip
        count = weight.sum(-1).clamp_min(1)
        pull = self._pull(one, z, context.label.unsqueeze(-1).expand_as(pairs.mask))
        mean_pull = None if pull is None else (pull * weight).sum(-1) / count
        return self._total(params, recon, (kl * weight).sum(-1) / count, mean_pull)

    def _decay(self, params: Params, z: Float[Tensor, "*s c d"]) -> Float[Tensor, "*s c"]:
        """Gaussian prior on the reward that z picks: decay x |w + W^T z|^2, in whitened units; 0
        where it is off."""
        if not self.of.reward_decay:
            return torch.zeros(z.shape[:-1])
        head = cast(DirectionalHead, self.of.selector.reward)  # checked where it was built
        return self.of.reward_decay * head.direction(params, z).square().sum(-1)

    def _pull(
        self, params: Params, z: Float[Tensor, "s *c d"], label: Int[Tensor, "*c"]
    ) -> Float[Tensor, "*c"] | None:
        if PROTOTYPES not in params:
            return None
        return pull_loss(z, params[PROTOTYPES], label.expand(z.shape[:-1])).mean(0)


@dataclass(frozen=True)
class RewardLoss:
    """Bradley-Terry loss of a reward without a latent, on all pairs of the step."""

    reward: SharedReward
    draws: DrawSizes = NO_NOISE

    def __call__(
        self,
        params: Params,
        episode: Episode,
        noise: Float[Tensor, "s c 0"],
        uniform: Float[Tensor, "c 0"],
    ) -> dict[str, Float[Tensor, "c"]]:
        """Loss of one step; it reads no noise."""
        weight = (episode.context | episode.target).to(episode.pairs.difference.dtype)
        owner = episode.pairs.owner
        margin = self.reward.margin(spread(params, owner), episode.pairs)
        loss = mean_choice_loss(margin, weight, owner)
        return {"recon": loss, "loss": loss}
