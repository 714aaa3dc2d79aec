"""Text to token ids and back: byte-level BPE learnt from the text, or bytes. Neither can fail on any text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, Final, Protocol

from .config import DataSection

END_OF_TEXT: Final = "<|endoftext|>"
_BYTES_JSON: Final = b'{"kind":"bytes"}\n'


class Tokenizer(Protocol):
    @property
    def size(self) -> int:
        """Number of different ids."""

    @property
    def end_of_text(self) -> int:
        """The id that ends a document."""

    def encode_all(self, texts: Sequence[str]) -> Sequence[Sequence[int]]:
        """The ids of each text, without end-of-text."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text; bytes that are no UTF-8 become U+FFFD, end-of-text vanishes."""

    def to_json(self) -> bytes:
        """For `load_tokenizer`."""


class ByteTokenizer:
    """One id per byte of UTF-8."""

    size = 257
    end_of_text = 256

    def encode_all(self, texts: Sequence[str]) -> Sequence[Sequence[int]]:
        return [text.encode() for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i != self.end_of_text).decode(errors="replace")

    def to_json(self) -> bytes:
        return _BYTES_JSON


class BpeTokenizer:
    """Byte-level BPE of the `tokenizers` library, as GPT-2 has it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokenizer.encode_special_tokens = True  # "<|endoftext|>" in a text is text

    @staticmethod
    def learn(texts: Iterable[str], vocabulary: int) -> BpeTokenizer:
        """`vocabulary` tokens at most: a short text does not hold enough pairs."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=[END_OF_TEXT], initial_alphabet=sorted(alphabet), show_progress=False
        )
        tokenizer.train_from_iterator(texts, trainer)
        return BpeTokenizer(tokenizer)

    @property
    def size(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    @property
    def end_of_text(self) -> int:
        return int(self._tokenizer.token_to_id(END_OF_TEXT))

    def encode_all(self, texts: Sequence[str]) -> Sequence[Sequence[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts))]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode([i for i in ids if i != self.end_of_text], skip_special_tokens=False))

    def to_json(self) -> bytes:
        return str(self._tokenizer.to_str()).encode()


def learn_tokenizer(config: DataSection, texts: Iterable[str]) -> Tokenizer:
    return BpeTokenizer.learn(texts, config.vocabulary) if config.tokenizer == "bpe" else ByteTokenizer()


def load_tokenizer(body: bytes) -> Tokenizer:
    """Inverse of `to_json`. Raises ValueError for anything else."""
    if json.loads(body) == json.loads(_BYTES_JSON):
        return ByteTokenizer()
    from tokenizers import Tokenizer

    return BpeTokenizer(Tokenizer.from_str(body.decode()))
