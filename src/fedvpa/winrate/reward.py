"""The reward judge: reward models that know neither the selector's data nor its backbone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegressionCV
from sklearn.model_selection import GroupKFold

from fedvpa.config import FeaturesConfig
from fedvpa.errors import BadInputError
from fedvpa.evaluation.statistics import Interval, show
from fedvpa.experiment.subjects import untrained_pairs
from fedvpa.features.cache import FeatureCache
from fedvpa.policy.prompts import Prompt
from fedvpa.records import Item, PreferencePair, Progress
from fedvpa.winrate.judges import Judging
from fedvpa.winrate.statistics import bootstrap


class RewardJudge:
    """A Bradley-Terry reward per group, linear in features of a backbone that the selector did not
    use, trained on pairs that the selector never saw. `accuracy` is on prompts that the reward was
    not trained on (five folds), by group."""

    name = "reward"
    controls_length = True

    def __init__(
        self,
        pairs: Sequence[PreferencePair],
        features: FeaturesConfig,
        progress: Progress | None = None,
    ) -> None:
        """Train.

        Raises:
            BadInputError: pairs without a group, or a group with fewer than 20 pairs or five
                prompts.
        """
        self._cache = FeatureCache(features)
        self.backbone = features.backbone
        self.pairs: dict[str, int] = {}
        self.accuracy: dict[str, Interval] = {}
        self._direction: dict[str, NDArray[np.float64]] = {}
        if not pairs or any(p.group is None for p in pairs):
            raise BadInputError(
                "--judge-pairs: every pair needs a group (a folder for each, or a column `group`)"
            )
        for group in sorted({str(p.group) for p in pairs}):
            own = [p for p in pairs if p.group == group]
            prompts = np.unique([p.prompt_key() for p in own], return_inverse=True)[1]
            if len(own) < 20 or prompts.max() < 4:
                raise BadInputError(
                    f"--judge-pairs: group '{group}' has {len(own)} pairs; a judge needs 20 and"
                    " five prompts"
                )
            values = self._cache.pairs(own, progress).values.double().numpy()
            gaps = values[:, 0] - values[:, 1]
            self.pairs[group] = len(own)
            self.accuracy[group] = _cross_validated(gaps, prompts)
            self._direction[group] = _fit(gaps, prompts)

    @property
    def criteria(self) -> list[str]:
        """The groups."""
        return list(self._direction)

    def compare(
        self, criterion: str, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]
    ) -> list[float]:
        """See `Judge`."""
        items = [
            Item(prompt, text) for prompt, *texts in zip(prompts, first, second) for text in texts
        ]
        values = self._cache.items(items).values.double().numpy().reshape(len(prompts), 2, -1)
        margin = (values[:, 0] - values[:, 1]) @ self._direction[criterion]
        same = np.array([a == b for a, b in zip(first, second)], dtype=bool)
        return [float(x) for x in np.where(same, 0.5, margin > 0)]

    def about(self) -> dict[str, Any]:
        """See `Judge`."""
        shown = "; ".join(
            f"{group}: {show(found, 2)} on {self.pairs[group]} pairs"
            for group, found in self.accuracy.items()
        )
        words = (
            f"A reward model per group on features of {self.backbone}. Accuracy on prompts it was"
            f" not trained on: {shown}."
        )
        return {
            "about": words, "backbone": self.backbone, "pairs": self.pairs,
            "accuracy": self.accuracy,
        }  # fmt: skip


def _fit(gaps: NDArray[np.float64], prompts: NDArray[np.int_]) -> NDArray[np.float64]:
    """Direction of the reward; the penalty is chosen by accuracy on prompts left out. A pair and
    its reversal count alike."""
    scale = gaps.std() or 1.0
    x, y = np.concatenate([gaps, -gaps]) / scale, np.repeat([1, 0], len(gaps))
    folds = GroupKFold(min(5, len(np.unique(prompts)))).split(
        x, y, np.concatenate([prompts, prompts])
    )
    model = LogisticRegressionCV(
        Cs=np.logspace(-4, 1, 6), cv=list(folds), fit_intercept=False, scoring="neg_log_loss",
        max_iter=500,
        l1_ratios=(0,), use_legacy_attributes=False,
    )  # fmt: skip
    return np.asarray(model.fit(x, y).coef_[0] / scale)


def _cross_validated(gaps: NDArray[np.float64], prompts: NDArray[np.int_]) -> Interval:
    correct = np.zeros(len(gaps))
    for train, test in GroupKFold(5).split(gaps, groups=prompts):
        margin = gaps[test] @ _fit(gaps[train], prompts[train])
        correct[test] = (margin > 0) + 0.5 * (margin == 0)
    return bootstrap(correct)


def build(*, judging: Judging) -> RewardJudge:
    """Trained on the option `pairs` (`split`), with features of `backbone` at `layer`.

    Raises:
        BadInputError: no pairs are named, or they cannot be used.
    """
    given = judging.options
    if not given.get("pairs"):
        raise BadInputError("--judge reward: name pairs to train it on with --judge-pairs SOURCE")
    backbone, layer = given.get("backbone", "minilm"), given.get("layer", "0")
    if not layer.isdigit():
        raise BadInputError(f"--judge-layer {layer}: a number of layers")
    pairs, dropped = untrained_pairs(judging.selector, given["pairs"], given.get("split"), backbone)
    if dropped:
        judging.say(f"{dropped} of --judge-pairs were left out: the selector was trained on them")
    judged = set(judging.prompts)
    kept = [pair for pair in pairs if pair.prompt not in judged]
    if len(kept) < len(pairs):
        judging.say(
            f"{len(pairs) - len(kept)} of --judge-pairs were left out: they are on prompts that are"
            " judged"
        )
    return RewardJudge(kept, FeaturesConfig(backbone=backbone, layer=int(layer)), judging.progress)
