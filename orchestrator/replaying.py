"""`keepstep replay`: a step that was computed once is computed again, compared with what was recorded, and looked into.

The root is only read, also that of a run that goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from keepstep.storage.errors import DamagedCheckpoint, StorageError
from keepstep.storage.logreader import LogReader
from keepstep.storage.routes import Leg, Past, Route, attempt_of, read_past, routes, segment_of
from keepstep.storage.steps import read_steps, step_lines, surroundings_of
from keepstep.storage.store import Store
from keepstep.trainer.config import TrainerConfig
from keepstep.trainer.contract import Resume
from keepstep.trainer.replay import Origin, Replayed, Stretch, View
from keepstep.trainer.replay import replay as compute

from . import config as configs
from .comparing import Comparison, compare, likely_causes
from .errors import InputError
from .roots import open_as_stored

# Relative, by train.precision. On one process the gradients of more than two ranks are added in another order, so updates differ in their
# last float32 bits. Four ranks, 200 steps from scratch: 1.3e-7 at the most; a parameter that rounds to another bfloat16 counts for more.
TOLERANCES: Final = {"fp32": 1e-5, "bf16": 1e-3, "fp16": 1e-3}
_INDEX: Final = "tokens/index.json"
Records = Mapping[int, Mapping[int, Mapping[str, Any]]]  # attempt -> step -> its record


class Archive:
    """All that a root says of its past."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.config = open_as_stored(root)
        self.store = Store.open(root)
        try:
            self.past: Past = read_past(LogReader.read_all(self.store).entries)
            found = read_steps(self.store)
        except StorageError as error:
            raise InputError(f"{root}: {error}") from error
        self.records: Records = {attempt: {record["step"]: record for record in records} for attempt, records in found.items()}
        if self.config.train.script:
            raise InputError(
                f"{root}: train.script = {self.config.train.script!r} trained here: only keepstep's own trainer can be replayed"
            )
        if not self.store.exists(_INDEX):
            raise InputError(
                f"{root}: its tokens are gone (no {_INDEX}), and no step can be computed without them; restore the folder tokens/"
            )

    def attempt(self, step: int, attempt: int | None) -> int:
        """The attempt that is meant: the given one, else that of the history. Raises InputError where nothing shows that it computed it."""
        segment = segment_of(self.past.lineage, step)
        if attempt is None and segment and segment.last is not None:
            return segment.attempt
        number = segment.attempt if attempt is None and segment else attempt
        if attempt is not None and attempt not in self.past.attempts:
            raise InputError(f"{self.root}: there was no attempt {attempt}; there were: {_listed(self.past.attempts)}")
        if number is not None and (step in self.records.get(number, {}) or self.refused(number, step)):
            return number
        raise InputError(f"{self.root}: {self._why_not(step, number if attempt is not None else None)}")

    def refused(self, attempt: int, step: int) -> Mapping[str, Any] | None:
        """What an attempt wrote down of a step that must not become part of the training, if it was this one."""
        found = (line["rejected"] for line in step_lines(self.store, attempt) if isinstance(line.get("rejected"), dict))
        return next((rejected for rejected in found if rejected.get("step") == step), None)

    def _why_not(self, step: int, attempt: int | None) -> str:
        if attempt is not None:
            mine = self.records.get(attempt, {})
            return f"attempt {attempt} recorded no step {step}, it recorded {f'{min(mine)} to {max(mine)}' if mine else 'none'}"
        if lost := [number for number, steps in self.records.items() if step in steps]:
            return f"step {step} does not belong to the history; it was lost work of attempt {_listed(lost)}: say --attempt {lost[-1]}"
        newest = max((s for number, steps in self.records.items() for s in steps if attempt_of(self.past.lineage, s) == number), default=0)
        return f"step {step} is not recorded; " + (f"the history reaches from step 1 to {newest}" if newest else "no step is, yet")

    def stretches(self, route: Route) -> tuple[Stretch, ...]:
        return tuple(self._stretch(legs) for legs in route.stretches())

    def _stretch(self, legs: Sequence[Leg]) -> Stretch:
        first = legs[0]
        threads = surroundings_of(self.store, first.attempt).get("threads", "0")
        return Stretch(
            config=self._trainer_config(first.overrides),
            attempt=first.attempt,
            world_size=first.world_size,
            after=first.after,
            last=legs[-1].last,
            skips=first.skips,
            threads=int(threads),
            num_nodes=first.num_nodes,
        )

    def _trainer_config(self, overrides: Sequence[str]) -> TrainerConfig:
        config = configs.overridden(self.config, overrides)
        config = config.model_copy(update={"run": config.run.model_copy(update={"root": self.root})})
        return TrainerConfig.model_validate(config.model_dump())

    def recorded(self, route: Route) -> dict[int, Mapping[str, Any]]:
        """What each leg's attempt wrote down; a step whose record was lost is not there."""
        return {
            step: record for leg in route.legs for step, record in self.records.get(leg.attempt, {}).items() if leg.after < step <= leg.last
        }

    def world_size(self, attempt: int) -> int:
        return self.past.attempts[attempt].world_size


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(str(number) for number in sorted(numbers)) or "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A route that was travelled."""

    attempt: int
    route: Route
    replayed: Replayed
    comparison: Comparison
    recorded: Mapping[int, Mapping[str, Any]]
    on_one_process: bool  # that did the work of several ranks
    notes: tuple[str, ...]  # what people should know of the way

    def causes(self, archive: Archive) -> tuple[str, ...]:
        """What may have made the first difference."""
        first = self.comparison.first
        if first is None:
            return ()
        leg = next(leg for leg in self.route.legs if leg.after < first.step <= leg.last)
        then = surroundings_of(archive.store, leg.attempt)
        return tuple(likely_causes(self.recorded[first.step], self.replayed.records[first.step], then, self.replayed.surroundings))


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """What a replay is asked beside the step."""

    on_one_process: bool = False
    view: View | None = None
    progress: Callable[[int, int], None] = lambda done, total: None


