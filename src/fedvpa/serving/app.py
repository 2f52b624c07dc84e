"""The application: OpenAI's routes and those of users, behind keys and limits."""

from __future__ import annotations

import asyncio
import secrets
import time
import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from fedvpa import __version__
from fedvpa.errors import BadInputError
from fedvpa.serving.access import Access, DeniedError
from fedvpa.serving.chat import Chat
from fedvpa.serving.model import FAMILY, Served
from fedvpa.serving.observing import Metrics, logger
from fedvpa.serving.settings import ServingSettings
from fedvpa.serving.shapes import ChatRequest, error_body
from fedvpa.serving.users import UserRoutes
from fedvpa.serving.work import LongWork

LOCAL = ("127.0.0.1", "localhost", "::1")
"""Names of this machine for itself."""
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH")
PATIENCE = 30.0
"""Seconds that a request may take to be sent."""
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The page loads nothing from elsewhere, and is shown in no other page."""


def build_app(served: Served, settings: ServingSettings) -> FastAPI:
    """The application around a model."""
    metrics, started = Metrics(), int(time.time())
    access = Access(served.people.store, settings.local, settings.rate)
    work = LongWork(settings.waiting)
    chat = Chat(served, settings, metrics, work)

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        logger.info("ready")
        yield
        work.close()
        await asyncio.to_thread(served.close)

    # the usual pages of documentation load files from elsewhere
    app = FastAPI(title="fedvpa", version=__version__, lifespan=life, docs_url=None, redoc_url=None)

    @app.get("/health")
    async def health() -> Any:
        return {"status": "ok", "run": served.people.run, "engine": served.engine.name}

    page = resources.files("fedvpa.serving").joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/")
    async def front() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": POLICY})

    @app.get("/metrics")
    async def numbers() -> Response:
        return PlainTextResponse(metrics.text(served.engine.load))

    @app.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [_model(name, started) for name in served.models]}

    @app.get(f"/v1/models/{FAMILY}/{{name}}")
    async def model(name: str) -> Any:
        if f"{FAMILY}/{name}" not in served.models:
            raise DeniedError(404, "model_not_found", f"no model '{FAMILY}/{name}'")
        return _model(f"{FAMILY}/{name}", started)

    @app.post("/v1/chat/completions")
    async def complete(body: ChatRequest, request: Request) -> Response:
        return await chat.answer(body, request, request.state.caller)

    app.include_router(UserRoutes(served, metrics, work).router())
    _errors(app)
    app.add_middleware(Doors, settings=settings, access=access, metrics=metrics)
    if settings.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.origins), allow_methods=["*"],
            allow_headers=["authorization", "content-type"],
        )  # fmt: skip
    return app


def _model(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": FAMILY}


def _errors(app: FastAPI) -> None:
    """Every error in OpenAI's form; none holds what was sent."""

    @app.exception_handler(DeniedError)
    async def denied(_: Request, error: DeniedError) -> Response:
        return refusal(error)

    @app.exception_handler(BadInputError)
    async def bad(_: Request, error: BadInputError) -> Response:
        return refusal(DeniedError(400, "invalid_value", str(error)))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(p) for p in first["loc"] if p != "body") or "body"
        body = error_body(
            f"{place}: {first['msg']}", "invalid_request_error", "invalid_value", place
        )
        return JSONResponse(body, 400)

    @app.exception_handler(HTTPException)
    async def other(_: Request, error: HTTPException) -> Response:
        body = error_body(str(error.detail), "invalid_request_error", None)
        return JSONResponse(body, error.status_code, headers=error.headers)


def refusal(error: DeniedError) -> Response:
    """A refusal in OpenAI's form."""
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    kind = kinds.get(error.status, "invalid_request_error")
    headers = {"Retry-After": str(max(1, round(error.wait)))} if error.wait else None
    return JSONResponse(error_body(str(error), kind, error.code), error.status, headers=headers)


class Doors:
    """What every request passes: size, key, and a line in the log without what was said.

    An ASGI application, so that streams pass unbuffered and a client that hangs up is noticed.
    """

    def __init__(
        self, app: Any, settings: ServingSettings, access: Access, metrics: Metrics
    ) -> None:
        self._app, self._settings = app, settings
        self._access, self._metrics = access, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, name = time.perf_counter(), secrets.token_hex(8)
        status, key, begun = 500, "", False

        async def answered(message: Any) -> None:
            nonlocal status, begun
            if message["type"] == "http.response.start":
                status, begun = message["status"], True
                message["headers"] = [*message["headers"], (b"x-request-id", name.encode())]
            await send(message)

        try:
            request = Request(scope)
            self._host(request)
            if not self._free(scope["path"]):
                header = request.headers.get("authorization")
                caller = await asyncio.to_thread(self._access.caller, header)
                scope.setdefault("state", {})["caller"], key = caller, caller.key
            body, given = await self._whole(request, receive), False

            async def once() -> Any:
                # the body was read here; what follows is the client's hanging up
                nonlocal given
                if given:
                    return await receive()
                given = True
                return {"type": "http.request", "body": body, "more_body": False}

            await self._app(scope, once, answered)
        except DeniedError as error:
            await refusal(error)(scope, receive, answered)
        except Exception as error:  # where, but not what: a message may hold somebody's text
            where = "".join(traceback.format_tb(error.__traceback__))
            logger.error("a request failed (%s)\n%s", type(error).__name__, where)
            if not begun:
                body = error_body("the server failed; see its log", "server_error", "failed")
                await JSONResponse(body, 500)(scope, receive, answered)
        finally:
            seconds = time.perf_counter() - began
            route = getattr(scope.get("route"), "path", "other")
            method = scope["method"] if scope["method"] in METHODS else "other"
            self._metrics.requests.labels(route, method, str(status)).inc()
            self._metrics.seconds.labels(route).observe(seconds)
            fields = {
                "request": name, "route": route, "method": method, "status": status,
                "ms": round(1000 * seconds, 1), "key": key,
            }  # fmt: skip
            logger.info("request", extra={"fields": fields})

    def _free(self, path: str) -> bool:
        """Whether a route needs no key; /metrics does, where other machines can ask."""
        return path in ("/", "/health") or (path == "/metrics" and self._settings.local)

    def _host(self, request: Request) -> None:
        """Refuse other names of this machine: a web page elsewhere could have its own name point
        here, and read what only this machine may (DNS rebinding)."""
        if self._settings.local and request.url.hostname not in (*LOCAL, self._settings.host):
            raise DeniedError(421, "wrong_host", "ask for 127.0.0.1 or localhost")

    async def _whole(self, request: Request, receive: Any) -> bytes:
        """The body, if it comes soon enough."""
        try:
            async with asyncio.timeout(PATIENCE):
                return await self._body(request, receive)
        except TimeoutError as error:
            raise DeniedError(408, "too_slow", f"not sent within {PATIENCE:g} s") from error

    async def _body(self, request: Request, receive: Any) -> bytes:
        """The body, if it is not too large."""
        most = self._settings.most_bytes
        too_large = DeniedError(413, "request_too_large", f"a request has at most {most} bytes")
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > most:
            raise too_large
        parts, size = list[bytes](), 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise DeniedError(400, "hung_up", "the request was not sent whole")
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > most:
                raise too_large
            if not message.get("more_body"):
                return b"".join(parts)
