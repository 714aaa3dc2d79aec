"""The start-up probe: proves on the real root what everything rests on, and refuses a root that only pretends."""

from __future__ import annotations

import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

from .errors import NotFound, StoreError, StoreForbidden, StoreFull, StoreRefused, StoreUnavailable
from .layout import PROBE

if TYPE_CHECKING:
    from .store import Store

WRITERS: Final = 8

_CONDITION_REMEDY: Final = (
    "use a store with conditional writes (AWS S3, Google Cloud Storage, MinIO, Ceph, SeaweedFS 3.97 or newer) or a shared file system"
)


def probe(store: Store) -> None:
    """Two writers, eight racing writers, read back, list, ranged read, and what only this kind of store must prove.

    Raises:
        StoreRefused: names the store, what it did, and the remedy.
    """
    prefix = f"{PROBE}/{uuid.uuid4().hex}"
    try:
        try:
            _check_two_writers(store, f"{prefix}/two")
            _check_race(store, f"{prefix}/race")
            _check_reads(store, prefix)
            store.probe_more(prefix)
        finally:
            _clean(store, prefix)
    except StoreRefused:
        raise
    except StoreError as error:
        raise StoreRefused(f"{store.name} cannot hold a run: {error}; {_remedy(error)}") from error


def _check_two_writers(store: Store, key: str) -> None:
    first, second = _body(), _body()
    if not store.put_new(key, first):
        raise StoreRefused(f"{store.name}: the first writer of a new object was told that it exists; {_CONDITION_REMEDY}")
    won, now = store.put_new(key, second), store.get(key)
    if won or now != first:
        raise StoreRefused(
            f"{store.name} ignores the condition of a conditional write (If-None-Match): "
            f"a second writer replaced the first; {_CONDITION_REMEDY}"
        )


def _check_race(store: Store, key: str) -> None:
    bodies = [_body() for _ in range(WRITERS)]
    barrier = threading.Barrier(WRITERS)

    def write(body: bytes) -> bool:
        barrier.wait(timeout=60)
        return store.put_new(key, body)

    with ThreadPoolExecutor(WRITERS, thread_name_prefix="probe") as pool:
        winners = [body for body, won in zip(bodies, pool.map(write, bodies), strict=True) if won]
    if winners != [store.get(key)]:
        raise StoreRefused(
            f"{store.name}: of {WRITERS} writers of one new object {len(winners)} were told that they won; {_CONDITION_REMEDY}"
        )


def _check_reads(store: Store, prefix: str) -> None:
    body = bytes(range(256))
    store.write_file(f"{prefix}/reads/file", [body[:100], body[100:]], num_bytes=len(body))
    store.put(f"{prefix}/reads/small", b"old")
    store.put(f"{prefix}/reads/small", b"new")
    seen = {
        "read back": store.get(f"{prefix}/reads/file") == body and store.get(f"{prefix}/reads/small") == b"new",
        "ranged read": store.get_range(f"{prefix}/reads/file", 200, 100) == body[200:],
        "list": store.list(f"{prefix}/reads") == [f"{prefix}/reads/file", f"{prefix}/reads/small"],
    }
    if failed := [name for name, is_right in seen.items() if not is_right]:
        raise StoreRefused(
            f"{store.name} does not return what was just written ({', '.join(failed)}): "
            "it lacks read-after-write consistency; use another store"
        )


def _clean(store: Store, prefix: str) -> None:
    try:
        store.delete_tree(prefix)
    except StoreError:
        return  # the probe's own verdict matters more; what stays is a few hundred bytes that nothing reads


def _body() -> bytes:
    return uuid.uuid4().hex.encode()


def _remedy(error: StoreError) -> str:
    if isinstance(error, NotFound):
        return "create the bucket or mount the file system first, or correct run.root"
    if isinstance(error, StoreForbidden):
        return "give this user permission to read, write, list and delete there, or correct the credentials"
    if isinstance(error, StoreFull):
        return "free some space or choose another root"
    if isinstance(error, StoreUnavailable):
        return "check address, network and time-outs of the store"
    return "correct run.root"
