"""Recovery and cold start of keepstep beside its peers, each at its best settings: SIGKILL of a rank, SIGKILL of a node, on 4 ranks.

    python benchmarks/peers.py                                        results/peers.json, some ten minutes
    python benchmarks/peers.py --rounds 1 --only "keepstep 2x2" "torchft 4x1"

All train the same toy (benchmarks/peers/toy.py) with a checkpoint every 10 steps and write the time of each step in the same way. A trial
is one launch that takes SIGKILLs of ranks and one of a node, whose replacement starts at once. Contenders take turns; those that take
long have one trial. What cannot be installed or does not run has a row that says so.
"""

from __future__ import annotations

import itertools
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal

from common import HERE, Verdict, machine, parser, publish, spread
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(HERE / "peers"))

from contenders import (
    CONTENDERS,
    RANKS,
    Contender,
    Keepstep,
    KeepstepOneNode,
    TorchrunSameScript,
    TorchrunSameScriptOneNode,
)
from environments import NotInstalled
from steplog import Step, all_stepped, newest_pids, read_steps, same_bits

Fault = Literal["rank", "node"]
FAULTS: Final[tuple[Fault, ...]] = ("rank", "rank", "node")
OURS: Final = {  # what a peer is compared with: as many agents; for nodes a replacement that starts, or a spare that waits
    "rank": {"": "keepstep 2x2", "torchrun 1x4": "keepstep 1x4"},
    "node": {"": "keepstep 2x2", "NVRx in-process 4+3": "keepstep 2x2, spare"},
}
OFTEN: Final = ("keepstep 2x2", "torchrun 1x4", "torchft 4x1")  # the others: one trial, one fault of each kind
QUICK: Final = ("keepstep 2x2", "torchft 4x1")
STEPS_BETWEEN: Final = 15  # more than the checkpoint interval
BETWEEN_S: Final = 4.0  # and at least so long: what a restart used up is there again, as it is in life
START_S, RECOVERY_S, POLL_S = 90.0, 60.0, 0.1  # all times are taken from the records
COLD: Final[Mapping[str, tuple[type[Contender], type[Contender]]]] = {
    "1x4": (KeepstepOneNode, TorchrunSameScriptOneNode),
    "2x2": (Keepstep, TorchrunSameScript),
}


class Stuck(RuntimeError):
    """A contender did not do what was waited for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One launch, or one fault."""

    contender: str
    round: int
    what: Literal["launch", "rank", "node"]
    seconds: float | None  # to the first step that all ranks finished; None: it did not come
    step_s: float = 0.0  # median seconds per step before the fault
    lost_steps: int = 0  # done before the fault and once more after it
    same_bits: bool = True  # of all steps that were done more than once
    why: str = ""  # where there are no seconds
    load: float = 0.0


def faults_of(name: str, faults: Sequence[Fault]) -> list[Fault]:
    """A single node that is lost is a launch."""
    chosen = faults if name in OFTEN else dict.fromkeys(faults)
    return [fault for fault in chosen if fault == "rank" or CONTENDERS[name].nodes > 1]


def trial(name: str, number: int, faults: Iterable[Fault]) -> list[Row]:
    """One launch of one contender, and its faults; it ends at the first that it does not recover from."""
    folder = Path(tempfile.mkdtemp(prefix="ks-peer-"))
    contender, rows = CONTENDERS[name](folder), list[Row]()
    what: Literal["launch", "rank", "node"] = "launch"
    began, load = time.monotonic(), os.getloadavg()[0]
    try:
        contender.start()
        first = wait_for(folder, since=began, patience_s=START_S)
        rows.append(Row(contender=name, round=number, what="launch", seconds=round(first.at - began, 3), load=load))
        for what in faults:
            rows.append(fault_once(contender, name, number, what))
    except (Stuck, NotInstalled, OSError, StopIteration) as error:
        why = f"not installed: {error}" if isinstance(error, NotInstalled) else f"{error or type(error).__name__}, see {folder}"
        rows.append(Row(contender=name, round=number, what=what, seconds=None, why=why, load=load))
        return rows
    finally:
        contender.stop()
    shutil.rmtree(folder, ignore_errors=True)  # kept after an error: its logs say why
    return rows


