"""What the benchmarks of saving and restoring share: contenders, alternating rounds, tables. storage.py: a folder; storage_s3.py: S3."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from common import Verdict, machine, parser, publish, spread
from rich.console import Console
from rich.table import Table
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter

from keepstep.storage.arena import Staging
from keepstep.storage.layout import MANIFEST_NAME, checkpoint_directory, rank_index_name
from keepstep.storage.manifest import RankIndex, merge
from keepstep.storage.store import ENV_OPTIONS, StorageOptions, Store
from keepstep.storage.verify import CheckpointReader, read_manifest
from keepstep.trainer.attach import Attached
from keepstep.trainer.checkpoint import Checkpointer
from keepstep.trainer.parallel import join
from keepstep.trainer.restore import restore

BIG, SMALL = "64 x 4 MiB", "2,000 x 16 KiB"
SHAPES = {BIG: (64, 1 << 20), SMALL: (2000, 4096)}  # (tensors, float32 elements in each)
DEADLINE_S = 300.0

State = dict[str, torch.Tensor]
Times = dict[str, float]  # operation -> seconds
Measured = Mapping[str, Sequence[float]]  # "contender: operation" -> seconds of every round


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


class Contender(ABC):
    """One way to save `state` and to load it into `target`."""

    name: str

    @abstractmethod
    def run(self, key: str, state: State, target: State) -> Times:
        """Saves below `key`, fills `target` from there; removes nothing."""


class Dcp(Contender):
    """torch.distributed.checkpoint with its defaults; in S3 through fsspec and s3fs. No hashes, no commit."""

    def __init__(self, name: str, where: str, **options: Any) -> None:
        self.name, self._where, self._options = name, where, options

    def run(self, key: str, state: State, target: State) -> Times:
        where = f"{self._where}/{key}"
        remote = "://" in where
        writer = FsspecWriter(where, **self._options) if remote else dcp.FileSystemWriter(where)
        saved = timed(lambda: dcp.save(state, storage_writer=writer, no_dist=True))
        reader = FsspecReader(where, **self._options) if remote else dcp.FileSystemReader(where)
        return {"save: dcp.save": saved, "load: dcp.load": timed(lambda: dcp.load(target, storage_reader=reader, no_dist=True))}


class Keepstep(Contender):
    name = "keepstep"

    def __init__(self, url: str, staging: Staging) -> None:
        self._store, self._staging = Store.open(url), staging
        self._step = 0
        self._checkpointers: dict[int, Checkpointer] = {}  # a state dict's first save makes its plan, which training does ahead of time

    def run(self, key: str, state: State, target: State) -> Times:
        self._step += 1
        saver = self._checkpointers.setdefault(len(state), Checkpointer(self._staging, rank=0, attempt=1, nonce="bench"))
        saver.get_ready({"model": state})
        stall = timed(lambda: saver.save(self._step, {"model": state}, {}))
        persisted = timed(lambda: self._staging.wait_idle(DEADLINE_S))
        assert not self._staging.last_error, self._staging.last_error
        directory = checkpoint_directory(1, self._step, "bench")
        committed = timed(lambda: self._commit(directory))
        durable = stall + persisted
        times = {
            "save: training waits": stall,
            "save: persist": persisted,
            "save: durable": durable,
            "save: committed": durable + committed,
        }
        self._warm(directory)
        times["load: restore"] = timed(lambda: self._restore(directory, target, resident=False))
        for tensor in target.values():
            tensor.zero_()
        return times | {"load: restore from memory": timed(lambda: self._restore(directory, target, resident=True))}

    def _commit(self, directory: str) -> None:
        """The coordinator's part, but for the record in the log."""
        manifest = merge([RankIndex.parse(self._store.get(f"{directory}/{rank_index_name(0)}"))])
        assert self._store.put_new(f"{directory}/{MANIFEST_NAME}", manifest.body())
        self._sha256 = manifest.sha256()

    def _warm(self, directory: str) -> None:
        """The files went to the disk past the page cache; everybody else's are in it."""
        if (folder := self._store.local_path(directory)) is not None:
            for path in folder.iterdir():
                path.read_bytes()

    def _restore(self, directory: str, target: State, *, resident: bool) -> None:
        manifest = read_manifest(self._store, directory, self._sha256)
        reader = CheckpointReader(self._store, directory, manifest, resident=self._staging.resident if resident else None)
        restore(manifest, reader, {"model": target})
        assert (reader.bytes_from_memory > 0) == resident

    def clean(self) -> None:
        self._store.delete_tree("data")


