"""Asks the sources of `cluster.notices`, for as long as the agent lives, whether its node will be taken away.

A service that does not answer, is slow or talks nonsense has given no notice: it is said once in the agent's log, and asked again after
a pause that grows. A notice is never taken back: by then the run may have moved on.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Protocol

import aiohttp
import tenacity

from keepstep.trainer.contract import ENV_AZURE_METADATA

from . import notices
from .notices import Nonsense, Notice

# The first two as the providers' own libraries name them; with "http://" or without.
ENV_AWS_METADATA: Final = "AWS_EC2_METADATA_SERVICE_ENDPOINT"
ENV_GCE_METADATA: Final = "GCE_METADATA_HOST"
LINK_LOCAL: Final = "http://169.254.169.254"

PERIOD_S: Final = 1.0  # Azure advises one second, AWS five at the most
FILE_PERIOD_S: Final = 0.1
MAX_PAUSE_S: Final = 10.0  # of Google's 30 s at most a third is lost to a service that came back
ANSWER_S: Final = 2.0
GCP_HANG_S: Final = 60  # how long Google's service may hold a question until the value changes
NO_ETAG: Final = "0"  # of no value: the question is answered at once
MAX_ANSWER_BYTES: Final = 1 << 16
MAX_FILE_BYTES: Final = 4096
AWS_TOKEN_TTL_S: Final = 21600

_WORD: Final = re.compile(r"[A-Za-z0-9._+/=-]{1,1000}")

Hear = Callable[[str, float], None]  # (reason, seconds until the node is gone)


class Silent(ConnectionError):
    """No answer that could be understood: says nothing about the node."""


class Source(Protocol):
    """One place where a notice may turn up."""

    period_s: float

    async def ask(self) -> Notice | None:
        """What it says now. Raises Silent or Nonsense."""
        ...


async def watch_notices(names: Iterable[str], default_s: float, hear: Hear) -> None:
    """Asks all sources until it is cancelled; `default_s` is what a notice gives that names no time."""
    async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as group:
        for name in names:
            group.create_task(watch(_source(name, session), default_s, hear))


def _source(name: str, session: aiohttp.ClientSession) -> Source:
    match name:
        case "aws":
            return Aws(Service(session, _address(ENV_AWS_METADATA, LINK_LOCAL)))
        case "gcp":
            return Gcp(Service(session, _address(ENV_GCE_METADATA, "metadata.google.internal")))
        case "azure":
            return Azure(Service(session, _address(ENV_AZURE_METADATA, LINK_LOCAL)))
        case _:
            return File(Path(name.removeprefix("file:")))


def _address(variable: str, default: str) -> str:
    address = (os.environ.get(variable) or default).rstrip("/")
    return address if "://" in address else f"http://{address}"


async def watch(source: Source, default_s: float, hear: Hear) -> None:
    """Tells each notice once, when it is first seen or changes."""
    told: Notice | None = None
    said: set[str] = set()
    retrying = tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception_type((Silent, Nonsense)),
        wait=tenacity.wait_exponential(multiplier=source.period_s, max=MAX_PAUSE_S),
        before_sleep=lambda state: _say_once(state, said),
    )
    while True:
        notice: Notice | None = await retrying(source.ask)
        if notice is not None and notice != told:
            told = notice
            hear(*_heard(notice, default_s))
        await asyncio.sleep(source.period_s)


def _heard(notice: Notice, default_s: float) -> tuple[str, float]:
    seconds, remark = notices.time_left(notice, datetime.now(UTC))
    seconds = default_s if seconds is None else seconds
    return notices.sentence(notice, seconds, remark), seconds


def _say_once(state: tenacity.RetryCallState, said: set[str]) -> None:
    """Each trouble once, and a few of them: a service that talks nonsense may have much to say."""
    trouble = str(state.outcome.exception()) if state.outcome else ""
    if trouble not in said and len(said) < 8:
        said.add(trouble)
        print(f"keepstep agent: {trouble}; no notice will come from there until it answers", file=sys.stderr)  # noqa: T201


class Service:
    """HTTP to a metadata service: never through a proxy, never redirected, short answers, a deadline on each."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = url

    async def call(self, method: str, path: str, headers: Mapping[str, str], *, hang_s: float = 0.0) -> tuple[int, str, Mapping[str, str]]:
        """(status, text, headers). Raises Silent."""
        timeout = aiohttp.ClientTimeout(total=ANSWER_S + hang_s)
        try:
            async with self._session.request(method, self._url + path, headers=headers, timeout=timeout, allow_redirects=False) as answer:
                body = await _first_bytes(answer.content)
                return answer.status, body.decode(errors="replace"), answer.headers
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:  # ValueError: a header that aiohttp cannot read
            raise Silent(f"no answer from {self._url}{path.partition('?')[0]}: {type(error).__name__} {error}".rstrip()) from error

    async def get(self, path: str, headers: Mapping[str, str], *, hang_s: float = 0.0) -> tuple[str, Mapping[str, str]]:
        """(text, headers). Raises Silent for any status but 200."""
        status, body, received = await self.call("GET", path, headers, hang_s=hang_s)
        if status != 200:
            raise self.refused(path, status)
        return body, received

    def refused(self, path: str, status: int) -> Silent:
        return Silent(f"{self._url}{path.partition('?')[0]} answered {status}")