def fault_once(contender: Contender, name: str, number: int, what: Fault) -> Row:
    """One fault, once all ranks have gone on for a while. Raises Stuck."""
    before = go_on(contender.folder)
    pids, step_s = newest_pids(before), seconds_per_step(before)
    load = os.getloadavg()[0]
    if what == "rank":
        killed_at = time.monotonic()
        victim = pids[RANKS - 1]
        assert victim > 1, "no process of ours"
        os.kill(victim, 9)
    else:
        killed_at = contender.kill_node(1)
    first = wait_for(contender.folder, since=killed_at, patience_s=RECOVERY_S, dead=lambda: frozenset(gone(pids.values())))
    steps = read_steps(contender.folder)
    done = max(each.step for each in steps if each.at <= killed_at)
    return Row(
        contender=name,
        round=number,
        what=what,
        seconds=round(first.at - killed_at, 3),
        step_s=round(step_s, 4),
        lost_steps=max(0, done - first.step + 1),
        same_bits=same_bits(steps),
        load=load,
    )


def gone(pids: Iterable[int]) -> Iterable[int]:
    """Those that have ended, whether or not somebody has waited for them."""
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            state = "X"
        if state in "XZ":
            yield pid


def wait_for(folder: Path, *, since: float, patience_s: float, dead: Callable[[], frozenset[int]] = frozenset) -> Step:
    """The last rank's end of the first step that all ranks have finished after `since`. Raises Stuck."""
    until = time.monotonic() + patience_s
    while time.monotonic() < until:
        if found := all_stepped(read_steps(folder), ranks=RANKS, since=since, dead=dead()):
            return found
        time.sleep(POLL_S)
    raise Stuck(f"no step of all ranks within {patience_s:.0f} s")


def go_on(folder: Path) -> list[Step]:
    """Until every rank has done STEPS_BETWEEN more steps; everything since the beginning. Raises Stuck."""
    began, until = time.monotonic(), time.monotonic() + START_S
    while time.monotonic() < until:
        steps = read_steps(folder)
        if min(sum(each.rank == rank and each.at > began for each in steps) for rank in range(RANKS)) >= STEPS_BETWEEN:
            time.sleep(max(0.0, began + BETWEEN_S - time.monotonic()))
            return read_steps(folder)
        time.sleep(POLL_S)
    raise Stuck(f"no {STEPS_BETWEEN} steps within {START_S:.0f} s")


def seconds_per_step(steps: Sequence[Step]) -> float:
    """Median over the newest steps of rank 0, saves included."""
    at = [each.at for each in steps if each.rank == 0][-STEPS_BETWEEN:]
    return statistics.median(later - earlier for earlier, later in itertools.pairwise(at))


def cold_starts(rounds: int) -> list[Row]:
    """Launch to the first step, by keepstep and by torchrun, of the very same script, in turns."""
    rows = []
    for number in range(rounds):
        for size, pair in COLD.items():
            for made in pair:
                name = f"{'keepstep' if issubclass(made, Keepstep) else 'torchrun'} {size}, same script"
                rows += launch(made, name, number)
    return rows


def launch(made: type[Contender], name: str, number: int) -> list[Row]:
    folder = Path(tempfile.mkdtemp(prefix="ks-peer-"))
    contender, began, load = made(folder), time.monotonic(), os.getloadavg()[0]
    try:
        contender.start()
        first = wait_for(folder, since=began, patience_s=START_S)
    finally:
        contender.stop()
    shutil.rmtree(folder, ignore_errors=True)
    return [Row(contender=name, round=number, what="launch", seconds=round(first.at - began, 3), load=load)]


