"""Saving and restoring a state dict: keepstep beside dcp.save, dcp.load, Fsspec on s3fs, and the raw floor, in alternating runs.

    python benchmarks/storage.py                          local folder and S3, two shapes, results/storage.json and tables
    python benchmarks/storage.py --rounds 1 --places local

One process holds the whole state. keepstep's side is the code that runs train with: `Checkpointer` into the shared memory of a real
persister process, which hashes and writes; `restore` with every byte compared with its hash. Everybody reads into tensors that exist
already, from a warm page cache; everybody's checkpoint is durable (fsync) when its clock stops. The S3 server is SeaweedFS on loopback, on
the same cores.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import http.client
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.parse
import warnings
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import s3fs
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
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
from keepstep.trainer.state import byte_view

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

from s3server import BUCKET, KEY, SECRET, S3Server, running_s3_server  # noqa: E402 - the tests' server

SHAPES = {"64 x 4 MiB": (64, 1 << 20), "2,000 x 16 KiB": (2000, 4096)}  # (tensors, float32 elements in each)
WRITE_BYTES = 16 << 20
VIEWS = 512  # of one preadv
DEADLINE_S = 300.0
SERVER_MEMORY = "3GiB"  # with the tests' 300 MiB it spends twice the CPU time and more on collecting garbage

State = dict[str, torch.Tensor]
Times = dict[str, float]  # operation -> seconds


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


class RawFile(Contender):
    name = "raw floor"

    def __init__(self, root: Path) -> None:
        self._root = root

    def run(self, key: str, state: State, target: State) -> Times:
        path, blob = self._root / key, memoryview(bytearray(b"".join(byte_view(tensor) for tensor in state.values())))
        return {"save: pwrite + fsync": timed(lambda: self._write(path, blob)), "load: preadv": timed(lambda: self._read(path, target))}

    def _write(self, path: Path, blob: memoryview) -> None:
        with path.open("wb", buffering=0) as file:
            for start in range(0, len(blob), WRITE_BYTES):
                os.pwrite(file.fileno(), blob[start : start + WRITE_BYTES], start)
            os.fsync(file.fileno())

    def _read(self, path: Path, target: State) -> None:
        views, at = [byte_view(tensor) for tensor in target.values()], 0
        with path.open("rb", buffering=0) as file:
            for start in range(0, len(views), VIEWS):
                at += os.preadv(file.fileno(), views[start : start + VIEWS], at)


class RawObject(Contender):
    """One PUT and one GET over one connection with signed URLs: what the server and one core can do without any library."""

    name = "raw floor"

    def __init__(self, server: S3Server) -> None:
        self._fs = s3fs.S3FileSystem(key=KEY, secret=SECRET, endpoint_url=server.endpoint_url, client_kwargs={"region_name": "us-east-1"})
        self._address = urllib.parse.urlparse(server.endpoint_url).netloc

    def run(self, key: str, state: State, target: State) -> Times:
        blob = b"".join(byte_view(tensor) for tensor in state.values())
        put, get = (self._signed(key, method) for method in ("put_object", "get_object"))
        return {"save: one PUT": timed(lambda: self._call("PUT", put, blob)), "load: one GET": timed(lambda: self._get(get, target))}

    def _signed(self, key: str, method: str) -> str:
        url = urllib.parse.urlparse(self._fs.sign(f"{BUCKET}/{key}", client_method=method))
        return f"{url.path}?{url.query}"

    @contextlib.contextmanager
    def _answer(self, method: str, url: str, body: bytes | None) -> Iterator[http.client.HTTPResponse]:
        with contextlib.closing(http.client.HTTPConnection(self._address)) as connection:
            connection.request(method, url, body)
            answer = connection.getresponse()
            assert answer.status == 200, answer.read()
            yield answer

    def _call(self, method: str, url: str, body: bytes) -> None:
        with self._answer(method, url, body) as answer:
            answer.read()

    def _get(self, url: str, target: State) -> None:
        with self._answer("GET", url, None) as answer:
            for tensor in target.values():
                view = byte_view(tensor)
                while view:
                    view = view[answer.readinto(view) :]


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
        durable = timed(lambda: self._staging.wait_idle(DEADLINE_S))
        assert not self._staging.last_error, self._staging.last_error
        directory = checkpoint_directory(1, self._step, "bench")
        committed = timed(lambda: self._commit(directory))
        times = {"save: training waits": stall, "save: durable": stall + durable, "save: committed": stall + durable + committed}
        times["load: restore"] = timed(lambda: self._restore(directory, target, resident=False))
        for tensor in target.values():
            tensor.zero_()
        return times | {"load: restore from memory": timed(lambda: self._restore(directory, target, resident=True))}

    def _commit(self, directory: str) -> None:
        """The coordinator's part, but for the record in the log."""
        manifest = merge([RankIndex.parse(self._store.get(f"{directory}/{rank_index_name(0)}"))])
        assert self._store.put_new(f"{directory}/{MANIFEST_NAME}", manifest.body())
        self._sha256 = manifest.sha256()

    def _restore(self, directory: str, target: State, *, resident: bool) -> None:
        manifest = read_manifest(self._store, directory, self._sha256)
        reader = CheckpointReader(self._store, directory, manifest, resident=self._staging.resident if resident else None)
        restore(manifest, reader, {"model": target})
        assert (reader.bytes_from_memory > 0) == resident

    def clean(self) -> None:
        self._store.delete_tree("data")


