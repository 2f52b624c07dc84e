"""The clients' side of a Bayes method: one client, or many in this process.

A client never takes a step: from the models that it is sent it infers its own posterior from a
context, and answers with the gradient of its targets' negative log-likelihood. No gradient flows
through the posterior, so that all is a few products of small matrices, without autograd.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fedvpa.config import Config
from fedvpa.data.content import Policy
from fedvpa.errors import NonFiniteUpdateError
from fedvpa.federated.accounting import Privacy, privacy_of
from fedvpa.federated.batch import ClientStore, Roster, like_sized
from fedvpa.federated.bayes.bounded import Bounded, bounded_gains, bounded_sum
from fedvpa.federated.bayes.inference import Chunk, Dealt, judged_of, per_target, slopes_of
from fedvpa.federated.bayes.messages import Judged, Outline, Slopes, added, judged
from fedvpa.federated.bayes.models import Models, Width
from fedvpa.federated.components import Moments, summed_moments
from fedvpa.federated.content import Divider, folds_of, outside
from fedvpa.federated.random import stream
from fedvpa.federated.simulation import Simulation, build_simulation
from fedvpa.functional.laplace import laplace
from fedvpa.selector.bayes import WEIGHT, BayesPredictor, BayesSelector
from fedvpa.types import Params, Population

logger = logging.getLogger("fedvpa")

MOST_CONTEXT = 0.9
"""The context's share of a client's pairs is drawn from 0 to this."""
MOST_NUMBERS = 1 << 21
"""Numbers of a chunk's padded pairs in latent space at the most, for all models together."""
LIKE = 1.5
"""A chunk's largest client has at most so many times the pairs of its smallest."""


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
        privacy: bounds of their contributions.
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
    privacy: Privacy | None = None

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

    def _chunk(self, clients: list[int], by_prompt: bool, silent: bool = False) -> Chunk:
        """Their pairs; what is not finite is an error, or (`silent`: whether a round is stopped
        must not depend on one client) counts as 0."""
        row, mask = self.store.rows(clients)
        difference = self.store.difference[row].masked_fill(~mask.unsqueeze(-1), 0.0)
        names = [self.store.names[c] for c in clients]
        finite = difference.flatten(1).isfinite().all(1)
        if silent and not finite.all():
            bad = [name for name, good in zip(names, finite.tolist()) if not good]
            logger.warning("features of '%s' are NaN or Inf; it answers nothing", bad[0])
            difference = difference.masked_fill(~finite.view(-1, 1, 1), 0.0)
        elif not finite.all():
            raise NonFiniteUpdateError(
                f"client '{names[int((~finite).nonzero()[0])]}' has features that are NaN or Inf;"
                " nothing was applied (look at its pairs, and at the backbone's number type)"
            )
        sides = self._divider.sides(self.store, torch.tensor(clients))
        return Chunk(clients, names, difference, sides, self._fold[by_prompt][row])

    def _dealt(self, chunk: Chunk, round_number: int) -> Dealt:
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
        return Dealt(*chunk.sides.dealt(key, share), noise)

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

        def part(clients: list[int]) -> list[Slopes]:
            return [
                Slopes(*(v.sum(1) for v in found))
                for found in self._slopes(models, self._chunk(clients, by_prompt), round_number)
            ]

        chunks = self.chunks(cohort, _numbers(models))
        for clients, found in zip(chunks, self.simulation.map(part, chunks)):
            yield torch.tensor(clients), found

    def _slopes(self, models: Sequence[Models], chunk: Chunk, round_number: int) -> list[Slopes]:
        """A row per client of the chunk, for every element of `models`."""
        dealt = self._dealt(chunk, round_number)
        found = [slopes_of(m, chunk, dealt, samples=self.samples, steps=self.steps) for m in models]
        return [per_target(each) for each in found] if self.alike else found

    # -- the same within bounds

    def bounded(
        self, models: Sequence[Models], cohort: Sequence[int], round_number: int
    ) -> Iterator[tuple[Int[Tensor, "c"], Bounded]]:
        """Chunks of the cohort with the sums of their bounded gradients."""

        def part(clients: list[int]) -> Bounded:
            chunk = self._chunk(clients, True, silent=True)
            found = self._slopes(models, chunk, round_number)
            return bounded_sum(found, self._privacy.clip)

        chunks = self.chunks(cohort, _numbers(models))
        for clients, found in zip(chunks, self.simulation.map(part, chunks)):
            yield torch.tensor(clients), found

    def gains(
        self, models: Sequence[Models], widths: Sequence[Sequence[Width]]
    ) -> Float[Tensor, "w"]:
        """Sum over all clients of what each option gains over the first one, within bounds."""

        def part(clients: list[int]) -> Tensor:
            chunk = self._chunk(clients, True, silent=True)
            total, _, pairs = _options(models, widths, chunk)
            return bounded_gains(total, pairs, self._privacy.gain_clip)

        chunks = self.chunks(range(len(self.store)), _numbers(models))
        return torch.stack(list(self.simulation.map(part, chunks))).sum(0)

    @property
    def _privacy(self) -> Privacy:
        assert self.privacy is not None
        return self.privacy

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
        chunks = self.chunks(range(len(self.store)), _numbers(models))

        def part(clients: list[int]) -> tuple[Tensor, Tensor, Tensor]:
            chunk = self._chunk(clients, by_prompt)
            return _options(models, widths, chunk)

        parts = list(self.simulation.map(part, chunks))
        total, correct, pairs = (torch.cat([p[i] for p in parts]) for i in range(3))
        return judged(total, correct, pairs, reference)

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


def _numbers(models: Sequence[Models]) -> int:
    return max(len(m.weight) * m.shape[1] for m in models)


def _options(
    models: Sequence[Models], widths: Sequence[Sequence[Width]], chunk: Chunk
) -> tuple[Float[Tensor, "c w"], Float[Tensor, "c w"], Float[Tensor, "c"]]:
    """`judged_of` every model at each of its widths."""
    found = [judged_of(m, w, chunk) for m, own in zip(models, widths) for w in own]
    total, correct = (torch.stack([f[i] for f in found], -1) for i in (0, 1))
    return total, correct, found[0][2]


def build(
    *, config: Config, store: ClientStore, total: int, identity: object = None
) -> BayesClients:
    """The clients of `store` under the settings."""
    p = config.population
    return BayesClients(
        store, build_simulation(config), config.seed, config.data.content, p.splits, p.samples,
        p.folds, latent=config.model.latent, alike=config.federation.aggregation == "uniform",
        privacy=privacy_of(config, total),
    )  # fmt: skip