@contextlib.contextmanager
def persister(root: str, options: StorageOptions | None = None, *, nice: int = 0) -> Iterator[str]:
    """A real one, as every node has it: gives its socket. `nice` 0: alone on a machine it has nobody to let go first."""
    with tempfile.TemporaryDirectory(prefix="ks-") as folder:
        command = [sys.executable, "-m", "keepstep.storage.persister", "--socket", f"{folder}/s", "--root", root, "--nice", str(nice)]
        environment = os.environ | ({ENV_OPTIONS: options.to_json()} if options else {})
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
            assert process.stdout
            assert b"ready" in process.stdout.readline()
            try:
                yield f"{folder}/s"
            finally:
                process.communicate()


@contextlib.contextmanager
def only_rank(root: str, options: StorageOptions | None = None) -> Iterator[Staging]:
    with persister(root, options) as socket:
        staging = Staging.connect(socket, attempt=1, rank=0, world_size=1)
        yield staging
        staging.close()


@dataclass(frozen=True, slots=True)
class Place:
    name: str
    contenders: tuple[Contender, ...]
    clean: Callable[[], object]


def measure(place: Place, shape: str, rounds: int) -> dict[str, list[float]]:
    """ "contender: operation" -> seconds of every round; the first two, in which both of a rank's buffers are filled once, do not count."""
    number, each = SHAPES[shape]
    state = {f"w{i}": torch.randn(each) for i in range(number)}
    target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    times: dict[str, list[float]] = defaultdict(list)
    for round_ in range(rounds + 2):
        place.clean()
        for contender in random.Random(round_).sample(place.contenders, len(place.contenders)):
            for tensor in target.values():
                tensor.zero_()
            key = f"peers/{contender.name[:3]}{round_}".removeprefix("peers/" if place.name == "local" else "")
            gc.collect()  # nobody pays for what the one before left behind
            found = contender.run(key, state, target)
            assert all(torch.equal(target[name], state[name]) for name in state), contender.name
            for operation, seconds in found.items():
                times[f"{contender.name}: {operation}"] += [seconds] if round_ > 1 else []
    place.clean()
    return dict(times)


def ratios(measured: Measured, one: str, other: str) -> list[float]:
    """How many times as long `one` took as `other`, in each round."""
    return [mine / theirs for mine, theirs in zip(measured[one], measured[other], strict=True)]


def show(title: str, measured: Measured, num_bytes: int) -> None:
    table = Table("who", "what", "milliseconds", "MB/s", title=title)
    for name in sorted(measured, key=lambda name: (name.split(": ")[1] == "load", name)):
        who, kind, what = name.split(": ")
        milliseconds = [1e3 * seconds for seconds in measured[name]]
        table.add_row(who, f"{kind}: {what}", spread(milliseconds, "ms", 0), f"{num_bytes / 1e3 / statistics.median(milliseconds):.0f}")
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def compare(
    description: str | None,
    name: str,
    open_place: Callable[[], contextlib.AbstractContextManager[Place]],
    verdicts: Callable[[Mapping[str, Measured]], list[Verdict]],
    *,
    rounds: int,
    quick_rounds: int,
) -> None:
    """A whole script: its options, every shape with a table, results/NAME.json with the verdicts."""
    arguments = parser(description)
    arguments.add_argument("--rounds", type=int, default=0, help=f"that count; {rounds}, quick {quick_rounds}")
    options = arguments.parse_args()
    rounds = options.rounds or (quick_rounds if options.quick else rounds)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    join(Attached(None))
    began_on, measured = machine(), dict[str, dict[str, list[float]]]()
    with open_place() as place:
        for shape, (number, each) in SHAPES.items():
            measured[shape], num_bytes = measure(place, shape, rounds), 4 * number * each
            show(f"{place.name}, {shape} ({num_bytes / 1e6:.0f} MB), {rounds} rounds", measured[shape], num_bytes)
    publish(name, verdicts(measured), measured, began_on=began_on)
    dist.destroy_process_group()
