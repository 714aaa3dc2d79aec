"""Tokens that stay in the root, on every kind of store: the rows are those of a copy, whoever reads ahead, and damage is found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from keepstep.storage.store import Store
from keepstep.trainer import spool
from keepstep.trainer.config import DataSection, TrainerConfig
from keepstep.trainer.data import feed_for
from keepstep.trainer.loader import Share, batches
from keepstep.trainer.preparing import prepare
from keepstep.trainer.samples import samples_of
from keepstep.trainer.streaming import DamagedTokens, StreamedTokens
from keepstep.trainer.tokens import open_tokens

CONTEXT = 16


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataSection:
    """Of many documents, for blocks of 1 KiB."""
    monkeypatch.setattr(spool, "HASHED_BYTES", 1024)
    (tmp_path / "text").mkdir()
    for i in range(20):
        (tmp_path / "text" / f"{i:02}.txt").write_text(f"Chapter {i}: the quick brown fox jumps over the lazy dog.\n" * (10 + i))
    return DataSection(source=str(tmp_path / "text"), tokenizer="bytes", order="blocks", block_samples=32)


def share_of(store: Store, scratch: Path, data: DataSection, *, streaming: bool) -> Share:
    config = TrainerConfig.model_validate(
        {"data": data.model_dump(), "model": {"context": CONTEXT}, "train": {"batch_tokens": 8 * CONTEXT}}
    )
    samples = samples_of(open_tokens(store, scratch, streaming=streaming), config)
    return Share(samples=samples, feed=feed_for(samples.sizes, config), shares=range(1), num_shares=2, micro_batch_samples=3)


def test_streamed_batches_are_those_of_a_copy_from_any_step_on(
    store: Store, data: DataSection, tmp_path_factory: pytest.TempPathFactory
) -> None:
    prepare(TrainerConfig(data=data), store)
    scratch = tmp_path_factory.mktemp("scratch")
    copied = share_of(store, scratch, data, streaming=False)
    streamed = share_of(store, tmp_path_factory.mktemp("other"), data, streaming=True)
    assert isinstance(streamed.samples.tokens, StreamedTokens)
    assert len(streamed.samples.tokens.files[0].hashes) > 10
    for first in (1, 70, 10**9):
        with batches(streamed, range(first, first + 12), 0) as read:
            for step, parts in zip(range(first, first + 12), read, strict=True):
                for part, expected in zip(parts, copied[step], strict=True):
                    assert np.array_equal(part.rows, expected.rows)
                    assert part.turns == expected.turns


def test_a_damaged_block_is_found_when_it_is_read_and_not_before(
    store: Store, data: DataSection, tmp_path_factory: pytest.TempPathFactory
) -> None:
    prepare(TrainerConfig(data=data), store)
    share = share_of(store, tmp_path_factory.mktemp("scratch"), data, streaming=True)
    body = bytearray(store.get("tokens/train-00000.bin"))
    body[5 * 1024 + 17] ^= 8
    store.put("tokens/train-00000.bin", bytes(body))
    tokens = share.samples.tokens
    assert tokens[np.array([5 * 512 - 1, 6 * 512])].tolist() != []
    with pytest.raises(DamagedTokens, match=r"bytes 5120 to 6144 of tokens/train-00000\.bin \(data\.streaming\) are not what was prepared"):
        tokens[np.array([5 * 512])]
