"""From text to token shards below the run's root, and back to memory-mapped arrays on every node.

tokens/train.bin, tokens/held_out.bin    token ids, little-endian uint16 (uint32 for large vocabularies), documents end with end-of-text;
                                         those of the first source, then those of the second, ...
tokens/train-documents.bin               where each training document begins: tokens before it, little-endian uint64
tokens/tokenizer.json                    of the `tokenizers` library, or {"kind": "bytes"}
tokens/index.json                        written last, with put_new: what exists is complete, and its SHA-256 sums say what belongs to it
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from keepstep.storage.canonical import canonical_json, seal, sha256_hex, unseal
from keepstep.storage.errors import CorruptRecord, NotFound
from keepstep.storage.manifest import hash_blocks
from keepstep.storage.store import Store

from .config import DataSection
from .streaming import StreamedTokens
from .text import Document, documents
from .tokenizer import Tokenizer, learn_tokenizer, load_tokenizer

FORMAT: Final = 2
FOLDER: Final = "tokens"
INDEX: Final = f"{FOLDER}/index.json"
TOKENIZER: Final = f"{FOLDER}/tokenizer.json"
STARTS: Final = f"{FOLDER}/train-documents.bin"
PARTS: Final = ("train", "held_out")
HASHED_BYTES: Final = 1 << 20  # what streaming reads at once
_BLOCK_BYTES: Final = 8 << 20
_ENCODE_DOCUMENTS: Final = 256

Progress = Callable[[str, float], None]  # (what is being done, share that is done)
TokenArray = npt.NDArray[np.unsignedinteger[Any]]


class TokenReader(Protocol):
    """Token ids by place: a mapped file, or `StreamedTokens`."""

    def __len__(self) -> int: ...
    def __getitem__(self, places: npt.NDArray[np.int64], /) -> TokenArray: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """What one source gave to a part."""

    documents: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One side of the held-out split."""

    documents: int
    text_bytes: int
    tokens: int
    sha256: str  # of the .bin file
    sources: tuple[Extent, ...]  # one after the other
    blocks: tuple[str, ...]  # xxh3-64 of each HASHED_BYTES of the file
    unigram_nats: float  # cross-entropy per token under the train part's token frequencies: what a model that knows no context reaches


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenIndex:
    """tokens/index.json."""

    recipe: str  # digest of the [data] section that was asked for
    dtype: str  # numpy's name
    vocabulary: int
    tokenizer_sha256: str
    starts_sha256: str  # of the file with the documents' starts
    block_bytes: int
    train: Part
    held_out: Part

    def body(self) -> bytes:
        return seal({"format": FORMAT, **asdict(self)})

    @staticmethod
    def parse(body: bytes) -> TokenIndex:
        """Raises ValueError when another version of keepstep wrote it, or its bytes are not those that were written."""
        try:
            fields = unseal(body, INDEX)
        except CorruptRecord as error:
            raise ValueError(f"{error}; delete the folder {FOLDER}/ and run `keepstep prepare` again") from None
        if fields.pop("format", None) != FORMAT:
            raise ValueError(
                f"{INDEX} is not of format {FORMAT}: another keepstep wrote it; go on with that one, or choose another run.root"
            )
        return TokenIndex(**fields | {name: _part(fields[name]) for name in PARTS})

    def part(self, name: str) -> Part:
        return {"train": self.train, "held_out": self.held_out}[name]


def _part(fields: Mapping[str, Any]) -> Part:
    sources = tuple(Extent(**source) for source in fields["sources"])
    return Part(**{**fields, "sources": sources, "blocks": tuple(fields["blocks"])})


