"""Batches that are read ahead: the same ones, so many and no more, by processes that go when their rank goes."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trainer_ranks import run_ranks

from keepstep.trainer.data import Feed
from keepstep.trainer.order import Order
from keepstep.trainer.samples import StreamSamples
from keepstep.trainer.tokens import Extent

pytestmark = pytest.mark.slow

DEADLINE_S = 30.0


def a_share() -> Any:
    """Rank 1 of 3 with unequal shares, in micro-batches."""
    from keepstep.trainer.loader import Share

    samples = StreamSamples(np.arange(999, dtype=np.uint16), (Extent(documents=1, tokens=999),), 8)
    return Share(samples=samples, feed=a_feed(10), shares=range(1, 2), num_shares=3, micro_batch_samples=2)


def a_feed(samples_per_step: int) -> Feed:
    return Feed(order=Order(seed=3, sizes=(50,)), samples_per_step=samples_per_step)


def plain(parts: Any) -> Any:
    return [([rows.tolist() for rows in part.rows], part.counts) for part in parts]


def reads(rank: int, world_size: int) -> None:
    """With any number of workers, from any step on."""
    import torch

    from keepstep.trainer.loader import batches

    share = a_share()
    before = torch.get_rng_state()
    for workers, steps in ((0, range(1, 12)), (1, range(5, 12)), (2, range(1, 12)), (2, range(11, 12)), (2, range(12, 12))):
        with batches(share, steps, workers) as read:
            assert [plain(parts) for parts in read] == [plain(share[step]) for step in steps]
    assert torch.equal(torch.get_rng_state(), before), "dropout's stream"


def test_the_batches_are_the_same_whoever_reads_them_and_draw_no_random_number() -> None:
    run_ranks(1, reads)


def reads_ahead(rank: int, world_size: int, folder: str) -> None:
    from keepstep.trainer.loader import AHEAD, Share, batches

    class Noted(Share):
        def __getitem__(self, step: int) -> Any:
            (Path(folder) / str(step)).touch()
            return super().__getitem__(step)

    share = a_share()
    noted = Noted(**{name: getattr(share, name) for name in share.__slots__})
    with batches(noted, range(1, 40), 2) as read:
        for taken, _ in enumerate(read, start=1):
            assert len(os.listdir(folder)) <= taken + 2 * AHEAD


def test_workers_read_a_few_batches_ahead_and_no_more(tmp_path: Path) -> None:
    run_ranks(1, reads_ahead, str(tmp_path))


class Described:
    """Instead of batches, what a worker is."""

    def __getitem__(self, step: int) -> Any:
        links = []
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                links.append(os.readlink(f"/proc/self/fd/{name}"))
        return os.getpid(), links


def holds_sockets(rank: int, world_size: int) -> None:
    from keepstep.trainer.loader import batches

    mine, peer = socket.socketpair()
    described: Any = Described()
    with batches(described, range(1, 40), 2) as read:
        for _, (_, links) in zip(range(4), read, strict=False):
            assert [link for link in links if link.startswith("socket:")] == []
        mine.close()
        assert peer.recv(1) == b"", "a peer sees the rank's connection closed although its workers live"


def test_workers_hold_none_of_their_ranks_connections_open() -> None:
    run_ranks(1, holds_sockets)


def killing(victim: int, read: Iterator[Any]) -> Iterator[Any]:
    """Its death may be told before the call that kills returns."""
    os.kill(victim, signal.SIGKILL)
    yield from read


def loses_a_worker(rank: int, world_size: int) -> None:
    from multiprocessing import active_children

    from keepstep.trainer.loader import batches

    described: Any = Described()
    with batches(described, range(1, 100000), 2) as read:
        victim, _ = next(read)
        named = rf"DataLoader worker \(pid(\(s\))? {victim}\) (is killed by signal: Killed|exited unexpectedly)"
        with pytest.raises(RuntimeError, match=named):
            deque(killing(victim, read), maxlen=0)
    assert active_children() == []


def test_a_worker_that_was_killed_is_named_by_its_rank() -> None:
    run_ranks(1, loses_a_worker)


def has_deaf_and_stopped_workers(rank: int, world_size: int) -> None:
    """What a platform sends to every process of a job ends no worker; leaving ends even one that does not react."""
    from multiprocessing import active_children

    from keepstep.trainer import loader

    described: Any = Described()
    with loader.batches(described, range(1, 40), 2) as read:
        first, second = sorted({next(read)[0] for _ in range(4)})
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(first, number)
        deque((next(read) for _ in range(8)), maxlen=0)
        os.kill(second, signal.SIGSTOP)
    assert active_children() == []


def test_workers_ignore_a_platforms_signals_and_never_hold_up_their_rank() -> None:
    run_ranks(1, has_deaf_and_stopped_workers)


def waits_with_workers(pids: Any) -> None:
    from keepstep.trainer.loader import batches

    os.setsid()
    described: Any = Described()
    with batches(described, range(1, 40), 2) as read:
        pids.send(sorted({next(read)[0] for _ in range(4)}))
        signal.pause()


def test_workers_die_with_their_rank_at_once(tmp_path: Path) -> None:
    from keepstep.orchestrator.processes import is_alive

    context = get_context("forkserver")
    ours, theirs = context.Pipe()
    rank = context.Process(target=waits_with_workers, args=(theirs,))
    rank.start()
    try:
        assert ours.poll(DEADLINE_S)
        workers = ours.recv()
        assert len(workers) == 2
        assert all(map(is_alive, workers))
    finally:
        rank.kill()
        rank.join(DEADLINE_S)
    deadline = time.monotonic() + 2  # torch's own look comes every five seconds
    while any(map(is_alive, workers)):
        assert time.monotonic() < deadline, "they outlived their rank"


def test_a_rank_without_samples_goes_along_with_rows_that_do_not_count() -> None:
    share = replace(a_share(), feed=a_feed(2), micro_batch_samples=0)
    parts = [part for rank in range(3) for part in replace(share, shares=range(rank, rank + 1))[7]]
    assert [(len(part.rows.inputs), part.counts) for part in parts] == [(1, False), (1, True), (1, True)]


def reads_ahead_by_a_thread(rank: int, world_size: int, folder: str) -> None:
    """Streamed tokens: the same batches, a few steps ahead, and the thread goes with the last of them."""
    import threading

    from keepstep.storage.manifest import hash_blocks
    from keepstep.storage.store import Store
    from keepstep.trainer.loader import AHEAD, batches
    from keepstep.trainer.streaming import DamagedTokens, StreamedFile, StreamedTokens

    share = a_share()
    tokens = np.arange(999, dtype=np.uint16)
    file = Path(folder) / "train.bin"
    file.write_bytes(tokens.tobytes())
    files = (StreamedFile(key="train.bin", num_tokens=999, hashes=hash_blocks(tokens.data.cast("B"), 64)),)
    streamed = replace(
        share,
        samples=StreamSamples(StreamedTokens(Store.open(folder), files, tokens.dtype, 64, 128), (Extent(documents=1, tokens=999),), 8),
    )
    with batches(streamed, range(3, 12), 0) as read:
        assert [plain(parts) for parts in read] == [plain(share[step]) for step in range(3, 12)]
    with batches(streamed, range(1, 12), 0) as read:
        next(read)
        file.write_bytes(bytes(2 * 999))
        with pytest.raises(DamagedTokens):
            deque(zip(range(AHEAD + 2), read, strict=False), maxlen=0)
    for thread in threading.enumerate():
        if thread.name.startswith(("read-ahead", "tokens")):
            thread.join(DEADLINE_S)
            assert not thread.is_alive()


def waits_for_a_slow_store(rank: int, world_size: int, folder: str) -> None:
    import threading

    from keepstep.storage.manifest import hash_blocks
    from keepstep.storage.posix import PosixStore
    from keepstep.trainer.loader import batches
    from keepstep.trainer.streaming import StreamedFile, StreamedTokens

    said = threading.Event()

    class Slow(PosixStore):
        def get_range(self, key: str, start: int, length: int) -> bytes:
            assert said.wait(DEADLINE_S)
            return super().get_range(key, start, length)

    share, tokens = a_share(), np.arange(999, dtype=np.uint16)
    (Path(folder) / "train.bin").write_bytes(tokens.tobytes())
    files = (StreamedFile(key="train.bin", num_tokens=999, hashes=hash_blocks(tokens.data.cast("B"), 64)),)
    read = StreamedTokens(Slow(Path(folder)), files, tokens.dtype, 64, 128)
    samples = StreamSamples(read, (Extent(documents=1, tokens=999),), 8)
    with batches(replace(share, samples=samples), range(1, 3), 0, said.set) as slow:
        assert plain(next(slow)) == plain(share[1])


def test_a_rank_says_that_it_waits_for_a_slow_store(tmp_path: Path) -> None:
    run_ranks(1, waits_for_a_slow_store, str(tmp_path))


def test_streamed_tokens_are_read_ahead_and_damage_is_found_at_its_step(tmp_path: Path) -> None:
    run_ranks(1, reads_ahead_by_a_thread, str(tmp_path))
