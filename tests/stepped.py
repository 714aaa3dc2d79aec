"""A root whose every call is a step: a scheduler decides whose call comes next, and what becomes of it.

Each actor runs in its own thread, but only ever one of them moves: from one store call to the next. So the same choices give the same
run, and interleavings happen where they hurt: between the calls of one append.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from enum import Enum

from keepstep.storage.errors import NotFound, StoreUnavailable
from keepstep.storage.remote import MemoryStore


class Verdict(Enum):
    DONE = "the call is answered"
    FAILED = "an error; nothing happened"
    LOST = "an error; it happened"
    LATE = "an error; it happens later"
    CRASH = "the caller is killed"


class Crashed(BaseException):
    """The process ends here."""


class Root:
    """What is stored, and the requests that are still on their way although their senders have given up."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.late: list[tuple[str, bytes]] = []

    def create(self, key: str, body: bytes) -> bool:
        return self.objects.setdefault(key, body) == body

    def land(self) -> None:
        """The oldest late request arrives."""
        if self.late:
            self.create(*self.late.pop(0))


class Actor:
    """Somebody who works in steps."""

    def __init__(self) -> None:
        self.is_waiting = False
        self.error: BaseException | None = None  # that ended the last work
        self._verdict = Verdict.DONE
        self._stopped, self._go = threading.Semaphore(0), threading.Semaphore(0)

    def start(self, work: Callable[[], object]) -> None:
        """Until its first store call, or its end."""
        assert not self.is_waiting
        self.error = None
        threading.Thread(target=self._run, args=(work,), daemon=True).start()
        self._stopped.acquire()

    def grant(self, verdict: Verdict) -> None:
        """Until the next store call, or the end."""
        assert self.is_waiting
        self._verdict, self.is_waiting = verdict, False
        self._go.release()
        self._stopped.acquire()

    def finish(self, verdict: Verdict = Verdict.DONE) -> None:
        while self.is_waiting:
            self.grant(verdict)

    def call(self) -> Verdict:
        """In the actor's thread: what becomes of this store call."""
        self.is_waiting = True
        self._stopped.release()
        self._go.acquire()
        if self._verdict is Verdict.CRASH:
            raise Crashed
        return self._verdict

    def _run(self, work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - handed to whoever scheduled us
            self.error = error
        finally:
            self._stopped.release()


class SteppedStore(MemoryStore):
    """One actor's way to a shared root. Without an actor nothing ever waits or fails."""

    def __init__(self, root: Root, actor: Actor | None = None) -> None:
        super().__init__("stepped")
        self.root = root
        self.garbled: set[str] = set()  # keys that this actor alone, and always, reads wrongly
        self._actor = actor

    def put_new(self, key: str, body: bytes) -> bool:
        verdict = self._call_root()
        if verdict is Verdict.LATE:
            self.root.late.append((key, body))
        if verdict in (Verdict.FAILED, Verdict.LATE):
            raise StoreUnavailable("the request timed out")
        won = self.root.create(key, body)
        self._lose_answer(verdict)
        return won

    def put(self, key: str, body: bytes) -> None:
        verdict = self._call_root()
        if verdict not in (Verdict.FAILED, Verdict.LATE):
            self.root.objects[key] = body
        self._lose_answer(verdict)

    def get(self, key: str) -> bytes:
        self._lose_answer(self._call_root())
        if key not in self.root.objects:
            raise NotFound(key)
        body = self.root.objects[key]
        return body[:-9] if key in self.garbled else body

    def list(self, prefix: str = "") -> Sequence[str]:
        self._lose_answer(self._call_root())
        return sorted(key for key in self.root.objects if key.startswith(f"{prefix}/"))

    def delete(self, key: str) -> None:
        verdict = self._call_root()
        if verdict not in (Verdict.FAILED, Verdict.LATE):
            self.root.objects.pop(key, None)
        self._lose_answer(verdict)

    def _call_root(self) -> Verdict:
        return self._actor.call() if self._actor else Verdict.DONE

    def _lose_answer(self, verdict: Verdict) -> None:
        if verdict is not Verdict.DONE:
            raise StoreUnavailable("the request timed out")