def seconds_of(rows: Iterable[Row], contender: str, what: str) -> list[float]:
    return [row.seconds for row in rows if (row.contender, row.what) == (contender, what) and row.seconds is not None]


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """Each fault beside each peer, with ours in the shape nearest to it; cold starts beside torchrun's."""
    found = []
    for what, words in (("rank", "SIGKILL of a rank"), ("node", "SIGKILL of a node")):
        for name in dict.fromkeys(row.contender for row in rows if row.what == what or row.seconds is None):
            if not name.startswith("keepstep"):
                found.append(beside(rows, name, what, words))
    for size in COLD:
        ours, theirs = (seconds_of(rows, f"{who} {size}, same script", "launch") for who in ("keepstep", "torchrun"))
        if ours and theirs:
            ratio = statistics.median(ours) / statistics.median(theirs)
            result = f"{ratio:.2f} x: {spread(ours)} beside {spread(theirs)}"
            found.append(
                Verdict(what=f"cold start to the first step, {size}, beside torchrun", target="<= 1 x", result=result, met=ratio <= 1)
            )
    return found


def beside(rows: Sequence[Row], peer: str, what: str, words: str) -> Verdict:
    """How many times faster we are."""
    ours_name = OURS[what].get(peer, OURS[what][""])
    ours, theirs = (seconds_of(rows, name, what) for name in (ours_name, peer))
    at_least = 1 if what == "node" else 4 if peer.startswith("torchft") else 10
    title, target = f"{words}: {ours_name} beside {peer}", f">= {at_least} x faster"
    whys = "; ".join(dict.fromkeys(row.why for row in rows if row.contender == peer and row.why))
    if not ours or not theirs:
        return Verdict(what=title, target=target, result="not measured", met=None, note=whys)
    ratio = statistics.median(theirs) / statistics.median(ours)
    result = f"{ratio:.1f} x: {spread(ours)} beside {spread(theirs)}"
    return Verdict(what=title, target=target, result=result, met=ratio >= at_least, note=whys)


def table_of(rows: Sequence[Row]) -> Table:
    table = Table("contender", "settings", "launch to first step", "SIGKILL of a rank", "of a node", "step s", "steps redone", "same bits")
    for name in dict.fromkeys(row.contender for row in rows):
        mine = [row for row in rows if row.contender == name]
        faults = [row for row in mine if row.what != "launch" and row.seconds is not None]
        times = (spread(seconds_of(rows, name, what)) for what in ("launch", "rank", "node"))
        step_s = f"{statistics.median(row.step_s for row in faults):.3f}" if faults else ""
        lost, bits = (f"{max(row.lost_steps for row in faults)} at most", all(row.same_bits for row in faults)) if faults else ("", "")
        settings = CONTENDERS[name].settings if name in CONTENDERS else ""
        table.add_row(name, settings, *times, step_s, lost, {True: "yes", False: "NO", "": ""}[bits])
        for why in dict.fromkeys(row.why for row in mine if row.why):
            table.add_row("", f"[bold]{why}[/bold]")
    return table


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=2, help="trials of each contender, in turns; of those that take long one")
    made.add_argument("--cold", type=int, default=2, help="cold starts of each kind")
    made.add_argument("--only", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    options = made.parse_args()
    rounds, cold, faults, names = options.rounds, options.cold, FAULTS, options.only
    if options.quick:
        rounds, cold, faults, names = 1, 0, ("rank",), [name for name in names if name in QUICK]
    began_on, rows = machine(), list[Row]()
    for number in range(rounds):
        for name in names:
            if number == 0 or name in OFTEN:
                found = trial(name, number, faults_of(name, faults))
                rows += found
                told = "; ".join(f"{row.what} {f'{row.seconds:.2f} s' if row.seconds is not None else row.why}" for row in found)
                print(f"{name}: {told}", flush=True)
    rows += cold_starts(cold)
    Console(width=180).print(table_of(rows))
    publish("peers", verdicts(rows), [asdict(row) for row in rows], began_on=began_on)


if __name__ == "__main__":
    main()
