"""Win rates: the bootstrap covers, equal length is what it says, texts are counted right, judges
ask both orders."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from fedvpa.config import FeaturesConfig
from fedvpa.errors import BadInputError
from fedvpa.records import Message, PreferencePair
from fedvpa.winrate.endpoint import EndpointJudge
from fedvpa.winrate.exact import ExactJudge
from fedvpa.winrate.judges import JudgeError
from fedvpa.winrate.reward import RewardJudge
from fedvpa.winrate.statistics import (
    bootstrap,
    difference,
    distinct_n,
    length_controlled,
    monotone,
    repetition,
    win_rate,
)
from tests.conftest import endpoint

PROMPTS = [(Message("user", "tea?"),), (Message("user", "coffee?"),)]


def test_the_bootstrap_interval_is_that_of_the_mean() -> None:
    values = np.random.default_rng(0).normal(size=400)
    found = bootstrap(values)
    half = 1.96 * values.std() / 20
    assert found["mean"] == pytest.approx(values.mean())
    assert (found["low"], found["high"]) == pytest.approx(
        (values.mean() - half, values.mean() + half), abs=0.02
    )
    assert math.isnan(win_rate([1.0])["low"])
    assert math.isnan(win_rate([])["mean"])
    assert difference([1.0, 0.5], [0.0, 0.5])["mean"] == 0.5


def test_a_win_by_length_alone_is_none_at_equal_length() -> None:
    generator = np.random.default_rng(0)
    words, other = generator.integers(20, 200, 300), generator.integers(20, 200, 300)
    longer = [float(a > b) for a, b in zip(words, other)]
    found = length_controlled(longer, words.tolist(), other.tolist())
    assert found["low"] < 0.5 < found["high"]
    skilled = [float(a - b + 120 > 0) for a, b in zip(words, other)]
    assert length_controlled(skilled, words.tolist(), other.tolist())["low"] > 0.7
    same = length_controlled([1.0, 0.0, 1.0, 1.0], [5] * 4, [5] * 4)
    assert same["mean"] == pytest.approx(0.75, abs=0.01)
    assert length_controlled([1.0] * 8, [5] * 8, [4] * 8)["mean"] > 0.9


def test_the_regression_is_the_usual_one() -> None:
    generator = np.random.default_rng(1)
    gap = (generator.normal(size=200) * 30).astype(int)
    won = (generator.random(200) < 1 / (1 + np.exp(-(0.6 + gap / 40)))).astype(float)
    x = np.tanh(gap / gap.std())[:, None]
    usual = LogisticRegression(C=1.0).fit(x, won)
    expected = 1 / (1 + np.exp(-usual.intercept_[0]))
    assert length_controlled(won.tolist(), gap.tolist(), [0] * 200)["mean"] == pytest.approx(
        expected, abs=2e-3
    )


def test_texts_are_counted() -> None:
    assert distinct_n("a b a b", 2) == pytest.approx(2 / 3)
    assert math.isnan(distinct_n("a", 2))
    assert repetition("a b c d a b c d") == pytest.approx(1 / 5)
    assert repetition("a b") == 0
    assert monotone([3.0, 2.0, 2.0, 1.0])
    assert not monotone([1.0, 3.0, 2.0])


def test_the_exact_judge_reads_the_attribute() -> None:
    judge = ExactJudge(["concise", "asking"])
    assert judge.compare("concise", PROMPTS, ["one", "one two"], ["one two", "one two"]) == [
        1.0,
        0.5,
    ]
    assert judge.compare("asking", PROMPTS, ["Really?", "No."], ["Really.", "Why?"]) == [1.0, 0.0]


def verdict(text: str, tokens: int = 3) -> tuple[int, dict[str, Any]]:
    choice = {
        "index": 0,
        "finish_reason": "stop",
        "message": {"role": "assistant", "content": text},
    }
    usage = {"prompt_tokens": tokens, "completion_tokens": 1, "total_tokens": tokens + 1}
    return 200, {
        "id": "",
        "object": "",
        "created": 0,
        "model": "m",
        "system_fingerprint": "",
        "choices": [choice],
        "usage": usage,
    }


def judge_at(url: str, **more: Any) -> EndpointJudge:
    return EndpointJudge(url, "m", {"kind": "kindness"}, first_wait=0.01, attempts=3, **more)


def test_an_answer_that_follows_the_order_is_half_a_win_and_is_counted() -> None:
    with endpoint(lambda _: verdict("A")) as (url, asked):
        judge = judge_at(url)
        assert judge.compare("kind", PROMPTS, ["x", "same"], ["y", "same"]) == [0.5, 0.5]
        assert (judge.usage.disagreements, judge.usage.comparisons, len(asked)) == (1, 1, 2)
        assert judge.about()["prompt_tokens"] == 6
    assert "kindness" in asked[0]["messages"][0]["content"]
    with endpoint(lambda _: verdict("tie")) as (url, _):
        assert judge_at(url).compare("kind", PROMPTS[:1], ["x"], ["y"]) == [0.5]


def test_an_endpoint_that_stumbles_is_asked_again_and_one_that_fails_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = iter([(503, {}), (429, {}), verdict("B"), verdict("A")])
    monkeypatch.setenv("SOME_KEY", "secret")
    with endpoint(lambda _: next(answers)) as (url, asked):
        judge = judge_at(url, workers=1, key_variable="SOME_KEY")
        assert judge.compare("kind", PROMPTS[:1], ["x"], ["y"]) == [0.0]
        assert (judge.usage.retries, len(asked)) == (2, 4)
    with (
        endpoint(lambda _: verdict("I cannot say")) as (url, asked),
        pytest.raises(JudgeError, match="instead of A, B or TIE"),
    ):
        judge_at(url).compare("kind", PROMPTS[:1], ["x"], ["y"])
    assert len(asked) == 3
    with pytest.raises(JudgeError, match=r"m at http.*:9/v1 gave no verdict"):
        judge_at("http://127.0.0.1:9/v1").compare("kind", PROMPTS[:1], ["x"], ["y"])


def test_a_reward_judge_needs_groups_and_pairs(tiny_model: Any) -> None:
    features = FeaturesConfig(backbone=str(tiny_model), layer=2, dtype="float32")
    pair = PreferencePair(PROMPTS[0], "yes", "no")
    with pytest.raises(BadInputError, match="needs a group"):
        RewardJudge([pair], features)
    with pytest.raises(BadInputError, match="'kind' has 1 pairs"):
        RewardJudge([PreferencePair(PROMPTS[0], "yes", "no", group="kind")], features)
