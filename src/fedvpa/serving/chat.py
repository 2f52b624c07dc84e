"""POST /v1/chat/completions: answers under a preference, whole or as a stream."""

from __future__ import annotations

import asyncio
import json
import random
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from fedvpa.errors import FedvpaError
from fedvpa.policy.engine import Answer, Drawing
from fedvpa.policy.engine import Request as Asked
from fedvpa.records import Message
from fedvpa.serving.access import Caller, DeniedError
from fedvpa.serving.model import Preference, Served
from fedvpa.serving.observing import Metrics
from fedvpa.serving.settings import ServingSettings
from fedvpa.serving.shapes import ChatRequest, chunk, completion, error_body, usage
from fedvpa.serving.work import Answers, LongWork

LOOK = 0.5
"""Seconds between looks whether a client is still there."""


@dataclass(frozen=True)
class Chat:
    """The route.

    Args:
        served: the model.
        settings: limits.
        metrics: what is counted.
        work: what takes long.
    """

    served: Served
    settings: ServingSettings
    metrics: Metrics
    work: LongWork

    async def answer(self, body: ChatRequest, request: Request, caller: Caller) -> Response:
        """Answer a conversation.

        Raises:
            DeniedError: it cannot be answered, or not now.
        """
        # 1. What is asked for.
        body.checked()
        preference = await asyncio.to_thread(
            self.served.preference, body.model, body.preference, body.user, caller
        )
        prompt = conversation(body)
        drafts = self._drafts(body, preference)
        asked = self._asked(body, prompt, preference, drafts)
        # 2. All drafts begin side by side, or none.
        answers = Answers(self.served.engine, asked)
        # 3. Whole, or as it comes.
        reply = _Reply(self, body, prompt, preference, drafts, answers)
        if body.stream:
            return StreamingResponse(reply.stream(), media_type="text/event-stream")
        return await reply.whole(request.is_disconnected)

    def _drafts(self, body: ChatRequest, preference: Preference) -> int:
        """Drafts per answer; without a preference there is nothing to choose by."""
        usual = self.settings.best_of
        given = body.best_of or ((1 if self.served.steers else 4) if usual == "auto" else usual)
        if preference.z is None:
            if (body.best_of or 1) > 1:
                raise DeniedError(400, "invalid_value", "best_of: the base model has no preference")
            return 1
        return given

    def _asked(
        self, body: ChatRequest, prompt: list[Message], preference: Preference, drafts: int
    ) -> list[Asked]:
        most = self.settings.most_tokens
        tokens = min(body.max_completion_tokens or body.max_tokens or most, most)
        temperature = 0.8 if body.temperature is None else body.temperature
        top_p = 0.95 if body.top_p is None else body.top_p
        seed = random.SystemRandom().getrandbits(48) if body.seed is None else body.seed
        z = preference.z if self.served.steers else None
        count = (body.n or 1) * drafts
        if count > self.settings.rows + self.settings.waiting:
            raise DeniedError(400, "invalid_value", f"n, best_of: {count} drafts are too many")
        return [
            Asked(prompt, z, Drawing(tokens, temperature, top_p, body.stops, seed + i))
            for i in range(count)
        ]


@dataclass
class _Reply:
    """One response under way."""

    chat: Chat
    body: ChatRequest
    prompt: list[Message]
    preference: Preference
    drafts: int
    answers: Answers
    name: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))
    begun: float = field(default_factory=time.perf_counter)

    async def whole(self, gone: Callable[[], Awaitable[bool]]) -> Response:
        """All of it; drawing ends where nobody waits for it any more."""
        drawing = asyncio.ensure_future(self._drawn())
        try:
            while not (await asyncio.wait([drawing], timeout=LOOK))[0]:
                if await gone():
                    drawing.cancel()
                    return Response(status_code=499)
            chosen, counts = drawing.result()
        finally:
            self.answers.cancel()
        said = self.preference.told(self.drafts)
        self._count(counts)
        return JSONResponse(
            completion(self.name, self.created, self.body.model, chosen, counts, said)
        )

    async def stream(self) -> AsyncIterator[str]:
        """Server-sent events; when the client hangs up, drawing ends."""
        try:
            opened = False
            async for part in self._parts():
                if not opened:  # the first one says under which preference
                    part = part | {"preference": self.preference.told(self.drafts)}
                    opened = True
                yield _event(part)
            yield "data: [DONE]\n\n"
        except FedvpaError as error:
            yield _event(error_body(str(error), "server_error", "engine_failed"))
        finally:
            self.answers.cancel()

    async def _parts(self) -> AsyncIterator[dict[str, Any]]:
        head = (self.name, self.created, self.body.model)
        count = self.body.n or 1
        for i in range(count):
            yield chunk(*head, i, {"role": "assistant", "content": ""})
        if self.drafts > 1:  # what is chosen is known at the end
            chosen, counts = await self._drawn()
            for i, answer in enumerate(chosen):
                yield chunk(*head, i, {"content": answer.text})
                yield chunk(*head, i, {}, answer.finish)
        else:
            counts = [0] * count
            async for i, piece in self.answers.pieces():
                if not any(counts):
                    self.chat.metrics.first.observe(time.perf_counter() - self.begun)
                counts[i] = piece.tokens
                if piece.text:
                    yield chunk(*head, i, {"content": piece.text})
                if piece.finish:
                    yield chunk(*head, i, {}, piece.finish)
        self._count(counts)
        if self.body.stream_options is not None and self.body.stream_options.include_usage:
            last = chunk(*head, 0, {})
            tokens = usage(self.answers.tickets[0].prompt_tokens, counts)
            yield last | {"choices": [], "usage": tokens}

    async def _drawn(self) -> tuple[list[Answer], list[int]]:
        """The answers, each the best of its drafts, and the tokens of all drafts."""
        found = await self.answers.whole()
        counts = [answer.tokens for answer in found]
        z = self.preference.z
        if self.drafts == 1 or z is None:
            return found, counts
        texts = [answer.text for answer in found]
        rewards = await self.chat.work(self.chat.served.people.rewards, self.prompt, texts, z)
        parts = [range(i, i + self.drafts) for i in range(0, len(found), self.drafts)]
        return [found[max(part, key=rewards.__getitem__)] for part in parts], counts

    def _count(self, drawn: list[int]) -> None:
        tokens = self.chat.metrics.tokens
        tokens.labels("read").inc(self.answers.tickets[0].prompt_tokens)
        tokens.labels("drawn").inc(sum(drawn))


def conversation(body: ChatRequest) -> list[Message]:
    """The messages, as every record's are read.

    Raises:
        DeniedError: 400: the last one is not the user's, or one is empty.
    """
    roles = {"developer": "system"}
    found = [Message(roles.get(turn.role, turn.role), turn.text) for turn in body.messages]  # type: ignore[arg-type]
    if found[-1].role != "user":
        raise DeniedError(400, "invalid_value", "messages: the last one must be the user's")
    if not found[-1].content.strip():
        raise DeniedError(400, "invalid_value", "messages: the last one is empty")
    return found


def _event(part: dict[str, Any]) -> str:
    return f"data: {json.dumps(part, ensure_ascii=False)}\n\n"
