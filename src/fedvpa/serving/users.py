"""The routes that concern one user: comparisons, posterior, the next question, saved preferences,
and forgetting all of it."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse

from fedvpa.errors import BadInputError
from fedvpa.records import PreferencePair
from fedvpa.serving.access import Caller, DeniedError, checked_id
from fedvpa.serving.model import Served
from fedvpa.serving.observing import Metrics
from fedvpa.serving.people import People, read_pair
from fedvpa.serving.questions import Bank, draft_requests, telling
from fedvpa.serving.shapes import ComparisonIn, PosteriorIn, SavedIn
from fedvpa.serving.work import Answers, LongWork


@dataclass(frozen=True)
class UserRoutes:
    """The routes, of a model's users.

    Args:
        served: the model.
        metrics: what is counted.
        work: what takes long.
    """

    served: Served
    metrics: Metrics
    work: LongWork

    def router(self) -> APIRouter:
        """All of them."""
        router, one = APIRouter(), "/v1/users/{user}"
        router.post(one + "/comparisons")(self.add)
        router.delete(one + "/comparisons/{number}")(self.take_back)
        router.get(one)(self.show)
        router.get(one + "/export")(self.export)
        router.delete(one)(self.forget)
        router.get(one + "/next")(self.following)
        router.put(one + "/preferences/{name}")(self.save)
        router.delete(one + "/preferences/{name}")(self.unsave)
        router.post("/v1/preferences")(self.infer)
        return router

    @property
    def people(self) -> People:
        """The users."""
        return self.served.people

    async def add(self, user: str, body: ComparisonIn, request: Request) -> Any:
        """Keep a choice; the posterior after it."""
        owner = _mine(user, request)
        pair = _pair(body, self.served.bank)
        if pair is None:  # a tie tells nothing of z
            added = 0
        else:
            added = await self.work(self.people.add, owner, [pair])
            self.metrics.updates.inc(added)
        found = await asyncio.to_thread(self.people.preference, owner)
        return {"added": added} | self.people.summary(found)

    async def take_back(self, user: str, number: str, request: Request) -> Any:
        """Take a choice back; the posterior after it."""
        owner = _mine(user, request)
        if number != "last" and not number.isdecimal():
            raise DeniedError(400, "invalid_value", "comparisons/ID: a number, or 'last'")
        which = None if number == "last" else int(number)
        if not await asyncio.to_thread(self.people.store.take_back, owner, which):
            raise DeniedError(404, "not_found", "no such comparison")
        return self.people.summary(await asyncio.to_thread(self.people.preference, owner))

    async def show(self, user: str, request: Request) -> Any:
        """All that is known of a user."""
        return await asyncio.to_thread(self.people.described, _mine(user, request))

    async def export(self, user: str, request: Request) -> Any:
        """The same with what is stored, as a file."""
        owner = _mine(user, request)
        found = await asyncio.to_thread(self.people.described, owner)
        saved = self.people.store.saved(owner)
        rows = {name: {"run": run, "z": z} for name, (run, z) in saved.items()}
        kept = [
            {"id": c.id, "at": c.at, "features": c.features.flatten().tolist(),
             "backbone": c.signature}
            for c in self.people.of(owner)
        ]  # fmt: skip
        whole = {"user": owner, **found, "saved": rows, "kept": kept}
        name = "".join(c if c.isascii() and c.isalnum() else "_" for c in owner)
        return JSONResponse(
            whole, headers={"Content-Disposition": f'attachment; filename="{name}.json"'}
        )

    async def forget(self, user: str, request: Request) -> Any:
        """Remove all of it."""
        owner = _mine(user, request)
        return {"user": owner, "deleted": await asyncio.to_thread(self.people.forget, owner)}

    async def following(
        self, user: str, request: Request, skip: Annotated[list[int] | None, Query()] = None
    ) -> Any:
        """What to ask next; `skip` names questions of the bank that are not to be asked."""
        owner = _mine(user, request)
        if len(self.served.bank):
            found = await self.work(self.served.bank.next, owner, skip or [])
            if found is None:
                raise DeniedError(404, "all_answered", "every question of the bank is answered")
            return found.to_json()
        seed = random.SystemRandom().getrandbits(48)
        ends = list(self.served.named.values()) if self.served.steers else []
        requests = draft_requests(ends, seed)
        answers = Answers(self.served.engine, requests)
        try:
            drafts = [answer.text for answer in await answers.whole()]
        finally:
            answers.cancel()
        found = await self.work(telling, self.people, owner, requests[0].prompt, drafts, seed)
        if found is None:
            raise DeniedError(503, "no_question", "all drafts were the same; ask again", 1.0)
        return found.to_json()

    async def save(self, user: str, name: str, body: SavedIn, request: Request) -> Any:
        """Save a preference under a name."""
        owner = _mine(user, request)
        try:
            checked_id(name)
        except BadInputError as error:
            raise DeniedError(400, "invalid_value", f"name: {error}") from error
        if name in self.served.named:
            raise DeniedError(400, "invalid_value", f"'{name}' is a preference of everybody's")
        caller: Caller = request.state.caller
        model = f"fedvpa/{'mine' if self.served.named else 'neutral'}"
        wanted = await asyncio.to_thread(
            self.served.preference, model, body.preference, owner, caller
        )
        assert wanted.z is not None
        await asyncio.to_thread(self.people.save, owner, name, wanted.z)
        return {"name": name, "z": wanted.z.tolist()}

    async def unsave(self, user: str, name: str, request: Request) -> Any:
        """Remove a saved preference."""
        if not await asyncio.to_thread(self.people.store.unsave, _mine(user, request), name):
            raise DeniedError(404, "not_found", f"no preference '{name}' is saved")
        return {"name": name, "deleted": True}

    async def infer(self, body: PosteriorIn) -> Any:
        """A posterior that is kept nowhere here."""
        self.people.signing()  # or it would be for nothing
        pairs = [p for c in body.comparisons if (p := _pair(c, self.served.bank)) is not None]
        found = await self.work(self.people.inferred, pairs)
        return self.people.summary(found) | {"token": self.people.token(found)}


def _mine(user: str, request: Request) -> str:
    """The user, if the caller may act for it.

    Raises:
        DeniedError: it may not, or there can be no such user.
    """
    caller: Caller = request.state.caller
    try:
        return caller.of_user(checked_id(user))
    except BadInputError as error:
        raise DeniedError(400, "invalid_value", str(error)) from error


def _pair(body: ComparisonIn, bank: Bank) -> PreferencePair | None:
    """What was compared, the better response as chosen; None for a tie.

    Raises:
        DeniedError: 400: it does not say what was compared, or compares nothing.
    """
    if body.question is not None:
        known = bank.answers(body.question)
        if known is None or body.choice is None or body.messages is not None:
            raise DeniedError(400, "invalid_value", "question: a number of the bank, with a choice")
        prompt, a, b = known
        messages: list[Any] = [m._asdict() for m in prompt]
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
