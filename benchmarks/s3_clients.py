"""Which library should move bytes to and from S3: s3fs beside obstore on one SeaweedFS server, in alternating runs.

    python benchmarks/s3_clients.py                     results/s3_clients.json and a table
    python benchmarks/s3_clients.py --rounds 1          a look

Wall time is what a caller waits; CPU is of this process alone, all its threads included (the server is another process). Both libraries get
the same part size and the same number of requests at once.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import obstore
import s3fs
from common import Verdict, machine, parser, publish
from obstore.store import S3Store
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

from s3server import BUCKET, KEY, SECRET, S3Server, running_s3_server  # noqa: E402 - the tests' server

MIB = 1 << 20
LARGE_BYTES = 256 * MIB
PART_BYTES = 16 * MIB
PARALLEL_PARTS = 4
RANGE_BYTES = 4 * MIB
NUM_RANGES = LARGE_BYTES // RANGE_BYTES
PARALLEL = 16
NUM_SMALL = 200
SMALL = b"x" * 2000


class Contender(ABC):
    """One library; keys are names in the bucket."""

    @abstractmethod
    def put_large(self, key: str, data: memoryview) -> None: ...

    @abstractmethod
    def get_range(self, key: str, start: int, length: int) -> int: ...

    @abstractmethod
    def put(self, key: str, body: bytes) -> None: ...

    @abstractmethod
    def get(self, key: str) -> int: ...


class S3fs(Contender):
    """As storage/s3.py uses it: one call is one request, parts from a few threads, each part copied (botocore takes no memoryview)."""

    def __init__(self, server: S3Server) -> None:
        self._fs = s3fs.S3FileSystem(
            key=KEY,
            secret=SECRET,
            endpoint_url=server.endpoint_url,
            client_kwargs={"region_name": "us-east-1"},
            config_kwargs={
                "max_pool_connections": PARALLEL,
                "request_checksum_calculation": "when_required",
                "response_checksum_validation": "when_required",
            },
            use_listings_cache=False,
            skip_instance_cache=True,
        )

    def put_large(self, key: str, data: memoryview) -> None:
        upload = self._fs.call_s3("create_multipart_upload", Bucket=BUCKET, Key=key)["UploadId"]

        def send(number: int) -> dict[str, Any]:
            body = bytes(data[(number - 1) * PART_BYTES : number * PART_BYTES])
            etag = self._fs.call_s3("upload_part", Bucket=BUCKET, Key=key, UploadId=upload, PartNumber=number, Body=body)["ETag"]
            return {"PartNumber": number, "ETag": etag}

        with ThreadPoolExecutor(PARALLEL_PARTS) as pool:
            parts = list(pool.map(send, range(1, data.nbytes // PART_BYTES + 1)))
        self._fs.call_s3("complete_multipart_upload", Bucket=BUCKET, Key=key, UploadId=upload, MultipartUpload={"Parts": parts})

    def get_range(self, key: str, start: int, length: int) -> int:
        return len(self._fs.cat_file(f"{BUCKET}/{key}", start=start, end=start + length))

    def put(self, key: str, body: bytes) -> None:
        self._fs.call_s3("put_object", Bucket=BUCKET, Key=key, Body=body)

    def get(self, key: str) -> int:
        return len(self._fs.cat_file(f"{BUCKET}/{key}", max_concurrency=1))


class Obstore(Contender):
    def __init__(self, server: S3Server) -> None:
        self._store = S3Store(
            BUCKET,
            endpoint=server.endpoint_url,
            access_key_id=KEY,
            secret_access_key=SECRET,
            region="us-east-1",
            client_options={"allow_http": True},
        )

    def put_large(self, key: str, data: memoryview) -> None:
        blocks = (data[start : start + RANGE_BYTES] for start in range(0, data.nbytes, RANGE_BYTES))
        obstore.put(self._store, key, blocks, use_multipart=True, chunk_size=PART_BYTES, max_concurrency=PARALLEL_PARTS)

    def get_range(self, key: str, start: int, length: int) -> int:
        return len(obstore.get_range(self._store, key, start=start, length=length))

    def put(self, key: str, body: bytes) -> None:
        obstore.put(self._store, key, body, use_multipart=False)

    def get(self, key: str) -> int:
        return len(obstore.get(self._store, key).bytes())


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    operation: str
    contender: str
    wall_s: float
    cpu_s: float


def operations(contender: Contender, data: memoryview) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is timed, in order: each reads what the one before it wrote."""
    prefix = f"bench/{uuid.uuid4().hex}"
    small = [f"{prefix}/small/{number}" for number in range(NUM_SMALL)]
    starts = [number * RANGE_BYTES for number in range(NUM_RANGES)]
    yield "PUT of 268 MB", lambda: contender.put_large(f"{prefix}/large", data)
    yield "64 ranged GETs of 4 MiB", lambda: _check(_at_once(lambda at: contender.get_range(f"{prefix}/large", at, RANGE_BYTES), starts))
    yield "200 small PUTs", lambda: _at_once(lambda key: contender.put(key, SMALL), small)
    yield "200 small GETs", lambda: _at_once(contender.get, small)


