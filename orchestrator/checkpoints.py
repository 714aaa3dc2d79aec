"""`keepstep checkpoints`: look at what a run has committed, prove it, keep it, let it go.

All of it works beside a running coordinator: what is decided here becomes a record of the run log, under the newest term.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from keepstep.storage.canonical import sha256_hex
from keepstep.storage.disposal import UPLOAD_GRACE_S, Leftovers, dispose, find_leftovers
from keepstep.storage.errors import DamagedCheckpoint, Fenced, NotFound, StoreError
from keepstep.storage.layout import MANIFEST_NAME, parse_checkpoint_directory
from keepstep.storage.lineage import Lineage
from keepstep.storage.manifest import Manifest
from keepstep.storage.records import Commit, Pin, Quarantine, Retire, Verified
from keepstep.storage.retention import Retention
from keepstep.storage.runlog import RunLog
from keepstep.storage.store import Store
from keepstep.storage.verify import verify_checkpoint
from keepstep.trainer.contract import EXIT_FAILED, EXIT_OK

from .archive import utc_now
from .errors import InputError
from .janitor import retention_of
from .lines import human_age, human_bytes
from .roots import stored_config
from .viewing import open_console, visit

R = TypeVar("R", Pin, Quarantine, Retire, Verified)
Row = dict[str, Any]

RIGHT = "every byte is right"


def _append(log: RunLog, record: R) -> R:
    """Makes it a record under the newest term, whoever opens another one meanwhile. Raises InputError where it would be void, or may be."""
    while True:
        try:
            return log.append(replace(record, term=log.lineage.term))
        except Fenced as error:
            if error.opened != log.lineage.opened:
                raise InputError(f"{error} (a coordinator does when it starts)") from error
            continue  # the log was read up to the newer term
        except ValueError as error:
            raise InputError(str(error)) from error


def _commit_of_step(root: str, lineage: Lineage, step: int) -> Commit:
    """That of the history; else the newest of those that left it. Raises InputError."""
    of_step = [commit for commit in lineage.live if commit.step == step]
    if not of_step:
        known = ", ".join(str(number) for number in sorted({commit.step for commit in lineage.live})) or "none yet"
        raise InputError(f"{root}: no committed checkpoint of step {step}; there are: {known}")
    return max(of_step, key=lambda commit: (commit in lineage.commits, commit.attempt))


# --- list -------------------------------------------------------------------------------------------------------------


def print_list(root: str, *, as_json: bool) -> None:
    store, log = visit(root)
    rows = _rows(store, log.lineage)
    if as_json:
        print(json.dumps(rows))
        return
    table = Table("step", "attempt", "state", "size", "age", "directory")
    for row in rows:
        table.add_row(
            str(row["step"]), str(row["attempt"]), _told_state(row), _size(row["bytes"]), human_age(row["age_s"]), row["directory"]
        )
    open_console().print(table)


def _told_state(row: Row) -> str:
    tip = " (the last before a rewind)" if row["tip"] else ""
    return ", ".join([row["state"], *(["pinned"] if row["pinned"] else []), *(["best evaluation"] if row["best"] else [])]) + tip


def _rows(store: Store, lineage: Lineage) -> list[Row]:
    bodies = store.get_many([f"{commit.directory}/{MANIFEST_NAME}" for commit in lineage.live])
    return [_row(lineage, commit, body) for commit, body in zip(lineage.live, bodies, strict=True)]


def _row(lineage: Lineage, commit: Commit, manifest: bytes | StoreError) -> Row:
    names = ("step", "attempt", "directory", "manifest_sha256", "world_size", "at")
    return {name: getattr(commit, name) for name in names} | {
        "state": _state_of(lineage, commit),
        "verified": commit.directory in lineage.verified,
        "pinned": commit.directory in lineage.pinned,
        "tip": commit.directory in lineage.tips,
        "best": commit == lineage.best(),
        "bytes": _bytes_of(commit, manifest),
        "age_s": _age_s(commit),
    }


def _state_of(lineage: Lineage, commit: Commit) -> str:
    if commit.directory in lineage.quarantined:
        return "quarantined"
    if commit in lineage.abandoned:
        return "abandoned"
    return "verified" if commit.directory in lineage.verified else "committed"


def _bytes_of(commit: Commit, manifest: bytes | StoreError) -> int | None:
    """None where the manifest is not what was committed: `verify` says more."""
    if isinstance(manifest, StoreError) or sha256_hex(manifest) != commit.manifest_sha256:
        return None
    return Manifest.parse(manifest).num_bytes


def _age_s(commit: Commit) -> float | None:
    """By the wall clocks of two machines: for people."""
    if not commit.at:
        return None
    return round(max(0.0, (datetime.now(UTC) - datetime.fromisoformat(commit.at)).total_seconds()), 1)


def _size(num_bytes: int | None) -> str:
    return "?" if num_bytes is None else human_bytes(num_bytes)


# --- verify -----------------------------------------------------------------------------------------------------------


def verify(root: str, *, step: int, quarantine: bool, as_json: bool) -> int:
    """Exit code: 0 when every byte is right, 3 when a checkpoint is damaged."""
    store, log = visit(root)
    lineage = log.lineage
    wanted = lineage.live if step < 0 else (_commit_of_step(root, lineage, step),)
    if not wanted:
        raise InputError(f"{root}: no committed checkpoint yet")
    with _reading(as_json) as progress:
        rows = [_verified(store, log, commit, progress, quarantine=quarantine) for commit in wanted]
    if as_json:
        print(json.dumps(rows))
    else:
        for row in rows:
            print(f"step {row['step']}: {row['verdict']}" + (f" ({row['note']})" if row["note"] else ""))
    return EXIT_OK if all(row["verdict"] == RIGHT for row in rows) else EXIT_FAILED


def _reading(as_json: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=as_json)


def _verified(store: Store, log: RunLog, commit: Commit, progress: Progress, *, quarantine: bool) -> Row:
    task = progress.add_task(f"step {commit.step}", total=None)
    store.drop_cache(commit.directory)
    try:
        manifest = verify_checkpoint(
            store, commit.directory, commit.manifest_sha256, lambda done, total: progress.update(task, completed=done, total=total)
        )
    except DamagedCheckpoint as error:
        verdict, num_bytes = f"DAMAGED: {error.file}: {error.why}", 0
        note = _note_damage(log, commit, f"{error.file}: {error.why}", quarantine=quarantine)
    else:
        verdict, num_bytes, note = RIGHT, manifest.num_bytes, _note_right(log, commit)
    return {"step": commit.step, "directory": commit.directory, "bytes": num_bytes, "verdict": verdict, "note": note}


def _note_right(log: RunLog, commit: Commit) -> str:
    if commit.directory in log.lineage.quarantined:
        return "although it is quarantined"
    if commit.directory in log.lineage.verified:
        return ""
    try:
        _append(log, Verified(term=0, directory=commit.directory, at=utc_now()))
    except (InputError, StoreError) as error:
        return f"the run log does not know: {error}"
    return ""


def _note_damage(log: RunLog, commit: Commit, why: str, *, quarantine: bool) -> str:
    """Only on request: what is quarantined is never resumed from again, and perhaps it is this machine that reads it wrong."""
    log.refresh()
    if log.lineage.commit_of(commit.directory) is None:
        return "it was retired while it was read"
    if commit.directory in log.lineage.quarantined:
        return "quarantined"
    if not quarantine:
        return "the run does not know: with --quarantine it is never resumed from again"
    _append(log, Quarantine(term=0, directory=commit.directory, why=why, at=utc_now()))
    return "quarantined"


# --- pin --------------------------------------------------------------------------------------------------------------


def pin(root: str, *, step: int, pinned: bool) -> None:
    _, log = visit(root)
    commit = _commit_of_step(root, log.lineage, step)
    what = f"step {step} of attempt {commit.attempt} ({commit.directory})"
    if (commit.directory in log.lineage.pinned) == pinned:
        print(f"{what} is {'pinned' if pinned else 'not pinned'} already")
        return
    _append(log, Pin(term=0, directory=commit.directory, pinned=pinned, at=utc_now()))
    print(f"{what} is pinned: it stays until it is unpinned" if pinned else f"{what} is unpinned: it may go like any other")


# --- gc ---------------------------------------------------------------------------------------------------------------


def collect_garbage(root: str, *, dry_run: bool, as_json: bool) -> int:
    """What the run's janitor would do, now. Exit code: 0, or 3 when something could not be deleted."""
    store, log = visit(root)
    section = stored_config(store).checkpoint
    chosen = retention_of(log.lineage, section)
    left = find_leftovers(store, log.lineage, is_log_whole=log.is_whole)
    with Progress(console=Console(stderr=True), disable=as_json) as progress:
        goes = _goes(store, chosen, left, progress)
        if not dry_run:
            _let_go(store, log, chosen, goes, progress)
    halves = 0 if dry_run else store.sweep(UPLOAD_GRACE_S)
    stays = [_gc_row(directory, why, None) for directory, why in (*chosen.stays.items(), *left.stays.items())]
    if as_json:
        document = {"dry_run": dry_run, "goes": goes, "stays": stays, "bytes": _sum(goes), "half_written": None if dry_run else halves}
        print(json.dumps(document))
    else:
        is_unread = section.scrub and bool(log.lineage.live) and not log.lineage.verified
        hint = f"; `keepstep checkpoints verify {root}` reads them back" if is_unread else ""
        _print_gc(goes, stays, chosen.why + hint, halves, dry_run=dry_run)
    return EXIT_FAILED if any(row["error"] for row in goes) else EXIT_OK


