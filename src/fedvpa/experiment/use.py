"""Use a trained run: a new user's preference from a few comparisons, and scores of responses
under it. No training."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fedvpa.data.memory import items_from, pairs_from
from fedvpa.data.partition import ClientPairs, without_duplicates
from fedvpa.errors import BadInputError
from fedvpa.experiment.dataset import presentation_order
from fedvpa.experiment.run import Run, open_run, pairs_to_batch, same_backbone
from fedvpa.experiment.train import TrainResult
from fedvpa.features.cache import FeatureCache
from fedvpa.federated.algorithm import LatentPredictor
from fedvpa.federated.random import stream
from fedvpa.functional.mixture import drawn_from
from fedvpa.records import Item, PreferencePair
from fedvpa.types import PairBatch, Population

USERS = 256
"""Users who are drawn from a prior where nobody's z is held."""


@dataclass(frozen=True)
class UserPreference:
    """A user's posterior: mean and standard deviation of z [d]; and where it lies among the
    population's preferences.

    `probability` is the posterior over the fitted components (or, with orthogonal prototypes and no
    population, a softmax of negative half squared distances); `nearest` its largest entry,
    `nearest_group` the true group of most training clients there, where groups were known.
    `surprise` is the mean negative log-likelihood of each comparison under the z inferred from the
    *others*, in nats: near 0.69 or above, they are few, noisy, or fit no preference that the model
    knows (NaN with fewer than two). `run` is the identity of the run that z belongs to: under
    another one it means something else.
    """

    mean: Float[Tensor, "d"]
    sigma: Float[Tensor, "d"]
    pairs: int
    nearest: int | None
    nearest_group: str | None
    probability: list[float]
    surprise: float
    run: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "run": self.run,
            "z": self.mean.tolist(), "sigma": self.sigma.tolist(), "pairs": self.pairs,
            "nearest": self.nearest,
            "nearest_group": self.nearest_group, "probability": self.probability,
            "surprise": self.surprise,
        }  # fmt: skip


