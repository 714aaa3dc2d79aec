"""Faults on purpose, for tests and chaos: named places where a process comes to harm, and stores that fail.

Fault points cost one dictionary look-up when no plan is set. KEEPSTEP_FAULTS = "POINT[:key=value...];POINT[...]": the process ends itself
when it passes POINT with all the given facts, e.g. "persister.shards.middle:rank=1:step=20:once=/tmp/x/fired". Words beside the facts:

    once=PATH      fires once for all processes that share PATH (created with O_EXCL)
    when=PATH      fires when somebody has made the file PATH, whose "{fact}"s are filled in, and removes it: a trigger from outside
    during=PATH    fires whenever it is passed while the file PATH exists
    signal=STOP    sends that signal instead of KILL
    action=NAME    does this instead: raise, exit (code 3), leave (os._exit(0)), hang (sleeps for ever), spin (for ever, and no other thread
                   runs Python meanwhile), eat (memory, until somebody objects), pause (goes on after `seconds`)

    store = FaultyStore(inner, [StoreFault(FailsAfter(), "put_new", "log/*", times=1)])    # written, but the answer is lost, once
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache, partial
from itertools import repeat
from pathlib import Path
from typing import Final, TypeVar

from .errors import NotFound, StoreError, StoreUnavailable
from .store import Modified, Store, scatter

T = TypeVar("T")

ENV_FAULTS: Final = "KEEPSTEP_FAULTS"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    point: str
    facts: tuple[tuple[str, str], ...]
    once: str
    when: str
    during: str
    act: Callable[[], object]


@lru_cache(maxsize=4)
def parse_plan(text: str) -> tuple[Fault, ...]:
    """The faults of a plan. Raises ValueError naming the entry that is not understood."""
    return tuple(_parse_fault(entry) for entry in text.split(";") if entry.strip())


def fault_point(point: str, **facts: object) -> None:
    """Called by a process at a named place; ends or delays it when the plan says so, otherwise does nothing."""
    text = os.environ.get(ENV_FAULTS)
    if not text:
        return
    for fault in parse_plan(text):
        fits = fault.point == point and all(str(facts.get(key)) == value for key, value in fault.facts)
        if (
            fits
            and (not fault.during or os.path.exists(fault.during))
            and _is_triggered(fault.when.format_map(facts))
            and _claim(fault.once)
        ):
            fault.act()


def planned(point: str) -> list[dict[str, str]]:
    """The facts of every fault of the plan at a point that nobody passes: whoever asks does the harm, and says which facts it knows."""
    return [dict(fault.facts) for fault in parse_plan(os.environ.get(ENV_FAULTS, "")) if fault.point == point]


def _parse_fault(entry: str) -> Fault:
    point, *pairs = entry.strip().split(":")
    if not all("=" in pair for pair in pairs):
        raise ValueError(f"{ENV_FAULTS}: {entry!r} is not POINT:key=value:...")
    facts = dict(pair.split("=", 1) for pair in pairs)
    words = {name: facts.pop(name, "") for name in ("once", "when", "during")}
    act = _parse_action(entry, facts)
    return Fault(point=point, facts=tuple(sorted(facts.items())), act=act, **words)


def _parse_action(entry: str, facts: dict[str, str]) -> Callable[[], object]:
    """Takes its words out of the facts."""
    name, number, seconds = facts.pop("action", "signal"), facts.pop("signal", "KILL"), facts.pop("seconds", "1")
    if name == "signal":
        return partial(signal.raise_signal, signal.Signals[f"SIG{number}"])
    if name == "pause":
        return partial(time.sleep, float(seconds))
    if name not in ACTIONS:
        raise ValueError(f"{ENV_FAULTS}: {entry!r}: there is no action {name!r}; known are {', '.join(ACTIONS)}, pause")
    return ACTIONS[name]


class InjectedError(RuntimeError):
    """What `action=raise` raises."""


def _raise() -> None:
    raise InjectedError("injected on purpose")


def _hang() -> None:
    threading.Event().wait()


def _spin() -> None:
    """One call into C that neither ends nor releases the interpreter's lock."""
    deque(repeat(None), maxlen=0)


def _eat() -> None:
    """Touches each page, 16 MB at a time: the kernel's OOM killer is to find a process that grows."""
    eaten = []
    while True:
        eaten.append(b"x" * (16 << 20))


ACTIONS: Final[Mapping[str, Callable[[], object]]] = {
    "raise": _raise,
    "exit": partial(sys.exit, 3),
    "leave": partial(os._exit, 0),
    "hang": _hang,
    "spin": _spin,
    "eat": _eat,
}


def _is_triggered(when: str) -> bool:
    """Of all processes that look for it, the one that removes the file was meant."""
    if not when:
        return True
    try:
        os.unlink(when)
    except FileNotFoundError:
        return False
    return True


