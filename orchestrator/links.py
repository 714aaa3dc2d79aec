"""The coordinator's ends of its conversations with agents (link.py). Nothing is decided here."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Final

from aiohttp import WSMsgType, web
from pydantic import ValidationError

from .coordinator import Coordinator, NoAnswer
from .directives import Orders
from .wire import PARTING, REFUSED, AgentReport, Answer, Directive

MAX_REPORT_BYTES: Final = 64 << 20
IDLE_S: Final = 15.0  # who has been silent for so long is closed; agents report every few seconds at the least
REASON_BYTES: Final = 120  # of a WebSocket's last word

OPEN: Final = web.AppKey("open links", set["AgentLink"])


async def hang_up(app: web.Application) -> None:
    """For `on_shutdown`."""
    for link in app[OPEN]:
        link.hang_up()


class AgentLink:
    """One agent's connection."""

    def __init__(self, coordinator: Coordinator) -> None:
        self.node = ""
        self._coordinator = coordinator
        self._socket = web.WebSocketResponse(compress=False, autoclose=False, max_msg_size=MAX_REPORT_BYTES)
        self._heard_at = time.monotonic()
        self._heard = -1
        self._said_heard = -1
        self._parted = False
        self._orders: Orders | None = None  # those that the newest directive was made of
        self._said: Directive | None = None
        self._news = asyncio.Event()
        self._task: asyncio.Task[object] | None = None
        self._watching: asyncio.TimerHandle | None = None

    def _idle_s(self) -> float:
        return max(IDLE_S, 3 * self._coordinator.config.cluster.lease_s)

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """Until it ends, or we do. A broken connection is the fastest sign of a dead agent."""
        try:
            await self._socket.prepare(request)
        except ConnectionError:  # it was not answered in time and has begun again
            return web.Response()
        request.app[OPEN].add(self)
        self._task = asyncio.current_task()
        self._watch()
        speaking = asyncio.create_task(self._speak())
        try:
            await self._listen()
        finally:
            speaking.cancel()
            if self._watching:
                self._watching.cancel()
            request.app[OPEN].discard(self)
            self._coordinator.leave(self, alive=self._parted)
        return self._socket

    def hang_up(self) -> None:
        """The server closes: whoever talks to us must find out where things stand."""
        if self._task:
            self._task.cancel()

    def wake(self) -> None:
        """The coordinator may have something to say."""
        self._news.set()

    async def _listen(self) -> None:
        while True:
            message = await self._socket.receive()
            self._heard_at = time.monotonic()
            if message.type != WSMsgType.TEXT:
                self._parted = message.type == WSMsgType.CLOSE and message.data == PARTING
                return
            try:
                report = AgentReport.model_validate_json(message.data)
            except ValidationError as error:
                why = f"agent and coordinator are of different versions of keepstep: {error}"
                await self._socket.close(code=REFUSED, message=why.encode()[:REASON_BYTES])
                return
            await self._take(report)

    def _watch(self) -> None:
        """Hangs up on who has been silent for too long. A time-out for each report would cost more than its answer."""
        left_s = self._heard_at + self._idle_s() - time.monotonic()
        if left_s <= 0:
            self.hang_up()
        else:
            self._watching = asyncio.get_running_loop().call_later(left_s, self._watch)

    async def _take(self, report: AgentReport) -> None:
        if report.node != self.node:
            self.node = report.node
            self._coordinator.join(self)
        self._coordinator.hear(report)
        self._heard = report.sequence
        await self._say_what_is_new()

    async def _speak(self) -> None:
        """What is to be said unasked."""
        while await self._news.wait():
            self._news.clear()
            await self._say_what_is_new()

    async def _say_what_is_new(self) -> None:
        if answer := self._answer():
            with contextlib.suppress(ConnectionError):  # who listens will notice
                await self._socket.send_str(answer.model_dump_json(exclude_defaults=True))
                if answer.directive and answer.directive.over:
                    self._coordinator.seen_off(self.node)

    def _answer(self) -> Answer | None:
        """What is new; None where nothing is, which is most of the time for all but one."""
        try:
            directive = self._new_directive()
        except NoAnswer as error:
            self._orders = None
            return Answer(unable=str(error))
        if directive is None and self._heard == self._said_heard:
            return None
        self._said, self._said_heard = directive or self._said, self._heard
        return Answer(heard=self._heard, directive=directive, report_s=self._coordinator.report_s)

    def _new_directive(self) -> Directive | None:
        orders = self._coordinator.orders_for(self.node)
        if orders.is_common and orders == self._orders:
            return None
        self._orders = orders
        directive = self._coordinator.directive(self.node)
        return None if directive == self._said else directive
