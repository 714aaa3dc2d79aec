"""`keepstep run --demo`: breaks a run on purpose, twice, and says how long it stood still and whether the bits stayed the same."""

from __future__ import annotations

from keepstep.storage.steps import read_steps
from keepstep.storage.store import Store

from .breaking import Scene
from .conducting import Conductor, Witness
from .faultkinds import KINDS, AtStep, Fault
from .faultplan import world_size
from .sections import RunConfig

RANK_DIES_AT = 0.35  # of the run's steps
NODE_DIES_AT = 0.7


def demonstration(config: RunConfig, store: Store, witness: Witness) -> Conductor:
    """Kills the last rank, later its whole node."""
    last = world_size(config) - 1
    moments = {"kill-rank": RANK_DIES_AT, "kill-node": NODE_DIES_AT}
    faults = [Fault(kind=KINDS[name], moment=AtStep(max(1, int(share * config.run.steps))), rank=last) for name, share in moments.items()]
    return Conductor(faults, config, Scene(root=config.run.root, store=store), witness)


def same_bits(store: Store) -> str:
    """The steps that were computed more than once, compared bit by bit with what the first computation gave."""
    losses: dict[int, list[str]] = {}
    for records in read_steps(store).values():
        for record in records:
            losses.setdefault(record["step"], []).append(record["loss_hex"])
    again = {step: seen for step, seen in losses.items() if len(seen) > 1}
    differing = [step for step, seen in again.items() if len(set(seen)) > 1]
    if differing:
        return f"demo: steps {differing} gave other losses when they were computed again: this is a bug"
    return f"demo: {len(again)} steps were computed twice; every loss came out equal to the last bit"
