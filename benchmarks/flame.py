"""What one process of a live run spends its time on, as a flame graph for https://www.speedscope.app.

    python benchmarks/flame.py coordinator runs/quickstart                  .build/flames/coordinator.json, 10 seconds
    python benchmarks/flame.py rank:2 runs/quickstart --seconds 30 --native
    python benchmarks/flame.py agent:node1 runs/quickstart --idle           threads that wait as well: for what takes long without the CPU
    python benchmarks/flame.py persister:node0 runs/quickstart --format flamegraph

py-spy looks from outside, 200 times a second; the process stands still for well under a millisecond each time. The parts of the last
recovery, in seconds, are in `keepstep status ROOT --json`: look there first.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from common import HERE, parser

OUT: Final = HERE.parent / ".build" / "flames"
ENDINGS: Final = {"speedscope": "json", "flamegraph": "svg", "raw": "txt"}
RATE: Final = 200


def pid_of(role: str, root: str) -> int:
    """Raises SystemExit with a sentence where there is no such process on this machine."""
    kind, _, which = role.partition(":")
    status = json.loads(subprocess.run(keepstep("status", root, "--json"), capture_output=True, text=True, check=True).stdout)
    nodes = {node["id"].partition("#")[0]: node for node in status["nodes"]}
    if kind == "coordinator":
        return int(status["coordinator"]["pid"])
    if kind == "agent" and which in nodes:
        return int(nodes[which]["pid"])
    if kind == "persister" and which in nodes:
        agent = int(nodes[which]["pid"])
        return next(children(agent, lambda words: "keepstep.storage.persister" in words))
    ranks = {str(rank["rank"]): rank["pid"] for node in nodes.values() for rank in node["ranks"] if rank["phase"] != "exited"}
    if kind == "rank" and which in ranks:
        return int(ranks[which])
    known = ["coordinator", *(f"{kind}:{name}" for kind in ("agent", "persister") for name in nodes), *(f"rank:{rank}" for rank in ranks)]
    raise SystemExit(f"{root} has no {role}; there are {', '.join(known)}")


def keepstep(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "keepstep.orchestrator.cli", *arguments]


def children(pid: int, fits: Callable[[list[str]], bool]) -> Iterator[int]:
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in path.read_text().split():
            if fits(Path(f"/proc/{child}/cmdline").read_text().split("\0")):
                yield int(child)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("role", help="coordinator, agent:NODE, persister:NODE or rank:NUMBER")
    made.add_argument("root", help="of a run on this machine")
    made.add_argument("--seconds", type=int, default=10)
    made.add_argument("--idle", action="store_true", help="count threads that wait, too")
    made.add_argument("--native", action="store_true", help="C and C++ frames, too")
    made.add_argument("--format", choices=ENDINGS, default="speedscope")
    options = made.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / f"{options.role.replace(':', '-')}.{ENDINGS[options.format]}"
    seconds = 2 if options.quick else options.seconds
    spy = [
        Path(sysconfig.get_path("scripts")) / "py-spy",
        "record",
        "--rate",
        str(RATE),
        "--duration",
        str(seconds),
        "--format",
        options.format,
    ]
    more = [*(("--idle",) if options.idle else ()), *(("--native",) if options.native else ())]
    subprocess.run([*spy, *more, "--output", path, "--pid", str(pid_of(options.role, options.root))], check=True)
    print(path)


if __name__ == "__main__":
    main()
