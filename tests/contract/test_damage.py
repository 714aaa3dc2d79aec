"""Whatever happens to the bytes of a root, it is noticed, and the run goes on from a checkpoint whose every byte is right."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from tiny import INTERVAL, TinyRun, load

from keepstep.orchestrator import events as ev
from keepstep.storage.errors import DamagedCheckpoint
from keepstep.storage.layout import HINT_KEY, LOG, MANIFEST_NAME, METADATA_NAME, SNAPSHOTS, rank_index_name, shard_name
from keepstep.storage.records import Commit
from keepstep.storage.remote import MemoryStore
from keepstep.storage.runlog import RunLog
from keepstep.storage.store import Store

Tree = dict[str, bytes]
Choose = Callable[[Tree], str]
Damage = Callable[[Tree, str, random.Random], None]
SAVES = 6
KEEP = 4
NEWEST = 2 * SAVES * INTERVAL


@pytest.fixture(scope="module", autouse=True)
def _impatient() -> Iterator[None]:
    """No pause before what looks corrupt is read again."""
    defaults = RunLog.__init__.__kwdefaults__
    assert defaults
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(defaults, "sleep", lambda seconds: None)
        yield


@pytest.fixture(scope="module", params=[16, 1000], ids=["with-snapshots", "without"])
def intact(_impatient: None, request: pytest.FixtureRequest) -> Iterator[Tree]:
    """A root after two reigns."""
    store = store_of({})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RunLog.__init__.__kwdefaults__, "period", request.param)  # type: ignore[arg-type]
        for _ in range(2):
            run = TinyRun(store, keep=KEEP)
            run.launch()
            for _ in range(SAVES):
                run.save(run.newest_step + INTERVAL)
        assert run.log.tidy()
        assert run.newest_step == NEWEST
        yield {key: store.get(key) for key in store.list()}


@pytest.fixture
def tree(intact: Tree) -> Tree:
    return dict(intact)


def store_of(tree: Tree) -> Store:
    store = MemoryStore(uuid.uuid4().hex)
    store.parallel_reads = 1
    for key, body in tree.items():
        store.put(key, body)
    return store


# --- what can happen to a file --------------------------------------------------------------------------------------


def flip(tree: Tree, key: str, chance: random.Random) -> None:
    body = bytearray(tree[key])
    body[chance.randrange(len(body))] ^= 1 << chance.randrange(8)
    tree[key] = bytes(body)


def truncate(tree: Tree, key: str, chance: random.Random) -> None:
    tree[key] = tree[key][: chance.randrange(len(tree[key]))]


def zero(tree: Tree, key: str, chance: random.Random) -> None:
    """A sector, as a disk that lost it may answer; or all of a small file."""
    start = chance.randrange(0, len(tree[key]), 512)
    tree[key] = tree[key][:start] + bytes(len(tree[key][start : start + 512])) + tree[key][start + 512 :]


def delete(tree: Tree, key: str, chance: random.Random) -> None:
    del tree[key]


def swap(tree: Tree, key: str, chance: random.Random) -> None:
    """With another file of the same kind."""
    folder, _, name = key.rpartition("/")
    twins = [other for other in tree if other != key and is_twin(other, folder, name)]
    other = chance.choice(twins or [other for other in tree if other != key])
    tree[key], tree[other] = tree[other], tree[key]


def is_twin(other: str, folder: str, name: str) -> bool:
    other_folder, _, other_name = other.rpartition("/")
    return other_name == name if folder.startswith("data/") else other_folder == folder


DAMAGES: list[Damage] = [flip, truncate, zero, delete, swap]


# --- to which file --------------------------------------------------------------------------------------------------


def newest_directory(tree: Tree) -> str:
    return max(key for key in tree if key.endswith(MANIFEST_NAME)).rpartition("/")[0]


def records(tree: Tree, kind: str = "") -> list[str]:
    return [key for key in sorted(tree) if key.startswith(LOG + "/") and f'"kind":"{kind}'.encode() in tree[key]]


def snapshots(tree: Tree) -> list[str]:
    return [key for key in sorted(tree) if key.startswith(SNAPSHOTS)]


OF_THE_CHECKPOINT: dict[str, Choose] = {
    name: lambda tree, name=name: f"{newest_directory(tree)}/{name}"
    for name in (shard_name(0), shard_name(1), METADATA_NAME, MANIFEST_NAME, rank_index_name(0))
}
OF_THE_LOG: dict[str, Choose] = {
    "oldest record": lambda tree: records(tree)[0],
    "middle record": lambda tree: records(tree)[len(records(tree)) // 2],
    "newest record": lambda tree: records(tree)[-1],
    "newest opened": lambda tree: records(tree, "opened")[-1],
    "newest attempt": lambda tree: records(tree, "attempt")[-1],
    "newest commit": lambda tree: records(tree, "commit")[-1],
    "newest retire": lambda tree: records(tree, "retire")[-1],
    "newest verified": lambda tree: records(tree, "verified")[-1],
}
SHORTCUTS: dict[str, Choose] = {
    "newest snapshot": lambda tree: snapshots(tree)[-1],
    "older snapshot": lambda tree: snapshots(tree)[0],
    "hint": lambda tree: HINT_KEY,
}


def sample(victims: dict[str, Choose], positions: int) -> list[pytest.param]:  # type: ignore[valid-type]
    return [
        pytest.param(name, damage, seed, id=f"{damage.__name__}-{name}-{seed}".replace(" ", "-"))
        for name in victims
        for damage in DAMAGES
        for seed in range(positions)
    ]


@dataclass(frozen=True, slots=True)
class Ending:
    """What a successor made of a damaged root."""

    alarms: list[str]
    damaged: list[str]  # directories that it quarantined
    resumed: Commit


def succeed(store: Store) -> Ending:
    """Opens a term, chooses, reads every byte, quarantines what is damaged and chooses again, launches, saves."""
    run, damaged = TinyRun(store, keep=KEEP, on_damage=lambda directory, why: None), list[str]()
    run.logbook.carry_out(ev.FindCheckpoint())
    while True:
        commit = run.log.lineage.newest_committed()
        assert commit, f"nothing is left; alarms: {run.log.alarms}, damaged: {damaged}"
        try:
            load(store, commit)
        except DamagedCheckpoint as error:
            damaged.append(commit.directory)
            run.logbook.carry_out(ev.LogQuarantine(commit.directory, str(error)))
        else:
            break
    run.launch()
    run.save(run.newest_step + INTERVAL)
    assert run.attempt.resume_directory == commit.directory
    return Ending([*run.log.alarms, *RunLog.read_all(store).alarms], damaged, commit)


def spoilt(intact: Tree, tree: Tree) -> list[str]:
    """Directories in which something is not as it was, the newest first."""
    changed = {key.rpartition("/")[0] for key in intact if key.startswith("data/") and tree.get(key) != intact[key]}
    return sorted(changed, reverse=True)


@pytest.mark.parametrize(("name", "damage", "seed"), sample(OF_THE_CHECKPOINT, 2))
def test_a_damaged_checkpoint_leads_to_the_one_before(intact: Tree, tree: Tree, name: str, damage: Damage, seed: int) -> None:
    damage(tree, OF_THE_CHECKPOINT[name](tree), random.Random(seed))
    ending = succeed(store_of(tree))
    assert ending.damaged == spoilt(intact, tree)[: len(ending.damaged)]
    assert ending.damaged[0] == newest_directory(intact)
    assert ending.resumed.directory not in spoilt(intact, tree)


@pytest.mark.parametrize(("name", "damage", "seed"), sample(OF_THE_LOG, 2))
def test_a_damaged_record_is_noticed_and_costs_no_checkpoint(intact: Tree, tree: Tree, name: str, damage: Damage, seed: int) -> None:
    damage(tree, OF_THE_LOG[name](tree), random.Random(seed))
    assert tree != intact
    ending = succeed(store_of(tree))
    assert ending.alarms
    assert (ending.resumed.step, ending.damaged) == (NEWEST, [])


@pytest.mark.parametrize(("name", "damage", "seed"), sample(SHORTCUTS, 2))
def test_a_damaged_shortcut_changes_nothing(intact: Tree, tree: Tree, name: str, damage: Damage, seed: int) -> None:
    """It is a way to read less, and is never believed against the log."""
    if not snapshots(tree) and name != "hint":
        return
    damage(tree, SHORTCUTS[name](tree), random.Random(seed))
    if spoilt(intact, tree) or any(tree[key] != intact[key] for key in records(intact)):
        return  # swapped with something that matters: another test's case
    assert RunLog.open(store_of(tree)).lineage == RunLog.open(store_of(intact)).lineage
    assert succeed(store_of(tree)).resumed.step == NEWEST


@pytest.mark.parametrize("damage", [flip, truncate, zero])
def test_a_damaged_rank_index_is_not_rolled_forward(damage: Damage) -> None:
    """Nobody has reported its hash: it must vouch for itself."""
    store = store_of({})
    run = TinyRun(store)
    run.launch()
    run.save(INTERVAL)
    directory = run.persist(2 * INTERVAL).directory
    whole = {key: store.get(key) for key in store.list()}
    for seed in range(20):
        tree = dict(whole)
        damage(tree, f"{directory}/{rank_index_name(1)}", random.Random(seed))
        assert tree != whole
        ending = succeed(store_of(tree))
        assert (ending.resumed.step, ending.damaged) == (INTERVAL, [])