@contextlib.contextmanager
def persister(root: str, options: StorageOptions | None) -> Iterator[Staging]:
    """A real one, as every node has it."""
    with tempfile.TemporaryDirectory(prefix="ks-") as folder:
        command = [sys.executable, "-m", "keepstep.storage.persister", "--socket", f"{folder}/s", "--root", root]
        environment = os.environ | ({ENV_OPTIONS: options.to_json()} if options else {})
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
            assert process.stdout
            assert b"ready" in process.stdout.readline()
            staging = Staging.connect(f"{folder}/s", attempt=1, rank=0, world_size=1)
            yield staging
            staging.close()
            process.communicate()


@dataclass(frozen=True, slots=True)
class Place:
    name: str
    contenders: tuple[Contender, ...]
    clean: Callable[[], object]


@contextlib.contextmanager
def local() -> Iterator[Place]:
    with tempfile.TemporaryDirectory(prefix="keepstep-bench-") as folder, persister(f"{folder}/keepstep", None) as staging:
        root = Path(folder) / "peers"
        ours = Keepstep(f"{folder}/keepstep", staging)

        def clean() -> None:
            ours.clean()
            shutil.rmtree(root, ignore_errors=True)
            root.mkdir()

        yield Place("local", (ours, Dcp("dcp (FileSystemWriter)", str(root)), RawFile(root)), clean)


@contextlib.contextmanager
def s3() -> Iterator[Place]:
    with running_s3_server(memory=SERVER_MEMORY) as server:
        os.environ[ENV_OPTIONS] = server.options.to_json()
        with persister(f"{server.url}/keepstep", server.options) as staging:
            ours, peers = Keepstep(f"{server.url}/keepstep", staging), Store.open(f"{server.url}/peers")
            dcp_ = Dcp("dcp (FsspecWriter, s3fs)", f"{server.url}/peers", endpoint_url=server.endpoint_url, key=KEY, secret=SECRET)

            def clean() -> None:
                ours.clean()
                for key in peers.list():
                    peers.delete(key)

            yield Place("S3", (ours, dcp_, RawObject(server)), clean)


PLACES = {"local": local, "S3": s3}


def measure(place: Place, shape: str, rounds: int) -> dict[str, list[float]]:
    """ "contender: operation" -> seconds of every round; a first round is not counted."""
    number, each = SHAPES[shape]
    state = {f"w{i}": torch.randn(each) for i in range(number)}
    target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    times: dict[str, list[float]] = defaultdict(list)
    for round_ in range(rounds + 1):
        place.clean()
        for contender in random.Random(round_).sample(place.contenders, len(place.contenders)):
            for tensor in target.values():
                tensor.zero_()
            key = f"peers/{contender.name[:3]}{round_}".removeprefix("peers/" if place.name == "local" else "")
            gc.collect()  # nobody pays for what the one before left behind
            found = contender.run(key, state, target)
            assert all(torch.equal(target[name], state[name]) for name in state), contender.name
            for operation, seconds in found.items():
                times[f"{contender.name}: {operation}"] += [seconds] if round_ else []
    place.clean()
    return dict(times)


def summary(times: dict[str, list[float]], num_bytes: int) -> dict[str, dict[str, float]]:
    """Medians, and how often keepstep's (saves: until durable; loads: from the store) goes into each."""
    ours = {"save": "keepstep: save: durable", "load": "keepstep: load: restore"}
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    return {
        name: {
            "median_ms": round(1e3 * median, 2),
            "min_ms": round(1e3 * min(times[name]), 2),
            "max_ms": round(1e3 * max(times[name]), 2),
            "mb_per_s": round(num_bytes / 1e6 / median, 1),
            "times_keepstep": round(median / medians[ours[name.split(": ")[1]]], 2),
        }
        for name, median in medians.items()
    }


def show(title: str, rows: dict[str, dict[str, float]]) -> None:
    table = Table("who", "what", "median", "min to max", "MB/s", "times keepstep", title=title)
    for name in sorted(rows, key=lambda name: (name.split(": ")[1] == "load", name)):
        who, kind, what = name.split(": ")
        row = rows[name]
        span = f"{row['min_ms']:.0f} to {row['max_ms']:.0f}"
        table.add_row(who, f"{kind}: {what}", f"{row['median_ms']:.0f} ms", span, f"{row['mb_per_s']:.0f}", f"{row['times_keepstep']:.2f}")
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def machine() -> dict[str, Any]:
    models = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    versions = {"python": platform.python_version(), "torch": torch.__version__, "s3fs": s3fs.__version__}
    return {"cpu": models[0] if models else platform.machine(), "cores": os.cpu_count(), "kernel": platform.release(), **versions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--places", nargs="+", choices=list(PLACES), default=list(PLACES))
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--out", type=Path, default=HERE / "results" / "storage.json")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    join(Attached(None))
    report: dict[str, Any] = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine(), "rounds": arguments.rounds}
    report["results"] = {}
    arguments.out.parent.mkdir(exist_ok=True)
    for name in arguments.places:
        with PLACES[name]() as place:
            for shape in arguments.shapes:
                number, each = SHAPES[shape]
                times = measure(place, shape, arguments.rounds)
                rows = summary(times, 4 * number * each)
                report["results"][f"{name}, {shape}"] = {"load": os.getloadavg()[0], "summary": rows, "seconds": times}
                arguments.out.write_text(json.dumps(report, indent=1) + "\n")
                show(f"{name}, {shape} ({4 * number * each / 1e6:.0f} MB), {arguments.rounds} rounds", rows)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
