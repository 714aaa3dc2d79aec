"""The coordinator's one port: agents, the CLI and metrics. Every call carries the run's token; nothing is decided here."""

from __future__ import annotations

import asyncio
import hmac
import json

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from pydantic import ValidationError

from .client import LONG_POLL_S
from .coordinator import Coordinator, NoAnswer
from .errors import InputError
from .metrics import exposition
from .wire import AgentReport, Directive, RewindWish

MAX_BODY_BYTES = 64 << 20


def application(coordinator: Coordinator, token: str) -> web.Application:
    """Routes of one coordinator."""
    app = web.Application(middlewares=[_token_required(token)], client_max_size=MAX_BODY_BYTES)
    views = _Views(coordinator)
    app.add_routes(
        [
            web.post("/v1/report", views.report),
            web.get("/v1/directive", views.directive),
            web.get("/v1/config", views.config),
            web.get("/v1/status", views.status),
            web.post("/v1/stop", views.stop),
            web.post("/v1/save", views.save),
            web.post("/v1/drain", views.drain),
            web.post("/v1/readmit", views.readmit),
            web.post("/v1/resize", views.resize),
            web.post("/v1/rewind", views.rewind),
            web.get("/metrics", views.metrics),
        ]
    )
    return app


def _token_required(token: str) -> Middleware:
    expected = f"Bearer {token}"

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("Authorization", "")
        if not hmac.compare_digest(given.encode(), expected.encode()):
            raise web.HTTPUnauthorized(text="wrong token: it stands in the file `token` of the run's root; set KEEPSTEP_TOKEN to it\n")
        return await handler(request)

    return check


class _Views:
    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator

    async def report(self, request: web.Request) -> web.Response:
        try:
            report = AgentReport.model_validate_json(await request.read())
        except ValidationError as error:
            raise web.HTTPConflict(text=f"agent and coordinator are of different versions of keepstep: {error}\n") from error
        try:
            return _json(self._coordinator.hear(report))
        except NoAnswer as error:
            raise _unavailable(error) from error

    async def directive(self, request: web.Request) -> web.Response:
        """Held until the directive differs from what the node knows. A broken connection is the fastest sign of a dead agent."""
        node = request.query["node"]
        try:
            directive = await self._coordinator.next_directive(node, request.query.get("known", ""), LONG_POLL_S)
        except NoAnswer as error:
            raise _unavailable(error) from error
        except asyncio.CancelledError:
            self._coordinator.connection_broke(node)
            raise
        return _json(directive)

    async def config(self, _: web.Request) -> web.Response:
        return web.Response(text=self._coordinator.config.model_dump_json(), content_type="application/json")

    async def status(self, _: web.Request) -> web.Response:
        return web.Response(text=json.dumps(await self._coordinator.status()), content_type="application/json")

    async def stop(self, request: web.Request) -> web.Response:
        self._coordinator.ask_stop(request.query.get("why", "asked by a person"))
        return web.Response(text="stopping: one checkpoint at a step boundary, then all ranks leave\n")

    async def save(self, _: web.Request) -> web.Response:
        self._coordinator.ask_save()
        return web.Response(text="saving at the next step boundary\n")

    async def drain(self, request: web.Request) -> web.Response:
        self._coordinator.ask_drain(request.query["node"], request.query.get("why", "asked by a person"))
        return web.Response(text="draining\n")

    async def readmit(self, request: web.Request) -> web.Response:
        self._coordinator.ask_readmit(request.query["node"])
        return web.Response(text="trusted again\n")

    async def resize(self, request: web.Request) -> web.Response:
        nodes = int(request.query["nodes"])
        try:
            self._coordinator.ask_resize(nodes)
        except InputError as error:
            raise web.HTTPConflict(text=f"{error}\n") from error
        return web.Response(text=f"a full gang has {nodes} nodes from now on\n")

    async def rewind(self, request: web.Request) -> web.Response:
        try:
            wish = RewindWish.model_validate_json(await request.read())
            told = await self._coordinator.ask_rewind(to=wish.to, skip=wish.skip, override=wish.override)
        except (ValidationError, InputError) as error:
            raise web.HTTPConflict(text=f"{error}\n") from error
        return web.Response(text=f"{told}\n")

    async def metrics(self, _: web.Request) -> web.Response:
        body = exposition(await self._coordinator.status())
        return web.Response(body=body, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})


def _unavailable(error: NoAnswer) -> web.HTTPServiceUnavailable:
    return web.HTTPServiceUnavailable(text=f"{error}\n")


def _json(directive: Directive) -> web.Response:
    return web.Response(text=directive.model_dump_json(), content_type="application/json")
