"""The persister: one process per node that writes what ranks staged, and outlives them.

    python -m keepstep.storage.persister --socket PATH --root URL [--options JSON]

It owns the shared memory, so a rank that is killed after `submit` loses nothing. Files and their hashes are made in one pass; then the
step lines (rank 0), then the rank index, whose existence says "all of this rank is durable". Standard output speaks to the agent, one
JSON object a line: {"kind": "ready" | "begun" | "writing" | "persisted" | "failed", ...}. When standard input ends, what is in flight gets
a short grace; when the agent is killed, the kernel kills this process. The ranks go before it (background.py).
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from .arena import StagedFile
from .background import Heartbeat, Pace, step_back
from .buffers import SharedBuffer, Slot
from .canonical import canonical_json, sha256_hex
from .errors import StorageError, StoreError
from .frames import Disconnected, FrameSocket, Message
from .manifest import BEST_STEP, TensorEntry, best_step_in, parse_tensor
from .retry import RetryPolicy
from .steplines import StepLines
from .store import StorageOptions, Store
from .submission import Submission, persist

log = logging.getLogger(__name__)

DEFAULT_GRACE_S: Final = 5.0
TAKE_OVER_S: Final = 5.0
HELLO_S: Final = 10.0
_PR_SET_PDEATHSIG: Final = 1
Emit = Callable[[Mapping[str, Any]], None]


@dataclass(slots=True, eq=False)
class Session:
    """One connected rank. `tensors`: those of its last submission, which the next may repeat."""

    frames: FrameSocket
    attempt: int
    rank: int
    world_size: int
    tensors: tuple[TensorEntry, ...] = ()
    ended: threading.Event = field(default_factory=threading.Event)


@dataclass(slots=True, eq=False)
class Persister:
    """All ranks of a node: a thread reads from each, another one writes what it submitted. `_lock` covers slots and sessions."""

    store: Store
    emit: Emit
    pace: Pace = field(default_factory=lambda: Pace(0))
    slots: dict[int, Slot] = field(default_factory=dict)
    sessions: dict[int, Session] = field(default_factory=dict)
    steps: dict[int, StepLines] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _settled: threading.Condition = field(default_factory=threading.Condition)
    _in_flight: int = 0

    def accept(self, listener: socket.socket) -> None:
        """Serves ranks until the listener is closed."""
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self.serve, args=(FrameSocket(sock),), name="rank", daemon=True).start()

    def serve(self, frames: FrameSocket) -> None:
        """One rank from its hello to its end, however it ends."""
        try:
            hello = frames.receive(HELLO_S)
            session = self._begin_session(frames, hello) if hello else None
            if session:
                self._serve_session(session)
        except (Disconnected, TimeoutError):
            return  # a rank that ended, or one that does not read any more: what it submitted is in our hands
        finally:
            frames.close()

    def _serve_session(self, session: Session) -> None:
        try:
            session.frames.send({"kind": "welcome", "busy": self._is_busy(session.rank)})
            while message := session.frames.receive():
                self._answer(session, message)
        finally:
            self._leave(session)

    def _is_busy(self, rank: int) -> bool:
        with self._lock:
            return self.slots[rank].is_busy

    def flush_steps_for_ever(self, stopping: threading.Event) -> None:
        while not stopping.wait(0.2):
            for lines in list(self.steps.values()):
                try:
                    lines.flush_if_due()
                except StoreError as error:
                    log.warning("step lines wait: %s", error)

    def finish(self, grace_s: float) -> bool:
        """Waits for what is in flight or on its way from a rank that ended; false if the grace was too short."""
        until = time.monotonic() + grace_s
        is_done = self._wait_settled(until) and self._read_to_the_end(until) and self._wait_settled(until)
        for lines in list(self.steps.values()):
            try:
                lines.flush(sync=True)
            except StoreError as error:
                log.warning("step lines are lost: %s", error)
        return is_done

    def _wait_settled(self, until: float) -> bool:
        with self._settled:
            return self._settled.wait_for(lambda: self._in_flight == 0, timeout=until - time.monotonic())

    def _read_to_the_end(self, until: float) -> bool:
        for session in list(self.sessions.values()):
            session.frames.shutdown()
            if not session.ended.wait(until - time.monotonic()):
                return False
        return True

    def _begin_session(self, frames: FrameSocket, hello: Message) -> Session | None:
        session = Session(frames=frames, attempt=hello["attempt"], rank=hello["rank"], world_size=hello["world_size"])
        if why := self._admit(session):
            frames.send({"kind": "refused", "why": why})
            return None
        return session

    def _admit(self, session: Session) -> str:
        """Makes this the rank's only session; why not, as a sentence, otherwise.

        The one before it is read to its end first: what a killed rank had submitted may still be on its way.
        """
        while True:
            with self._lock:
                slot = self.slots.setdefault(session.rank, Slot())
                if session.attempt < slot.attempt:
                    return f"attempt {session.attempt} was replaced by attempt {slot.attempt}"
                slot.attempt = session.attempt
                old = self.sessions.setdefault(session.rank, session)
            if old is session:
                return ""
            old.frames.shutdown()  # what is on its way still arrives, then the end
            if not old.ended.wait(TAKE_OVER_S):
                return f"rank {session.rank} of attempt {old.attempt} is still being served"

    def _leave(self, session: Session) -> None:
        with self._lock:
            del self.sessions[session.rank]
            self.slots[session.rank].reclaim()
        session.ended.set()

    def _answer(self, session: Session, message: Message) -> None:
        match message["kind"]:
            case "step":
                self._steps_of(session.attempt).add(message["record"])
            case "buffer":
                self._give_buffer(session, message)
            case "reserve":
                self._reserve(session, message)
            case "resident":
                self._show_resident(session, message)
            case "submit":
                self._begin(session, message)
            case other:
                session.frames.send({"kind": "error", "why": f"the persister does not know {other!r}"})

    def _steps_of(self, attempt: int) -> StepLines:
        with self._lock:
            return self.steps.setdefault(attempt, StepLines(self.store, attempt))

    def _give_buffer(self, session: Session, message: Message) -> None:
        try:
            with self._lock:
                slot = self.slots[session.rank]
                given = None if slot.is_busy else slot.hand_out(message["bytes"], message["template"])
        except OSError as error:
            self._refuse_memory(session, f"no memory for {message['bytes']} bytes of staging: {error}")
            return
        if given is None:
            session.frames.send({"kind": "later"})
            return
        buffer, is_fresh, replaced = given
        _send_buffer(session, message, buffer, replaced, is_fresh=is_fresh)

    def _reserve(self, session: Session, message: Message) -> None:
        try:
            with self._lock:
                buffers = self.slots[session.rank].reserve(message["bytes"])
        except OSError as error:
            self._refuse_memory(session, f"no memory for two buffers of {message['bytes']} bytes: {error}")
            return
        for buffer, replaced in buffers:
            _send_buffer(session, message, buffer, replaced, is_fresh=True)
        session.frames.send({"kind": "reserved"})

    def _refuse_memory(self, session: Session, why: str) -> None:
        """Training goes on without checkpoints: the agent must know, too."""
        self.emit({"kind": "failed", "attempt": session.attempt, "rank": session.rank, "why": f"rank {session.rank} cannot stage: {why}"})
        session.frames.send({"kind": "error", "why": why})

    def _show_resident(self, session: Session, message: Message) -> None:
        with self._lock:
            found = (slot.find(message["directory"], message["file"]) for slot in self.slots.values())
            buffer = next((buffer for buffer in found if buffer), None)
            if buffer is None:
                session.frames.send({"kind": "absent"})
                return
            file = buffer.files[message["file"]]
            answer = {"kind": "resident", "offset": file.offset, "bytes": file.num_bytes}
            session.frames.send(answer, [buffer.descriptor])

    def _begin(self, session: Session, message: Message) -> None:
        if message["tensors"] is not None:
            session.tensors = tuple(parse_tensor(tensor) for tensor in message["tensors"])
        files = [StagedFile(**file) for file in message["files"]]
        with self._lock:
            slot = self.slots[session.rank]
            buffer = slot.submitted(message["buffer"], template=message["template"], directory=message["directory"], files=files)
        submission = Submission(
            attempt=session.attempt,
            rank=session.rank,
            world_size=session.world_size,
            step=message["step"],
            directory=message["directory"],
            files=tuple(files),
            tensors=session.tensors,
            state=message["state"],
            data=buffer.view,
            check=partial(buffer.lock.check, message["sequence"]),
        )
        with self._settled:
            self._in_flight += 1
        work = (slot, buffer, submission, message["patience_s"])
        threading.Thread(target=self._work, args=work, name=f"write-{session.rank}", daemon=True).start()

    def _work(self, slot: Slot, buffer: SharedBuffer, submission: Submission, patience_s: float) -> None:
        why = self._persist_and_report(submission, patience_s)
        with self._lock:
            slot.settled(buffer, is_durable=not why)
            if not why:
                self._forget_slots_before(submission.attempt)
            session = self.sessions.get(submission.rank)
        if session:
            _tell_done(session, submission.step, why)
        with self._settled:
            self._in_flight -= 1
            self._settled.notify_all()

    def _persist_and_report(self, submission: Submission, patience_s: float) -> str:
        """Why it did not become durable, "" if it did; the agent hears of every try."""
        of = {"attempt": submission.attempt, "step": submission.step, "rank": submission.rank}
        self.emit({"kind": "begun", **of})
        what = f"make step {submission.step} of rank {submission.rank} durable"
        try:
            RetryPolicy(deadline_s=patience_s).call(
                lambda _: self._persist_once(submission, of, is_urgent=patience_s > 0),
                is_transient=lambda error: patience_s > 0 and isinstance(error, StoreError),
                what=what,
            )
        except StorageError as error:
            return str(error)
        except Exception as error:
            log.exception("cannot %s", what)
            self.emit({"kind": "failed", **of, "why": f"cannot {what}: {type(error).__name__}: {error}"})
            return f"{type(error).__name__}: {error}"
        return ""

    def _persist_once(self, submission: Submission, of: Mapping[str, Any], is_urgent: bool) -> None:
        paced = () if is_urgent else (self.pace,)
        flush = self._steps_of(submission.attempt).flush
        tell = Heartbeat(lambda done: self.emit({"kind": "writing", **of, "bytes": done, "of": submission.num_bytes}))
        try:
            body = persist(self.store, submission, (lambda: flush(sync=True)) if submission.rank == 0 else lambda: None, [tell, *paced])
        except StorageError as error:
            log.warning("step %d of rank %d is not durable: %s", submission.step, submission.rank, error)
            self.emit({"kind": "failed", **of, "why": f"step {submission.step} of rank {submission.rank} is not durable: {error}"})
            raise
        durable = {"directory": submission.directory, "index_sha256": sha256_hex(body), "num_bytes": submission.num_bytes}
        self.emit({"kind": "persisted", **of, **durable, BEST_STEP: best_step_in(submission.state)})

    def _forget_slots_before(self, attempt: int) -> None:
        """Rank numbers that moved to another node would keep their memory for ever: a durable checkpoint of a newer attempt frees it."""
        for rank in [
            rank for rank, slot in self.slots.items() if slot.attempt < attempt and rank not in self.sessions and not slot.is_busy
        ]:
            self.slots.pop(rank).free()


def _send_buffer(session: Session, message: Message, buffer: SharedBuffer, replaced: int | None, *, is_fresh: bool) -> None:
    is_new = buffer.number not in message["known"]
    answer = {
        "kind": "mapped",
        "buffer": buffer.number,
        "bytes": buffer.num_bytes,
        "fresh": is_fresh,
        "replaced": replaced,
        "descriptor": is_new,
    }
    session.frames.send(answer, [buffer.descriptor] if is_new else [])


def _tell_done(session: Session, step: int, why: str) -> None:
    try:
        session.frames.send({"kind": "done", "step": step, "why": why})
    except (Disconnected, TimeoutError):
        return  # the rank is gone: its thread cleans up


def emit_line(message: Mapping[str, Any], _lock: threading.Lock = threading.Lock()) -> None:  # noqa: B008 - one lock for the process is meant
    """One line for the agent. When nobody reads any more, the end of standard input says so too."""
    with _lock:
        try:
            sys.stdout.buffer.write(canonical_json(message) + b"\n")
            sys.stdout.buffer.flush()
        except BrokenPipeError:
            log.warning("the agent does not listen any more")


def listen(path: Path) -> socket.socket:
    """Raises OSError, e.g. for a path over 107 bytes."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    listener.bind(os.fspath(path))
    listener.listen(128)
    return listener


