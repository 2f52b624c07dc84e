"""Requests in OpenAI's form (https://platform.openai.com/docs/api-reference/chat), with what is
ours beside it, and the responses."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from fedvpa.policy.engine import Answer, Finish
from fedvpa.serving.access import DeniedError

MOST_ANSWERS = 16
MOST_STOPS = 4
NOT_HERE = (
    "tools", "tool_choice", "functions", "function_call", "logprobs", "top_logprobs", "audio",
    "modalities", "prediction", "web_search_options",
)  # fmt: skip
"""OpenAI's parameters that ask for what is not done here: refused, so that nobody believes that
they are."""


class TextPart(BaseModel):
    """Text within a message of several parts."""

    type: Literal["text"]
    text: str


class Turn(BaseModel):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        """Its text."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class Wanted(BaseModel):
    """Under which preference: one of these."""

    model_config = ConfigDict(extra="forbid")

    name: str | None = None
    mix: dict[str, float] | None = None
    z: list[float] | None = None
    token: str | None = None


class StreamOptions(BaseModel):
    """What a stream tells beside its text."""

    include_usage: bool = False


class ChatRequest(BaseModel):
    """Body of POST /v1/chat/completions. Parameters of OpenAI's that change nothing here (as
    `store`, `metadata`) are taken and not read."""

    model: str
    messages: Annotated[list[Turn], Field(min_length=1)]
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    user: str | None = None
    best_of: Annotated[int, Field(ge=1, le=64)] | None = None
    preference: Wanted | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    response_format: dict[str, Any] | None = None

    model_config = ConfigDict(extra="allow")

    def checked(self) -> None:
        """Refuse what would silently not be done.

        Raises:
            DeniedError: 400, naming the parameter.
        """
        given = self.model_extra or {}
        wrong = next((name for name in NOT_HERE if given.get(name)), None)
        for name in ("frequency_penalty", "presence_penalty", "logit_bias"):
            if wrong is None and getattr(self, name):
                wrong = name
        if wrong is None and (self.response_format or {}).get("type", "text") != "text":
            wrong = "response_format"
        if wrong is not None:
            raise DeniedError(400, "unsupported_parameter", f"{wrong}: is not supported")
        if len(self.stops) > MOST_STOPS or "" in self.stops:
            raise DeniedError(400, "invalid_value", f"stop: 1 to {MOST_STOPS} strings, none empty")

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end an answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ComparisonIn(BaseModel):
    """A choice of a user. Of two answers `a` and `b` (or of a question of the bank), `choice` says
    which was better; `chosen` and `rejected` say the same without a choice."""

    model_config = ConfigDict(extra="forbid")

    messages: list[Turn] | None = None
    chosen: str | None = None
    rejected: str | None = None
    question: int | None = None
    choice: Literal["a", "b", "tie"] | None = None


class PosteriorIn(BaseModel):
    """Comparisons of somebody whose preference is not kept here."""

    model_config = ConfigDict(extra="forbid")

    comparisons: Annotated[list[ComparisonIn], Field(max_length=100)]


class SavedIn(BaseModel):
    """A preference to save under a name."""

    model_config = ConfigDict(extra="forbid")

    preference: Wanted


def error_body(message: str, kind: str, code: str | None, param: str | None = None) -> Any:
    """An error, as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def usage(prompt: int, answers: list[int]) -> dict[str, int]:
    """Tokens of the conversation, and of all that was drawn."""
    drawn = sum(answers)
    return {
        "prompt_tokens": prompt, "completion_tokens": drawn, "total_tokens": prompt + drawn,
    }  # fmt: skip


def completion(
    name: str, created: int, model: str, answers: list[Answer], drawn: list[int], said: Any
) -> dict[str, Any]:
    """A whole response; `drawn` counts tokens of drafts, too, and `said` is the preference."""
    return {
        "id": name, "object": "chat.completion", "created": created, "model": model,
        "choices": [
            {
                "index": i, "message": {"role": "assistant", "content": a.text, "refusal": None},
                "logprobs": None, "finish_reason": finish_of(a.finish),
            }
            for i, a in enumerate(answers)
        ],
        "usage": usage(answers[0].prompt_tokens, drawn), "preference": said,
        "system_fingerprint": None,
    }  # fmt: skip


def chunk(
    name: str, created: int, model: str, index: int, delta: dict[str, str], finish: Finish = ""
) -> dict[str, Any]:
    """A part of a streamed response."""
    return {
        "id": name, "object": "chat.completion.chunk", "created": created, "model": model,
        "choices": [
            {
                "index": index, "delta": delta, "logprobs": None,
                "finish_reason": finish_of(finish) if finish else None,
            }
        ],
        "system_fingerprint": None,
    }  # fmt: skip


def finish_of(finish: Finish) -> str:
    """Why an answer ended, as OpenAI calls it."""
    return "length" if finish == "length" else "stop"
