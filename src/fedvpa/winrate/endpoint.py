"""The endpoint judge: any OpenAI-compatible chat endpoint."""

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
from pathlib import Path
from typing import Any

from fedvpa.config import read_yaml
from fedvpa.errors import BadInputError
from fedvpa.foreign import harmless
from fedvpa.policy.prompts import Prompt
from fedvpa.winrate.judges import JudgeError, Judging


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
        """Preferences that have a description."""
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
        words = (
            f"{self.model}, both orders asked: {used.comparisons} comparisons,"
            f" {used.disagreements} changed with the order; {used.requests} requests"
            f" ({used.retries} of them retries), {used.prompt_tokens} + {used.completion_tokens}"
            " tokens" + (f", cost {cost:.4f}." if cost is not None else ".")
        )
        return {
            "about": words, "model": self.model, "criteria": dict(self.descriptions), **vars(used),
            "cost": cost,
        }  # fmt: skip

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
                with _OPENER.open(request, timeout=self.timeout) as reply:
                    content = json.loads(reply.read(MOST_BYTES))
                said = str(content["choices"][0]["message"]["content"])
                said = said.strip().strip(".*\"'() ").upper()
                read, written = (_count(content, n) for n in ("prompt_tokens", "completion_tokens"))
            except urllib.error.HTTPError as error:
                said = error.read(300).decode(errors="replace") if error.fp else ""
                problem = f"HTTP {error.code} {error.reason}: {said}"
                # asking again will not help
                if error.code in (400, 401, 403, 404, 422) or 300 <= error.code < 400:
                    break
                continue
            # no connection, or not such an endpoint
            except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
                problem = f"{type(error).__name__}: {error}"
                continue
            with self._lock:
                self.usage.prompt_tokens += read
                self.usage.completion_tokens += written
            if said in _ANSWERS:
                return _ANSWERS[said]
            problem = f"answered {said[:40]!r} instead of A, B or TIE"
        raise JudgeError(
            f"the judge {self.model} at {self.url} gave no verdict: {harmless(problem, 400)}"
        )


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: the key in the request's headers is for the address that was named."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> None:
        """Refuse.

        Raises:
            urllib.error.HTTPError: naming the other address.
        """
        reason = f"is redirected to {newurl}; name that address, if it is the judge's"
        raise urllib.error.HTTPError(req.full_url, code, reason, headers, None)


_OPENER = urllib.request.build_opener(_NoRedirect)
MOST_BYTES = 1 << 20
"""Of a reply to one comparison."""


def _count(content: Any, name: str) -> int:
    """Tokens, as far as the endpoint counts them."""
    used = content.get("usage")
    found = used.get(name) if isinstance(used, dict) else None
    return found if isinstance(found, int) and found >= 0 else 0


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


def build(*, judging: Judging) -> EndpointJudge:
    """The model `model` at `url`; the file `criteria` describes the preferences.

    Raises:
        BadInputError: no address or model is named, or the file cannot be used.
    """
    given = judging.options
    if not given.get("url"):
        raise BadInputError("--judge endpoint: name its address with --judge-url URL")
    if not given.get("model"):
        raise BadInputError("--judge-url: name the model to ask with --judge-model")
    described = {n: f"the reply that fits the preference '{n}' better" for n in judging.preferences}
    if given.get("criteria"):
        described = preference_texts(given["criteria"], judging.preferences)
    key, price = given.get("key-env", "OPENAI_API_KEY"), _price(given.get("price"))
    return EndpointJudge(given["url"], given["model"], described, key, price=price)


def preference_texts(file: str, preferences: Sequence[str]) -> dict[str, str]:
    """Preference to text, from a YAML file.

    Raises:
        BadInputError: a name that is no preference, or no text.
    """
    content = read_yaml(Path(file))
    for name, text in content.items():
        if name not in preferences:
            raise BadInputError(
                f"{file}: unknown preference '{name}' (known: {', '.join(preferences)})"
            )
        if not isinstance(text, str) or not text.strip():
            raise BadInputError(f"{file}: '{name}' needs a text")
    return {name: text.strip() for name, text in content.items()}


def _price(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        read, written = (float(part) for part in text.split(","))
    except ValueError as error:
        raise BadInputError(f"--judge-price {text}: is not IN,OUT, as in 0.15,0.6") from error
    return read, written
