"""What all benchmarks share: the machine that they ran on, medians with spread, and verdicts on targets that `make bench` collects.

A benchmark is a script that can be run by itself, prints its tables, and calls `publish` once. Measurements of contenders alternate within
one run of it; nothing here measures.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import signal
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

HERE: Final = Path(__file__).resolve().parent
RESULTS: Final = HERE / "results"
ENV_OUT: Final = "KEEPSTEP_BENCH_OUT"  # a folder for the results instead, set by bench.py in a quick run
EVENTS_S: Final = 5.0  # that an event may take to be written
_VERSIONS: Final = ("torch", "s3fs", "obstore", "numpy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One line of the table of targets."""

    what: str  # "SIGKILL of a rank -> next finished step, 2 x 2"
    target: str  # "median <= 0.45 s + one step"
    result: str  # "median 0.41 s + one step (0.36 to 0.52, n = 9)"
    met: bool | None  # None: not measured in this run, `note` says why
    note: str = ""  # where it is missed: what the time is spent on


def machine() -> dict[str, Any]:
    """What a figure must be read with. `load` is that of the last minute, when the benchmark began or ended."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 2),
        **{name: found for name in _VERSIONS if (found := _version(name))},
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def spread(values: Sequence[float], unit: str = "s", digits: int = 2) -> str:
    """ "0.41 s (0.36 to 0.52, n = 9)": the median, then the smallest and the largest."""
    if not values:
        return "nothing measured"
    low, high = min(values), max(values)
    return f"{statistics.median(values):.{digits}f} {unit} ({low:.{digits}f} to {high:.{digits}f}, n = {len(values)})"


def percentile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that at least this share of all values does not exceed (nearest rank); None of nothing."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(round(share * len(ordered), 6)) - 1)] if ordered else None


def median(values: Sequence[float]) -> float | None:
    """None of nothing."""
    return statistics.median(values) if values else None


def parser(description: str | None) -> argparse.ArgumentParser:
    """With `--quick`: fewer rounds, a figure to look at and not to quote. Every benchmark ends within half a minute with it.

    SIGTERM from here on ends the script like Ctrl-C does: it ends what it started.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="fewer rounds: a figure to look at, not to quote")
    return made


def publish(name: str, verdicts: Sequence[Verdict], measured: Any, *, began_on: dict[str, Any] | None = None) -> Path:
    """Prints the verdicts and writes `results/NAME.json`: machine, date, verdicts, and every single measurement.

    Args:
        began_on: `machine()` from before the first measurement, for its load.
    """
    folder = Path(os.environ.get(ENV_OUT) or RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    document = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": began_on or machine(),
        "verdicts": [asdict(verdict) for verdict in verdicts],
        "measured": measured,
    }
    path.write_text(json.dumps(document, indent=1) + "\n")
    if verdicts:
        Console(width=180).print(table_of(verdicts))
    return path


def table_of(verdicts: Sequence[Verdict]) -> Table:
    """Target and result side by side."""
    table = Table("what", "target", "result", "", "note")
    marks = {True: "met", False: "MISSED", None: "-"}
    for each in verdicts:
        table.add_row(each.what, each.target, each.result, marks[each.met], each.note)
    return table


def recoveries(root: Path, count: int) -> list[dict[str, float]]:
    """Of each of a run's `count` recoveries: seconds by part, as the events tell them. Those of the last one may come a moment late."""
    events, deadline = root / "events.jsonl", time.monotonic() + EVENTS_S
    while True:
        told = [json.loads(line) for line in events.read_text().splitlines() if '"trains-again"' in line]
        if len(told) >= count or time.monotonic() > deadline:
            return [{span["name"]: span["seconds"] for span in each["recovery"]["spans"]} for each in told]
        time.sleep(0.05)


def spent_on(parts: Sequence[Mapping[str, float]]) -> str:
    """Their medians, as a note: "detect 0.00, stop 0.05, ..."; parts that take no time are left out."""
    middles = {name: statistics.median(each.get(name, 0.0) for each in parts) for name in (parts[0] if parts else ())}
    told = ", ".join(f"{name} {middle:.2f}" for name, middle in middles.items() if middle >= 0.005)
    return f"spent on: {told} s" if told else ""


def progress_pages(folder: Path) -> Iterator[tuple[Path, bytes]]:
    """Every rank's page below a folder, a run's root left out, and what it holds. Ranks come and go: what has vanished is no error."""
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != "root"]
        for name in names:
            if name.startswith("progress-"):
                with contextlib.suppress(FileNotFoundError):
                    yield (path := Path(place, name)), path.read_bytes()


def wait_until_quiet(below: float = 1.0, patience_s: float = 120.0) -> float:
    """Gives a machine time to calm down before it is measured; the load that it begins with, calm or not."""
    until = time.monotonic() + patience_s
    while (load := os.getloadavg()[0]) > below and time.monotonic() < until:
        time.sleep(2)
    return load
