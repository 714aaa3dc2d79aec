"""What a run leaves for people beside its checkpoints: events.jsonl while it goes on, result.json at its end.

Nothing here decides anything: the run log is the authority, and a write that fails here never stops a run.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from keepstep.storage.errors import NotFound, StoreError
from keepstep.storage.layout import EVENTS_KEY, MANIFEST_NAME, RESULT_KEY
from keepstep.storage.lineage import Lineage
from keepstep.storage.manifest import Manifest
from keepstep.storage.records import Commit, Failed, Finished
from keepstep.storage.steps import read_steps
from keepstep.storage.store import Store

FAILURE: Final = "failure"  # kind of the event that carries an attempt's verdict


def utc_now() -> str:
    """For people; never compared with another machine's."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class EventFile:
    """Appends events; an object store gets several of them in one segment. Called from one thread."""

    def __init__(self, store: Store, run: str) -> None:
        self._store = store
        self._run = run
        self._waiting: list[bytes] = []
        self._written_at = -math.inf

    def append(self, event: Mapping[str, Any]) -> None:
        self._waiting.append(json.dumps({"at": utc_now(), "run": self._run, **event}).encode())
        if event["kind"] == FAILURE or time.monotonic() - self._written_at >= self._store.segment_period_s:
            self.flush()

    def flush(self) -> None:
        if not self._waiting:
            return
        try:
            self._store.append(EVENTS_KEY, b"\n".join(self._waiting))
        except StoreError as error:  # kept for the next flush
            print(f"keepstep: events.jsonl: {error}", file=sys.stderr)  # noqa: T201
            return
        self._waiting, self._written_at = [], time.monotonic()


def read_events(store: Store) -> Sequence[dict[str, Any]]:
    """All events so far, oldest first."""
    return store.read_records(EVENTS_KEY)


def final_state(store: Store, commit: Commit) -> dict[str, Any]:
    """What rank 0 computed over the whole state when it staged the last checkpoint; {} for a checkpoint in mid-run."""
    manifest = Manifest.parse(store.get(f"{commit.directory}/{MANIFEST_NAME}"))
    result: dict[str, Any] = dict(manifest.ranks[0].state.get("result") or {})
    return result


def result_of(store: Store, lineage: Lineage, books: Mapping[str, Any]) -> dict[str, Any]:
    """The text of result.json; `books`: see books.document. Raises StoreError."""
    assert lineage.outcome is not None
    commit, goodput = lineage.newest_committed(), books["goodput"]
    return {
        "outcome": outcome_name(lineage.outcome),
        "why": lineage.outcome.why,
        "step": _last_step(store, lineage, commit),
        **_digests(final_state(store, commit) if commit else {}),
        "attempts": lineage.num_attempts,
        "failures": [_failure(event) for event in read_events(store) if event.get("kind") == FAILURE],
        "lost_steps": goodput["lost_steps"],
        "goodput": goodput["ratio"],
        "wall_s": goodput["wall_s"],
        "seconds": goodput["seconds"],
        "recovery": books["recovery"],
    }


def write_result(store: Store, lineage: Lineage, books: Mapping[str, Any]) -> dict[str, Any]:
    result = result_of(store, lineage, books)
    store.put(RESULT_KEY, json.dumps(result, indent=1).encode())
    return result


def read_result(store: Store) -> dict[str, Any] | None:
    try:
        result: dict[str, Any] = json.loads(store.get(RESULT_KEY))
    except NotFound:
        return None
    return result


def outcome_name(outcome: Finished | Failed) -> str:
    return outcome.outcome if isinstance(outcome, Finished) else "failed"


def _last_step(store: Store, lineage: Lineage, commit: Commit | None) -> int:
    if isinstance(lineage.outcome, Finished):
        return lineage.outcome.step
    if commit:
        return commit.step
    history = lineage.history(read_steps(store))
    return history[-1].step if history else 0


def _digests(final: Mapping[str, Any]) -> dict[str, Any]:
    """The names of interfaces.md first, null where the run ended without them, then whatever else the trainer found out."""
    names = ("model_sha256", "optimizer_sha256", "state_sha256", "final_loss_hex")
    return {name: final.get(name) for name in names} | {name: final[name] for name in sorted(final) if name not in names}


def _failure(event: Mapping[str, Any]) -> dict[str, Any]:
    named = {name: event.get(name) for name in ("attempt", "node", "rank", "step", "kind", "why")}
    return named | {"kind": event.get("cause", FAILURE), "printed": event.get("detail", [])}
