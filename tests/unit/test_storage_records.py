"""Records of the run log and their bytes."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepstep.storage.canonical import seal, sha256_hex
from keepstep.storage.errors import CorruptRecord
from keepstep.storage.records import (
    KINDS,
    Attempt,
    Commit,
    Failed,
    Finished,
    Opened,
    Pin,
    Quarantine,
    Record,
    Retire,
    Rewind,
    Verified,
    corrupt_entry,
    decode,
    encode,
)

TEXT = st.text(max_size=20)
EXAMPLES: tuple[Record, ...] = (
    Opened(term=1, run="x", identity="i", host="gpu07", pid=7, url="http://gpu07:1", at="2026-11-22T00:00:00Z"),
    Attempt(term=1, attempt=3, nodes=("a#1", "b#2"), world_size=4, resume_step=20, resume_directory="data/x", nonce="ab"),
    Commit(term=1, attempt=3, step=40, directory="data/y", manifest_sha256="00", world_size=4),
    Quarantine(term=2, directory="data/y", why="block 3"),
    Pin(term=2, directory="data/y", pinned=False),
    Retire(term=2, directories=("data/x", "data/y")),
    Verified(term=2, directory="data/y", at="2026-11-22T00:00:00Z"),
    Rewind(term=2, directory="data/x", step=20, skips=("96:104",), overrides=("optimizer.lr=0.001",), bad_step=25, why="a spike"),
    Finished(term=2, step=100, outcome="succeeded", why="all steps done"),
    Failed(term=2, why="budget spent", requeue=True),
)


def body_of(record: Record, sequence: int = 5) -> bytes:
    return encode(record, sequence=sequence, uuid="u", previous="p")


def with_check(envelope: dict[str, object]) -> bytes:
    return seal({key: value for key, value in envelope.items() if key != "check"})


@pytest.mark.parametrize("record", EXAMPLES, ids=lambda record: type(record).__name__)
def test_a_record_comes_back_as_it_was(record: Record) -> None:
    body = body_of(record)
    entry = decode(body, sequence=5)
    assert entry.record == record
    assert (entry.sequence, entry.uuid, entry.previous, entry.sha256) == (5, "u", "p", sha256_hex(body))


def test_every_kind_has_an_example() -> None:
    assert {type(record) for record in EXAMPLES} == set(KINDS.values())


@given(st.integers(0, 10**9), TEXT, TEXT, st.lists(TEXT, max_size=4))
def test_any_text_survives(sequence: int, why: str, directory: str, directories: list[str]) -> None:
    for record in (Quarantine(term=1, directory=directory, why=why), Retire(term=1, directories=tuple(directories), why=why)):
        assert decode(body_of(record, sequence), sequence=sequence).record == record


@given(st.sampled_from(EXAMPLES), st.data())
def test_no_flipped_bit_goes_unnoticed(record: Record, data: st.DataObject) -> None:
    body = bytearray(body_of(record))
    position = data.draw(st.integers(0, len(body) - 2))  # the line end carries nothing
    body[position] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(CorruptRecord):
        decode(bytes(body), sequence=5)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "no JSON"),
        (b"[]", "no JSON object"),
        (b"{}", "check"),
        (body_of(EXAMPLES[0])[:-20], "no JSON"),
        (body_of(EXAMPLES[0], sequence=6), "says that it is number 6"),
        (with_check({**json.loads(body_of(EXAMPLES[0])), "format": 2}), "format 2, this keepstep reads 1"),
        (with_check({**json.loads(body_of(EXAMPLES[0])), "record": {"kind": "party"}}), "unknown kind 'party'"),
        (with_check({**json.loads(body_of(EXAMPLES[0])), "record": {"kind": "failed", "term": 1, "why": "x"}}), "requeue"),
        (
            with_check({**json.loads(body_of(EXAMPLES[0])), "record": {"kind": "failed", "term": True, "why": "x", "requeue": 1}}),
            "term is True",
        ),
    ],
)
def test_a_corrupt_record_says_what_is_wrong(body: bytes, why: str) -> None:
    with pytest.raises(CorruptRecord, match=why):
        decode(body, sequence=5)


def test_a_field_of_a_newer_version_does_not_hide_the_record() -> None:
    envelope = json.loads(body_of(EXAMPLES[2]))
    envelope["record"]["colour"] = "red"
    assert decode(with_check(envelope), sequence=5).record == EXAMPLES[2]


def test_a_corrupt_record_keeps_its_number_and_its_place_in_the_chain() -> None:
    entry = corrupt_entry(b"rubbish", sequence=9, why="no JSON")
    assert (entry.sequence, entry.record, entry.sha256, entry.why) == (9, None, sha256_hex(b"rubbish"), "no JSON")