def _claim(once: str) -> bool:
    if not once:
        return True
    try:
        os.close(os.open(once, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
    except FileExistsError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class FailsBefore:
    """The call is not carried out."""

    error: type[StoreError] = StoreUnavailable


@dataclass(frozen=True, slots=True)
class FailsAfter:
    """The call is carried out and its answer lost."""

    error: type[StoreError] = StoreUnavailable


@dataclass(frozen=True, slots=True)
class Delayed:
    seconds: float


@dataclass(frozen=True, slots=True)
class ShortRead:
    """The last bytes do not come."""

    missing: int = 1


@dataclass(frozen=True, slots=True)
class FlippedBit:
    """Of the bytes that are read, whichever bit that is in a shorter answer."""

    bit: int = 0


@dataclass(frozen=True, slots=True)
class SeesNothing:
    """Reads and listings are stale: nothing was written yet, for all they know."""


Happening = FailsBefore | FailsAfter | Delayed | ShortRead | FlippedBit | SeesNothing


@dataclass(frozen=True, slots=True)
class StoreFault:
    """What happens to which calls. Both patterns are of fnmatch: operations are the names of Store's methods."""

    what: Happening
    operation: str = "*"
    key: str = "*"
    skip: int = 0  # so many fitting calls go well first
    times: int = 1 << 62  # then it happens to so many
    chance: float = 1.0  # to each of them, drawn from (seed, operation, key, number of the call)


class FaultyStore(Store):
    """Another store with faults. `faults` may be changed at any time; `happened` lists (operation, key, what) in order."""

    def __init__(
        self, inner: Store, faults: Iterable[StoreFault] = (), *, seed: int = 0, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self.inner = inner
        self.name = inner.name
        self.parallel_reads = inner.parallel_reads
        self.segment_period_s = inner.segment_period_s
        self.happened: list[tuple[str, str, Happening]] = []
        self._seed = seed
        self._sleep = sleep
        self._lock = threading.Lock()
        self.faults = tuple(faults)

    @property
    def faults(self) -> Sequence[StoreFault]:
        return self._faults

    @faults.setter
    def faults(self, faults: Iterable[StoreFault]) -> None:
        with self._lock:
            self._faults = tuple(faults)
            self._met = [0] * len(self._faults)  # fitting calls so far

    def put_new(self, key: str, body: bytes) -> bool:
        return self._call("put_new", key, lambda: self.inner.put_new(key, body))

    def put(self, key: str, body: bytes) -> None:
        self._call("put", key, lambda: self.inner.put(key, body))

    def get(self, key: str) -> bytes:
        return self._call("get", key, lambda: self.inner.get(key), _damage)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        return self._call("get_range", key, lambda: self.inner.get_range(key, start, length), _damage)

    def read_into(self, key: str, start: int, *destinations: memoryview) -> int:
        def spoil(count: int, what: Happening) -> int:
            body = _damage(b"".join(destinations)[:count], what)
            scatter(body, destinations)
            return len(body)

        return self._call("read_into", key, lambda: self.inner.read_into(key, start, *destinations), spoil)

    def size(self, key: str) -> int:
        return self._call("size", key, lambda: self.inner.size(key))

    def list(self, prefix: str = "") -> Sequence[str]:
        return self._call("list", prefix, lambda: self.inner.list(prefix), lambda keys, what: () if what == SeesNothing() else keys)

    def modified(self, prefix: str = "") -> Modified:
        return self._call("modified", prefix, lambda: self.inner.modified(prefix))

    def sweep(self, older_than_s: float) -> int:
        return self._call("sweep", "", lambda: self.inner.sweep(older_than_s))

    def write_file(self, key: str, blocks: Iterable[bytes | memoryview], *, num_bytes: int, sync: bool = True) -> None:
        self._call("write_file", key, lambda: self.inner.write_file(key, blocks, num_bytes=num_bytes, sync=sync))

    def delete(self, key: str) -> None:
        self._call("delete", key, lambda: self.inner.delete(key))

    def delete_tree(self, prefix: str) -> None:
        self._call("delete_tree", prefix, lambda: self.inner.delete_tree(prefix))

    def append(self, key: str, data: bytes, *, sync: bool = False) -> None:
        self._call("append", key, lambda: self.inner.append(key, data, sync=sync))

    def read_lines(self, key: str) -> Sequence[bytes]:
        return self._call("read_lines", key, lambda: self.inner.read_lines(key), lambda lines, what: () if what == SeesNothing() else lines)

    def drop_cache(self, prefix: str) -> None:
        self._call("drop_cache", prefix, lambda: self.inner.drop_cache(prefix))

    def local_path(self, key: str) -> Path | None:
        return self.inner.local_path(key)

    def probe_more(self, prefix: str) -> None:
        self.inner.probe_more(prefix)

    def close(self) -> None:
        self.inner.close()

    def _call(self, operation: str, key: str, work: Callable[[], T], spoil: Callable[[T, Happening], T] = lambda result, _: result) -> T:
        happenings = self._choose(operation, key)
        message = f"injected: {operation} {key}"
        for what in happenings:
            if isinstance(what, Delayed):
                self._sleep(what.seconds)
            elif isinstance(what, FailsBefore):
                raise what.error(f"{message} was not done")
        result = work()
        for what in happenings:
            if isinstance(what, FailsAfter):
                raise what.error(f"{message} was done and its answer lost")
            if what == SeesNothing() and operation in ("get", "get_range", "read_into", "size"):
                raise NotFound(f"{message} is not seen yet")
            result = spoil(result, what)
        return result

    def _choose(self, operation: str, key: str) -> Sequence[Happening]:
        with self._lock:
            chosen = [fault.what for index, fault in enumerate(self._faults) if self._hits(index, fault, operation, key)]
            self.happened += [(operation, key, what) for what in chosen]
            return chosen

    def _hits(self, index: int, fault: StoreFault, operation: str, key: str) -> bool:
        if not (fnmatchcase(operation, fault.operation) and fnmatchcase(key, fault.key)):
            return False
        number = self._met[index]
        self._met[index] += 1
        if not fault.skip <= number < fault.skip + fault.times:
            return False
        return random.Random(f"{self._seed} {operation} {key} {number}").random() < fault.chance


def _damage(body: bytes, what: Happening) -> bytes:
    match what:
        case ShortRead(missing):
            return body[: max(0, len(body) - missing)]
        case FlippedBit(bit) if body:
            damaged = bytearray(body)
            damaged[bit // 8 % len(body)] ^= 1 << bit % 8
            return bytes(damaged)
    return body