def _goes(store: Store, chosen: Retention, left: Leftovers, progress: Progress) -> list[Row]:
    reasons = {**chosen.goes, **dict.fromkeys(left.garbage, "nobody can commit it any more")}
    task = progress.add_task("measuring", total=len(reasons))
    rows = []
    for directory, why in reasons.items():
        rows.append(_gc_row(directory, why, _stored_bytes(store, directory)))
        progress.advance(task)
    return rows


def _gc_row(directory: str, why: str, num_bytes: int | None) -> Row:
    attempt, step = parse_checkpoint_directory(directory) or (0, 0)
    return {"directory": directory, "attempt": attempt, "step": step, "why": why, "bytes": num_bytes, "error": ""}


def _stored_bytes(store: Store, directory: str) -> int:
    with ThreadPoolExecutor(store.parallel_reads, thread_name_prefix="size") as pool:
        return sum(pool.map(lambda key: _size_or_nothing(store, key), store.list(directory)))


def _size_or_nothing(store: Store, key: str) -> int:
    try:
        return store.size(key)
    except NotFound:
        return 0  # somebody else clears away, too


def _let_go(store: Store, log: RunLog, chosen: Retention, goes: Sequence[Row], progress: Progress) -> None:
    """Record first, deletion afterwards; what cannot be deleted now is garbage from now on."""
    if chosen.retire:
        _append(log, Retire(term=0, directories=chosen.retire, why=f"keepstep checkpoints gc: {chosen.why}", at=utc_now()))
    task = progress.add_task("deleting", total=_sum(goes))
    for row in goes:
        try:
            dispose(store, row["directory"])
        except StoreError as error:
            row["error"] = str(error)
        progress.advance(task, row["bytes"])


def _sum(rows: Sequence[Mapping[str, Any]]) -> int:
    return sum(row["bytes"] for row in rows if not row["error"])


def _print_gc(goes: Sequence[Row], stays: Sequence[Row], why: str, halves: int, *, dry_run: bool) -> None:
    table = Table("", "step", "attempt", "size", "why", "directory")
    for verb, rows in (("stays", stays), ("would go" if dry_run else "gone", goes)):
        for row in sorted(rows, key=lambda row: (row["attempt"], row["step"])):
            size = "" if row["bytes"] is None else human_bytes(row["bytes"])
            table.add_row("FAILED" if row["error"] else verb, str(row["step"]), str(row["attempt"]), size, row["why"], row["directory"])
    open_console().print(table)
    print(why)
    if dry_run:
        print(f"{human_bytes(_sum(goes))} would be freed; nothing was changed")
        return
    print(f"{human_bytes(_sum(goes))} freed, {halves} half-written files of killed processes removed")
    for row in goes:
        if row["error"]:
            print(f"{row['directory']} could not be deleted: {row['error']}; nobody needs it any more, the next gc tries again")
