"""How a rank ended: what it writes down itself when it fails, and what its exit code says to its agent."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from keepstep.storage.skips import parse
from keepstep.trainer.contract import BAD_STEP_KIND, DAMAGED_KIND

from .processes import signal_name

GLOO_ADVICE: Final = " This is typically caused by"  # what follows in its messages is for people who have no verdict
MAX_NUMBER: Final = 1 << 53  # of steps and ranks: whatever reads JSON reads it exactly
# What a rank says whose peer died: a victim, never the culprit. Texts of gloo, NCCL and c10d of torch 2.13.
PEER_LOST: Final = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "socket closed",
    "connection refused",
    "connection was closed",
    "failed to recv",
    "sendbytes failed",
    "recvvalue failed",
    "remote process exited",
    "ncclremoteerror",
    "connectfullmesh failed",
    "timed out waiting",
    "application timeout caused pair closure",
)


@dataclass(frozen=True, slots=True)
class Exit:
    """How a rank ended. `exit_code` is negative for a signal; `kind` and `why` are empty after success."""

    exit_code: int
    kind: str
    why: str
    damaged: str
    bad_step: int = -1  # what it refused, see `contract.BAD_STEP_KIND`
    bad_ranks: tuple[int, ...] = ()
    skips: tuple[str, ...] = ()


def exit_code(error: SystemExit) -> int:
    if error.code is None:
        return 0
    if isinstance(error.code, int):
        return error.code
    print(error.code, file=sys.stderr)  # noqa: T201  (what the interpreter itself does with sys.exit("text"))
    return 1


def write_error(path: Path, error: BaseException) -> None:
    """Scripts raise what they like, with attributes of any kind: what is no text or number that we know how to read is left out."""
    text = str(error).strip()
    first_line = text.splitlines()[0].partition(GLOO_ADVICE)[0] if text else ""
    why = f"{type(error).__name__}: {first_line}".rstrip(": ")
    kind = _text(getattr(error, "kind", "")) or ("peer-lost" if is_peer_lost(error) else "exception")
    damaged = _text(getattr(error, "directory", "")) if kind == DAMAGED_KIND else ""
    told: dict[str, Any] = {"kind": kind, "why": _text(why[:500]), "damaged": damaged}
    if kind == BAD_STEP_KIND:
        bad = {"bad_step": getattr(error, "step", -1), "bad_ranks": getattr(error, "ranks", ()), "skips": getattr(error, "skips", ())}
        told |= bad if _is_bad_step(**bad) else {"kind": "exception"}
    path.write_text(json.dumps(told))


def _text(value: object) -> str:
    """Half of a surrogate pair can stand in a message, but in no report."""
    return value.encode(errors="replace").decode() if isinstance(value, str) else ""


def _is_bad_step(bad_step: object, bad_ranks: object, skips: object) -> bool:
    return _is_number(bad_step) and _are(bad_ranks, _is_number) and _are(skips, _is_skip)


def _are(values: object, is_one: Callable[[object], bool]) -> bool:
    return isinstance(values, (tuple, list)) and all(map(is_one, values))


def _is_number(value: object) -> bool:
    return type(value) is int and abs(value) < MAX_NUMBER


def _is_skip(value: object) -> bool:
    try:
        return isinstance(value, str) and bool(parse(value))
    except ValueError:
        return False


def is_peer_lost(error: BaseException) -> bool:
    """A collective that failed because somebody else died: torch raises RuntimeError subclasses with the transport's text."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in PEER_LOST)


def explain(code: int, error_path: str) -> Exit:
    if code == 0:
        return Exit(0, "", "", "")
    """A rank that had told its error before a signal ended it, ours perhaps, failed by that error."""
    by_itself = Exit(code, "signal", signal_name(code), "") if code < 0 else Exit(code, "exit", f"exit code {code}", "")
    return _from_error_file(code, error_path) or by_itself


def _from_error_file(code: int, error_path: str) -> Exit | None:
    try:
        body: Mapping[str, Any] = json.loads(Path(error_path).read_text())
    except (FileNotFoundError, ValueError):  # it left through sys.exit, or died while writing
        return None
    kind, why, damaged = body["kind"], body["why"], body["damaged"]
    bad_step, bad_ranks, skips = body.get("bad_step", -1), body.get("bad_ranks", ()), body.get("skips", ())
    if not _is_bad_step(bad_step, bad_ranks, skips):
        return Exit(code, "exception", why, damaged)
    return Exit(code, kind, why, damaged, bad_step, tuple(bad_ranks), tuple(skips))
