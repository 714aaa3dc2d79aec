"""Reading checkpoints: every byte is checked against the hash that its commit vouches for before anybody trusts it.

The chain of trust: run log -> SHA-256 of the manifest -> block hashes in it -> bytes, from whichever tier they come.

A block is read once, whatever number of destinations it is cut into, and straight into them: only the gaps between them (headers of
torch.save's archives, tensors that nobody asked for) go to scratch memory, because the hash needs them too. From this machine it is read in
steps that a core's cache holds, each hashed while it is there.
"""

from __future__ import annotations

import contextlib
import threading
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

from .canonical import sha256_hex
from .collector import collector_paused
from .errors import DamagedCheckpoint, IncompleteCheckpoint, NotFound, StoreError
from .layout import MANIFEST_NAME, rank_index_name
from .manifest import FileEntry, Manifest, block_hasher
from .store import OpenFile, Store


class HeldFile(OpenFile, Protocol):
    """What reading needs of `arena.ResidentFile`."""

    @property
    def num_bytes(self) -> int: ...


Resident = Callable[[str, str], HeldFile | None]  # (directory, file name) -> the file, where it is in this node's memory
Progress = Callable[[int, int], None]  # (bytes verified, bytes of the checkpoint), in the thread that asked
T = TypeVar("T")
R = TypeVar("R")

STEP_BYTES: Final = 1 << 19  # of a block that lies on this machine
MAX_CUTS: Final = 64  # of a block that is read straight into them; smaller crumbs are cheaper to copy than to address


@dataclass(frozen=True, slots=True)
class Piece:
    """`destination.nbytes` bytes from byte `offset` of a file on, and the memory that they go to: contiguous and writable."""

    file: str
    offset: int
    destination: memoryview


@dataclass(frozen=True, slots=True)
class _Cut:
    """A part of a block: from its byte `skip` on."""

    skip: int
    destination: memoryview

    @property
    def end(self) -> int:
        return self.skip + self.destination.nbytes


@dataclass(frozen=True, slots=True)
class _Block:
    """A block of a file, and who wants which part of it, in order. Nobody: it is only verified."""

    file: FileEntry
    index: int
    cuts: Sequence[_Cut] = ()

    @property
    def start(self) -> int:
        return self.index * self.file.block_bytes

    @property
    def num_bytes(self) -> int:
        return min(self.file.block_bytes, self.file.num_bytes - self.start)

    @property
    def expected(self) -> str:
        return self.file.hashes[self.index]

    @property
    def wanted_bytes(self) -> int:
        return sum(cut.destination.nbytes for cut in self.cuts)


@dataclass(frozen=True, slots=True)
class _Read:
    """How a block was read: from this node's memory or from the store, and what was odd about it."""

    block: _Block
    from_memory: bool
    alarm: str = ""


def read_manifest(store: Store, directory: str, manifest_sha256: str) -> Manifest:
    """The manifest that was committed.

    Raises:
        DamagedCheckpoint: it is gone or not the committed one.
        StoreError: the store could not be asked.
    """
    try:
        body = store.get(f"{directory}/{MANIFEST_NAME}")
    except NotFound:
        raise DamagedCheckpoint(directory, MANIFEST_NAME, "is missing") from None
    if (found := sha256_hex(body)) != manifest_sha256:
        raise DamagedCheckpoint(directory, MANIFEST_NAME, f"has SHA-256 {found}, {manifest_sha256} was committed")
    try:
        with collector_paused():
            return Manifest.parse(body)
    except (ValueError, IncompleteCheckpoint) as error:
        raise DamagedCheckpoint(directory, MANIFEST_NAME, f"was committed but cannot be read: {error}") from error


