"""The coordinator's one port: agents, the CLI and metrics. Every call carries the run's token; nothing is decided here."""

from __future__ import annotations

import hmac
import json

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from pydantic import ValidationError

from .coordinator import Coordinator
from .errors import InputError
from .links import OPEN, AgentLink, hang_up
from .metrics import exposition
from .tether import PATH as TETHER_PATH
from .vigil import keep
from .wire import AGENT_PATH, RewindWish

MAX_BODY_BYTES = 64 << 20


def application(coordinator: Coordinator, token: str) -> web.Application:
    """Routes of one coordinator."""
    app = web.Application(middlewares=[_token_required(token)], client_max_size=MAX_BODY_BYTES)
    app[OPEN] = set()
    app.on_shutdown.append(hang_up)
    views = _Views(coordinator)
    app.add_routes(
        [
            web.get(AGENT_PATH, views.agent),
            web.get(TETHER_PATH, views.tether),
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

    async def agent(self, request: web.Request) -> web.StreamResponse:
        return await AgentLink(self._coordinator).serve(request)

    async def tether(self, request: web.Request) -> web.StreamResponse:
        """Held until the node's last process has ended."""
        if not self._coordinator.config.cluster.proof_of_death:
            raise web.HTTPConflict(text="cluster.proof_of_death = false\n")
        node = request.query["node"]
        return await keep(request, lambda: self._coordinator.died(node))

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