class PreferenceModel:
    """A finished run of a variational method, as it serves users.

    Args:
        run: what `fedvpa.train` returned, or the run's folder.
        keep: whether features of what is read are kept in the cache.

    Raises:
        BadInputError: no finished run there, or one of a method without a latent preference.

    Example:
        >>> from fedvpa import PreferenceModel
        >>> model = PreferenceModel(run)
        >>> me = model.personalize([{"prompt": "tea is", "chosen": "good", "rejected": "bad"}])
        >>> me.pairs, me.mean.shape == (model.latent,)
        (1, True)
        >>> model.score([("tea is", "very good"), ("tea is", "very bad")], me).shape
        torch.Size([2])
    """

    def __init__(self, run: TrainResult | str | Path, keep: bool = True) -> None:
        directory = run.root if isinstance(run, TrainResult) else Path(run)
        self.run: Run = open_run(directory)
        predictor = self.run.predictor
        if not isinstance(predictor, LatentPredictor):
            raise BadInputError(
                f"{directory}: trained with {self.run.config.method}, which has no latent"
                " preference; train with --method fedvpa-gp"
            )
        self._predictor = predictor
        self._cache = FeatureCache(self.run.config.features, keep=keep)
        self._components = _component_groups(self.run, self.prototypes)

    @property
    def latent(self) -> int:
        """Dimensions d of z."""
        return self.run.config.model.latent

    @property
    def prototypes(self) -> Float[Tensor, "m d"] | None:
        """z of the preferences that have a name: centres of the population's groups, both ends of
        the main directions in which its users differ, or orthogonal prototypes."""
        return self._predictor.named

    @property
    def directions(self) -> int | None:
        """How many main directions the prototypes are the ends of (None: they are groups)."""
        structure = self.run.told
        if not structure or structure["kind"] == "groups" or self.prototypes is None:
            return None
        return len(self.prototypes) // 2

    @property
    def population(self) -> Population | None:
        """Fitted components of the population: centres, variances, shares of users."""
        return self._predictor.population

    def margins(
        self, pairs: Sequence[PreferencePair], z: Float[Tensor, "m d"]
    ) -> Float[Tensor, "m n"]:
        """Margin of each pair's chosen response under each z, in nats."""
        return self.margins_of(*self.read(pairs), z)

    def margins_of(
        self, features: Float[Tensor, "n 2 h"], orders: Float[Tensor, "n"], z: Float[Tensor, "m d"]
    ) -> Float[Tensor, "m n"]:
        """The same of pairs that were read before (see `read`)."""
        batch = self._batch(features, orders)
        many = PairBatch(
            *(None if v is None else v.expand(len(z), *v.shape[1:]) for v in batch)  # type: ignore[arg-type]
        )
        return self._predictor.margin_under(z, many)

    @property
    def posterior_means(self) -> Float[Tensor, "k d"] | None:
        """z of the training clients, as the server holds them; where it holds nobody's, users who
        are drawn from the mixture prior."""
        if self.run.config.prior.kind == "components":
            return None
        held = self.run.checkpoint.state.clients.get("mean")
        if held is not None or self.population is None:
            return held
        generator = stream(self.run.config.seed, "users of the prior")
        return drawn_from(*self.population, USERS, generator)

    @property
    def neutral(self) -> Float[Tensor, "d"]:
        """z of somebody of whom nothing is known."""
        return self._predictor.prior_mean()

    @property
    def component_groups(self) -> list[str | None]:
        """True group of most training clients near each prototype, for naming it; empty where no
        groups are known."""
        return self._components

    def personalize(self, pairs: Any) -> UserPreference:
        """Infer z from a user's comparisons, without training; with none, the prior's mean.

        Args:
            pairs: a path, a list of records or of `PreferencePair`, or a `datasets.Dataset`.

        Raises:
            BadInputError: unusable pairs, or the backbone that the run was trained with cannot be
                had.
        """
        own = without_duplicates(pairs_from(pairs, "personalize(pairs)"))
        if not own:
            return self.inferred(torch.zeros(0, 2, 0), torch.zeros(0))
        table = self._cache.pairs(own)
        same_backbone(self.run, table.signature)
        return self.inferred(table.values, presentation_order(ClientPairs("", None, tuple(own))))

    def read(self, pairs: Sequence[PreferencePair]) -> tuple[Tensor, Tensor]:
        """Features [n, 2, h] of comparisons, and which response was shown first [n] (+1: the chosen
        one), for `inferred`.

        Raises:
            BadInputError: the backbone that the run was trained with cannot be had.
        """
        table = self._cache.pairs(pairs)
        same_backbone(self.run, table.signature)
        return table.values, presentation_order(ClientPairs("", None, tuple(pairs)))

    def inferred(
        self, features: Float[Tensor, "n 2 h"], orders: Float[Tensor, "n"]
    ) -> UserPreference:
        """What `personalize` returns, of features that were read before."""
        batch = self._batch(features, orders)
        posterior = self._predictor.posterior(batch)
        mean = posterior.mean[0]
        probability: list[float] = []
        if self.directions is not None:
            pass  # a direction is no group that one could belong to
        elif self._predictor.population is not None:
            probability = self._predictor.responsibilities(batch)[0].tolist()
        elif self.prototypes is not None:
            probability = torch.softmax(
                -0.5 * (self.prototypes - mean).square().sum(-1), 0
            ).tolist()
        nearest = int(torch.tensor(probability).argmax()) if probability else None
        surprise = self._surprise(batch)
        return UserPreference(
            mean, (0.5 * posterior.log_var[0]).exp(), len(features), nearest,
            self._components[nearest] if nearest is not None and self._components else None,
            probability, surprise, self.run.identity,
        )  # fmt: skip

    def influence(
        self, features: Float[Tensor, "n 2 h"], orders: Float[Tensor, "n"]
    ) -> Float[Tensor, "n"]:
        """How far each comparison has moved the mean of z: its distance from the mean that all the
        others give, in standard deviations of the prior's users where these are known."""
        if not len(features):
            return torch.zeros(0)
        batch = self._batch(features, orders)
        others = _each_without_one(batch)
        whole = self._predictor.posterior(batch).mean
        return (self._predictor.posterior(others).mean - whole).norm(dim=-1)

    def _batch(self, features: Float[Tensor, "n 2 h"], orders: Float[Tensor, "n"]) -> PairBatch:
        if len(features):
            return pairs_to_batch(self.run, features, orders)
        empty = torch.zeros(1, 0, self.run.config.model.inputs)
        return PairBatch(empty, empty, torch.zeros(1, 0), torch.zeros(1, 0, dtype=torch.bool))

    def _surprise(self, batch: PairBatch) -> float:
        """Mean negative log-likelihood of each comparison under the z of the others, in nats;
        NaN with fewer than two."""
        count = batch.mask.shape[-1]
        if count < 2:
            return float("nan")
        others = _each_without_one(batch)
        margin = self._predictor.margin(
            self._predictor.adapt(others, torch.full((len(others.mask),), -1)), others
        ).diagonal()
        return float(-torch.nn.functional.logsigmoid(margin).mean())

    def score(self, items: Any, z: Any) -> Float[Tensor, "n"]:
        """Reward of each response under z, in nats, relative to the average training response.

        Args:
            items: `Item`s, (prompt, response) pairs, or records with these keys.
            z: what `personalize` returned, or z as numbers: [d] for all, or [n, d] for each.

        Raises:
            BadInputError: something that is no response to a prompt, or z is of another dimension
                or not finite.
        """
        items, z = items_from(items, "score(items)"), self._own(z)
        if z.shape not in ((self.latent,), (len(items), self.latent)):
            raise BadInputError(
                f"z has shape {tuple(z.shape)}, but this run's latent has {self.latent} dimensions"
            )
        if not z.isfinite().all():
            raise BadInputError("z holds NaN or Inf")
        batch = against_average(self.run, self._cache, items)
        return self._predictor.margin_under(z.expand(len(items), -1), batch)[:, 0]

    def _own(self, z: Any) -> Float[Tensor, "*n d"]:
        """z as a tensor, if it is of this run."""
        if isinstance(z, UserPreference) and z.run != self.run.identity:
            raise BadInputError(f"score(z): {_of_another_run(self.run)}")
        return _latent(z)

    def read_z(self, source: str) -> Float[Tensor, "d"]:
        """z from a JSON file that `personalize` wrote (or a list of numbers), or from
        ``prototype:K``, ``mean``.

        Raises:
            BadInputError: unreadable, of another dimension, or no such prototype.
        """
        if source == "mean":
            return self._predictor.prior_mean()
        if source.startswith("prototype:"):
            prototypes = self.prototypes
            count = 0 if prototypes is None else len(prototypes)
            number = source.partition(":")[2]
            if prototypes is None or not re.fullmatch("[0-9]{1,9}", number) or int(number) >= count:
                known = f"has prototypes 0 to {count - 1}" if count else "has no prototypes"
                raise BadInputError(f"--z {source}: this run {known}")
            return prototypes[int(number)]
        try:
            content = json.loads(Path(source).expanduser().read_bytes())
            values = content["z"] if isinstance(content, dict) else content
            z = torch.tensor(values, dtype=torch.float32)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, RecursionError) as error:
            raise BadInputError(
                f"--z {source}: not a file that `fedvpa personalize --json` writes: {error}"
            ) from error
        if isinstance(content, dict) and content.get("run") != self.run.identity:
            raise BadInputError(f"--z {source}: {_of_another_run(self.run)}")
        if z.shape != (self.latent,):
            raise BadInputError(
                f"--z {source}: shape {tuple(z.shape)}, but this run's latent has {self.latent}"
                " dimensions"
            )
        if not z.isfinite().all():
            raise BadInputError(f"--z {source}: holds NaN or Inf")
        return z


