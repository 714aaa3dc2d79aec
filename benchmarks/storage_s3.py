"""Saving and restoring a state dict in S3: keepstep beside FsspecWriter and FsspecReader on s3fs, and the raw floor, in alternating runs.

    python benchmarks/storage_s3.py                 two shapes, results/storage_s3.json and tables
    python benchmarks/storage_s3.py --quick

As benchmarks/storage.py. The S3 server is SeaweedFS on loopback, on the same cores.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import statistics
import sys
import urllib.parse
from collections.abc import Iterator, Mapping

import s3fs
from common import HERE, Verdict, spread
from saving import Contender, Dcp, Keepstep, Measured, Place, State, Times, compare, only_rank, ratios, timed

from keepstep.storage.store import ENV_OPTIONS, Store
from keepstep.trainer.state import byte_view

sys.path.insert(0, str(HERE.parent / "tests"))

from s3server import BUCKET, KEY, SECRET, S3Server, running_s3_server

SERVER_MEMORY = "3GiB"  # with the tests' 300 MiB it spends twice the CPU time and more on collecting garbage
ROUNDS, QUICK_ROUNDS = 5, 1


class RawObject(Contender):
    """One PUT and one GET over one connection with signed URLs: what the server and one core can do without any library."""

    name = "floor"

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


@contextlib.contextmanager
def s3() -> Iterator[Place]:
    with running_s3_server(memory=SERVER_MEMORY) as server:
        os.environ[ENV_OPTIONS] = server.options.to_json()
        with only_rank(f"{server.url}/keepstep", server.options) as staging:
            ours, peers = Keepstep(f"{server.url}/keepstep", staging), Store.open(f"{server.url}/peers")
            dcp = Dcp("dcp (s3fs)", f"{server.url}/peers", endpoint_url=server.endpoint_url, key=KEY, secret=SECRET)

            def clean() -> None:
                ours.clean()
                for key in peers.list():
                    peers.delete(key)

            yield Place("S3", (ours, dcp, RawObject(server)), clean)


def verdicts(measured: Mapping[str, Measured]) -> list[Verdict]:
    """Persist and restore of each shape; the note says what the server allows."""
    saves = ("persist", 2, "FsspecWriter", "dcp (s3fs): save: dcp.save", "keepstep: save: durable", "floor: save: one PUT")
    loads = ("restore", 8, "FsspecReader", "dcp (s3fs): load: dcp.load", "keepstep: load: restore", "floor: load: one GET")
    return [_at_least(shape, runs, *named) for shape, runs in measured.items() for named in (saves, loads)]


def _at_least(shape: str, runs: Measured, what: str, limit: float, peer: str, theirs: str, ours: str, floor: str) -> Verdict:
    found, best = ratios(runs, theirs, ours), statistics.median(ratios(runs, theirs, floor))
    middle = statistics.median(found)
    return Verdict(
        what=f"{what}, S3 on loopback, {shape}",
        target=f">= {limit:g} x as fast as {peer}",
        result=spread(found, "x"),
        met=middle >= limit,
        note=f"{floor.rpartition(': ')[2]} of the same bytes and nothing else: {best:.1f} x",
    )


if __name__ == "__main__":
    compare(__doc__, "storage_s3", s3, verdicts, rounds=ROUNDS, quick_rounds=QUICK_ROUNDS)
