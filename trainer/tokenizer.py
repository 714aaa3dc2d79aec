"""Text to token ids and back. What a tokenizer is made of lies in one file, `to_json`: of the library `tokenizers`, but for bytes.

Byte-level tokenizers (bytes, and BPE and Unigram as they are learnt here) cannot fail on any text. Words and characters that were not
learnt are the unknown token.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

END_OF_TEXT: Final = "<|endoftext|>"
MASK: Final = "<|mask|>"
UNKNOWN: Final = "<|unknown|>"
END_NAMES: Final = (END_OF_TEXT, "</s>", "<|end_of_text|>", "[SEP]", "<eos>")  # what other tokenizers call it
MASK_NAMES: Final = (MASK, "[MASK]", "<mask>")
# A word with the space before it, marks, the white space between: joined they are the text again. As GPT-2's, without its contractions.
WORDS: Final = r" ?\w+| ?[^\w\s]+|\s+(?!\S)|\s+"
_WHOLE_CHARS: Final = 1 << 20  # a longer text is encoded in parts: the library needs 25 times a text's bytes
_BETWEEN_WORDS: Final = re.compile(r"(?<=[A-Za-z0-9]) (?=[A-Za-z0-9])")  # where no token of ours goes across
_CODE_POINTS: Final = 0x110000

Ids = npt.NDArray[np.unsignedinteger[Any]]


class Tokenizer(Protocol):
    @property
    def size(self) -> int:
        """All ids are below it."""

    @property
    def end_of_text(self) -> int:
        """The id that ends a document."""

    @property
    def mask(self) -> int | None:
        """The id that stands for a token that is to be guessed; None: there is none."""

    @property
    def unknown(self) -> int | None:
        """The id of what was not learnt; None: there is nothing of that kind."""

    def encode_all(self, texts: Sequence[str]) -> Sequence[Sequence[int]]:
        """The ids of each text, without end-of-text. Uses all cores, and the interpreter's lock only at its end."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text; bytes that are no UTF-8 become U+FFFD, end-of-text vanishes."""

    def to_json(self) -> bytes:
        """For `load_tokenizer`."""


class ByteTokenizer:
    """One id per byte of UTF-8."""

    end_of_text = 256
    unknown: int | None = None

    def __init__(self, *, with_mask: bool = False) -> None:
        self.mask = 257 if with_mask else None
        self.size = 257 + with_mask

    def encode_all(self, texts: Sequence[str]) -> Sequence[Sequence[int]]:
        return [text.encode() for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(MASK.encode() if i == self.mask else bytes((i,)) for i in ids if i != self.end_of_text).decode(errors="replace")

    def to_json(self) -> bytes:
        return b'{"kind":"bytes","mask":true}\n' if self.mask else b'{"kind":"bytes"}\n'


class CharacterTokenizer:
    """One id per character, by a table of all code points. Its file is that of a BPE without merges, which gives the same ids."""

    end_of_text, unknown = 0, 1

    def __init__(self, characters: Sequence[str], *, with_mask: bool = False) -> None:
        self._special = (END_OF_TEXT, UNKNOWN, MASK)[: 2 + with_mask]
        self._tokens = (*self._special, *characters)
        self._table = np.full(_CODE_POINTS, self.unknown, dtype=np.uint32)
        self._table[[ord(character) for character in characters]] = np.arange(len(self._special), len(self._tokens), dtype=np.uint32)

    @property
    def size(self) -> int:
        return len(self._tokens)

    @property
    def mask(self) -> int | None:
        return 2 if len(self._special) > 2 else None

    def encode_all(self, texts: Sequence[str]) -> Sequence[Sequence[int]]:
        return [array("I", self._table[np.frombuffer(text.encode("utf-32-le"), dtype="<u4")].tobytes()) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self._tokens[i] for i in ids if i != self.end_of_text)

    def to_json(self) -> bytes:
        from tokenizers import Tokenizer, decoders, models

        tokens = {token: i for i, token in enumerate(self._tokens)}
        tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=[], unk_token=UNKNOWN))
        tokenizer.add_special_tokens(list(self._special))
        tokenizer.decoder = decoders.Fuse()
        return str(tokenizer.to_str()).encode()


