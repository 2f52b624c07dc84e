"""Mixtures of Gaussians as priors: learned weights, and the divergence of a posterior from them
(nats)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from fedvpa.functional.gaussian import gaussian_kl, gaussian_log_prob


def gumbel_noise(uniform: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """Gumbel(0, 1) noise from uniform noise in [0, 1); 0 and 1 are kept apart from the poles of the
    logarithms."""
    return -(-uniform.clamp(1e-9, 1 - 1e-7).log()).log()


def gumbel_softmax_log_weight(
    logit: Float[Tensor, "*#b k"], gumbel: Float[Tensor, "*#b k"], temperature: float
) -> Float[Tensor, "*b k"]:
    """log w = log softmax((log pi + g) / tau) (M4; Jang et al., 2017, eq. 1). A logit of -inf
    leaves its component out."""
    return torch.log_softmax((logit + gumbel) / temperature, dim=-1)


def mixture_prior_kl(
    mean: Float[Tensor, "*b d"],
    log_var: Float[Tensor, "*b d"],
    peer_mean: Float[Tensor, "k d"],
    peer_log_var: Float[Tensor, "k d"],
    log_weight: Float[Tensor, "*#b k"],
    noise: Float[Tensor, "s *b d"],
) -> Float[Tensor, "*b"]:
    r"""Monte-Carlo KL, in nats, from a client's posterior to the mixture of its peers (M3, M5).

    KL(q_i || sum_k w_ik q_k) has no closed form; an estimate may be slightly negative.
    """
    z = mean + (0.5 * log_var).exp() * noise  # z ~ q_i, reparameterised
    log_q = gaussian_log_prob(z, mean, log_var)
    log_peers = gaussian_log_prob(z.unsqueeze(-2), peer_mean, peer_log_var)
    return (log_q - torch.logsumexp(log_weight + log_peers, dim=-1)).mean(0)


def mixture_kl_bound(
    mean: Float[Tensor, "*b d"],
    log_var: Float[Tensor, "*b d"],
    peer_mean: Float[Tensor, "k d"],
    peer_log_var: Float[Tensor, "k d"],
    log_weight: Float[Tensor, "*#b k"],
) -> Float[Tensor, "*b"]:
    r"""Variational upper bound of that KL, in nats, without samples (Hershey & Olsen, 2007, eq. 20,
    one component in q).

    KL(q || sum_k w_k p_k) <= -log sum_k w_k exp(-KL(q || p_k)).
    """
    each = gaussian_kl(mean.unsqueeze(-2), log_var.unsqueeze(-2), peer_mean, peer_log_var)
    return -torch.logsumexp(log_weight - each, dim=-1)


def drawn_from(
    mean: Float[Tensor, "m d"], variance: Float[Tensor, "m"], weight: Float[Tensor, "m"],
    count: int, generator: torch.Generator,
) -> Float[Tensor, "n d"]:  # fmt: skip
    """So many draws from a mixture of spherical Gaussians."""
    component = torch.multinomial(weight, count, replacement=True, generator=generator)
    noise = torch.randn(count, mean.shape[-1], generator=generator)
    return mean[component] + variance[component].sqrt().unsqueeze(-1) * noise
