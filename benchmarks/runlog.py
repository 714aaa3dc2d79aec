"""How long it takes to open a log of 100,000 records: from hint and snapshot, from a snapshot alone, and record by record.

    python benchmarks/runlog.py                     results/runlog.json and a table
    python benchmarks/runlog.py --rounds 1 --records 10000 --s3-records 2000

The log is what a year of a restless run leaves: a coordinator's term every 5,000 records, an attempt every 200, and in between commits,
each read back (`verified`), with all but the newest five retired. The last snapshot lies as far back as it can: 255 records.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import HERE, Verdict, machine, parser, publish, spread
from rich.console import Console
from rich.table import Table

from keepstep.storage.canonical import sha256_hex
from keepstep.storage.layout import HINT_KEY, checkpoint_directory, log_key
from keepstep.storage.lineage import Folding, Lineage
from keepstep.storage.records import Attempt, Commit, Opened, Record, Retire, Verified, encode
from keepstep.storage.runlog import RunLog
from keepstep.storage.snapshots import PERIOD
from keepstep.storage.store import Store

sys.path.insert(0, str(HERE.parent / "tests"))

from s3server import running_s3_server  # the tests' server

TERM_RECORDS, ATTEMPT_RECORDS, LIVE = 5_000, 200, 5
AT = "2026-11-22T08:00:00.000000+00:00"
MODES = ("hint and snapshot", "snapshot only", "every record")


def records_of_a_year(number: int) -> Iterator[Record]:
    """None of them is void."""
    folding, term, attempt = Folding(Lineage()), 0, 0
    step, live, unread = 0, list[str](), ""
    for sequence in range(number):
        record: Record
        if sequence % TERM_RECORDS == 0:
            term += 1
            record = Opened(term=term, run="benchmark", identity="ab" * 32, host="gpu-0001", pid=4711, url="http://10.0.0.1:4747", at=AT)
        elif sequence % ATTEMPT_RECORDS == 1:
            attempt += 1
            nodes = tuple(f"gpu-{node:04d}#3f9c1a2b" for node in range(8))
            resume = {"resume_step": step, "resume_directory": live[-1]} if live else {}
            record = Attempt(term=term, attempt=attempt, nodes=nodes, world_size=64, nonce=f"{attempt:016x}", at=AT, **resume)
        elif unread:
            record, unread = Verified(term=term, directory=unread, at=AT), ""
        elif len(live) > LIVE:
            record = Retire(term=term, directories=(live.pop(0),), why="checkpoint.keep = 5", at=AT)
        else:
            step += 100
            unread = checkpoint_directory(attempt, step, f"{attempt:016x}")
            live.append(unread)
            record = Commit(term=term, attempt=attempt, step=step, directory=unread, manifest_sha256="cd" * 32, world_size=64, at=AT)
        assert not folding.add(record), folding.refusal(record)
        yield record


def bodies(number: int) -> Iterator[tuple[str, bytes]]:
    """Key and bytes of each record of a log, as `RunLog.append` would have written them."""
    previous = ""
    for sequence, record in enumerate(records_of_a_year(number)):
        body = encode(record, sequence=sequence, uuid=f"{sequence:032x}", previous=previous)
        yield log_key(sequence), body
        previous = sha256_hex(body)


def build(store: Store, number: int) -> RunLog:
    """A log with its hint and its newest snapshot; record by record in the form of a coordinator's, but not through its 100,000 fsyncs."""
    if (folder := store.local_path("")) is not None:
        (folder / "log").mkdir(parents=True)
        for key, body in bodies(number):
            (folder / key).write_bytes(body)
    else:
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda item: store.put(*item), bodies(number)))
    log = RunLog.read_all(store)
    assert log.count == number, log.count
    assert log.alarms == [], log.alarms[:3]
    assert log.tidy()
    return log


def timed(work: Callable[[], RunLog]) -> tuple[float, RunLog]:
    began = time.perf_counter()
    log = work()
    return time.perf_counter() - began, log


def measure(store: Store, built: RunLog, rounds: int) -> dict[str, list[float]]:
    """Seconds of each mode, in alternating runs."""
    hint = store.get(HINT_KEY)
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    for _ in range(rounds):
        for mode in MODES:
            if mode == "snapshot only":
                store.delete(HINT_KEY)
            took, log = timed(lambda: RunLog.read_all(store) if mode == "every record" else RunLog.open(store))  # noqa: B023 - called here
            store.put(HINT_KEY, hint)
            assert log.lineage == built.lineage
            seconds[mode].append(round(took, 4))
    return seconds


def run(name: str, store: Store, number: int, rounds: int) -> dict[str, Any]:
    began = time.perf_counter()
    built = build(store, number)
    build_s = round(time.perf_counter() - began, 1)
    print(f"{name}: {number} records built in {build_s} s", flush=True)
    seconds = measure(store, built, rounds)
    tail = number % PERIOD
    snapshot_bytes = store.size(store.list("snapshots")[-1])
    return {"where": name, "records": number, "tail": tail, "snapshot_bytes": snapshot_bytes, "build_s": build_s, "seconds": seconds}


def table_of(results: list[dict[str, Any]]) -> Table:
    table = Table("where", "records", "how", "median s", "min - max s")
    for result in results:
        for mode, seconds in result["seconds"].items():
            spread = f"{min(seconds):.3f} - {max(seconds):.3f}"
            table.add_row(result["where"], f"{result['records']:,}", mode, f"{statistics.median(seconds):.3f}", spread)
    return table


def at_most(number: int) -> int:
    """The number of records at or below `number` that leaves the longest way after the last snapshot."""
    return number // PERIOD * PERIOD - 1


def verdict(local: dict[str, Any]) -> Verdict:
    """From hint and snapshot, as every coordinator opens it."""
    seconds = local["seconds"][MODES[0]]
    result = spread(seconds, digits=3)
    return Verdict(
        what=f"run log of {local['records']:,} records opens",
        target="< 1 s",
        result=result,
        met=max(seconds) < 1 if local["records"] >= 100_000 else None,
    )


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--records", type=int, default=100_352, help="on the local disk")
    made.add_argument("--s3-records", type=int, default=5_120, help="on an S3 server; 0: none")
    options = made.parse_args()
    rounds, records, s3_records = (1, 20_480, 0) if options.quick else (options.rounds, options.records, options.s3_records)
    began_on, results = machine(), []
    with tempfile.TemporaryDirectory(prefix="keepstep-") as folder:
        results.append(run("local disk", Store.open(Path(folder) / "root"), at_most(records), rounds))
    if s3_records:
        with running_s3_server() as server:
            store = Store.open(f"{server.url}/runlog", server.options)
            results.append(run("S3 (SeaweedFS)", store, at_most(s3_records), rounds))
    Console(width=100).print(table_of(results))
    publish("runlog", [verdict(results[0])], results, began_on=began_on)


if __name__ == "__main__":
    main()
