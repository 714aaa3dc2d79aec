"""`keepstep doctor`: what would fail, said before it does. Each check returns one sentence; nothing is changed."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from keepstep.storage.errors import StorageError
from keepstep.trainer.contract import EXIT_BAD_INPUT, EXIT_OK
from keepstep.trainer.counting import gradient_bytes, model_size, state_bytes

from .errors import InputError
from .lines import human_bytes
from .paper import BUFFERS, Machines, sentences
from .roots import open_root
from .scratch import default_scratch
from .sections import RunConfig

PACKAGES = ("keepstep", "torch", "fsspec", "s3fs", "numpy", "aiohttp", "pydantic", "tokenizers")
MIN_FREE_SCRATCH = 64 << 20


@dataclass(frozen=True, slots=True)
class Finding:
    what: str
    good: bool
    text: str


def examine(config: RunConfig, *, as_json: bool) -> int:
    """Runs all checks; the exit code: 2 when one of them would stop a run."""
    return _tell([_guarded(what, check, config) for what, check in CHECKS.items()], as_json=as_json)


def estimate(config: RunConfig, machines: Machines, *, as_json: bool) -> int:
    """What the file alone says; the exit code: 2 when a rank's memory would not suffice."""
    try:
        return _tell([Finding(*finding) for finding in sentences(config, machines)], as_json=as_json)
    except ValueError as error:
        raise InputError(str(error)) from error


def _tell(findings: Sequence[Finding], *, as_json: bool) -> int:
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings]))
    else:
        for finding in findings:
            print(f"{'ok  ' if finding.good else 'FAIL'}  {finding.what}: {finding.text}")
    return EXIT_OK if all(finding.good for finding in findings) else EXIT_BAD_INPUT


def _guarded(what: str, check: Callable[[RunConfig], str], config: RunConfig) -> Finding:
    try:
        return Finding(what, True, check(config))
    except (StorageError, InputError, OSError) as error:
        return Finding(what, False, str(error))


def _versions(_: RunConfig) -> str:
    return f"Python {sys.version.split()[0]}, " + ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)


def _store(config: RunConfig) -> str:
    open_root(config).probe()
    return f"{config.run.root} takes atomic create-if-absent, reads back what was written and lists it"


def _port(config: RunConfig) -> str:
    host, _, port = config.cluster.listen.rpartition(":")
    try:
        socket.create_server((host, int(port))).close()
    except OSError as error:
        raise InputError(
            f"cluster.listen = {config.cluster.listen!r}: {error.strerror}; choose another port, or 0 for any free one"
        ) from error
    return f"{config.cluster.listen} can be bound"


def _memory(config: RunConfig) -> str:
    if config.train.script or config.model.kind == "hf":
        return "unknown: the model is not described in run.toml"
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    parameters = model_size(config.model, config.data.vocabulary).parameters
    needed = (1 + BUFFERS) * state_bytes(parameters, config.optimizer) + gradient_bytes(parameters)
    if needed > available:
        raise InputError(f"about {human_bytes(needed)} are needed for state and staging on one machine, {human_bytes(available)} are free")
    return f"about {human_bytes(needed)} for state and staging of the whole run, {human_bytes(available)} free here"


def _scratch(config: RunConfig) -> str:
    scratch = default_scratch(config.run.root, "doctor")
    parent = next(path for path in scratch.parents if path.exists())
    if not os.access(parent, os.W_OK):
        raise InputError(f"{parent} cannot be written: set KEEPSTEP_SCRATCH_BASE to a directory that can")
    free = shutil.disk_usage(parent).free
    if free < MIN_FREE_SCRATCH:
        raise InputError(f"{parent} has {human_bytes(free)} free, {human_bytes(MIN_FREE_SCRATCH)} are the least")
    return f"{parent} has {human_bytes(free)} free"


def _text(config: RunConfig) -> str:
    if config.train.script:
        return "a script brings its own"
    return ", ".join(_source(config, number) for number in range(len(config.data.all_sources)))


def _source(config: RunConfig, number: int) -> str:
    source = config.data.all_sources[number]
    if source == "installed-docs" or "://" in source:
        return source
    if not Path(source).exists():
        raise InputError(f"{config.data.source_key(number)}: no such file or folder")
    return f"{source} is there"


def _cores(config: RunConfig) -> str:
    ranks = (config.cluster.nodes + config.cluster.spares) * (config.cluster.ranks_per_node or 1)
    return f"{os.cpu_count()} cores for {ranks} ranks if all nodes run on this machine"


CHECKS: dict[str, Callable[[RunConfig], str]] = {
    "versions": _versions,
    "store": _store,
    "port": _port,
    "memory": _memory,
    "scratch": _scratch,
    "text": _text,
    "cores": _cores,
}
