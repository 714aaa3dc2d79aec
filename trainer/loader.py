"""The batches of a rank, one step after the other: read when they are needed, or ahead of time by processes of the rank.

What a step consumes is a pure function of its number, so the loader's index is the step: the bits do not depend on who reads them, and
after a restart there is nothing to restore. Tokens that are streamed are read ahead by a thread: nearly all of its time is waiting.

The workers are forked from the rank. It has threads by then (gloo's, the pulse), and a fork keeps none of them, nor the locks that they
hold; a worker maps integers out of a file with numpy, and needs none of those. Rejected: a forkserver of the rank's own would import torch
again (seconds of processor time in every rank at every restart), and the semaphores of its queues would stay behind, by name, when the
rank is killed; the agent's forkserver would be the workers' parent, and the kernel tells them of their parent's death only.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Final, NamedTuple

import torch
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from keepstep.storage.skips import Range

from .data import Feed, micro_batches
from .samples import Rows, Samples, rows_of
from .streaming import StreamedTokens

AHEAD: Final = 2  # batches per worker that are read and wait, at the most
SLOW_S: Final = 0.5  # a batch of streamed tokens that is not there by then is waited for


class MicroBatch(NamedTuple):
    rows: Rows  # inputs and targets, see samples.py
    turns: Range  # which samples these are
    share: int = 0  # that it belongs to, of `Share.num_shares`

    @property
    def counts(self) -> bool:
        """False: this rank has no samples left, and goes along because the others wait for it in every layer."""
        first, last = self.turns
        return last > first


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one rank reads, one or more shares of each batch; as a mapping from the step to its micro-batches."""

    samples: Samples
    feed: Feed
    shares: range
    num_shares: int
    micro_batch_samples: int

    def __getitem__(self, step: int) -> list[MicroBatch]:
        if not self.shares:  # more ranks than shares: nothing counts, at the place where it would
            turn, _ = self.feed.share(step, self.shares.start, self.num_shares)
            return [MicroBatch(self.rows(turn, turn + 1), (turn, turn), self.shares.start)]
        return [part for share in self.shares for part in self._parts(step, share)]

    def _parts(self, step: int, share: int) -> list[MicroBatch]:
        first, last = self.feed.share(step, share, self.num_shares)
        largest = -(-self.feed.samples_per_step // self.num_shares)
        parts = micro_batches(first, last, largest, self.micro_batch_samples)
        return [MicroBatch(self.rows(start, max(end, start + 1)), (start, end), share) for start, end in parts]

    def rows(self, first: int, last: int) -> Rows:
        """Of the turns [first, last)."""
        return rows_of(self.samples, self.feed, first, last)


@contextlib.contextmanager
def batches(share: Share, steps: range, workers: int, slow: Callable[[], None] = lambda: None) -> Iterator[Iterator[Sequence[MicroBatch]]]:
    """The micro-batches of `steps`, in order; the workers are gone afterwards. Main thread of the rank only: they die with that thread.

    A worker that is killed becomes a RuntimeError that names it, at whatever the rank is doing then.

    Args:
        slow: called when a batch of streamed tokens is waited for, so that nobody takes a slow store for a hang.
    """
    if not steps:
        yield iter(())
        return
    if not workers:
        with contextlib.closing(_read_ahead(share, steps, slow)) as ahead:
            yield ahead if isinstance(share.samples.tokens, StreamedTokens) else map(share.__getitem__, steps)
        return
    loader: DataLoader[Any] = DataLoader(
        share,  # type: ignore[arg-type]  # a map-style dataset in all but name
        sampler=steps,
        batch_size=None,
        num_workers=min(workers, len(steps)),
        prefetch_factor=AHEAD,
        collate_fn=_as_it_is,
        worker_init_fn=partial(_begin_worker, os.getpid()),
        multiprocessing_context="fork",
        generator=torch.Generator(),  # else it would draw a seed for its workers from the stream that dropout draws from
    )
    read = iter(loader)
    assert isinstance(read, _MultiProcessingDataLoaderIter)
    try:
        yield read
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would call it an error
        for worker in read._workers:
            worker.kill()  # it only reads; one that hangs would hold up the rank for ten seconds, and its exit for ever
        read._shutdown_workers()


def _read_ahead(share: Share, steps: Iterable[int], slow: Callable[[], None]) -> Generator[Sequence[MicroBatch], None, None]:
    """The next steps are read while one is computed: a store answers in milliseconds, not microseconds."""
    thread = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
    left, waiting = iter(steps), deque[Future[list[MicroBatch]]]()
    try:
        while True:
            waiting.extend(thread.submit(share.__getitem__, step) for step in islice(left, AHEAD + 1 - len(waiting)))
            if not waiting:
                return
            batch = waiting.popleft()
            if not wait([batch], timeout=SLOW_S).done:
                slow()
            yield batch.result()
    finally:
        thread.shutdown(wait=False, cancel_futures=True)


def _as_it_is(parts: list[MicroBatch]) -> list[MicroBatch]:
    """Arrays go through a pipe; tensors would go through shared memory, a file and a descriptor each."""
    return parts


def _begin_worker(rank_pid: int, worker: int) -> None:
    """Dies with its rank, at once (torch's own workers look every few seconds), of nothing that a platform sends to all processes of a
    job, and holds nothing open that others take for the rank."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGKILL)  # type: ignore[attr-defined]
    if os.getppid() != rank_pid:
        os._exit(1)
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the listing's own descriptor is closed by now
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                os.close(int(name))
