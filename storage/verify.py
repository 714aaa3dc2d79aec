"""Reading checkpoints: every byte is checked against the hash that its commit vouches for before anybody trusts it.

The chain of trust: run log -> SHA-256 of the manifest -> block hashes in it -> bytes, from whichever tier they come.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from .canonical import sha256_hex
from .errors import DamagedCheckpoint, IncompleteCheckpoint, NotFound
from .layout import MANIFEST_NAME
from .manifest import FileEntry, Manifest, hash_block, verify_blocks
from .store import Store

Resident = Callable[[str, str], memoryview | None]  # (directory, file name) -> its bytes in this node's memory
Progress = Callable[[int, int], None]  # (bytes verified, bytes of the checkpoint)

CACHE_BYTES: Final = 32 << 20


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
        return Manifest.parse(body)
    except (ValueError, IncompleteCheckpoint) as error:
        raise DamagedCheckpoint(directory, MANIFEST_NAME, f"was committed but cannot be read: {error}") from error


def verify_checkpoint(store: Store, directory: str, manifest_sha256: str, progress: Progress | None = None) -> Manifest:
    """Reads every byte of a committed checkpoint back from the store.

    Raises:
        DamagedCheckpoint: naming the first file that is not what was written.
        StoreError: the store could not be asked.
    """
    manifest = read_manifest(store, directory, manifest_sha256)
    done = 0
    for file in manifest.files.values():
        _verify_file(store, directory, file)
        done += file.num_bytes
        if progress:
            progress(done, manifest.num_bytes)
    return manifest


def _verify_file(store: Store, directory: str, file: FileEntry) -> None:
    key = f"{directory}/{file.name}"
    try:
        size = store.size(key)
    except NotFound:
        raise DamagedCheckpoint(directory, file.name, "is missing") from None
    if size != file.num_bytes:
        raise DamagedCheckpoint(directory, file.name, f"has {size} bytes, {file.num_bytes} were written")
    reader = _Blocks(store, directory, file)
    buffer = memoryview(bytearray(min(file.block_bytes, file.num_bytes)))
    for index in range(len(file.hashes)):
        reader.read(index, buffer[: reader.length(index)])


class CheckpointReader:
    """Verified bytes of one checkpoint, from this node's memory where they are still there, else from the store. For one thread.

    Attributes:
        alarms: what did not verify in memory and was read from the store instead, one sentence each.
        bytes_from_memory, bytes_from_store: how much came from which tier.
    """

    def __init__(
        self, store: Store, directory: str, manifest: Manifest, resident: Resident | None = None, *, cache_bytes: int = CACHE_BYTES
    ) -> None:
        self.manifest = manifest
        self.directory = directory
        self.alarms: list[str] = []
        self.bytes_from_memory = 0
        self.bytes_from_store = 0
        self._store = store
        self._resident = resident
        self._files = manifest.files
        self._views: dict[str, memoryview | None] = {}
        self._trusted: set[tuple[str, int]] = set()  # blocks in memory that were verified already
        self._cache: OrderedDict[tuple[str, int], bytearray] = OrderedDict()  # verified blocks of the store, the last used at the end
        self._cache_bytes = cache_bytes

    def read_file(self, name: str) -> bytes:
        """A whole file, for small ones. Raises KeyError for a file that the manifest does not list, DamagedCheckpoint, StoreError."""
        body = bytearray(self._files[name].num_bytes)
        self.read_into(name, 0, memoryview(body))
        return bytes(body)

    def read_into(self, name: str, offset: int, destination: memoryview) -> None:
        """Fills `destination` (contiguous bytes) from byte `offset` of a file; all blocks it touches are verified.

        Whole blocks go straight from the store into the destination and are verified there, so on an error its content is undefined.
        Raises KeyError, DamagedCheckpoint, StoreError.
        """
        file = self._files[name]
        destination = destination.cast("B") if destination.format != "B" else destination
        if offset + destination.nbytes > file.num_bytes:
            raise DamagedCheckpoint(self.directory, name, f"bytes up to {offset + destination.nbytes} are wanted, it has {file.num_bytes}")
        at = 0
        while at < destination.nbytes:
            index, skip = divmod(offset + at, file.block_bytes)
            length = min(_Blocks(self._store, self.directory, file).length(index) - skip, destination.nbytes - at)
            self._read_piece(file, index, skip, destination[at : at + length])
            at += length

    def _read_piece(self, file: FileEntry, index: int, skip: int, destination: memoryview) -> None:
        """Part or all of one block."""
        if (block := self._block_in_memory(file, index)) is not None:
            destination[:] = block[skip : skip + destination.nbytes]
            self.bytes_from_memory += destination.nbytes
            return
        blocks = _Blocks(self._store, self.directory, file)
        self.bytes_from_store += destination.nbytes
        if destination.nbytes == blocks.length(index) and (file.name, index) not in self._cache:
            blocks.read(index, destination)
        else:
            destination[:] = self._cached(blocks, index)[skip : skip + destination.nbytes]

    def _block_in_memory(self, file: FileEntry, index: int) -> memoryview | None:
        if file.name not in self._views:
            self._views[file.name] = self._find_resident(file)
        view = self._views[file.name]
        if view is None:
            return None
        block = view[index * file.block_bytes : (index + 1) * file.block_bytes]
        if (file.name, index) not in self._trusted:
            if hash_block(block) != file.hashes[index]:
                self.alarms.append(
                    f"{self.directory}/{file.name}: block {index} in this node's memory is damaged, read from the store instead"
                )
                return None
            self._trusted.add((file.name, index))
        return block

    def _find_resident(self, file: FileEntry) -> memoryview | None:
        view = self._resident(self.directory, file.name) if self._resident else None
        return view if view is not None and view.nbytes == file.num_bytes else None

    def _cached(self, blocks: _Blocks, index: int) -> memoryview:
        key = (blocks.file.name, index)
        if key not in self._cache:
            body = self._recycled(blocks.length(index))
            blocks.read(index, memoryview(body))
            self._cache[key] = body
        self._cache.move_to_end(key)
        return memoryview(self._cache[key])

    def _recycled(self, length: int) -> bytearray:
        """Memory for a block: that of the one that leaves the cache, if it fits (fresh pages cost several times the copy)."""
        body = bytearray()
        while self._cache and sum(map(len, self._cache.values())) + length > self._cache_bytes:
            _, body = self._cache.popitem(last=False)
        return body if len(body) == length else bytearray(length)


class _Blocks:
    """The blocks of one file on the store."""

    __slots__ = ("_directory", "_store", "file")

    def __init__(self, store: Store, directory: str, file: FileEntry) -> None:
        self._store = store
        self._directory = directory
        self.file = file

    def length(self, index: int) -> int:
        return min(self.file.block_bytes, self.file.num_bytes - index * self.file.block_bytes)

    def read(self, index: int, destination: memoryview) -> None:
        """Raises DamagedCheckpoint."""
        start = index * self.file.block_bytes
        try:
            count = self._store.read_into(f"{self._directory}/{self.file.name}", start, destination)
        except NotFound:
            raise DamagedCheckpoint(self._directory, self.file.name, "is missing") from None
        if count != destination.nbytes:
            raise DamagedCheckpoint(self._directory, self.file.name, f"ends at byte {start + count}, {self.file.num_bytes} were written")
        if hash_block(destination) != self.file.hashes[index]:
            raise DamagedCheckpoint(
                self._directory, self.file.name, f"block {index} (from byte {start}) does not have the hash that was written"
            )


__all__ = ["CheckpointReader", "Progress", "Resident", "read_manifest", "verify_blocks", "verify_checkpoint"]
