"""The proof that each sample was consumed once: it holds for what was, and for nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepstep.storage.skips import Range
from keepstep.trainer.data import Feed
from keepstep.trainer.ledger import check_ledger, entry_of
from keepstep.trainer.loader import Share
from keepstep.trainer.order import Order
from keepstep.trainer.samples import DocumentSamples, Samples, StreamSamples
from keepstep.trainer.tokens import Extent

Record = dict[str, Any]
TOKENS = np.random.default_rng(1).integers(0, 500, 4001).astype(np.uint16)
STARTS = np.array([0, 1200, 1900, 3000], dtype=np.uint64)
EXTENTS = (Extent(documents=3, tokens=3000), Extent(documents=1, tokens=1001))
KINDS = {"stream": StreamSamples(TOKENS, EXTENTS, 16), "documents": DocumentSamples(TOKENS, STARTS, EXTENTS, 16)}


def a_feed(samples: Samples, *skips: Range, samples_per_step: int = 10) -> Feed:
    order = Order(seed=3, sizes=samples.sizes, quotas=(3, 1))
    return Feed(order=order, samples_per_step=samples_per_step, skips=skips)


def record(samples: Samples, feed: Feed, step: int, world_size: int, micro: int = 0) -> Record:
    """What a step of so many ranks writes down."""
    shares = (
        Share(samples=samples, feed=feed, shares=range(rank, rank + 1), num_shares=world_size, micro_batch_samples=micro)
        for rank in range(world_size)
    )
    return {"step": step, "ledger": [list(entry_of(share[step])) for share in shares]}


@given(
    worlds=st.lists(st.tuples(st.integers(1, 13), st.integers(0, 4)), min_size=1, max_size=6),
    kind=st.sampled_from(list(KINDS)),
    skip=st.tuples(st.integers(1, 30), st.integers(1, 20)),
)
def test_any_sequence_of_world_sizes_consumes_the_prefix_exactly_once(
    worlds: list[tuple[int, int]], kind: str, skip: tuple[int, int]
) -> None:
    """Also where a world is larger than a batch, and with ranks that have nothing to do."""
    samples = KINDS[kind]
    feed = a_feed(samples, (skip[0], sum(skip)))
    found = check_ledger([record(samples, feed, step, *world) for step, world in enumerate(worlds, start=1)], samples, feed)
    assert found.problems == ()
    assert found.sentence == f"ledger: {10 * len(worlds)} samples, each exactly once"


def test_a_rank_with_several_shares_has_one_entry() -> None:
    samples = KINDS["stream"]
    feed = a_feed(samples)
    share = Share(samples=samples, feed=feed, shares=range(1, 4), num_shares=4, micro_batch_samples=2)
    assert entry_of(share[2])[:2] == (12, 20)


def dropped(records: list[Record]) -> None:
    del records[1]


def doubled(records: list[Record]) -> None:
    records.insert(1, records[0])


def taken_twice(records: list[Record]) -> None:
    records[1]["ledger"][1] = records[1]["ledger"][0]


def left_out(records: list[Record]) -> None:
    del records[1]["ledger"][2]


def rank_missing(records: list[Record]) -> None:
    del records[1]["ledger"][0]


def other_rows(records: list[Record]) -> None:
    records[1]["ledger"][1][2] ^= 1


def too_many(records: list[Record]) -> None:
    records[1] = record(KINDS["stream"], a_feed(KINDS["stream"], samples_per_step=11), 2, 3)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (dropped, "step 2 has no record, or two: a record of step 3 stands in its place"),
        (doubled, "step 2 has no record, or two: a record of step 1 stands in its place"),
        (taken_twice, "step 2: consumed twice: samples 10 to 13, before those of rank 1"),
        (left_out, "step 2: a gap: samples 16 to 20, behind those of the last rank"),
        (rank_missing, "step 2: a gap: samples 10 to 13, before those of rank 0"),
        (other_rows, "step 2: the rows that rank 1 was fed are not samples 13 to 16"),
        (too_many, "step 2: a gap: samples 10 to 11, before those of rank 0"),
    ],
)
def test_nothing_else_passes(harm: Callable[[list[Record]], None], says: str) -> None:
    samples = KINDS["stream"]
    feed = a_feed(samples)
    records = [record(samples, feed, step, 3) for step in (1, 2, 3)]
    harm(records)
    found = check_ledger(records, samples, feed)
    assert found.problems[0] == says
    assert found.sentence.startswith(f"ledger: not proved: {says}")
    assert found.samples < 30


def test_rows_of_other_text_do_not_pass() -> None:
    samples, feed = KINDS["stream"], a_feed(KINDS["stream"])
    changed = TOKENS.copy()
    changed[::7] += 1
    records = [record(samples, feed, 1, 2)]
    assert len(check_ledger(records, StreamSamples(changed, EXTENTS, 16), feed).problems) == 2


def test_what_a_skip_left_out_does_not_pass_as_the_whole() -> None:
    samples = KINDS["stream"]
    records = [record(samples, a_feed(samples, (4, 8)), step, 2) for step in (1, 2)]
    assert check_ledger(records, samples, a_feed(samples)).problems[0] == "step 1: the rows that rank 0 was fed are not samples 0 to 5"
    assert check_ledger(records, samples, a_feed(samples, (4, 8))).problems == ()


def test_an_entry_is_exact_as_a_float() -> None:
    """It travels through the exchange of a step, which is one of float64."""
    samples = KINDS["stream"]
    entry = record(samples, a_feed(samples), 10**14, 2)["ledger"][0]
    assert [int(float(number)) for number in entry] == entry
