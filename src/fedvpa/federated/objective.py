"""What a client minimises in a local step (M7), for stacked clients [c]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedvpa.federated.draws import Episode
from fedvpa.functional.gaussian import standard_kl_per_dimension
from fedvpa.functional.mixture import (
    gumbel_noise,
    gumbel_softmax_log_weight,
    mixture_kl_bound,
    mixture_prior_kl,
)
from fedvpa.functional.preference import mean_choice_loss
from fedvpa.functional.prototypes import orthonormality_loss, pull_loss
from fedvpa.selector.reward import SharedReward
from fedvpa.selector.selector import Selector
from fedvpa.types import MixturePrior, Params, Population, Posterior

PRIOR_LOGIT = "private.prior_logit"
PROTOTYPES = "prototypes"


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


@runtime_checkable
class Objective(Protocol):
    """Loss terms [c] of one step; the entry `loss` is what is minimised."""

    def __call__(
        self,
        params: Params,
        episode: Episode,
        noise: Float[Tensor, "s c d"],
        uniform: Float[Tensor, "c k"],
        context: RoundContext,
    ) -> dict[str, Float[Tensor, "c"]]: ...


@dataclass(frozen=True)
class VariationalObjective:
    """L = L_recon + beta KL + lambda L_pull + gamma L_orthonorm (M7)."""

    selector: Selector
    weights: Literal["gumbel", "uniform", "sample-size"] = "gumbel"
    temperature: float = 1.0
    estimator: Literal["monte-carlo", "hershey-olsen"] = "monte-carlo"
    exclude_self: bool = True
    free_bits: float = 0.0
    orthonormal_weight: float = 0.0
    radius: float = 5.0
    single_pair: bool = False
    reward_decay: float = 0.0

    def __call__(
        self,
        params: Params,
        episode: Episode,
        noise: Float[Tensor, "s c d"],
        uniform: Float[Tensor, "c k"],
        context: RoundContext,
    ) -> dict[str, Float[Tensor, "c"]]:
        """Loss terms of one step."""
        if self.single_pair:
            return self._leaking(params, episode, noise, uniform, context)
        target = episode.target.to(noise.dtype)
        posterior = self.selector.posterior(params, episode.pairs, episode.context)
        if context.anchors is not None and context.evidence is not None:
            evidence = episode.of(context.evidence)
            share = self.selector.combine(
                context.anchors, evidence, posterior.mean.detach(), episode.context
            )
            z = share @ context.anchors.mean
            recon = mean_choice_loss(self.selector.margin(params, z, episode.pairs), target)
            pull = (posterior.mean - z).square().sum(-1)
            return self._total(params, recon + self._decay(params, z), None, pull, context)
        z = posterior.mean + (0.5 * posterior.log_var).exp() * noise
        recon = mean_choice_loss(self.selector.margin(params, z, episode.pairs), target).mean(0)
        if self.reward_decay:
            recon = recon + self._decay(params, z).mean(0)
        kl = self._kl(posterior, params, noise, uniform, context)
        return self._total(params, recon, kl, self._pull(params, z, context.label), context)

    def _total(
        self,
        params: Params,
        recon: Tensor,
        kl: Tensor | None,
        pull: Tensor | None,
        context: RoundContext,
    ) -> dict[str, Float[Tensor, "c"]]:
        """The weighted sum, and its terms; a term that is off is not computed."""
        terms = {"recon": recon}
        loss = recon
        if kl is not None:
            terms["kl"] = kl
            loss = torch.add(loss, kl, alpha=context.kl_weight)
        if pull is not None:
            terms["pull"] = pull
            loss = torch.add(loss, pull, alpha=context.pull_weight)
        if PROTOTYPES in params:
            terms["orthonormality"] = orthonormality_loss(params[PROTOTYPES], self.radius)
            loss = torch.add(loss, terms["orthonormality"], alpha=self.orthonormal_weight)
        return terms | {"loss": loss}

    def _leaking(
        self,
        params: Params,
        episode: Episode,
        noise: Tensor,
        uniform: Tensor,
        context: RoundContext,
    ) -> dict[str, Float[Tensor, "c"]]:
        """The published protocol: every pair's z is inferred from that pair. It LEAKS the label
        that it then scores."""
        one = {k: v.unsqueeze(1) for k, v in params.items()}
        pairs = episode.pairs
        single = type(pairs)(
            pairs.difference.unsqueeze(-2),
            None if pairs.common is None else pairs.common.unsqueeze(-2),
            pairs.order.unsqueeze(-1),
            pairs.mask.unsqueeze(-1),
        )
        weight = pairs.mask.to(noise.dtype)
        posterior = self.selector.posterior(one, single, single.mask)
        z = posterior.mean + (0.5 * posterior.log_var).exp() * noise.unsqueeze(-2)
        margin = self.selector.margin(one, z, single).squeeze(-1)
        recon = mean_choice_loss(margin, weight).mean(0)
        per_pair = RoundContext(
            context.prior, None, None, context.label.unsqueeze(-1).expand_as(pairs.mask),
            context.client.unsqueeze(-1),
            context.kl_weight, context.pull_weight,
        )  # fmt: skip
        kl = self._kl(
            posterior, one, noise.unsqueeze(-2).expand_as(z), uniform.unsqueeze(-2), per_pair
        )
        count = weight.sum(-1).clamp_min(1)
        pull = self._pull(one, z, per_pair.label)
        mean_pull = None if pull is None else (pull * weight).sum(-1) / count
        return self._total(params, recon, (kl * weight).sum(-1) / count, mean_pull, context)

    def _decay(self, params: Params, z: Float[Tensor, "*s c d"]) -> Float[Tensor, "*s c"]:
        """Gaussian prior on the reward that z picks: decay x |w + W^T z|^2, in whitened units; 0
        where it is off."""
        if not self.reward_decay:
            return torch.zeros(z.shape[:-1])
        return self.reward_decay * self.selector.reward.direction(params, z).square().sum(-1)

    def _pull(
        self, params: Params, z: Float[Tensor, "s *c d"], label: Int[Tensor, "*c"]
    ) -> Float[Tensor, "*c"] | None:
        if PROTOTYPES not in params:
            return None
        return pull_loss(z, params[PROTOTYPES], label.expand(z.shape[:-1])).mean(0)

    def _kl(
        self,
        posterior: Posterior,
        params: Params,
        noise: Float[Tensor, "s *c d"],
        uniform: Tensor,
        context: RoundContext,
    ) -> Float[Tensor, "*c"]:
        if context.prior is None:
            each = standard_kl_per_dimension(*posterior)
            return (each.clamp_min(self.free_bits) if self.free_bits else each).sum(-1)
        prior = context.prior
        log_weight = self.log_weight(params.get(PRIOR_LOGIT), prior, context.client, uniform)
        if self.estimator == "hershey-olsen":
            kl = mixture_kl_bound(*posterior, prior.mean, prior.log_var, log_weight)
        else:
            kl = mixture_prior_kl(*posterior, prior.mean, prior.log_var, log_weight, noise)
        return kl.clamp_min(self.free_bits * posterior.mean.shape[-1]) if self.free_bits else kl

    def log_weight(
        self,
        logit: Tensor | None,
        prior: MixturePrior,
        client: Int[Tensor, "*c"],
        uniform: Float[Tensor, "*c k"] | None,
    ) -> Float[Tensor, "*c k"]:
        """Log-weights of the mixture (M4). Without `uniform` noise: the plain softmax of the
        learned logits."""
        base = (
            torch.zeros(prior.client.shape)
            if self.weights != "sample-size"
            else prior.size.clamp_min(1e-6).log()
        )
        if self.exclude_self and prior.client.numel() > 1:
            base = base.masked_fill(prior.client == client.unsqueeze(-1), -torch.inf)
        if self.weights != "gumbel" or logit is None:
            return torch.log_softmax(base.expand(*client.shape, -1), -1)
        gumbel = torch.zeros(()) if uniform is None else gumbel_noise(uniform)
        return gumbel_softmax_log_weight(base + logit[..., prior.slot], gumbel, self.temperature)


@dataclass(frozen=True)
class WithFixed:
    """An objective some of whose parameters are given and not trained."""

    objective: Objective
    fixed: Params

    def __call__(
        self,
        params: Params,
        episode: Episode,
        noise: Float[Tensor, "s c d"],
        uniform: Float[Tensor, "c k"],
        context: RoundContext,
    ) -> dict[str, Float[Tensor, "c"]]:
        """Loss terms of one step."""
        return self.objective(params | self.fixed, episode, noise, uniform, context)


@dataclass(frozen=True)
class RewardObjective:
    """Bradley-Terry loss of a reward without a latent, on all pairs of the step."""

    reward: SharedReward

    def __call__(
        self,
        params: Params,
        episode: Episode,
        noise: Float[Tensor, "s c d"],
        uniform: Float[Tensor, "c k"],
        context: RoundContext,
    ) -> dict[str, Float[Tensor, "c"]]:
        """Loss of one step; noise and context are not read."""
        weight = (episode.context | episode.target).to(episode.pairs.difference.dtype)
        loss = mean_choice_loss(self.reward.margin(params, episode.pairs), weight)
        return {"recon": loss, "loss": loss}
