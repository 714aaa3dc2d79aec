"""`keepstep chaos PLAN.toml`: the user's own run twice, once undisturbed and once with the plan's faults, and a verdict about the second.

Both runs have roots of their own; an undisturbed one that is there already, of the same run at the same size, is taken as it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from keepstep.storage.faults import ENV_FAULTS
from keepstep.storage.records import Attempt
from keepstep.storage.runlog import RunLog
from keepstep.storage.steps import read_steps
from keepstep.storage.store import Store
from keepstep.trainer.contract import EXIT_FAILED, EXIT_OK, EXIT_REQUEUE

from . import cgroups, faultplan
from . import config as configs
from .archive import read_result
from .breaking import Scene, fault_points
from .cgroups import Cgroup
from .commands import ready
from .conducting import Conductor, Witness
from .errors import InputError
from .faultkinds import Fault
from .faultplan import PlanFile
from .faultverdict import History
from .launchers import LocalPlatform, Place
from .processes import marked
from .reporting import Report, print_plan, print_report, report_of
from .roots import open_root
from .screen import Screen
from .sections import RunConfig

if TYPE_CHECKING:
    from .lab import Host

ENV_MARK = "KEEPSTEP_CHAOS"  # carried by all processes of the run that is broken
ORPHANS_S = 10.0  # what is still there so long after the run's end is an orphan
MAX_REQUEUES = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A plan, and the run that it is for."""

    name: str
    plan: PlanFile
    config: RunConfig
    faults: tuple[Fault, ...]
    base: Path


def chaos(path: Path, *, root: str, dry_run: bool, as_json: bool) -> int:
    """The whole of `keepstep chaos`; its exit code: 0 when everything held, 3 when not."""
    task = _task(path, root)
    console = Console(stderr=as_json, highlight=False, soft_wrap=True)
    print_plan(console, task.plan.seed, task.faults)
    if dry_run:
        return EXIT_OK
    _check_means(task)
    undisturbed, known = _undisturbed(task, console)
    report = _broken(task, undisturbed, console)
    print_report(report, reused=known, as_json=as_json)
    return EXIT_OK if report.holds else EXIT_FAILED


def _task(path: Path, root: str) -> Task:
    plan = faultplan.parse(_read(path), str(path))
    config = configs.load(path.parent / plan.run, plan.overrides)
    if "://" in root:
        raise InputError(f"--root {root}: name a local folder; the runs of a chaos are made to be thrown away")
    base = Path(root).absolute() if root else path.absolute().parent / f"chaos-{path.stem}"
    return Task(name=str(path), plan=plan, config=config, faults=faultplan.draw(plan, config, str(path)), base=base)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}; examples/chaos.toml is one to start from") from None


def _check_means(task: Task) -> None:
    if task.plan.hosts == "namespaces":
        from .lab import Lab

        if why := Lab.missing():
            raise InputError(f'{task.name}: hosts = "namespaces" cannot be had here: {why}')
    if any(fault.kind.action == "eat" for fault in task.faults) and (why := cgroups.missing()):
        raise InputError(f"{task.name}: oom-rank cannot be had here: {why}")


# The undisturbed run.


def _undisturbed(task: Task, console: Console) -> tuple[History, bool]:
    """Its history, and whether it was there already."""
    config = _rooted(task.config, task.base / f"undisturbed-{_kinship(task.config)}")
    store, config_path = ready(config)
    if known := _is_finished(store):
        console.print(f"chaos: the undisturbed run is there already: {config.run.root}", markup=False)
    else:
        console.print(f"chaos: first undisturbed, in {config.run.root}", markup=False)
        platform = LocalPlatform(config, config_path, Screen(config, store, console))
        if (code := asyncio.run(platform.run())) != EXIT_OK:
            raise InputError(f"{task.name}: the run does not even succeed undisturbed (exit code {code}, see {config.run.root})")
    return history_of(store), known


def _kinship(config: RunConfig) -> str:
    """Equal for runs that must end with the same bits."""
    same = (configs.identity(config), config.run.steps, faultplan.world_size(config))
    return sha256(repr(same).encode()).hexdigest()[:8]


def _is_finished(store: Store) -> bool:
    result = read_result(store)
    return result is not None and result["outcome"] == "succeeded"


def _rooted(config: RunConfig, root: Path, *, listen: str = "") -> RunConfig:
    cluster = config.cluster.model_copy(update={"listen": listen}) if listen else config.cluster
    return config.model_copy(update={"run": config.run.model_copy(update={"root": str(root)}), "cluster": cluster})


