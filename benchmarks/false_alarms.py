"""Minutes of training in which nothing fails: each failure that is reported is a false alarm. There must be none.

    python benchmarks/false_alarms.py                                  10 minutes of each, results/false_alarms.json
    python benchmarks/false_alarms.py --minutes 0.5 --only quiet       a look; --quick: a few seconds of each

quiet            nothing else happens
slow-save        every part of a checkpoint takes 5 s longer on its way to the store, and rank 1 stands still for 1.5 s while it is copied
busy-neighbour   as many processes as there are cores burn all the processor time that they get
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from common import Verdict, machine, parser, publish
from live import Live, RunBroke, make_folder

from keepstep.orchestrator.faultkinds import FAILURE

START_S = 300.0
SLOW_SAVES = "persister.shards.before:action=pause:seconds=5;rank.stage.before:rank=1:action=pause:seconds=1.5"
SCENES = {"quiet": "", "slow-save": SLOW_SAVES, "busy-neighbour": ""}
BURN = "import os\nwhile os.getppid() == {parent}:\n    sum(range(1000000))"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    scene: str
    minutes: float
    steps: int
    commits: int
    failures: tuple[str, ...]  # sentences
    load: float


def watch(scene: str, minutes: float) -> Row:
    run = Live(make_folder())
    began_at_step: list[int] = []

    async def beside() -> None:
        if not await run.witness.until(lambda: run.witness.training, START_S):
            raise RunBroke(f"the run does not train, see {run.folder}")
        began_at_step.append(run.witness.step)
        await asyncio.sleep(60 * minutes)

    with burning(os.cpu_count() or 1 if scene == "busy-neighbour" else 0):
        run.run(beside, faults=SCENES[scene])
        load = os.getloadavg()[0]
    events = run.witness.events
    row = Row(
        scene=scene,
        minutes=minutes,
        steps=run.witness.step - began_at_step[0],
        commits=sum(event["kind"] == "committed" for event in events),
        failures=tuple(event["why"] for event in events if event["kind"] == FAILURE),
        load=load,
    )
    if not row.failures:
        shutil.rmtree(run.folder, ignore_errors=True)  # kept after an alarm: its logs say why
    return row


@contextlib.contextmanager
def burning(number: int) -> Iterator[None]:
    """So many processes that only compute; they leave by themselves should we be killed."""
    command = [sys.executable, "-c", BURN.format(parent=os.getpid())]
    burners = [subprocess.Popen(command) for _ in range(number)]
    try:
        yield
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()


def verdict(row: Row) -> Verdict:
    alarms = len(row.failures)
    result = f"{alarms} in {row.minutes:g} minutes, {row.steps} steps, {row.commits} commits"
    return Verdict(what=f"false alarms, {row.scene}", target="0", result=result, met=alarms == 0, note="; ".join(row.failures))


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--minutes", type=float, default=10.0, help="of each")
    made.add_argument("--only", nargs="+", choices=list(SCENES), default=list(SCENES))
    options = made.parse_args()
    began_on, rows = machine(), list[Row]()
    for scene in options.only:
        rows.append(row := watch(scene, 0.15 if options.quick else options.minutes))
        print(f"{scene}: {row.steps} steps, {row.commits} commits, {len(row.failures)} false alarms {' | '.join(row.failures)}", flush=True)
    publish("false_alarms", [verdict(row) for row in rows], [asdict(row) for row in rows], began_on=began_on)


if __name__ == "__main__":
    main()
