"""A run whose parts are started one by one: coordinators and agents, each with an environment of its own."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from e2e.live import ENV_MARK, PATIENCE_S, LiveRun, environment_of

CLI = (sys.executable, "-m", "keepstep.orchestrator.cli")


@dataclass(slots=True)
class Part:
    """One process and what it says."""

    process: subprocess.Popen[str]
    output: list[str] = field(default_factory=list)
    _reader: threading.Thread | None = None

    def read(self) -> Part:
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def _read(self) -> None:
        assert self.process.stdout
        with self.process.stdout as lines:
            self.output.extend(line.rstrip("\n") for line in lines)

    def wait(self) -> int:
        code = self.process.wait(PATIENCE_S)
        assert self._reader
        self._reader.join(PATIENCE_S)
        return code


@dataclass(slots=True)
class PartedRun(LiveRun):
    """`prepare`, then `coordinator` and `agent` as often as wanted. The newest coordinator counts as the run's process."""

    scratch: Path = Path()
    parts: dict[str, Part] = field(default_factory=dict)

    def prepare(self) -> PartedRun:
        environment = environment_of(self.environment)
        prepared = subprocess.run(
            self._command("prepare"), env=environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
        assert prepared.returncode == 0, prepared.stderr
        return self

    def coordinator(self, name: str, environment: Mapping[str, str] | None = None) -> Part:
        part = self._begin(name, self._command("coordinator"), environment)
        self.process, self.output = part.process, part.output
        return part

    def agent(self, name: str, environment: Mapping[str, str] | None = None) -> Part:
        command = [*CLI, "agent", "--root", self.root, "--node", name, "--scratch", str(self.scratch / name)]
        return self._begin(name, command, environment)

    def end(self) -> None:
        """Whatever is still there dies, and is waited for."""
        if self.process:
            self.kill_everything()
        for part in self.parts.values():
            part.wait()

    def _command(self, verb: str) -> list[str]:
        overrides = [f"run.root={self.root}", *self.overrides]
        return [*CLI, verb, str(self.config), *(word for override in overrides for word in ("-o", override))]

    def _begin(self, name: str, command: list[str], environment: Mapping[str, str] | None) -> Part:
        variables = environment_of({"KEEPSTEP_FAULTS": "", **self.environment, **(environment or {}), ENV_MARK: self.mark})
        process = subprocess.Popen(
            command, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        self.parts[name] = Part(process).read()
        return self.parts[name]

    def said(self) -> str:
        """For a failing test's message."""
        return "\n".join(f"--- {name}\n" + "\n".join(part.output[-40:]) for name, part in self.parts.items()) + self.logs()