def verify_checkpoint(store: Store, directory: str, manifest_sha256: str, progress: Progress | None = None) -> Manifest:
    """Reads every byte of a committed checkpoint back from the store: manifest, rank indexes, tensors, everything in it.

    An exception of `progress` ends it early.

    Raises:
        DamagedCheckpoint: naming the first file that is not what was written.
        StoreError: the store could not be asked.
    """
    manifest = read_manifest(store, directory, manifest_sha256)
    _verify_rank_indexes(store, directory, manifest)
    list(_in_parallel(lambda file: _verify_size(store, directory, file), list(manifest.files.values()), store.parallel_reads))
    done = 0
    with contextlib.closing(CheckpointReader(store, directory, manifest).verify_blocks()) as verified:
        for num_bytes in verified:
            done += num_bytes
            if progress:
                progress(done, manifest.num_bytes)
    return manifest


def _verify_rank_indexes(store: Store, directory: str, manifest: Manifest) -> None:
    """The manifest holds them all, so nobody reads them again; but what lies in a directory is what was committed, or it is damaged."""
    names = [rank_index_name(index.rank) for index in manifest.ranks]
    for name, index, body in zip(names, manifest.ranks, store.get_many([f"{directory}/{name}" for name in names]), strict=True):
        if isinstance(body, NotFound):
            raise DamagedCheckpoint(directory, name, "is missing")
        if isinstance(body, StoreError):
            raise body
        if body != index.body():
            raise DamagedCheckpoint(directory, name, "is not the index that the manifest was made of")


def _verify_size(store: Store, directory: str, file: FileEntry) -> None:
    try:
        size = store.size(f"{directory}/{file.name}")
    except NotFound:
        raise DamagedCheckpoint(directory, file.name, "is missing") from None
    if size != file.num_bytes:
        raise DamagedCheckpoint(directory, file.name, f"has {size} bytes, {file.num_bytes} were written")