def history_of(store: Store) -> History:
    """How a run ended. Raises StoreError."""
    result, log = read_result(store), RunLog.read_all(store)
    losses = tuple(str(step.record["loss_hex"]) for step in log.lineage.history(read_steps(store)) if "loss_hex" in step.record)
    sizes = frozenset(record.world_size for record in log.records if isinstance(record, Attempt))
    return History(state_sha256=result["state_sha256"] if result else None, losses=losses, world_sizes=sizes)


# The one that is broken.


def _broken(task: Task, undisturbed: History, console: Console) -> Report:
    mark = uuid.uuid4().hex
    with _stage(task) as (config, place, scene):
        store = open_root(config)
        os.environ |= {ENV_MARK: mark, ENV_FAULTS: fault_points(scene.triggers)}
        witness = Witness(Screen(config, store, console))
        conductor = Conductor(task.faults, config, scene, witness)
        console.print(f"chaos: now with {len(task.faults)} faults, in {config.run.root}", markup=False)
        code = asyncio.run(_run(config, witness, place, conductor))
    orphans = _orphans(f"{ENV_MARK}={mark}")
    return report_of(
        conductor,
        witness.events,
        store,
        undisturbed=undisturbed,
        broken=history_of(store),
        exit_code=code,
        orphans=orphans,
    )


async def _run(config: RunConfig, witness: Witness, place: Place, conductor: Conductor) -> int:
    """Until it is over for good: a run that ends with 75 asks to be queued again, and is."""
    for _ in range(MAX_REQUEUES):
        _, config_path = await asyncio.to_thread(ready, config)
        platform = LocalPlatform(config, config_path, witness, place)
        code = await platform.run(conductor.conduct())
        if code != EXIT_REQUEUE or platform.told_to_stop:
            return code
        witness.say("chaos: the run ended with 75 (queue me again): starting it again")
    return EXIT_REQUEUE


@contextlib.contextmanager
def _stage(task: Task) -> Iterator[tuple[RunConfig, Place, Scene]]:
    """The config of the broken run, where its roles live, and what its breaker must know."""
    folder = _fresh(task.base)
    root, triggers = folder / "root", folder / "triggers"
    triggers.mkdir(parents=True)
    scene = Scene(root=str(root), store=Store.open(str(root)), triggers=triggers)
    names = faultplan.node_names(task.config)
    if task.plan.hosts == "processes":
        eats = any(fault.kind.action == "eat" for fault in task.faults)
        with node_groups(names if eats else ()) as groups:
            yield _rooted(task.config, root), in_groups(groups), replace(scene, groups=groups)
        return
    from .lab import Lab

    with Lab(len(names), shared=(task.base,)) as lab:
        hosts = dict(zip(names, lab.hosts, strict=True))
        yield _rooted(task.config, root, listen=f"{lab.gateway}:0"), on_hosts_of(hosts), replace(scene, hosts=hosts)


def on_hosts_of(hosts: Mapping[str, Host]) -> Place:
    """Each node on its host, the coordinator on this machine; a host without power runs nothing."""

    def place(role: str, command: Sequence[str]) -> list[str]:
        host = hosts.get(role)
        if host is None:
            return list(command)
        return host.command(command) if host.is_up else ["false"]

    return place


def _fresh(base: Path) -> Path:
    """broken-1, broken-2, ...: nothing that is there is touched."""
    numbers = [int(path.name.removeprefix("broken-")) for path in base.glob("broken-*") if path.name.removeprefix("broken-").isdigit()]
    return base / f"broken-{max(numbers, default=0) + 1}"


@contextlib.contextmanager
def node_groups(names: Sequence[str]) -> Iterator[dict[str, Cgroup]]:
    """Cgroups for nodes that are processes; they are gone afterwards, with whatever still lives in them. Root only, unless empty."""
    from .lab import own_name

    if not names:
        yield {}
        return
    whole = Cgroup(own_name())
    groups = {name: Cgroup(f"{whole.path.name}/{name}") for name in names}
    try:
        for group in groups.values():
            group.make()
        yield groups
    finally:
        whole.kill()
        whole.remove()


def in_groups(groups: Mapping[str, Cgroup]) -> Place:
    """Each node in its cgroup, everybody else outside."""
    from .lab import into

    return lambda role, command: [*(into(groups[role]) if role in groups else ()), *command]


def _orphans(mark: str) -> list[int]:
    deadline = time.monotonic() + ORPHANS_S
    while (found := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found
