"""Plays a list of faults on a live run, one after the other, and remembers what the run said meanwhile.

The witness stands between the platform and the screen: the coordinator's events pass through it as soon as they are told, so nothing is
polled while nothing happens. The conductor waits for each fault's moment, inflicts it, ends it, and waits until the run trains again.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from keepstep.storage.errors import StorageError
from keepstep.storage.runlog import RunLog

from . import faultverdict
from .breaking import Scene, Struck, strike
from .client import CoordinatorClient, CoordinatorRefused, CoordinatorUnreachable
from .errors import InputError
from .faultkinds import After, AtStep, Fault, expected
from .faultverdict import Episode
from .launchers import Audience
from .roots import known_token
from .sections import RunConfig
from .victims import CannotBreak
from .waiting import is_set_within

LOOK_S: Final = 0.05
PATIENCE_S: Final = 300.0  # for a run to train again after a fault; then the next fault comes all the same


class Witness:
    """Remembers every event, and passes all on."""

    def __init__(self, audience: Audience) -> None:
        self._audience = audience
        self._news = asyncio.Event()
        self.events: list[Mapping[str, Any]] = []
        self.attempt = 0
        self.step = 0
        self.training = False
        self.trains_since: float | None = None  # monotonic; the first time

    def say(self, text: str) -> None:
        self._audience.say(text)

    def event(self, event: Mapping[str, Any]) -> None:
        self.events.append(event)
        self._follow(event)
        self._news.set()
        self._audience.event(event)

    def _follow(self, event: Mapping[str, Any]) -> None:
        if event["kind"] == "progress":
            self.attempt, self.step = event["attempt"], event["step"]
        elif event["kind"] == "training":
            self.attempt, self.training = event["attempt"], True
            self.trains_since = self.trains_since or event["at_s"]
        elif event["kind"] in ("draining", "waiting", "starting", "ending"):
            self.training = False

    async def until(self, holds: Callable[[], bool], patience_s: float) -> bool:
        """True as soon as it holds; looks at every event, and now and then (some conditions are about time)."""
        deadline = time.monotonic() + patience_s
        while not holds():
            if time.monotonic() > deadline:
                return False
            self._news.clear()
            await is_set_within(self._news, LOOK_S)
        return True

    def since(self, at_s: float) -> list[Mapping[str, Any]]:
        return faultverdict.window(self.events, at_s)


class Conductor:
    """`conduct()` runs beside the platform, and again beside the next one when the run was requeued; it goes on where it was."""

    def __init__(self, faults: Sequence[Fault], config: RunConfig, scene: Scene, witness: Witness) -> None:
        self.episodes: list[Episode] = []
        self.failed: list[str] = []  # faults that could not be inflicted, and why
        self._pending = list(faults)
        self._config = config
        self._scene = scene
        self._witness = witness
        self._client: CoordinatorClient | None = None

    @property
    def left(self) -> tuple[Fault, ...]:
        """Faults whose moment has not come yet."""
        return tuple(self._pending)

    async def conduct(self) -> None:
        try:
            while self._pending:
                await self._witness.until(lambda: self._due() is not None, float("inf"))
                fault = self._due()
                assert fault
                await self.play(fault)
        finally:
            await self.hang_up()

    def _due(self) -> Fault | None:
        return next((fault for fault in self._pending if self._witness.training and self._has_come(fault.moment)), None)

    def _has_come(self, moment: AtStep | After) -> bool:
        match moment:
            case AtStep(step):
                return self._witness.step >= step
            case After(seconds):
                began = self._witness.trains_since
                return began is not None and time.monotonic() - began >= seconds

    async def play(self, fault: Fault) -> Episode | None:
        """One fault, until the run trains again; None if it could not be inflicted."""
        try:
            status = await self.status()
            struck = await strike(fault, status, self._scene)
        except CannotBreak as error:
            self._witness.say(f"{fault} was not possible: {error}")
            self.failed.append(f"{fault}: {error}")
            self._done(fault)
            return None
        self._done(fault)
        number = len(self.episodes)
        self.episodes.append(self._episode(fault, struck, status))
        try:
            await self._endure(fault, struck)
        finally:
            if struck.heal:  # whatever happens: nobody is left stopped, cut or frozen
                struck.heal()
                self.episodes[number] = replace(self.episodes[number], until_s=time.monotonic())
        episode = self.episodes[number]
        await self._recover(episode)
        if stepped_at := faultverdict.stepped_at(episode, self._witness.since(episode.at_s)):
            self._witness.say(f"all ranks step again, {stepped_at - episode.at_s:.2f} s after {fault}")
        return episode

    def _done(self, fault: Fault) -> None:
        """By identity: a plan may have the same fault twice."""
        self._pending = [other for other in self._pending if other is not fault]

    def _episode(self, fault: Fault, struck: Struck, status: Mapping[str, Any]) -> Episode:
        who = f" (pid {', '.join(map(str, struck.pids))})" if struck.pids else ""
        self._witness.say(f"on purpose: {fault}{who} at step {status['step']}")
        return Episode(
            fault=fault,
            expected=expected(fault, lease_s=self._config.cluster.lease_s),
            node=struck.node,
            rank=struck.rank,
            pids=struck.pids,
            attempt=status["attempt"],
            step=max(status["step"], self._witness.step),
            at_s=struck.at_s,
        )

    async def _endure(self, fault: Fault, struck: Struck) -> None:
        """What goes on for ever ends when the run has got rid of it."""
        if fault.lasting_s is not None:
            await asyncio.sleep(struck.at_s + fault.lasting_s - time.monotonic())
        elif struck.heal:
            await self._recover(self.episodes[-1])

    async def _recover(self, episode: Episode) -> None:
        def over() -> bool:
            return faultverdict.is_over(episode, self._witness.since(episode.at_s), time.monotonic())

        if not await self._witness.until(over, PATIENCE_S):
            self._witness.say(f"after {episode.fault} the run did not train again within {PATIENCE_S:g} s")

    async def status(self) -> Mapping[str, Any]:
        """Of a run that trains and has a coordinator that says so; waits for one."""
        while True:
            try:
                self._client = self._client or await self._connect()
                status: dict[str, Any] = json.loads(await self._client.get("/v1/status"))
                if status["phase"] == "TRAINING":
                    return status
            except (CoordinatorUnreachable, CoordinatorRefused, StorageError, InputError):  # not there yet, or not at the moment
                await self.hang_up()
            await asyncio.sleep(LOOK_S)

    async def _connect(self) -> CoordinatorClient:
        opened = (await asyncio.to_thread(RunLog.open, self._scene.store)).newest_opened()
        if opened is None:
            raise CoordinatorUnreachable("no coordinator yet")
        return CoordinatorClient(opened.url, known_token(self._scene.store))

    async def hang_up(self) -> None:
        """For whoever calls `play` itself: at the end."""
        client, self._client = self._client, None
        if client:
            await client.close()