async def _first_bytes(content: aiohttp.StreamReader) -> bytes:
    body = b""
    while len(body) < MAX_ANSWER_BYTES and (more := await content.read(MAX_ANSWER_BYTES - len(body))):
        body += more
    return body


def _word(text: str, what: str) -> str:
    """What a portal or proxy says in the service's place must not be kept as its word. Raises Nonsense."""
    word = text.strip()
    if not _WORD.fullmatch(word):
        raise Nonsense(f"{what} that is none")
    return word


class Aws:
    """Spot interruptions, through version 2 of the instance metadata service: a token first, then questions."""

    period_s = PERIOD_S
    _PATH = "/latest/meta-data/spot/instance-action"

    def __init__(self, service: Service) -> None:
        self._service = service
        self._token = ""

    async def ask(self) -> Notice | None:
        status, body, _ = await self._question()
        if status == 401:  # the token expired, or is another machine's: this one was restored from an image of its memory
            self._token = ""
            status, body, _ = await self._question()
        match status:
            case 200:
                return notices.from_aws(body)
            case 404:
                return None
            case _:
                raise self._service.refused(self._PATH, status)

    async def _question(self) -> tuple[int, str, Mapping[str, str]]:
        self._token = self._token or await self._new_token()
        return await self._service.call("GET", self._PATH, {"X-aws-ec2-metadata-token": self._token})

    async def _new_token(self) -> str:
        path, headers = "/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": str(AWS_TOKEN_TTL_S)}
        status, token, _ = await self._service.call("PUT", path, headers)
        if status != 200:
            raise self._service.refused(path, status)
        return _word(token, "aws gave a metadata token")


class Gcp:
    """Preemption of spot machines. The service holds the question until its answer changes.

    `maintenance-event` (TERMINATE_ON_HOST_MAINTENANCE) is not asked for: machines with GPUs are told an hour ahead, to leave then would
    give an hour away; the shutdown itself reaches the agent as SIGTERM.
    """

    period_s = PERIOD_S
    _PATH = "/computeMetadata/v1/instance/preempted"

    def __init__(self, service: Service) -> None:
        self._service = service
        self._etag = NO_ETAG

    async def ask(self) -> Notice | None:
        question = f"{self._PATH}?wait_for_change=true&last_etag={self._etag}&timeout_sec={GCP_HANG_S}"
        hang_s = 0.0 if self._etag == NO_ETAG else GCP_HANG_S
        body, headers = await self._service.get(question, {"Metadata-Flavor": "Google"}, hang_s=hang_s)
        if headers.get("Metadata-Flavor") != "Google":
            raise Nonsense("something answers for gcp's metadata service that is not it (no header Metadata-Flavor)")
        notice = notices.from_gcp(body)
        etag = headers.get("ETag", NO_ETAG)
        self._etag = etag if etag.isalnum() else NO_ETAG
        return notice


class Azure:
    """Scheduled events. They are told to all machines of a scale set, so the machine's own name is asked for first."""

    period_s = PERIOD_S
    _EVENTS = "/metadata/scheduledevents?api-version=2020-07-01"
    _NAME = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
    _HEADERS: Final[Mapping[str, str]] = {"Metadata": "true"}

    def __init__(self, service: Service) -> None:
        self._service = service
        self._machine = ""

    async def ask(self) -> Notice | None:
        if not self._machine:
            name, _ = await self._service.get(self._NAME, self._HEADERS)
            self._machine = _word(name, "azure gave a name of this machine")
        # The first question only switches the service on for this machine: it is not answered for up to two minutes.
        body, _ = await self._service.get(self._EVENTS, self._HEADERS)
        return notices.from_azure(body, self._machine)


class File:
    """A file that somebody or something puts there. It counts as soon as it exists, also at the agent's start."""

    period_s = FILE_PERIOD_S

    def __init__(self, path: Path) -> None:
        self._path = path
        self._was_empty = False

    async def ask(self) -> Notice | None:
        try:
            text = await asyncio.to_thread(self._read)  # it may lie on a file server that hangs
        except FileNotFoundError:
            return None
        except OSError as error:
            raise Silent(f"cannot read the notice file {self._path}: {error.strerror}") from error
        is_fresh, self._was_empty = not text.strip() and not self._was_empty, not text.strip()
        return None if is_fresh else notices.from_file(text, str(self._path))  # perhaps it was created, and is not written yet

    def _read(self) -> str:
        with self._path.open("rb") as file:
            return file.read(MAX_FILE_BYTES).decode(errors="replace")