def _each_without_one(batch: PairBatch) -> PairBatch:
    """A user's n pairs [1, n] as n users [n, n], each of whom lacks one."""
    count = batch.mask.shape[-1]
    return PairBatch(
        batch.difference.expand(count, -1, -1),
        None if batch.common is None else batch.common.expand(count, -1, -1),
        batch.order.expand(count, -1),
        ~torch.eye(count, dtype=torch.bool),
    )


def _of_another_run(run: Run) -> str:
    return (
        f"was inferred by another run than {run.paths.root}, where it would mean something else;"
        " infer it anew with `fedvpa personalize`"
    )


def _latent(z: Any) -> Float[Tensor, "*n d"]:
    """z as a tensor.

    Raises:
        BadInputError: it cannot be one.
    """
    if isinstance(z, UserPreference):
        return z.mean
    try:
        return torch.as_tensor(z, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadInputError(
            f"score(z): is a {type(z).__name__}; give what `personalize` returned, or numbers"
        ) from error


def against_average(run: Run, cache: FeatureCache, items: Sequence[Item]) -> PairBatch:
    """Pairs [n, 1] of each response and one at the centre of the training responses, whose whitened
    features are zero."""
    found = cache.items(items)
    same_backbone(run, found.signature)
    features = found.values
    centred = (features - run.whitener.centre) @ run.whitener.projection
    mask = torch.ones(len(items), 1, dtype=torch.bool)
    return PairBatch(
        centred.unsqueeze(1), centred.unsqueeze(1) / 2, torch.zeros(len(items), 1), mask
    )


def _component_groups(run: Run, prototypes: Tensor | None) -> list[str | None]:
    """True group of most training clients nearest to each component (for naming it; nothing is
    inferred from it)."""
    if prototypes is None or all(g is None for g in run.roster.groups):
        return []
    tables = run.checkpoint.state.clients
    if run.told and run.told["kind"] != "groups":
        return []
    own = (
        tables["label"]
        if run.config.prior.kind == "components" or "mean" not in tables
        else torch.cdist(tables["mean"], prototypes).argmin(-1)
    )
    nearest = own.tolist()
    out: list[str | None] = []
    for component in range(prototypes.shape[0]):
        groups = Counter(
            g for g, n in zip(run.roster.groups, nearest) if n == component and g is not None
        )
        out.append(groups.most_common(1)[0][0] if groups else None)
    return out
