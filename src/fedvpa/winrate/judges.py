"""Judges of pairs of responses: exact measures of persona attributes, reward models that know
neither the selector's data nor its backbone, and any OpenAI-compatible endpoint. A judge that
fails says so; nothing stands in for it."""

from __future__ import annotations

import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegressionCV
from sklearn.model_selection import GroupKFold

from fedvpa.config import FeaturesConfig
from fedvpa.data.personas import ATTRIBUTES, measure
from fedvpa.errors import BadInputError, RunError
from fedvpa.evaluation.statistics import Interval
from fedvpa.features.cache import FeatureCache
from fedvpa.policy.prompts import Prompt
from fedvpa.records import Item, PreferencePair, Progress
from fedvpa.winrate.statistics import bootstrap

POLES = {
    pole: (name, sign) for name, low, high in ATTRIBUTES for pole, sign in ((low, -1), (high, 1))
}
"""Pole of a persona attribute to (attribute, sign)."""


class JudgeError(RunError):
    """A judge could not give an answer; what it was to measure is missing."""


@runtime_checkable
class Judge(Protocol):
    """Says which of two responses to a prompt is better by a criterion, usually the name of a
    preference."""

    @property
    def name(self) -> str:
        """What its figures are printed under."""
        ...

    @property
    def criteria(self) -> list[str]:
        """What it can measure."""
        ...

    @property
    def controls_length(self) -> bool:
        """Whether its win rates are to be given at equal length too."""
        ...

    def compare(
        self, criterion: str, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]
    ) -> list[float]:
        """1 where the first response is better, 0 where the second is, 1/2 for a tie.

        Raises:
            JudgeError: no answer could be had for one of the prompts.
        """
        ...

    def about(self) -> dict[str, Any]:
        """What a reader has to know to trust its figures."""
        ...


@dataclass(frozen=True)
class ExactJudge:
    """By `measure`: the response further towards the pole is the better one. Criteria are poles of
    persona attributes."""

    criteria: list[str]
    name: str = "exact"
    controls_length: bool = False

    def compare(
        self, criterion: str, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]
    ) -> list[float]:
        """See `Judge`."""
        attribute, sign = POLES[criterion]
        gaps = [
            sign * (measure(a)[attribute] - measure(b)[attribute]) for a, b in zip(first, second)
        ]
        return [1.0 if gap > 0 else 0.0 if gap < 0 else 0.5 for gap in gaps]

    def about(self) -> dict[str, Any]:
        """See `Judge`."""
        return {"measures": {c: POLES[c][0] for c in self.criteria}}


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
        values = self._cache.items(items)[0].double().numpy().reshape(len(prompts), 2, -1)
        margin = (values[:, 0] - values[:, 1]) @ self._direction[criterion]
        same = np.array([a == b for a, b in zip(first, second)], dtype=bool)
        return [float(x) for x in np.where(same, 0.5, margin > 0)]

    def about(self) -> dict[str, Any]:
        """See `Judge`."""
        return {"backbone": self.backbone, "pairs": self.pairs, "accuracy": self.accuracy}


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


@dataclass
class Usage:
    """What an endpoint was asked and what it used."""

    requests: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    disagreements: int = 0
    """Comparisons whose answer changed with the order."""
    comparisons: int = 0


@dataclass
class EndpointJudge:
    """Any OpenAI-compatible endpoint. Both orders of A and B are asked; answers that change with
    the order are half a win.

    `descriptions` says in words what each criterion rewards.
    """

    url: str
    model: str
    descriptions: Mapping[str, str]
    key_variable: str = "OPENAI_API_KEY"
    workers: int = 4
    attempts: int = 5
    timeout: float = 60.0
    first_wait: float = 1.0
    price: tuple[float, float] | None = None
    """Of a million tokens read and of a million written."""
    name: str = "endpoint"
    controls_length: bool = True
    usage: Usage = field(default_factory=Usage)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def criteria(self) -> list[str]:
        """Those that are described."""
        return list(self.descriptions)

    def compare(
        self, criterion: str, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]
    ) -> list[float]:
        """See `Judge`."""
        with ThreadPoolExecutor(self.workers) as pool:
            jobs = [
                pool.submit(self._both_orders, criterion, *row)
                for row in zip(prompts, first, second)
            ]
            try:
                return [job.result() for job in jobs]
            except JudgeError:
                pool.shutdown(cancel_futures=True)
                raise

    def about(self) -> dict[str, Any]:
        """See `Judge`."""
        used, cost = self.usage, None
        if self.price is not None:
            cost = (
                used.prompt_tokens * self.price[0] + used.completion_tokens * self.price[1]
            ) / 1e6
        return {
            "model": self.model,
            "criteria": dict(self.descriptions),
            **vars(used),
            "cost": cost,
        }

    def _both_orders(self, criterion: str, prompt: Prompt, first: str, second: str) -> float:
        if first == second:
            return 0.5
        one, two = (
            self._ask(criterion, prompt, first, second),
            1 - self._ask(criterion, prompt, second, first),
        )
        with self._lock:
            self.usage.comparisons += 1
            self.usage.disagreements += one != two
        return (one + two) / 2

    def _ask(self, criterion: str, prompt: Prompt, a: str, b: str) -> float:
        """1 if A is said to be better, 0 if B is, 1/2 for a tie."""
        question = _question(self.descriptions[criterion], prompt, a, b)
        body = {"model": self.model, "messages": question, "max_tokens": 8, "temperature": 0.0}
        headers = {"Content-Type": "application/json"}
        if os.environ.get(self.key_variable):
            headers["Authorization"] = f"Bearer {os.environ[self.key_variable]}"
        address = self.url.rstrip("/") + "/chat/completions"
        problem = ""
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(self.first_wait * 2 ** (attempt - 1))
            with self._lock:
                self.usage.requests += 1
                self.usage.retries += attempt > 0
            try:
                request = urllib.request.Request(address, json.dumps(body).encode(), headers)
                with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                    content = json.load(reply)
                said = (
                    str(content["choices"][0]["message"]["content"])
                    .strip()
                    .strip(".*\"'() ")
                    .upper()
                )
            except urllib.error.HTTPError as error:
                problem = (
                    f"HTTP {error.code} {error.reason}: {error.read(300).decode(errors='replace')}"
                )
                if error.code in (400, 401, 403, 404, 422):  # asking again will not help
                    break
                continue
            # no connection, or not such an endpoint
            except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
                problem = f"{type(error).__name__}: {error}"
                continue
            used = content.get("usage") or {}
            with self._lock:
                self.usage.prompt_tokens += int(used.get("prompt_tokens", 0))
                self.usage.completion_tokens += int(used.get("completion_tokens", 0))
            if said in _ANSWERS:
                return _ANSWERS[said]
            problem = f"answered {said[:40]!r} instead of A, B or TIE"
        raise JudgeError(f"the judge {self.model} at {self.url} gave no verdict: {problem}")


_ANSWERS = {"A": 1.0, "B": 0.0, "TIE": 0.5}


def _question(description: str, prompt: Prompt, a: str, b: str) -> list[dict[str, str]]:
    conversation = "\n\n".join(f"{m.role.upper()}: {m.content}" for m in prompt)
    rules = (
        "You compare two replies, A and B, to the last message of a conversation, for one reader."
        f" The order in which they are shown says nothing. What this reader wants: {description}."
        " Reply with one word: A, B, or TIE."
    )
    shown = f"<conversation>\n{conversation}\n</conversation>\n\n<A>\n{a}\n</A>\n\n<B>\n{b}\n</B>"
    return [{"role": "system", "content": rules}, {"role": "user", "content": shown}]
