"""What the benchmarks of a live keepstep share: a run on this machine, and somebody beside it who breaks or watches it."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from keepstep.orchestrator import config as configs
from keepstep.orchestrator.breaking import Scene
from keepstep.orchestrator.commands import ready
from keepstep.orchestrator.conducting import Witness
from keepstep.orchestrator.launchers import LocalPlatform, Place, on_this_machine
from keepstep.orchestrator.sections import RunConfig
from keepstep.storage.faults import ENV_FAULTS

HERE = Path(__file__).resolve().parent
# Nothing but the benchmark ends the run: budgets are endless, pauses short.
ENDLESS = ("max_failures=1000000", "strikes=1000000", "backoff_s=0.05", "max_backoff_s=0.05")


class RunBroke(RuntimeError):
    """The run did not do what a benchmark needs; its folder is kept, and named."""


class Log:
    """An audience that writes a file."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", buffering=1)

    def say(self, text: str) -> None:
        self._file.write(f"{text}\n")

    def event(self, event: Mapping[str, Any]) -> None:
        if event["kind"] != "progress":
            self._file.write(f"{event}\n")


class Live:
    """One run of benchmarks/recovery.toml on 4 ranks (2 x 2) in a folder of its own, removed by nobody: its logs say why."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.folder = folder
        root = f"run.root={folder / 'root'}"
        cluster = (f"cluster.{override}" for override in ("nodes=2", "ranks_per_node=2", *ENDLESS))
        self.config: RunConfig = configs.load(HERE / "recovery.toml", [root, *cluster, *overrides])
        self.triggers = folder / "triggers"
        self.triggers.mkdir()
        self.store, self._config_path = ready(self.config)
        self.scene = Scene(root=self.config.run.root, store=self.store, triggers=self.triggers)
        self.witness = Witness(Log(folder / "events.log"))

    def run(self, beside: Callable[[], Awaitable[None]], *, faults: str = "", place: Place = on_this_machine) -> None:
        """Until `beside` ends; then everything is killed."""
        os.environ[ENV_FAULTS] = faults

        asyncio.run(self._both(beside, place))

    async def _both(self, beside: Callable[[], Awaitable[None]], place: Place) -> None:
        platform = LocalPlatform(self.config, self._config_path, self.witness, place)
        work, run = asyncio.ensure_future(beside()), asyncio.create_task(platform.run())
        await asyncio.wait((run, work), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            work.cancel()
            raise RunBroke(f"the run ended before the benchmark did ({run.result()}), see {self.folder}")
        for role in (platform.coordinator, *platform.nodes):
            if role.process and role.process.returncode is None:
                role.process.kill()
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)
        work.result()  # raises what it raised


def make_folder() -> Path:
    """With a short path: a Unix socket's has at most 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="ks-bench-"))
    os.environ["KEEPSTEP_SCRATCH_BASE"] = str(folder / "s")
    os.environ["OMP_NUM_THREADS"] = "1"
    return folder
