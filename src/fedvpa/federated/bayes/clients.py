"""The clients' side of a Bayes method: one client, or many in this process.

A client never takes a step: from the models that it is sent it infers its own posterior from a
context, and answers with the gradient of its targets' negative log-likelihood. No gradient flows
through the posterior, so that all is a few products of small matrices, without autograd.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from fedvpa.config import Config
from fedvpa.data.content import Policy
from fedvpa.errors import NonFiniteUpdateError
from fedvpa.federated.batch import ClientStore, Roster, like_sized
from fedvpa.federated.bayes.messages import Judged, Outline, Slopes, added, judged
from fedvpa.federated.bayes.models import Models, Width
from fedvpa.federated.components import Moments, summed_moments
from fedvpa.federated.content import Divider, Sides, folds_of, outside
from fedvpa.federated.random import stream
from fedvpa.federated.simulation import Simulation, build_simulation
from fedvpa.functional.laplace import (
    Laplace,
    Slope,
    at_centres,
    laplace,
    mixed_log_odds,
    mixture_divergence,
    predicted,
    predictive_slope,
    sampled_slope,
)
from fedvpa.functional.mixture import gumbel_noise, gumbel_softmax_log_weight
from fedvpa.selector.bayes import WEIGHT, BayesPredictor, BayesSelector
from fedvpa.types import Params, Population

MOST_CONTEXT = 0.9
"""The context's share of a client's pairs is drawn from 0 to this."""
MOST_NUMBERS = 1 << 21
"""Numbers of a chunk's padded pairs in latent space at the most, for all models together."""
LIKE = 1.5
"""A chunk's largest client has at most so many times the pairs of its smallest."""


class Chunk(NamedTuple):
    """Clients of like size: whitened differences, how they are divided, and their folds."""

    clients: list[int]
    names: list[str]
    difference: Float[Tensor, "c n p"]
    sides: Sides
    fold: Int[Tensor, "c n"]