class LibraryTokenizer:
    """Of the library `tokenizers`. Nothing is added to a text, cut off it, or taken out of it: "<|endoftext|>" in a text is text."""

    def __init__(self, tokenizer: Any) -> None:
        """Raises ValueError where no token ends a text."""
        self._tokenizer = tokenizer
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        model = json.loads(self.to_json())
        self._is_cut = _never_across_words(model)
        self._size = 1 + max(self._tokenizer.get_vocab().values(), default=-1)  # there may be ids that no token has
        self._end, self.mask = self._named(END_NAMES), self._named(MASK_NAMES)
        self.unknown = _unknown_of(model["model"], tokenizer)
        if self._end is None:
            raise ValueError(f"it has no token that ends a text; one of {', '.join(END_NAMES)} must be in its vocabulary")

    def _named(self, names: Sequence[str]) -> int | None:
        found = (self._tokenizer.token_to_id(name) for name in names)
        return next((int(i) for i in found if i is not None), None)

    @property
    def size(self) -> int:
        return self._size

    @property
    def end_of_text(self) -> int:
        assert self._end is not None
        return self._end

    def with_mask(self) -> LibraryTokenizer:
        """With a mask token, which is added where there is none."""
        if self.mask is None:
            self._tokenizer.add_special_tokens([MASK])
        return LibraryTokenizer(self._tokenizer)

    def encode_all(self, texts: Sequence[str]) -> Sequence[Sequence[int]]:
        parts = [list(_parts(text)) if self._is_cut else [text] for text in texts]
        try:
            encoded = self._tokenizer.encode_batch_fast([part for some in parts for part in some], add_special_tokens=False)
        except Exception as error:  # the library raises nothing more special
            raise ValueError(
                f"data.tokenizer cannot encode a text: {error}; put its tokenizer.json right, or choose another one"
            ) from error
        ids = iter([encoding.ids for encoding in encoded])
        return [_joined([next(ids) for _ in some]) for some in parts]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode([i for i in ids if i != self.end_of_text], skip_special_tokens=False))

    def to_json(self) -> bytes:
        return str(self._tokenizer.to_str()).encode()


def as_array(ids: Sequence[int]) -> Ids:
    """What `encode_all` gives, as numbers without a copy where they are that already."""
    if isinstance(ids, bytes):
        return np.frombuffer(ids, dtype=np.uint8)
    return np.frombuffer(ids if isinstance(ids, array) else array("I", ids), dtype=np.uint32)


def load_tokenizer(body: bytes) -> Tokenizer:
    """Inverse of `to_json`; also of any other tokenizer.json of the library. Raises ValueError for anything else."""
    spec = json.loads(body)
    if not isinstance(spec, dict):
        raise ValueError("it is no JSON object")
    if spec.get("kind") == "bytes":
        return ByteTokenizer(with_mask=bool(spec.get("mask")))
    if (characters := _characters_of(spec)) is not None:
        return CharacterTokenizer(characters, with_mask=MASK in spec["model"]["vocab"])
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(body.decode())
    except Exception as error:  # noqa: BLE001 - the library raises nothing more special
        raise ValueError(f"it is no tokenizer.json of the library tokenizers: {error}") from None
    return LibraryTokenizer(tokenizer)


def _characters_of(spec: dict[str, Any]) -> list[str] | None:
    """Those of `CharacterTokenizer`, in the order of their ids; None for any other tokenizer."""
    model = spec.get("model")
    if not isinstance(model, dict):
        raise ValueError("it is no tokenizer.json of the library tokenizers: it describes no model")
    if model.get("type") != "BPE" or model.get("merges") or model.get("unk_token") != UNKNOWN or spec.get("pre_tokenizer"):
        return None
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return [token for token in tokens if token not in (END_OF_TEXT, UNKNOWN, MASK)]


def _unknown_of(model: dict[str, Any], tokenizer: Any) -> int | None:
    if model.get("unk_id") is not None:
        return int(model["unk_id"])
    found = tokenizer.token_to_id(model["unk_token"]) if model.get("unk_token") else None
    return None if found is None else int(found)


def _never_across_words(spec: dict[str, Any]) -> bool:
    """Whether a text may be encoded in parts that begin with the space between two words. True for what is learnt here."""
    before = spec.get("pre_tokenizer") or {}
    is_words = before.get("type") == "Split" and before["pattern"] == {"Regex": WORDS} and before["behavior"] == "Isolated"
    is_bytes = before.get("type") == "ByteLevel" and not before["add_prefix_space"] and before.get("use_regex", True)
    return spec.get("normalizer") is None and (is_words or is_bytes)


def _parts(text: str) -> Iterator[str]:
    """A long text in parts of about the same length, cut where it makes no difference; as one where there is no such place."""
    cuts = [0]
    while len(text) - cuts[-1] > _WHOLE_CHARS and (match := _BETWEEN_WORDS.search(text, cuts[-1] + _WHOLE_CHARS)):
        cuts.append(match.start())
    return (text[start:end] for start, end in pairwise((*cuts, len(text))))


def _joined(parts: Sequence[Sequence[int]]) -> Sequence[int]:
    return parts[0] if len(parts) == 1 else [i for part in parts for i in part]