@dataclass(frozen=True)
class Tokens:
    """What a rank trains and evaluates on; read-only, and memory-mapped unless it is streamed."""

    index: TokenIndex
    train: TokenReader
    held_out: TokenArray
    starts: npt.NDArray[np.uint64]  # of the training documents, in tokens
    tokenizer_json: bytes

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Parsed at first use: training itself only needs numbers."""
        return load_tokenizer(self.tokenizer_json)


def recipe_digest(config: DataSection) -> str:
    """Same digest, same tokens; the versions of the installed packages are not in it: what a root holds stays valid after an upgrade."""
    made_of = config.model_dump(include={"tokenizer", "vocabulary", "held_out", "max_bytes"})
    return sha256_hex(canonical_json({**made_of, "sources": config.all_sources}))


def read_index(store: Store) -> TokenIndex | None:
    """What the root holds, None if nothing was prepared yet."""
    try:
        return TokenIndex.parse(store.get(INDEX))
    except NotFound:
        return None


def prepare(config: DataSection, store: Store, progress: Progress = lambda what, share: None) -> TokenIndex:
    """Makes the root's token shards unless they are there. Deterministic: the same text and section give the same bytes.

    Raises:
        ValueError: there is no text, too little of it, or the root holds tokens of another recipe.
    """
    found = read_index(store)
    if found:
        return _checked_recipe(found, config, store)
    progress("reading text", 0.0)
    by_source = [_split_source(config, number) for number in range(len(config.all_sources))]
    progress("learning the tokenizer", 0.1)
    tokenizer = learn_tokenizer(config, (document.text for train, _ in by_source for document in train))
    made = {name: _encode(tokenizer, [sides[side] for sides in by_source], progress) for side, name in enumerate(PARTS)}
    progress("writing tokens", 0.9)
    index = _index(config, tokenizer, made)
    for name in PARTS:
        _write(store, f"{FOLDER}/{name}.bin", made[name].tokens)
    _write(store, STARTS, made["train"].starts)
    store.put(TOKENIZER, tokenizer.to_json())
    if not store.put_new(INDEX, index.body()):
        raise ValueError(
            f"{store.name} was prepared by somebody else at the same time with other text; start again, or choose another run.root"
        )
    progress("tokens ready", 1.0)
    return index


def _write(store: Store, key: str, array: npt.NDArray[Any]) -> None:
    body = array.data.cast("B")
    blocks = (body[start : start + _BLOCK_BYTES] for start in range(0, body.nbytes, _BLOCK_BYTES))
    store.write_file(key, blocks, num_bytes=body.nbytes)


def _checked_recipe(found: TokenIndex, config: DataSection, store: Store) -> TokenIndex:
    if found.recipe != recipe_digest(config):
        raise ValueError(f"{store.name} holds tokens of another [data] section; undo the change, or choose another run.root")
    return found


def _limited(found: Iterable[Document], max_bytes: int) -> Iterable[Document]:
    """The first `max_bytes` bytes of text (all for 0), at least up to the end of a character."""
    left = max_bytes or float("inf")
    for document in found:
        text_bytes = document.text.encode()[: int(left) if left < float("inf") else None]
        yield Document(document.name, text_bytes.decode(errors="ignore"))
        left -= len(text_bytes)
        if left <= 0:
            return


def _split_source(config: DataSection, number: int) -> tuple[list[Document], list[Document]]:
    """(train, held out) of one source: at least two documents with text, one to learn from, one to evaluate on."""
    found = _limited(documents(config.all_sources[number], config.source_key(number)), config.max_bytes)
    kept = [document for document in found if document.text.strip()]
    if len(kept) < 2:
        raise ValueError(
            f"{config.source_key(number)} holds {'no text' if not kept else 'one short document only'}, and training needs "
            "another document than evaluation: give it more text (a file counts as several documents from 8 KiB on)"
        )
    return split(kept, config.held_out)


def split(found: list[Document], held_out: float) -> tuple[list[Document], list[Document]]:
    """(train, held out), both in the order of `found`; the documents whose names hash lowest are held out, at least one on each side."""
    num_held_out = min(max(1, round(len(found) * held_out)), len(found) - 1)
    by_hash = sorted(range(len(found)), key=lambda i: hashlib.sha256(f"{i} {found[i].name}".encode()).digest())
    chosen = frozenset(by_hash[:num_held_out])
    return [d for i, d in enumerate(found) if i not in chosen], [d for i, d in enumerate(found) if i in chosen]


@dataclass(frozen=True)
class _Encoded:
    """A part as it is written."""

    tokens: TokenArray
    starts: npt.NDArray[np.uint64]  # of its documents
    sources: tuple[Extent, ...]
    text_bytes: int


def _encode(tokenizer: Tokenizer, by_source: Sequence[list[Document]], progress: Progress) -> _Encoded:
    """The ids of all documents, each followed by end-of-text."""
    part = [document for found in by_source for document in found]
    pieces: list[npt.NDArray[np.uint32]] = []
    for start in range(0, len(part), _ENCODE_DOCUMENTS):
        encoded = tokenizer.encode_all([document.text for document in part[start : start + _ENCODE_DOCUMENTS]])
        pieces += [np.fromiter(chain(ids, [tokenizer.end_of_text]), np.uint32, len(ids) + 1) for ids in encoded]
        progress("encoding text", 0.4 + 0.5 * start / len(part))
    ends = np.cumsum([len(piece) for piece in pieces], dtype=np.uint64)
    starts = np.concatenate([np.zeros(1, dtype=np.uint64), ends])
    documents_before = np.cumsum([0, *map(len, by_source)])
    return _Encoded(
        tokens=np.concatenate(pieces).astype(np.uint16 if tokenizer.size <= 1 << 16 else np.uint32),
        starts=starts[:-1],
        sources=tuple(
            Extent(documents=int(last - first), tokens=int(starts[last] - starts[first])) for first, last in pairwise(documents_before)
        ),
        text_bytes=sum(len(document.text.encode()) for document in part),
    )


def _index(config: DataSection, tokenizer: Tokenizer, made: Mapping[str, _Encoded]) -> TokenIndex:
    counts = np.bincount(made["train"].tokens, minlength=tokenizer.size)
    parts = {
        name: Part(
            documents=len(encoded.starts),
            text_bytes=encoded.text_bytes,
            tokens=len(encoded.tokens),
            sha256=_sha256(encoded.tokens),
            sources=encoded.sources,
            blocks=hash_blocks(encoded.tokens.data.cast("B"), HASHED_BYTES),
            unigram_nats=unigram_nats(counts, encoded.tokens, smoothing=0 if name == "train" else 1),
        )
        for name, encoded in made.items()
    }
    return TokenIndex(
        recipe=recipe_digest(config),
        dtype=str(made["train"].tokens.dtype),
        vocabulary=tokenizer.size,
        tokenizer_sha256=sha256_hex(tokenizer.to_json()),
        starts_sha256=_sha256(made["train"].starts),
        block_bytes=HASHED_BYTES,
        train=parts["train"],
        held_out=parts["held_out"],
    )


def _sha256(array: npt.NDArray[Any]) -> str:
    return hashlib.sha256(array.data.cast("B")).hexdigest()


def unigram_nats(counts: npt.NDArray[np.int64], tokens: TokenArray, *, smoothing: int) -> float:
    """Mean -ln(frequency) over `tokens`, with frequencies from `counts` (by token id); smoothing 1 is for text that was not counted."""
    frequencies = (counts + smoothing) / (counts + smoothing).sum()
    return float(-np.log(frequencies[tokens]).mean())


def open_tokens(store: Store, scratch: Path | None = None, alive: Callable[[], None] = lambda: None, *, streaming: bool = False) -> Tokens:
    """The root's tokens, memory-mapped: in place on a file system, otherwise from a verified copy in this node's `scratch`.

    Several ranks of a node may call it at once: each would write the same bytes, and renames them into place.

    Args:
        alive: called for each block that is read to be verified.
        streaming: the training tokens stay where they are, and are read and verified block by block.

    Raises:
        ValueError: nothing was prepared, or the bytes are not those that were.
    """
    index = read_index(store)
    if index is None:
        raise ValueError(f"{store.name} holds no tokens yet: run `keepstep prepare` first")

    def mapped(key: str, sha256: str, dtype: str, count: int) -> npt.NDArray[Any]:
        array: npt.NDArray[Any] = np.memmap(_local(store, key, sha256, scratch, alive), dtype=np.dtype(dtype), mode="r")
        assert len(array) == count
        return array

    held_out = mapped(f"{FOLDER}/held_out.bin", index.held_out.sha256, index.dtype, index.held_out.tokens)
    starts = mapped(STARTS, index.starts_sha256, "uint64", index.train.documents)
    train = _streamed(store, index) if streaming else mapped(f"{FOLDER}/train.bin", index.train.sha256, index.dtype, index.train.tokens)
    tokenizer_json = store.get(TOKENIZER)
    if sha256_hex(tokenizer_json) != index.tokenizer_sha256:
        raise _damaged(store, TOKENIZER)
    return Tokens(index, train, held_out, starts, tokenizer_json)


def _streamed(store: Store, index: TokenIndex) -> StreamedTokens:
    return StreamedTokens(store, f"{FOLDER}/train.bin", np.dtype(index.dtype), index.train.tokens, index.block_bytes, index.train.blocks)


def _damaged(store: Store, key: str) -> ValueError:
    return ValueError(f"{store.name}: {key} is not what {INDEX} says; delete the folder {FOLDER}/ and run `keepstep prepare` again")


def _local(store: Store, key: str, sha256: str, scratch: Path | None, alive: Callable[[], None]) -> Path:
    """A local file with the object's bytes, verified once per node: the copy or the marker is named after its hash."""
    in_place = store.local_path(key)
    if scratch is None:
        if in_place is None:
            raise ValueError(f"{store.name} is remote: its tokens need a local folder for a copy")
        return _verified(store, key, in_place, sha256, alive)
    name = key.rpartition("/")[2].removesuffix(".bin")
    copy = scratch / FOLDER / f"{name}-{sha256[:16]}.bin"
    if copy.exists():
        return copy.resolve()
    copy.parent.mkdir(parents=True, exist_ok=True)
    temporary = copy.with_suffix(f".{_unique()}")
    if in_place is not None:
        temporary.symlink_to(_verified(store, key, in_place, sha256, alive).absolute())
    else:
        temporary.write_bytes(store.get(key))
        _verified(store, key, temporary, sha256, alive)
    temporary.replace(copy)
    return copy.resolve()


def _unique() -> str:
    import uuid

    return uuid.uuid4().hex


def _verified(store: Store, key: str, path: Path, sha256: str, alive: Callable[[], None]) -> Path:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            sha.update(block)
            alive()
    if sha.hexdigest() != sha256:
        raise _damaged(store, key)
    return path


def describe(index: TokenIndex) -> dict[str, Any]:
    """The figures that people want to see after `prepare`."""
    return {
        "train tokens": index.train.tokens,
        "held-out tokens": index.held_out.tokens,
        "vocabulary": index.vocabulary,
        "bytes per token": round(index.train.text_bytes / index.train.tokens, 3),
        "unigram entropy, nats per token": round(index.train.unigram_nats, 4),
    }
