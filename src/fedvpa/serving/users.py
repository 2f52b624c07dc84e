"""The routes that concern one user: comparisons, posterior, the next question, saved preferences,
and forgetting all of it."""

from __future__ import annotations

import asyncio
import random
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from fedvpa.errors import BadInputError
from fedvpa.policy.engine import BusyError
from fedvpa.records import PreferencePair
from fedvpa.serving.access import Caller, DeniedError, checked_id
from fedvpa.serving.model import Served
from fedvpa.serving.observing import Metrics
from fedvpa.serving.people import People, read_pair
from fedvpa.serving.questions import fresh_question
from fedvpa.serving.shapes import COME_BACK, ComparisonIn, PosteriorIn, SavedIn


def user_routes(served: Served, metrics: Metrics) -> APIRouter:
    """The routes."""
    router, people = APIRouter(), served.people

    def mine(user: str, request: Request) -> str:
        caller: Caller = request.state.caller
        try:
            return caller.of_user(checked_id(user))
        except BadInputError as error:
            raise DeniedError(400, "invalid_value", str(error)) from error

    @router.post("/v1/users/{user}/comparisons")
    async def add(user: str, body: ComparisonIn, request: Request) -> Any:
        owner = mine(user, request)
        pair = _pair(body, people)
        if pair is None:  # a tie tells nothing of z
            added = 0
        else:
            added = await asyncio.to_thread(people.add, owner, [pair])
            metrics.updates.inc(added)
        found = await asyncio.to_thread(people.preference, owner)
        return {"added": added} | people.summary(found)

    @router.delete("/v1/users/{user}/comparisons/{number}")
    async def take_back(user: str, number: str, request: Request) -> Any:
        owner = mine(user, request)
        if number != "last" and not number.isdecimal():
            raise DeniedError(400, "invalid_value", "comparisons/ID: a number, or 'last'")
        which = None if number == "last" else int(number)
        if not await asyncio.to_thread(people.store.take_back, owner, which):
            raise DeniedError(404, "not_found", "no such comparison")
        return people.summary(await asyncio.to_thread(people.preference, owner))

    @router.get("/v1/users/{user}")
    async def show(user: str, request: Request) -> Any:
        return await asyncio.to_thread(people.described, mine(user, request))

    @router.get("/v1/users/{user}/export")
    async def export(user: str, request: Request) -> Any:
        owner = mine(user, request)
        found = await asyncio.to_thread(people.described, owner)
        saved = people.store.saved(owner)
        rows = {name: {"run": run, "z": z} for name, (run, z) in saved.items()}
        kept = [
            {"id": c.id, "at": c.at, "features": c.features.flatten().tolist(),
             "backbone": c.signature}
            for c in people.of(owner)
        ]  # fmt: skip
        whole = {"user": owner, **found, "saved": rows, "kept": kept}
        name = "".join(c if c.isascii() and c.isalnum() else "_" for c in owner)
        return JSONResponse(
            whole, headers={"Content-Disposition": f'attachment; filename="{name}.json"'}
        )

    @router.delete("/v1/users/{user}")
    async def forget(user: str, request: Request) -> Any:
        owner = mine(user, request)
        return {"user": owner, "deleted": await asyncio.to_thread(people.forget, owner)}

    @router.get("/v1/users/{user}/next")
    async def following(user: str, request: Request) -> Any:
        owner = mine(user, request)
        if not people.asks:
            seed = random.SystemRandom().getrandbits(48)
            try:
                fresh = await asyncio.to_thread(fresh_question, served, owner, seed)
            except BusyError as error:
                raise DeniedError(429, "overloaded", str(error), COME_BACK) from error
            if fresh is None:
                raise DeniedError(503, "no_question", "all drafts were the same; ask again", 1.0)
            return fresh
        found = await asyncio.to_thread(people.next, owner)
        if found is None:
            raise DeniedError(404, "all_answered", "every question of the bank is answered")
        # which response is shown first must not tell which one somebody else liked
        a, b = _shown(found.pair)
        return {
            "question": found.number, "messages": [m._asdict() for m in found.pair.prompt],
            "a": a, "b": b, "information": found.gain,
        }  # fmt: skip

    @router.put("/v1/users/{user}/preferences/{name}")
    async def save(user: str, name: str, body: SavedIn, request: Request) -> Any:
        owner = mine(user, request)
        try:
            checked_id(name)
        except BadInputError as error:
            raise DeniedError(400, "invalid_value", f"name: {error}") from error
        if name in served.named:
            raise DeniedError(400, "invalid_value", f"'{name}' is a preference of everybody's")
        caller: Caller = request.state.caller
        model = f"fedvpa/{'mine' if served.named else 'neutral'}"
        wanted = await asyncio.to_thread(served.preference, model, body.preference, owner, caller)
        assert wanted.z is not None
        await asyncio.to_thread(people.save, owner, name, wanted.z)
        return {"name": name, "z": wanted.z.tolist()}

    @router.delete("/v1/users/{user}/preferences/{name}")
    async def unsave(user: str, name: str, request: Request) -> Any:
        if not await asyncio.to_thread(people.store.unsave, mine(user, request), name):
            raise DeniedError(404, "not_found", f"no preference '{name}' is saved")
        return {"name": name, "deleted": True}

    @router.post("/v1/preferences")
    async def infer(body: PosteriorIn) -> Any:
        pairs = [p for c in body.comparisons if (p := _pair(c, people)) is not None]
        found = await asyncio.to_thread(people.inferred, pairs)
        return people.summary(found) | {"token": people.token(found)}

    return router


def _pair(body: ComparisonIn, people: People) -> PreferencePair | None:
    """What was compared, the better response as chosen; None for a tie.

    Raises:
        DeniedError: 400: it does not say what was compared, or compares nothing.
    """
    if body.question is not None:
        known = people.question(body.question)
        if known is None or body.choice is None or body.messages is not None:
            raise DeniedError(400, "invalid_value", "question: a number of the bank, with a choice")
        a, b = _shown(known)
        messages: list[Any] = [m._asdict() for m in known.prompt]
    else:
        if not body.messages or body.chosen is None or body.rejected is None:
            raise DeniedError(
                400, "invalid_value", "give messages, chosen and rejected; or question and choice"
            )
        a, b = body.chosen, body.rejected
        messages = [{"role": t.role, "content": t.text} for t in body.messages]
    if body.choice == "tie":
        return None
    chosen, rejected = (b, a) if body.choice == "b" else (a, b)
    try:
        return read_pair(messages, chosen, rejected)
    except BadInputError as error:
        raise DeniedError(400, "invalid_value", str(error)) from error


def _shown(pair: PreferencePair) -> tuple[str, str]:
    """Both responses in an order that does not depend on the label."""
    return (pair.chosen, pair.rejected) if pair.chosen_is_first() else (pair.rejected, pair.chosen)