def die_with_parent() -> None:
    """The kernel sends SIGKILL when the thread that started us ends. Signals of a terminal or a scheduler are the agent's business."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m keepstep.storage.persister", description="Writes what the ranks of this node stage.")
    parser.add_argument("--socket", required=True, type=Path, help="Unix socket for the ranks of this node")
    parser.add_argument("--root", required=True, help="local path or fsspec URL of the run")
    parser.add_argument("--options", default="", help="StorageOptions as JSON; better in KEEPSTEP_STORAGE_OPTIONS when it holds a secret")
    parser.add_argument("--grace", type=float, default=DEFAULT_GRACE_S, help="seconds for what is in flight when standard input ends")
    parser.add_argument("--nice", type=int, default=0, help="niceness, 0 to 19: how far the ranks go before it")
    parser.add_argument("--mb-per-s", type=float, default=0.0, help="written at most, all ranks together; 0: as fast as it goes")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(asctime)s persister %(levelname)s %(message)s", level=logging.INFO)
    die_with_parent()
    step_back(options.nice)
    try:
        store = Store.open(options.root, StorageOptions.from_json(options.options) if options.options else None)
        listener = listen(options.socket)
    except (OSError, ValueError, TypeError) as error:
        log.error("cannot start: %s", error)
        return 2
    persister = Persister(store=store, emit=emit_line, pace=Pace(options.mb_per_s * 1e6))
    return run(persister, listener, options.socket, options.grace)


def run(persister: Persister, listener: socket.socket, path: Path, grace_s: float) -> int:
    """Serves until standard input ends. The exit code: 0 if everything submitted is settled."""
    stopping = threading.Event()
    threading.Thread(target=persister.accept, args=(listener,), name="accept", daemon=True).start()
    threading.Thread(target=persister.flush_steps_for_ever, args=(stopping,), name="steps", daemon=True).start()
    emit_line({"kind": "ready", "pid": os.getpid()})
    while sys.stdin.buffer.read(4096):
        continue  # nothing is said on it yet
    began_at = time.monotonic()
    is_done = persister.finish(grace_s)
    stopping.set()
    path.unlink(missing_ok=True)
    log.info("ended %s after %.2f s", "with everything settled" if is_done else "with work left", time.monotonic() - began_at)
    return 0 if is_done else 1


if __name__ == "__main__":
    code = main()
    logging.shutdown()
    os._exit(code)  # daemon threads may be inside a store's library: do not wait for them
