"""The agent's end of its conversation with a coordinator: one WebSocket, whole states one way, directives the other.

Each report is answered, and the coordinator speaks unasked when it changes its mind. Deadlines decide how soon a node is heard again after
its cable was cut for a moment: TCP sends what was lost again after 0.2, 0.4, 0.8, ... seconds, so that a report which met a cut of 1.5 s
would be answered after 3. A new connection is answered at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Final

import aiohttp

from .client import CoordinatorRefused, CoordinatorUnreachable, abrupt_connector, refusal
from .wire import AGENT_PATH, PARTING, REFUSED, AgentReport, Answer, Directive

MAX_ANSWER_BYTES: Final = 64 << 20
WORD_S: Final = 0.1  # for the last word to whoever does not listen


class Link:
    """One connection to the coordinator at `url`. Every method raises CoordinatorUnreachable or CoordinatorRefused.

    One task tells, one hears.

    Attributes:
        directive: the newest that came over this connection.
    """

    def __init__(self, url: str, session: aiohttp.ClientSession, socket: aiohttp.ClientWebSocketResponse, patience_s: float) -> None:
        self.url = url
        self.directive: Directive | None = None
        self._session = session
        self._socket = socket
        self._patience_s = patience_s
        self._unanswered: dict[int, tuple[AgentReport, float]] = {}  # by sequence: what was told, and when

    @staticmethod
    async def open(url: str, token: str, *, patience_s: float) -> Link:
        """`patience_s`: for the answer to a report; the connection must stand within half of it (a kernel that hears nothing begins again
        after 1 s only)."""
        session = aiohttp.ClientSession(headers={"Authorization": f"Bearer {token}"}, connector=abrupt_connector())
        try:
            async with asyncio.timeout(min(2.0, patience_s / 2)):
                socket = await session.ws_connect(url + AGENT_PATH, max_msg_size=MAX_ANSWER_BYTES, autoclose=False)
        except aiohttp.WSServerHandshakeError as error:
            await session.close()
            raise refusal(url + AGENT_PATH, error.status, error.message) from error
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            await session.close()
            raise CoordinatorUnreachable(f"no answer from {url}: {type(error).__name__} {error}") from error
        except BaseException:
            await session.close()
            raise
        return Link(url, session, socket, patience_s)

    async def tell(self, report: AgentReport) -> None:
        """The node's whole state."""
        self._check_patience()
        self._unanswered[report.sequence] = report, time.monotonic()
        try:
            async with asyncio.timeout(self._patience_s):  # what the other end does not read piles up here
                await self._socket.send_str(report.model_dump_json())
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise CoordinatorUnreachable(f"{self.url} does not listen: {type(error).__name__} {error}") from error

    def _check_patience(self) -> None:
        oldest_at = next((told_at for _, told_at in self._unanswered.values()), None)
        if oldest_at is not None and time.monotonic() - oldest_at > self._patience_s:
            raise CoordinatorUnreachable(f"{self.url} has not answered for over {self._patience_s:g} s")

    async def hear(self) -> tuple[Answer, AgentReport | None, float]:
        """The next answer, the newest report that it has taken into account, and when (monotonic) that was told; no report: it proves
        nothing about now."""
        message = await self._socket.receive()
        if message.type == aiohttp.WSMsgType.CLOSE and message.data == REFUSED:
            raise CoordinatorRefused(f"{self.url}: {message.extra}")
        if message.type != aiohttp.WSMsgType.TEXT:
            raise CoordinatorUnreachable(f"{self.url} closed the connection")
        answer = Answer.model_validate_json(message.data)
        self.directive = answer.directive or self.directive
        report, told_at = self._settle(answer.heard)
        return answer, report, told_at

    def _settle(self, heard: int) -> tuple[AgentReport | None, float]:
        found: tuple[AgentReport | None, float] = None, 0.0
        for sequence in [sequence for sequence in self._unanswered if sequence <= heard]:
            found = self._unanswered.pop(sequence)
        return found

    async def close(self) -> None:
        """At once, without a word."""
        await self._session.close()

    async def say_goodbye(self) -> None:
        """The last word before `close`, where one can be sent: a connection that just ends is the sign of a dead agent."""
        with contextlib.suppress(TimeoutError, aiohttp.ClientError, OSError):
            async with asyncio.timeout(WORD_S):
                await self._socket.send_frame(PARTING.to_bytes(2, "big"), aiohttp.WSMsgType.CLOSE)
