"""What moves bytes to and from S3 fastest: s3fs, obstore, keepstep's own wire, on one SeaweedFS server, in alternating runs.

    python benchmarks/s3_clients.py                     results/s3_clients.json and a table
    python benchmarks/s3_clients.py --quick             a look

Wall time is what a caller waits; CPU is of this process and of the server, all their threads included. All get the same part size and the
same number of requests at once. "one request" is the whole object in one PUT and one GET: what the server can do.
"""

from __future__ import annotations

import os
import statistics
import sys
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import obstore
import s3fs
from common import HERE, machine, parser, publish
from obstore.store import S3Store
from rich.console import Console
from rich.table import Table

from keepstep.storage.store import Store

sys.path.insert(0, str(HERE.parent / "tests"))

from s3server import BUCKET, KEY, SECRET, S3Server, running_s3_server

MIB = 1 << 20
LARGE_BYTES = 256 * MIB
PART_BYTES = 32 * MIB
PARALLEL_PARTS = 4
RANGE_BYTES = 32 * MIB
PARALLEL = 16
NUM_SMALL = 200
SMALL = b"x" * 2000
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Contender(ABC):
    """One library; keys are names in the bucket."""

    name: str

    @abstractmethod
    def put_large(self, key: str, data: memoryview) -> None: ...

    def get_large(self, key: str) -> int:
        return sum(_at_once(lambda start: self.get_range(key, start, RANGE_BYTES), range(0, LARGE_BYTES, RANGE_BYTES)))

    @abstractmethod
    def get_range(self, key: str, start: int, length: int) -> int: ...

    @abstractmethod
    def put(self, key: str, body: bytes) -> None: ...

    @abstractmethod
    def get(self, key: str) -> int: ...


class S3fs(Contender):
    """One call is one request, parts from a few threads, each part copied (botocore takes no memoryview) and signed."""

    name = "s3fs"

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
    """Unsigned payloads, as ours are."""

    name = "obstore"

    def __init__(self, server: S3Server) -> None:
        self._store = S3Store(
            BUCKET,
            endpoint=server.endpoint_url,
            access_key_id=KEY,
            secret_access_key=SECRET,
            region="us-east-1",
            client_options={"allow_http": True},
            unsigned_payload=True,
        )

    def put_large(self, key: str, data: memoryview) -> None:
        blocks = (data[start : start + PART_BYTES] for start in range(0, data.nbytes, PART_BYTES))
        obstore.put(self._store, key, blocks, use_multipart=True, chunk_size=PART_BYTES, max_concurrency=PARALLEL_PARTS)

    def get_range(self, key: str, start: int, length: int) -> int:
        return len(obstore.get_range(self._store, key, start=start, length=length))

    def put(self, key: str, body: bytes) -> None:
        obstore.put(self._store, key, body, use_multipart=False)

    def get(self, key: str) -> int:
        return len(obstore.get(self._store, key).bytes())


class OneRequest(Obstore):
    """One PUT and one GET of the whole object: what the server can do."""

    name = "one request"

    def put_large(self, key: str, data: memoryview) -> None:
        obstore.put(self._store, key, data, use_multipart=False)

    def get_large(self, key: str) -> int:
        return len(obstore.get(self._store, key).bytes())


class Keepstep(Contender):
    """storage/s3.py: retries, deadlines, throttling included. Ranges go into memory that exists."""

    name = "keepstep"

    def __init__(self, server: S3Server) -> None:
        self._store = Store.open(server.url, server.options)
        self._memory = memoryview(bytearray(b"x" * LARGE_BYTES))

    def put_large(self, key: str, data: memoryview) -> None:
        self._store.write_file(key, [data], num_bytes=data.nbytes)

    def get_range(self, key: str, start: int, length: int) -> int:
        return self._store.read_into(key, start, self._memory[start : start + length])

    def put(self, key: str, body: bytes) -> None:
        self._store.put(key, body)

    def get(self, key: str) -> int:
        return len(self._store.get(key))


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    operation: str
    contender: str
    wall_s: float
    cpu_s: float
    server_cpu_s: float


def operations(contender: Contender, data: memoryview) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is timed, in order: each reads what the one before it wrote."""
    prefix = f"bench/{uuid.uuid4().hex}"
    small = [f"{prefix}/small/{number}" for number in range(NUM_SMALL)]
    yield "PUT of 268 MB", lambda: contender.put_large(f"{prefix}/large", data)
    yield "GET of 268 MB", lambda: _check(contender.get_large(f"{prefix}/large"))
    if isinstance(contender, OneRequest):
        return
    yield "200 small PUTs", lambda: _at_once(lambda key: contender.put(key, SMALL), small)
    yield "200 small GETs", lambda: _at_once(contender.get, small)


def _at_once(work: Callable[[Any], Any], arguments: Sequence[Any]) -> list[Any]:
    with ThreadPoolExecutor(PARALLEL) as pool:
        return list(pool.map(work, arguments))


def _check(num_bytes: int) -> None:
    assert num_bytes == LARGE_BYTES, num_bytes


def timed(operation: str, name: str, server: S3Server, work: Callable[[], object]) -> Run:
    wall, cpu, theirs = perf_counter(), process_time(), cpu_s(server.pid)
    work()
    spent = {"cpu_s": process_time() - cpu, "server_cpu_s": cpu_s(server.pid) - theirs}
    return Run(operation=operation, contender=name, wall_s=perf_counter() - wall, **spent)


def cpu_s(pid: int) -> float:
    """Seconds of all its threads so far; counted in hundredths."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def measure(rounds: int) -> list[Run]:
    data = memoryview(os.urandom(LARGE_BYTES))
    with running_s3_server(memory="3GiB") as server:
        contenders = [made(server) for made in (S3fs, Obstore, Keepstep, OneRequest)]
        runs: list[Run] = []
        for number in range(rounds + 1):
            for contender in contenders:
                found = [timed(operation, contender.name, server, work) for operation, work in operations(contender, data)]
                runs += found if number else []  # the first round warms connections and pages
        return runs


def table(runs: Sequence[Run]) -> Table:
    """Medians."""
    shown = Table("operation", "who", "wall", "CPU", "CPU of the server")
    for operation, name in dict.fromkeys((run.operation, run.contender) for run in runs):
        chosen = [run for run in runs if (run.operation, run.contender) == (operation, name)]
        wall, cpu, server = (statistics.median(getattr(run, key) for run in chosen) for key in ("wall_s", "cpu_s", "server_cpu_s"))
        shown.add_row(operation, name, f"{wall:.3f} s", f"{cpu:.3f} s", f"{server:.2f} s")
    return shown


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=0, help="that count; 7, quick 1")
    options = arguments.parse_args()
    began_on = machine()
    runs = measure(options.rounds or (1 if options.quick else 7))
    Console(width=None if sys.stdout.isatty() else 140).print(table(runs))
    publish("s3_clients", [], [asdict(run) for run in runs], began_on=began_on)


if __name__ == "__main__":
    main()
