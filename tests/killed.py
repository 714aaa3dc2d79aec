"""Lives of runs whose coordinators are killed, one after the other: a program, so that it can fork before it has threads.

    python killed.py URL FIRST_SEED NUM_LIVES KILLS_PER_LIFE

Each reign is a process of its own: it looks at what its predecessor left, takes over, saves, and is killed by KEEPSTEP_FAULTS at a
point that its seed chooses. What it was sure of it said through a pipe, so the judgement does not rest on the log that it judges.
One line of JSON per kill on standard output; exit code 1 with the reason when a promise was broken.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import botocore.loaders
from tiny import INTERVAL, TinyRun, load

from keepstep.storage import s3  # noqa: F401 - imported before the forks
from keepstep.storage.faults import ENV_FAULTS, fault_point
from keepstep.storage.runlog import RunLog
from keepstep.storage.store import Store
from keepstep.storage.verify import verify_checkpoint

MAX_SAVES = 8  # a point that was not reached by then is reported

Tell = Callable[[str, Any], None]

# Point of the plan -> does the save in whose middle it lies count when the successor has taken over? None: it lies behind a save.
SAVING: Mapping[str, bool | None] = {
    "persister.shards.before": False,
    "persister.shards.middle": False,
    "persister.shards.after": False,
    "persister.index.after": False,  # True for the last rank
    "coordinator.manifest.before": True,
    "coordinator.manifest.after": True,
    "coordinator.commit.before": True,
    "coordinator.commit.after": True,
    "coordinator.retire.after": None,
    "dispose.middle": None,
    "store.put_new.before:kind=snapshots": None,
    "store.put_new.after:kind=snapshots": None,
    "store.delete.after:kind=snapshots": None,
    "store.put.before:kind=hint.json": None,
    "store.put.after:kind=hint.json": None,
    "store.put_new.before:kind=manifest": True,
    "store.put_new.after:kind=manifest": True,
    "store.put_new.after:kind=log": True,
    "store.delete.after:kind=manifest": None,
    "store.delete.after:kind=index": None,
}
TAKING_OVER = ("store.put_new.before:kind=log:n=1", "store.put_new.after:kind=log:n=1", "store.put_new.after:kind=log:n=2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What the reigns said before they died. Steps; 0: none."""

    committed: int = 0
    saving: int = 0
    whole: int = 0

    def after(self, what: str, number: int) -> Known:
        match what:
            case "saving":
                return replace(self, saving=number)
            case "whole":
                return replace(self, whole=number)
            case "committed" | "landed":
                return replace(self, committed=number, whole=number, saving=number)
            case _:
                return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Where a reign is going to die."""

    point: str
    rank: int
    world_size: int
    save: int  # which of its saves, from 1
    is_takeover: bool

    @staticmethod
    def of(seed: int) -> Plan:
        chance = random.Random(seed)
        world_size, is_takeover = chance.choice([2, 2, 3, 4]), chance.random() < 0.2
        point = chance.choice(TAKING_OVER if is_takeover else list(SAVING))
        rank, save = chance.randrange(world_size), chance.choice([1, 2])
        return Plan(point=point, rank=rank, world_size=world_size, save=save, is_takeover=is_takeover)

    def faults(self, newest_step: int) -> str:
        """For KEEPSTEP_FAULTS."""
        if self.point.startswith("persister."):
            return f"{self.point}:rank={self.rank}:step={newest_step + self.save * INTERVAL}"
        if SAVING.get(self.point) and self.point.startswith("coordinator."):
            return f"{self.point}:step={newest_step + self.save * INTERVAL}"
        return self.point if self.is_takeover or SAVING.get(self.point) is None else f"{self.point}:n={self.save}"

    def leaves(self, known: Known) -> Known:
        """What is known to be whole when it struck; a kill while taking over changes nothing of that."""
        is_last_part = self.point == "persister.index.after" and self.rank == self.world_size - 1
        return replace(known, whole=known.saving) if SAVING.get(self.point) or is_last_part else known


def reign(url: str, plan: Plan | None, tell: Tell) -> None:
    """One process: audit, take over, save until the plan kills it."""
    store = Store.open(url)
    tell("audited", audit(store))
    passed = with_points(store)
    RunLog.__init__.__kwdefaults__["period"] = 4  # records from one snapshot to the next: a life has a few dozen
    if plan and plan.is_takeover:
        os.environ[ENV_FAULTS] = plan.faults(0)
    run = TinyRun(store, world_size=plan.world_size if plan else 2, tell=tell)
    run.launch()
    tell("landed", run.newest_step)
    passed.clear()
    os.environ[ENV_FAULTS] = plan.faults(run.newest_step) if plan else ""
    for _ in range(MAX_SAVES if plan else 1):
        run.save(run.newest_step + INTERVAL)


def audit(store: Store) -> int:
    """Every live checkpoint verifies, and the log means what its bare bytes say. How many there are."""
    log = RunLog.open(store)
    assert log.alarms == []
    if store.local_path(""):  # on S3 a second look at every record takes longer than everything else here
        assert log.lineage == RunLog.read_all(store).lineage
    live = {commit.directory: commit.manifest_sha256 for commit in log.lineage.live}
    assert live == commits_in(store)
    for commit in log.lineage.live[:-1]:
        verify_checkpoint(store, commit.directory, commit.manifest_sha256)
    for commit in log.lineage.live[-1:]:
        load(store, commit)
    return len(live)


def commits_in(store: Store) -> dict[str, str]:
    """Directory -> manifest hash of what was committed and not retired: read without the code under test, but for the store's.

    Every attempt must have begun at the newest of them.
    """
    found: dict[str, str] = {}
    for body in store.get_many(store.list("log")):
        assert isinstance(body, bytes)
        record = json.loads(body)["record"]
        if record["kind"] == "commit":
            found[record["directory"]] = record["manifest_sha256"]
        if record["kind"] == "attempt":
            assert record["resume_directory"] == next(reversed(found), ""), "not the newest committed checkpoint"
        for directory in record.get("directories", ()):
            found.pop(directory, None)
    return found


def with_points(store: Store) -> Counter[tuple[str, str]]:
    """A named point before and after each change of the root; the counter says how often each was passed."""
    passed: Counter[tuple[str, str]] = Counter()
    for name in ("put_new", "put", "write_file", "delete"):
        setattr(store, name, pointed(name, getattr(store, name), passed))
    return passed


def pointed(name: str, call: Callable[..., Any], passed: Counter[tuple[str, str]]) -> Callable[..., Any]:
    def wrapped(key: str, *arguments: Any, **options: Any) -> Any:
        kind = kind_of(key)
        passed[name, kind] += 1
        count = passed[name, kind]
        fault_point(f"store.{name}.before", kind=kind, n=count)
        result = call(key, *arguments, **options)
        fault_point(f"store.{name}.after", kind=kind, n=count)
        return result

    return wrapped


def kind_of(key: str) -> str:
    folder, _, name = key.rpartition("/")
    if folder.startswith("data/"):
        return "manifest" if name == "MANIFEST.json" else "index" if name.startswith("rank-") else "shard"
    return folder or name


# --- the parent: no threads, no store -------------------------------------------------------------------------------


def main(url: str, first_seed: int, num_lives: int, kills: int) -> int:
    for life in range(num_lives):
        seeds = range(first_seed + life * kills, first_seed + (life + 1) * kills)
        if why := live(f"{url}/life{seeds[0]}", seeds):
            sys.stderr.write(why)
            return 1
    return 0


def live(url: str, seeds: Iterable[int]) -> str:
    """What went wrong, "" if nothing did. After the last kill there is one more reign, which lives."""
    known = Known()
    for seed in (*seeds, None):
        plan = None if seed is None else Plan.of(seed)
        status, said = in_a_child(lambda tell, plan=plan: reign(url, plan, tell))
        if why := broken(known, said) or how_it_ended(status, said, plan):
            return f"seed {seed}, {plan}, known before: {known}: {why}; it said {said}"
        for what, number in said:
            known = known.after(what, number)
        if plan:
            known = plan.leaves(known)
            say({"seed": seed, "point": plan.point, "committed": known.committed, "whole": known.whole})
    return ""


def say(kill: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(kill) + "\n")
    sys.stdout.flush()


def broken(known: Known, said: list[tuple[str, Any]]) -> str:
    """What this reign found that must not be; "" if all is well."""
    facts = dict(reversed(said))  # the first of each kind
    if known.committed and not facts.get("audited", 1):
        return "no checkpoint is left"
    expected = max(known.committed, known.whole)
    if facts.get("landed", expected) != expected:
        return f"it resumed from step {facts['landed']}, not from {expected}"
    return ""


def how_it_ended(status: int, said: list[tuple[str, Any]], plan: Plan | None) -> str:
    """ "" if that was as planned."""
    if plan is None:
        return "" if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0 else f"it did not end well: {status}"
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return ""
    return f"it ended by itself: {dict(said).get('broke', 'its point was never reached')}"


def in_a_child(work: Callable[[Tell], None]) -> tuple[int, list[tuple[str, Any]]]:
    """How the child ended, and what it said."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        os._exit(enter(work, writing))
    os.close(writing)
    with os.fdopen(reading, "rb") as lines:
        said = [tuple(json.loads(line)) for line in lines]
    return os.waitpid(pid, 0)[1], said


def enter(work: Callable[[Tell], None], writing: int) -> int:
    """The child's exit code."""

    def tell(what: str, fact: Any) -> None:
        os.write(writing, json.dumps([what, fact]).encode() + b"\n")

    try:
        work(tell)
    except BaseException:  # noqa: BLE001 - a process' entry: the parent hears what it was
        tell("broke", traceback.format_exc())
        return 1
    return 0


def read_botocore_once() -> None:
    """Its description of S3 is megabytes of JSON, which every client would read again: the children inherit it."""
    loader = botocore.loaders.create_loader()
    for name in ("service-2", "endpoint-rule-set-1"):
        loader.load_service_model("s3", name)
    for name in ("endpoints", "partitions", "sdk-default-configuration", "_retry"):
        loader.load_data(name)
    botocore.loaders.create_loader = lambda search_path_string=None: loader


if __name__ == "__main__":
    read_botocore_once()
    sys.exit(main(sys.argv[1], *map(int, sys.argv[2:])))
