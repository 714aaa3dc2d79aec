"""The metadata services of AWS, Google and Azure, as far as notices go, on one loopback port: their paths, headers, tokens and manners."""

from __future__ import annotations

import asyncio
import json
import secrets
import threading
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from types import TracebackType
from typing import Any, Literal

from aiohttp import web

Trouble = Literal["", "hangs", "nonsense", "refuses"]
NONSENSE = "<html>captive portal</html>"


class MetadataServer:
    """Runs in a thread of its own. What it says may be changed at any time, from any thread; `asked` counts calls by path."""

    def __init__(self, machine: str = "vm_0") -> None:
        self.machine = machine
        self.trouble: Trouble = ""
        self.asked: Counter[str] = Counter()
        self._aws = ""
        self._gcp = "FALSE"
        self._azure: list[dict[str, Any]] = []
        self._tokens: set[str] = set()
        self._loop = asyncio.new_event_loop()
        self._changed = asyncio.Condition()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> MetadataServer:
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    @property
    def environment(self) -> dict[str, str]:
        """Makes an agent ask here."""
        return {
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": self.url,
            "GCE_METADATA_HOST": self.url.removeprefix("http://"),
            "KEEPSTEP_AZURE_METADATA_ENDPOINT": self.url,
        }

    # --- what is announced ------------------------------------------------------------------------------------------

    def interrupt_aws(self, in_s: float = 120, action: str = "terminate") -> None:
        at = datetime.now(UTC) + timedelta(seconds=in_s)
        self._aws = json.dumps({"action": action, "time": at.strftime("%Y-%m-%dT%H:%M:%SZ")})

    def preempt_gcp(self) -> None:
        def change() -> None:
            self._gcp = "TRUE"
            self._notify()

        self._loop.call_soon_threadsafe(change)

    def schedule_azure(self, *machines: str, kind: str = "Preempt", in_s: float = 30) -> None:
        at = format_datetime(datetime.now(UTC) + timedelta(seconds=in_s), usegmt=True)
        event = {"EventId": secrets.token_hex(8), "EventType": kind, "ResourceType": "VirtualMachine", "Resources": list(machines)}
        self._azure = [*self._azure, event | {"EventStatus": "Scheduled", "NotBefore": at}]

    def expire_tokens(self) -> None:
        self._tokens = set()

    # --- serving ----------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._start())
        self._started.set()
        self._loop.run_forever()
        self._loop.run_until_complete(self._runner.cleanup())
        self._loop.close()

    async def _start(self) -> None:
        app = web.Application(middlewares=[self._misbehave])
        app.router.add_put("/latest/api/token", self._give_token)
        app.router.add_get("/latest/meta-data/spot/instance-action", self._answer_aws)
        app.router.add_get("/computeMetadata/v1/instance/preempted", self._answer_gcp)
        app.router.add_get("/metadata/instance/compute/name", self._answer_name)
        app.router.add_get("/metadata/scheduledevents", self._answer_azure)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"

    @web.middleware
    async def _misbehave(self, request: web.Request, handler: Callable[..., Any]) -> web.StreamResponse:
        self.asked[request.path] += 1
        match self.trouble:
            case "hangs":
                await asyncio.Event().wait()
            case "nonsense":
                return web.Response(text=NONSENSE)
            case "refuses":
                return web.Response(status=503)
        answer: web.StreamResponse = await handler(request)
        return answer

    def _notify(self) -> None:
        async def notify() -> None:
            async with self._changed:
                self._changed.notify_all()

        self._notifying = self._loop.create_task(notify())

    async def _give_token(self, request: web.Request) -> web.Response:
        if not request.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "").isdigit():
            return web.Response(status=400)
        token = secrets.token_urlsafe(32)
        self._tokens.add(token)
        return web.Response(text=token)

    async def _answer_aws(self, request: web.Request) -> web.Response:
        if request.headers.get("X-aws-ec2-metadata-token") not in self._tokens:
            return web.Response(status=401)
        return web.Response(text=self._aws) if self._aws else web.Response(status=404)

    async def _answer_gcp(self, request: web.Request) -> web.Response:
        """Holds the question while the value is the one whose ETag the asker knows."""
        if request.headers.get("Metadata-Flavor") != "Google":
            return web.Response(status=403)
        if request.query.get("wait_for_change") == "true" and request.query.get("last_etag") == self._etag:
            async with self._changed, asyncio.timeout(float(request.query.get("timeout_sec", "60"))):
                await self._changed.wait()
        return web.Response(text=self._gcp, headers={"Metadata-Flavor": "Google", "ETag": self._etag})

    @property
    def _etag(self) -> str:
        return self._gcp.encode().hex()

    async def _answer_name(self, request: web.Request) -> web.Response:
        return web.Response(text=self.machine) if _is_asked_rightly(request) else web.Response(status=400)

    async def _answer_azure(self, request: web.Request) -> web.Response:
        if not _is_asked_rightly(request):
            return web.Response(status=400)
        return web.json_response({"DocumentIncarnation": len(self._azure), "Events": self._azure})


def _is_asked_rightly(request: web.Request) -> bool:
    return request.headers.get("Metadata") == "true" and "api-version" in request.query