def travel(archive: Archive, attempt: int, step: int, way: Way) -> Outcome:
    """Computes `step` of `attempt` from the nearest checkpoint that verifies, else from scratch.

    Raises:
        InputError: no way leads there.
        ReplayFailed: a process of the replay failed.
    """
    notes: list[str] = []
    for route in routes(archive.past, attempt, step):
        try:
            return _travel(archive, attempt, route, way, tuple(notes))
        except DamagedCheckpoint as error:
            notes.append(f"{error}; the checkpoint before it was taken")
    raise InputError(f"{archive.root}: no way leads to step {step} of attempt {attempt}: records of its past cannot be read", *notes)


def _travel(archive: Archive, attempt: int, route: Route, way: Way, notes: tuple[str, ...]) -> Outcome:
    stretches = archive.stretches(route)
    base = route.base
    origin = None
    if base is not None:
        origin = Origin(root=archive.root, resume=Resume(step=base.step, directory=base.directory, manifest_sha256=base.manifest_sha256))
    progress: Callable[[int], None] = lambda done: way.progress(done, route.num_steps)  # noqa: E731
    replayed = compute(stretches, origin, on_one_process=way.on_one_process, view=way.view, progress=progress)
    recorded = archive.recorded(route)
    is_exact = not way.on_one_process or all(stretch.world_size == 1 or stretch.config.cluster.exact_reduction for stretch in stretches)
    return Outcome(
        attempt=attempt,
        route=route,
        replayed=replayed,
        comparison=compare(recorded, replayed.records, tolerance=0.0 if is_exact else TOLERANCES[archive.config.train.precision]),
        recorded=recorded,
        on_one_process=not is_exact,
        notes=notes,
    )


def replay_steps(root: str, steps: Iterable[int], *, on_one_process: bool = False) -> list[Outcome]:
    """Computes steps of the history again, those that lie on one way together, and compares every loss on the ways with its record.

    Raises:
        InputError: a step is not recorded, or cannot be computed.
        ReplayFailed: a process of the replay failed.
    """
    archive = Archive(root)
    wanted = {step: archive.attempt(step, None) for step in sorted(set(steps))}
    outcomes: list[Outcome] = []
    for step, attempt in sorted(wanted.items(), reverse=True):
        if not any(_passes(outcome, step, attempt) for outcome in outcomes):
            outcomes.append(travel(archive, attempt, step, Way(on_one_process=on_one_process)))
    return outcomes[::-1]


def _passes(outcome: Outcome, step: int, attempt: int) -> bool:
    """Whether this step, as this attempt computed it, was on the way."""
    return any(leg.attempt == attempt and leg.after < step <= leg.last for leg in outcome.route.legs)