class CheckpointReader:
    """Verified bytes of one checkpoint, each block from this node's memory where it is still there, else from the store.

    For one thread; the threads that it reads with are its own, `store.parallel_reads` of them, and end with the call.

    Args:
        alive: called in the caller's thread after each block.

    Attributes:
        alarms: what did not verify at once and was read again from the store, one sentence each.
        bytes_from_memory, bytes_from_store: how much of what was asked for came from which tier.
    """

    def __init__(
        self,
        store: Store,
        directory: str,
        manifest: Manifest,
        resident: Resident | None = None,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        self._alive = alive
        self.manifest = manifest
        self.directory = directory
        self.alarms: list[str] = []
        self.bytes_from_memory = 0
        self.bytes_from_store = 0
        self._store = store
        self._resident = resident
        self._files = manifest.files
        self._held: dict[str, HeldFile | None] = {}  # files in this node's memory
        self._is_local = store.local_path("") is not None

    def read_file(self, name: str) -> bytes:
        """A whole file, for small ones. Raises as `read_pieces` does."""
        body = bytearray(self._files[name].num_bytes)
        self.read_into(name, 0, memoryview(body))
        return bytes(body)

    def read_into(self, name: str, offset: int, destination: memoryview) -> None:
        """Fills `destination` from byte `offset` of a file. For many tensors use `read_pieces`. Raises as it does."""
        self.read_pieces([Piece(name, offset, destination)])

    def read_pieces(self, pieces: Iterable[Piece]) -> None:
        """Fills all destinations; each block that they touch is read and verified once, several at a time.

        On an error the content of the destinations is undefined.

        Raises:
            KeyError: the manifest lists no such file.
            DamagedCheckpoint: a block is damaged in every tier, naming the first one.
            StoreError: the store could not be asked.
        """
        with collector_paused():
            self._read_pieces(pieces)

    def _read_pieces(self, pieces: Iterable[Piece]) -> None:
        blocks = self._blocks_of(pieces)
        for name in dict.fromkeys(block.file.name for block in blocks):
            self._find_resident(name)
        with contextlib.closing(self._read(blocks)) as reads:
            for read in reads:
                self._take_note(read)
                self._alive()

    def verify_blocks(self) -> Generator[int]:
        """Reads every block from the store and gives it to nobody; yields the bytes of each. Raises as `read_pieces` does."""
        self._held.clear()
        blocks = [_Block(file, index) for file in self._files.values() for index in range(len(file.hashes))]
        with contextlib.closing(self._read(blocks)) as reads:
            yield from (read.block.num_bytes for read in reads)

    def _blocks_of(self, pieces: Iterable[Piece]) -> list[_Block]:
        """What is wanted of which block, in the order of the bytes in the files."""
        cuts: dict[tuple[str, int], list[_Cut]] = defaultdict(list)
        for piece in pieces:
            file, memory = self._files[piece.file], piece.destination
            if memory.format != "B" and memory.nbytes:
                memory = memory.cast("B")
            if (end := piece.offset + memory.nbytes) > file.num_bytes:
                raise DamagedCheckpoint(self.directory, file.name, f"bytes up to {end} are wanted, it has {file.num_bytes}")
            index, skip = divmod(piece.offset, file.block_bytes)
            if skip + memory.nbytes <= file.block_bytes:  # nearly always, and then this is all
                if memory.nbytes:
                    cuts[file.name, index].append(_Cut(skip, memory))
                continue
            at = 0
            while at < memory.nbytes:
                index, skip = divmod(piece.offset + at, file.block_bytes)
                part = memory[at : at + file.block_bytes - skip]
                cuts[file.name, index].append(_Cut(skip, part))
                at += part.nbytes
        return [_Block(self._files[key[0]], key[1], sorted(cuts[key], key=lambda cut: cut.skip)) for key in sorted(cuts)]

    def _find_resident(self, name: str) -> None:
        """Asked in the caller's thread: the connection to the persister is for one."""
        if name not in self._held:
            held = self._resident(self.directory, name) if self._resident else None
            self._held[name] = held if held is not None and held.num_bytes == self._files[name].num_bytes else None

    def _read(self, blocks: Sequence[_Block]) -> Generator[_Read]:
        scratch = _Scratch()
        with _OpenFiles(self._store, self.directory) as files:
            runs = _runs(blocks, self._store.run_bytes)
            for reads in _in_parallel(lambda run: self._read_run(run, files, scratch), runs, self._store.parallel_reads):
                yield from reads

    def _read_run(self, run: Sequence[_Block], files: _OpenFiles, scratch: _Scratch) -> Sequence[_Read]:
        """Neighbouring blocks, in any thread; what the store has of them it is asked for once."""
        name, start = run[0].file.name, run[0].start
        if len(run) == 1:
            return [self._read_block(run[0], lambda: files.get(name), scratch)]
        num_bytes = sum(block.num_bytes for block in run)
        with contextlib.closing(self._store.open_span(_key(self.directory, name), start, num_bytes)) as span:
            return [self._read_block(block, lambda: span, scratch) for block in run]

    def _read_block(self, block: _Block, file: Callable[[], OpenFile], scratch: _Scratch) -> _Read:
        """Memory first, then the store, and the store once more."""
        views = _views(block, memory := scratch.of(block.num_bytes))
        held = self._held.get(block.file.name)
        alarm = ""
        if held is not None and self._fill(held, block, views, STEP_BYTES):
            alarm = self._alarm(block, "in this node's memory is damaged, read from the store instead")
            held = None
        if held is None and self._fetch(block, views, file):
            alarm = alarm or self._alarm(block, "came damaged from the store, and was right when it was read again")
        if views[0] is memory:
            _copy(memory, block.cuts)
        return _Read(block, from_memory=held is not None, alarm=alarm)

    def _alarm(self, block: _Block, what: str) -> str:
        return f"{self.directory}/{block.file.name}: block {block.index} {what}"

    def _fetch(self, block: _Block, views: Sequence[memoryview], file: Callable[[], OpenFile]) -> bool:
        """Reads a block from the store; whether that took a second try. Raises DamagedCheckpoint."""
        step = STEP_BYTES if self._is_local else block.num_bytes
        try:
            if not self._fill(file(), block, views, step):
                return False
            with contextlib.closing(self._store.open_file(_key(self.directory, block.file.name))) as again:
                why = self._fill(again, block, views, step)
        except NotFound:
            why = "is missing"
        if why:
            raise DamagedCheckpoint(self.directory, block.file.name, why)
        return True

    def _fill(self, file: OpenFile, block: _Block, views: Sequence[memoryview], step: int) -> str:
        """Reads a block; what is wrong with it, as a sentence, "" when it is right."""
        hasher, at = block_hasher(), block.start
        for group in _steps(views, step):
            count, wanted = file.read_into(at, *group), sum(view.nbytes for view in group)
            at += count
            if count != wanted:
                return f"ends at byte {at}, {block.file.num_bytes} were written"
            for view in group:
                hasher.update(view)
        if hasher.hexdigest() != block.expected:
            return f"block {block.index} (from byte {block.start}) does not have the hash that was written"
        return ""

    def _take_note(self, read: _Read) -> None:
        if read.alarm:
            self.alarms.append(read.alarm)
        if read.from_memory:
            self.bytes_from_memory += read.block.wanted_bytes
        else:
            self.bytes_from_store += read.block.wanted_bytes


def _key(directory: str, name: str) -> str:
    """Files that are no checkpoint of ours may lie in the store's own folder: ""."""
    return f"{directory}/{name}" if directory else name


class _OpenFiles:
    """The files of a directory, each opened once. Thread-safe; closed together."""

    def __init__(self, store: Store, directory: str) -> None:
        self._store, self._directory = store, directory
        self._lock = threading.Lock()
        self._files: dict[str, OpenFile] = {}

    def __enter__(self) -> _OpenFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def get(self, name: str) -> OpenFile:
        """Raises NotFound, StoreError."""
        with self._lock:
            if name not in self._files:
                self._files[name] = self._store.open_file(_key(self._directory, name))
            return self._files[name]


class _Scratch(threading.local):
    """Each reading thread's own memory for what nobody wants."""

    memory = memoryview(b"")

    def of(self, num_bytes: int) -> memoryview:
        if self.memory.nbytes < num_bytes:
            self.memory = memoryview(bytearray(num_bytes))
        return self.memory[:num_bytes]


def _runs(blocks: Iterable[_Block], run_bytes: int) -> list[list[_Block]]:
    """The same blocks in order, neighbours together as far as `run_bytes` goes."""
    runs = list[list[_Block]]()
    for block in blocks:
        if runs and _goes_on(runs[-1], block, run_bytes):
            runs[-1].append(block)
        else:
            runs.append([block])
    return runs


def _goes_on(run: Sequence[_Block], block: _Block, run_bytes: int) -> bool:
    is_next = block.file is run[-1].file and block.index == run[-1].index + 1
    return is_next and block.start + block.num_bytes - run[0].start <= run_bytes


def _views(block: _Block, scratch: memoryview) -> list[memoryview]:
    """Memory for the whole block, in order: the destinations and scratch between them, or scratch alone where that does not work."""
    views, at = list[memoryview](), 0
    for cut in block.cuts:
        if cut.skip < at or len(block.cuts) > MAX_CUTS:
            return [scratch]
        views += [scratch[at : cut.skip], cut.destination]
        at = cut.end
    return [view for view in (*views, scratch[at:]) if view.nbytes]


def _steps(views: Sequence[memoryview], step: int) -> Iterator[Sequence[memoryview]]:
    """The same memory in groups of about `step` bytes; only views that are larger are cut."""
    group, room = list[memoryview](), step
    for view in views:
        rest = view
        while rest.nbytes > room:
            group.append(rest[:room])
            yield group
            rest, group, room = rest[room:], [], step
        group.append(rest)
        room -= rest.nbytes
    if group:
        yield group


def _copy(body: memoryview, cuts: Iterable[_Cut]) -> None:
    for cut in cuts:
        cut.destination[:] = body[cut.skip : cut.end]


def _in_parallel(work: Callable[[T], R], items: Sequence[T], threads: int) -> Iterator[R]:
    """The results in order. The first error in that order ends it; what has not begun by then never begins."""
    if threads <= 1 or len(items) <= 1:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(min(threads, len(items)), thread_name_prefix="read") as pool:
        yield from pool.map(work, items)


__all__ = ["CheckpointReader", "Piece", "Progress", "Resident", "read_manifest", "verify_checkpoint"]