@dataclass(frozen=True)
class BayesClients:
    """The clients of `store`, in this process.

    Args:
        store: their pairs.
        simulation: how many of them side by side.
        seed: of all draws.
        content: whether context and targets may share responses.
        splits: divisions of a client's pairs per round.
        samples: samples of z per division (0: the closed-form prediction).
        folds: parts of the contents, of which each model of a search misses one.
        steps: Newton steps in training, where a posterior need not be exact.
        latent: dimensions of z.
        alike: whether clients count the same (else by the number of their targets).
    """

    store: ClientStore
    simulation: Simulation
    seed: int
    content: Policy = "new"
    splits: int = 2
    samples: int = 0
    folds: int = 3
    steps: int = 2
    latent: int = 16
    alike: bool = False

    def __len__(self) -> int:
        return len(self.store)

    @property
    def roster(self) -> Roster:
        """Names and groups of the clients."""
        return self.store.roster

    @cached_property
    def _divider(self) -> Divider:
        return Divider.of(self.store, self.content)

    @cached_property
    def _fold(self) -> dict[bool, Int[Tensor, "rows"]]:
        store = self.store
        place = torch.arange(len(store.owner)) - store.offset[store.owner]
        return {b: folds_of(store.content, place, self.folds, b) for b in (True, False)}

    # -- chunks

    def chunks(self, cohort: Sequence[int], numbers_per_pair: int) -> list[list[int]]:
        """The cohort in chunks of clients of like size, by size; each of bounded memory."""
        if self.simulation.backend == "sequential":
            return [[c] for c in cohort]
        index = torch.as_tensor(cohort)
        room = self.simulation.chunk or len(index)
        groups = like_sized(
            self.store.sizes[index], LIKE,
            lambda size: min(room, MOST_NUMBERS // max(1, size * numbers_per_pair)),
        )  # fmt: skip
        return [index[group].tolist() for group in groups]

    def _chunk(self, clients: list[int], by_prompt: bool) -> Chunk:
        row, mask = self.store.rows(clients)
        difference = self.store.difference[row].masked_fill(~mask.unsqueeze(-1), 0.0)
        names = [self.store.names[c] for c in clients]
        finite = difference.flatten(1).isfinite().all(1)
        if not finite.all():
            raise NonFiniteUpdateError(
                f"client '{names[int((~finite).nonzero()[0])]}' has features that are NaN or Inf;"
                " nothing was applied (look at its pairs, and at the backbone's number type)"
            )
        sides = self._divider.sides(self.store, torch.tensor(clients))
        return Chunk(clients, names, difference, sides, self._fold[by_prompt][row])

    def _draws(
        self, chunk: Chunk, round_number: int
    ) -> tuple[Bool[Tensor, "s c n"], Bool[Tensor, "s c n"], Tensor]:
        """Contexts and targets of the round, and the seeds of the samples; each client's from a
        stream of its own."""
        clients, units = chunk.sides.exists.shape
        key, share = torch.zeros(self.splits, clients, units), torch.zeros(self.splits, clients)
        noise = torch.zeros(self.splits, max(1, self.samples), clients, 2, self.latent)
        for c, name in enumerate(chunk.names):
            generator = stream(self.seed, "round", round_number, name)
            count = int(chunk.sides.exists[c].sum())
            share[:, c] = torch.rand(self.splits, generator=generator) * MOST_CONTEXT
            key[:, c, :count] = torch.rand(self.splits, count, generator=generator)
            if self.samples:
                noise[:, :, c] = torch.randn(noise[:, :, c].shape, generator=generator)
        return *chunk.sides.dealt(key, share), noise

    # -- before the first round

    @torch.no_grad()
    def outline(self, by_prompt: bool, folds: Int[Tensor, "t"]) -> Outline:
        """Moments of all clients' pairs, without each of these folds."""
        everyone = list(range(len(self.store)))
        p = self.store.difference.shape[-1]

        def part(clients: list[int]) -> Outline:
            chunk = self._chunk(clients, by_prompt)
            x, mask = chunk.difference, chunk.sides.mask
            first, second = self._halves(chunk)
            kept = mask & outside(chunk.fold, folds.view(-1, 1, 1))
            a, b = (kept & half for half in (first, second))
            count = [side.sum(-1).to(x.dtype) for side in (a, b)]
            mean = [
                (side.to(x.dtype).unsqueeze(-2) @ x).squeeze(-2) / n.clamp_min(1).unsqueeze(-1)
                for side, n in zip((a, b), count)
            ]
            both = (count[0] > 0) & (count[1] > 0)
            weight = (kept.sum(-1) * both).to(x.dtype)
            cross = (mean[0] * weight.unsqueeze(-1)).mT @ mean[1]
            total = kept.to(x.dtype).unsqueeze(-2) @ x
            square = kept.to(x.dtype).unsqueeze(-2) @ x.square()
            several = sum(self._prompts(c) > 1 for c in clients)
            return Outline(
                kept.sum((1, 2)).to(x.dtype), total.sum((1, 2)), weight.sum(-1),
                torch.stack([(m * weight.unsqueeze(-1)).sum(1) for m in mean], 1),
                0.5 * (cross + cross.mT), square.sum((1, 2)), torch.tensor(float(len(clients))),
                torch.tensor(float(several)),
            )  # fmt: skip

        parts = list(self.simulation.map(part, self.chunks(everyone, p)))
        return Outline(*added(parts))

    def _prompts(self, client: int) -> int:
        """How many prompts a client has judged."""
        begin, end = self.store.offset[client : client + 2].tolist()
        content = self.store.content
        return end - begin if content is None else len(content[begin:end, 0].unique())

    def _halves(self, chunk: Chunk) -> tuple[Bool[Tensor, "c n"], Bool[Tensor, "c n"]]:
        """The pairs of each client in two halves that share no content."""
        clients, units = chunk.sides.exists.shape
        key = torch.zeros(clients, units)
        for c, name in enumerate(chunk.names):
            count = int(chunk.sides.exists[c].sum())
            key[c, :count] = torch.rand(count, generator=stream(self.seed, "halves", name))
        return chunk.sides.dealt(key, torch.full((clients,), 0.5))

    @torch.no_grad()
    def moments(self, models: Models, centre: Float[Tensor, "t m d"], by_prompt: bool) -> Moments:
        """Moments of the clients' posterior means under given centres, by one model of directions
        and all pairs but those of its fold."""
        numbers = models.shape[1]

        def part(clients: list[int]) -> Moments:
            chunk = self._chunk(clients, by_prompt)
            there = chunk.sides.mask & outside(chunk.fold, models.fold[0])
            x, known = chunk.difference, there.to(chunk.difference.dtype)
            found = laplace(
                x @ models.weight[0], x @ models.bilinear[0].mT, known, models.mean[0],
                models.variance[0],
            )  # fmt: skip
            mean = found.mode.squeeze(-2)
            variance = found.covariance.squeeze(-3).diagonal(dim1=-2, dim2=-1)
            return summed_moments(mean, variance, centre)

        everyone = self.chunks(range(len(self.store)), numbers)
        return Moments(*added(list(self.simulation.map(part, everyone))))

    # -- rounds

    def slopes(
        self, models: Sequence[Models], cohort: Sequence[int], round_number: int, by_prompt: bool
    ) -> Iterator[tuple[Int[Tensor, "c"], list[Slopes]]]:
        """Chunks of the cohort with their sums, a `Slopes` per element of `models`."""
        numbers = max(len(m.weight) * m.shape[1] for m in models)
        chunks = self.chunks(cohort, numbers)

        def part(clients: list[int]) -> list[Slopes]:
            chunk = self._chunk(clients, by_prompt)
            context, target, noise = self._draws(chunk, round_number)
            return [self._slopes(m, chunk, context, target, noise) for m in models]

        for clients, found in zip(chunks, self.simulation.map(part, chunks)):
            yield torch.tensor(clients), found

    @torch.no_grad()
    def _slopes(
        self, models: Models, chunk: Chunk, context: Tensor, target: Tensor, noise: Tensor
    ) -> Slopes:
        m, d = models.shape
        weight, p = models.weight, models.weight.shape[-1]
        log_prior, x = models.share.log(), chunk.difference
        dtype = x.dtype
        # 1. Pairs in latent space, once for all divisions; pairs of a model's fold are not there.
        offset = torch.einsum("cnp,tp->tcn", x, weight)
        design = torch.einsum("cnp,tdp->tcnd", x, models.bilinear)
        there = chunk.sides.mask & outside(chunk.fold, models.fold.view(-1, 1, 1))
        centre, width = models.mean.unsqueeze(1), models.variance.unsqueeze(1)

        def infer(known: Tensor) -> tuple[Laplace, Tensor]:
            weight = (there & known).to(dtype)
            # groups are narrow: in training, points
            found = (
                laplace(offset, design, weight, centre, width, self.steps) if m == 1
                else at_centres(offset, design, weight, centre)
            )  # fmt: skip
            return found, torch.log_softmax(log_prior.unsqueeze(1) + found.evidence, -1)

        # 2. Gradients of the targets of each division.
        gradient_w = torch.zeros(len(weight), x.shape[0], p)
        gradient_b = torch.zeros(len(weight), x.shape[0], d, p)
        targets, loss = torch.zeros(len(weight), x.shape[0]), torch.zeros(len(weight), x.shape[0])
        for s in range(self.splits):
            found, log_share = infer(context[s])
            slope = self._slope(found, log_share, offset, design, noise[s])
            scored = (there & target[s]).to(dtype)
            gradient_w += torch.einsum("tcn,cnp->tcp", slope.offset * scored, x)
            gradient_b += (slope.design * scored.unsqueeze(-1)).mT @ x
            targets += scored.sum(-1)
            loss += (slope.loss * scored).sum(-1)
        if self.alike:  # every client counts the same, whatever the number of its pairs
            count = targets.clamp_min(1.0)
            gradient_w, gradient_b = (
                gradient_w / count[..., None],
                gradient_b / count[..., None, None],
            )
            loss, targets = loss / count, (targets > 0).to(dtype)
        # 3. What the population step reads: the posterior given all pairs.
        found, log_share = infer(chunk.sides.mask)
        share = log_share.exp()
        divergence = mixture_divergence(found, share, log_prior.unsqueeze(1), centre, width)
        known = there.any(-1).to(dtype)
        share = share * known.unsqueeze(-1)
        return Slopes(
            gradient_w.sum(1), gradient_b.sum(1), targets.sum(1), loss.sum(1), share.sum(1),
            (share.unsqueeze(-1) * found.mode).sum(1), (divergence * known).sum(1), known.sum(1),
        )  # fmt: skip

    def _slope(
        self, found: Laplace, log_share: Tensor, offset: Tensor, design: Tensor, noise: Tensor
    ) -> Slope:
        """Of the closed-form prediction, or of sampled latents: component by Gumbel-Softmax, z by
        reparameterisation."""
        if not self.samples:
            prediction = predicted(offset, design, found)
            return predictive_slope(found, log_share.exp(), prediction, design)
        m, d = found.mode.shape[-2:]
        uniform = torch.special.ndtr(noise[:, :, 1, :m]).unsqueeze(1)
        drawn = gumbel_softmax_log_weight(log_share, gumbel_noise(uniform), 1.0).exp()
        if not found.covariance.dim():  # points
            return sampled_slope((drawn.unsqueeze(-1) * found.mode).sum(-2), offset, design)
        factor = torch.linalg.cholesky(found.covariance)
        each = found.mode + (factor @ noise[:, None, :, None, 0, :d, None]).squeeze(-1)
        return sampled_slope((drawn.unsqueeze(-1) * each).sum(-2), offset, design)

    # -- the choice

    @torch.no_grad()
    def judge(
        self, models: Sequence[Models], widths: Sequence[Sequence[Width]], by_prompt: bool,
        reference: int,
    ) -> Judged:  # fmt: skip
        """What every model says of the targets of its own fold, given the client's other pairs, at
        each of its widths.

        Models that differ in their fold alone stand side by side in one element of `models`, a
        fold each; a client's sums are over all folds. Differences are from the option `reference`
        (models and their widths counted through).
        """
        numbers = max(len(m.weight) * m.shape[1] for m in models)
        chunks = self.chunks(range(len(self.store)), numbers)

        def part(clients: list[int]) -> tuple[Tensor, Tensor, Tensor]:
            chunk = self._chunk(clients, by_prompt)
            found = [self._judged(m, w, chunk) for m, own in zip(models, widths) for w in own]
            total, correct = (torch.stack([f[i] for f in found], -1) for i in (0, 1))
            return total, correct, found[0][2]

        parts = list(self.simulation.map(part, chunks))
        total, correct, pairs = (torch.cat([p[i] for p in parts]) for i in range(3))
        return judged(total, correct, pairs, reference)

    def _judged(
        self, models: Models, width: Width, chunk: Chunk
    ) -> tuple[Float[Tensor, "c"], Float[Tensor, "c"], Float[Tensor, "c"]]:
        m, x = models.shape[0], chunk.difference
        offset = torch.einsum("cnp,tp->tcn", x, models.weight)
        design = width.effect * torch.einsum("cnp,tdp->tcnd", x, models.bilinear)
        mine = chunk.fold == models.fold.view(-1, 1, 1)
        there = chunk.sides.mask & outside(chunk.fold, models.fold.view(-1, 1, 1))
        centre, known = models.mean.unsqueeze(1), there.to(x.dtype)
        spread = models.variance.unsqueeze(1) * (width.spread**2 if m > 1 else 1.0)
        found = (
            at_centres(offset, design, known, centre) if m > 1 and not width.spread
            else laplace(offset, design, known, centre, spread)
        )  # fmt: skip
        log_share = torch.log_softmax(models.share.unsqueeze(1).log() + found.evidence, -1)
        margin = mixed_log_odds(log_share, predicted(offset, design, found).log_odds)
        scored = (chunk.sides.mask & mine).to(x.dtype)
        right = (margin > 0).to(x.dtype) + 0.5 * (margin == 0).to(x.dtype)
        return (
            (logsigmoid(margin) * scored).sum((0, 2)),
            (right * scored).sum((0, 2)),
            scored.sum((0, 2)),
        )

    @torch.no_grad()
    def settle(self, params: Params, population: Population) -> Params:
        """The component of the greatest responsibility given all of a client's pairs."""
        label, predictor = torch.full((len(self.store),), -1), self.predictor(params, population)
        for clients in self.chunks(range(len(self.store)), population.mean.numel()):
            pairs = self.store.batch(clients)
            label[clients] = predictor.responsibilities(pairs).argmax(-1)
        return {"label": label}

    def predictor(self, params: Params, population: Population) -> BayesPredictor:
        """What serves users under these parameters."""
        return BayesPredictor(
            BayesSelector(params[WEIGHT].numel(), self.latent), params, population
        )


def build(
    *, config: Config, store: ClientStore, total: int, identity: object = None
) -> BayesClients:
    """The clients of `store` under the settings."""
    p = config.population
    return BayesClients(
        store, build_simulation(config), config.seed, config.data.content, p.splits, p.samples,
        p.folds, latent=config.model.latent, alike=config.federation.aggregation == "uniform",
    )  # fmt: skip
