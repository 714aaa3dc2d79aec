"""tokens/index.json: what the token files below a run's root hold, and the hashes of their bytes.

tokens/train-00000.bin ...               token ids, little-endian uint16 (uint32 for large vocabularies), cut anywhere; documents end with
tokens/held_out-00000.bin ...            end-of-text; those of the first source, then those of the second, ...
tokens/train-documents.bin               where each document begins: tokens before it, little-endian uint64
tokens/held_out-documents.bin
tokens/train-marks.bin                   with objective "pairs", tokens of the prompt, its end included; with "classes", the number of the
tokens/held_out-marks.bin                label: little-endian uint32 for each document. Otherwise there are none.
tokens/tokenizer.json                    of the library `tokenizers`, or {"kind": "bytes"}
tokens/index.json                        written last, with put_new: what exists is complete, and its hashes say what belongs to it

A pair is stored as prompt, end-of-text, completion, end-of-text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from keepstep.storage.canonical import canonical_json, seal, sha256_hex, unseal
from keepstep.storage.errors import CorruptRecord, NotFound
from keepstep.storage.store import Store

from .config import TrainerConfig

FORMAT: Final = 3
FOLDER: Final = "tokens"
INDEX: Final = f"{FOLDER}/index.json"
TOKENIZER: Final = f"{FOLDER}/tokenizer.json"
PARTS: Final = ("train", "held_out")
_RECIPE: Final = frozenset(
    {"text_field", "normalize", "strip_control", "deduplicate", "near_threshold", "tokenizer", "vocabulary", "min_frequency", "held_out"}
    | {"max_bytes", "shard_mb"}
)


def shard_key(part: str, number: int) -> str:
    return f"{FOLDER}/{part}-{number:05d}.bin"


def documents_key(part: str) -> str:
    return f"{FOLDER}/{part}-documents.bin"


def marks_key(part: str) -> str:
    return f"{FOLDER}/{part}-marks.bin"


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """What one source gave to a part."""

    documents: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A token file."""

    tokens: int
    sha256: str
    blocks: tuple[str, ...]  # xxh3-64 of each `block_bytes` of it

    @staticmethod
    def parse(fields: Mapping[str, Any]) -> Shard:
        return Shard(tokens=fields["tokens"], sha256=fields["sha256"], blocks=tuple(fields["blocks"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One side of the held-out split."""

    documents: int
    text_bytes: int
    tokens: int
    unknown: int  # of them, the unknown token
    starts_sha256: str  # of the file with the documents' starts
    marks_sha256: str  # "": there are none
    sources: tuple[Extent, ...]  # one after the other
    shards: tuple[Shard, ...]
    unigram_nats: float  # cross-entropy per token under the train part's token frequencies: what a model that knows no context reaches


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What the sources held beside the documents that became tokens."""

    files: int
    empty_files: int
    empty_documents: int
    duplicates: int
    source_bytes: int  # of the files, packed as they are


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenIndex:
    """tokens/index.json."""

    recipe: str  # digest of what was asked for
    dtype: str  # numpy's name
    vocabulary: int
    tokenizer_sha256: str
    block_bytes: int
    labels: tuple[str, ...]  # of objective "classes", by number
    report: Report
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
        own = {"labels": tuple(fields["labels"]), "report": Report(**fields["report"])}
        return TokenIndex(**{**fields, **own, **{name: _part(fields[name]) for name in PARTS}})

    def part(self, name: str) -> Part:
        return {"train": self.train, "held_out": self.held_out}[name]

    @property
    def keys(self) -> tuple[str, ...]:
        """All objects that belong to it, itself included."""
        found = [INDEX, TOKENIZER]
        for name in PARTS:
            part = self.part(name)
            found += [shard_key(name, number) for number in range(len(part.shards))]
            found += [documents_key(name), *([marks_key(name)] if part.marks_sha256 else [])]
        return tuple(found)


def _part(fields: Mapping[str, Any]) -> Part:
    sources = tuple(Extent(**source) for source in fields["sources"])
    return Part(**{**fields, "sources": sources, "shards": tuple(map(Shard.parse, fields["shards"]))})


def recipe_digest(config: TrainerConfig) -> str:
    """Same digest, same tokens; the versions of the installed packages are not in it: what a root holds stays valid after an upgrade."""
    made_of = config.data.model_dump(include=set(_RECIPE))
    objective = "text" if config.train.objective == "next-token" else config.train.objective
    return sha256_hex(canonical_json({**made_of, "sources": config.data.all_sources, "objective": objective}))


def read_index(store: Store) -> TokenIndex | None:
    """What the root holds, None if nothing was prepared yet."""
    try:
        return TokenIndex.parse(store.get(INDEX))
    except NotFound:
        return None


def describe(index: TokenIndex) -> dict[str, Any]:
    """The figures that people want to see after `prepare`."""
    train, held_out, report = index.train, index.held_out, index.report
    tokens = train.tokens + held_out.tokens
    return {
        "files": report.files,
        "empty_files": report.empty_files,
        "train_documents": train.documents,
        "held_out_documents": held_out.documents,
        "empty_documents": report.empty_documents,
        "duplicates_dropped": report.duplicates,
        "train_tokens": train.tokens,
        "held_out_tokens": held_out.tokens,
        "vocabulary": index.vocabulary,
        "bytes_per_token": round((train.text_bytes + held_out.text_bytes) / tokens, 3),
        "unknown_share": round((train.unknown + held_out.unknown) / tokens, 6),
        "unigram_nats_per_token": round(train.unigram_nats, 4),
        **({"labels": len(index.labels)} if index.labels else {}),
    }