def _at_once(work: Callable[[Any], Any], arguments: Sequence[Any]) -> list[Any]:
    with ThreadPoolExecutor(PARALLEL) as pool:
        return list(pool.map(work, arguments))


def _check(lengths: Sequence[int]) -> None:
    assert sum(lengths) == LARGE_BYTES, lengths


def timed(operation: str, name: str, work: Callable[[], object]) -> Run:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Run(operation=operation, contender=name, wall_s=time.perf_counter() - wall, cpu_s=time.process_time() - cpu)


def measure(rounds: int) -> list[Run]:
    data = memoryview(os.urandom(LARGE_BYTES))
    with running_s3_server(memory="3GiB") as server:
        contenders = {"s3fs": S3fs(server), "obstore": Obstore(server)}
        runs: list[Run] = []
        for number in range(rounds + 1):
            for name, contender in contenders.items():
                found = [timed(operation, name, work) for operation, work in operations(contender, data)]
                runs += found if number else []  # the first round warms connections and pages
        return runs


def medians(runs: Sequence[Run], operation: str, contender: str) -> tuple[float, float]:
    """(wall, CPU) in seconds."""
    chosen = [run for run in runs if (run.operation, run.contender) == (operation, contender)]
    return statistics.median(run.wall_s for run in chosen), statistics.median(run.cpu_s for run in chosen)


def table(runs: Sequence[Run]) -> Table:
    shown = Table("operation", "s3fs wall", "obstore wall", "ratio", "s3fs CPU", "obstore CPU", "ratio")
    for operation in dict.fromkeys(run.operation for run in runs):
        (wall_a, cpu_a), (wall_b, cpu_b) = medians(runs, operation, "s3fs"), medians(runs, operation, "obstore")
        times = (f"{wall_a:.3f} s", f"{wall_b:.3f} s", f"{wall_a / wall_b:.2f}", f"{cpu_a:.3f} s", f"{cpu_b:.3f} s", f"{cpu_a / cpu_b:.2f}")
        shown.add_row(operation, *times)
    return shown


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=7)
    options = made.parse_args()
    began_on = machine()
    runs = measure(1 if options.quick else options.rounds)
    Console().print(table(runs))
    verdicts = []
    for operation in dict.fromkeys(run.operation for run in runs):
        (old_s, _), (new_s, _) = (medians(runs, operation, name) for name in ("s3fs", "obstore"))
        result = f"{old_s / new_s:.1f} x as fast as s3fs"
        verdicts.append(Verdict(what=f"obstore: {operation}", target="(a figure)", result=result, met=None))
    publish("s3_clients", verdicts, [asdict(run) for run in runs], began_on=began_on)


if __name__ == "__main__":
    main()
