"""Which checkpoints exist, and which are on their way: the parts that ranks have made durable, per attempt's save. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from .events import Checkpoint, Commit
from .wire import Persisted

Save: TypeAlias = tuple[int, str]  # step, directory: unique within an attempt
_MAX_KNOWN = 32  # commits remembered: enough to tell a stale answer from a good one


@dataclass(frozen=True, slots=True, kw_only=True)
class Saves:
    """The checkpoints of a run, as far as this term knows."""

    commits: tuple[Checkpoint, ...] = ()  # of the history and good, oldest first
    ever_committed: bool = False
    quarantined: frozenset[str] = frozenset()
    unusable: frozenset[str] = frozenset()  # directories of saves whose parts do not fit together
    attempt: int = 0  # the one that `parts` belong to; 0: none commits
    rewound_to: int | None = None  # nothing newer than this step is to be resumed from, until the next attempt; -1: nothing at all
    parts: Mapping[Save, Mapping[int, Persisted]] = field(default_factory=dict)  # newer than the newest commit; by rank

    @property
    def newest(self) -> Checkpoint | None:
        return self.commits[-1] if self.commits else None

    @property
    def committed_step(self) -> int:
        return self.commits[-1].step if self.commits else -1


def begin_attempt(saves: Saves, attempt: int, resume: Checkpoint | None) -> Saves:
    """A newer attempt is in the log: older ones commit nothing any more, and what came after `resume` left the history."""
    step = resume.step if resume else -1
    kept = tuple(commit for commit in saves.commits if commit.step < step)
    return replace(
        saves,
        attempt=attempt,
        parts={},
        commits=(*kept, resume) if resume else kept,
        ever_committed=saves.ever_committed or bool(resume),
        rewound_to=None,
    )


def rewind(saves: Saves, target: Checkpoint | None) -> Saves:
    """The history goes back to `target`, None: to its beginning. Nobody commits until the next attempt."""
    return replace(begin_attempt(saves, 0, target), ever_committed=bool(target), rewound_to=target.step if target else -1)


def note(saves: Saves, persisted: Iterable[Persisted]) -> Saves:
    """Parts that became durable. Those of other attempts, older steps and unusable saves are dropped."""
    parts: dict[Save, Mapping[int, Persisted]] | None = None
    for part in persisted:
        save = (part.step, part.directory)
        if part.attempt != saves.attempt or part.step <= saves.committed_step or part.directory in saves.unusable | saves.quarantined:
            continue
        known = (parts or saves.parts).get(save, {})
        if part.rank not in known:
            parts = {**(parts or saves.parts), save: {**known, part.rank: part}}
    return replace(saves, parts=parts) if parts is not None else saves


def complete(saves: Saves, world_size: int) -> Commit | None:
    """The newest save that all ranks have finished, ready to be committed; before it the one with the best evaluation up to it."""
    done = _whole(saves, world_size)
    if not done:
        return None
    newest = max(done)
    best_step = saves.parts[newest][0].best_step
    step, directory = next((save for save in done if save[0] == best_step), newest)
    ranks = saves.parts[step, directory]
    return Commit(attempt=saves.attempt, step=step, directory=directory, indexes=tuple(ranks[rank] for rank in sorted(ranks)))


def newest_whole(saves: Saves, world_size: int) -> int:
    """The newest step that all ranks have saved, committed or not; -1: none."""
    return max([saves.committed_step, *(step for step, _ in _whole(saves, world_size))])


def _whole(saves: Saves, world_size: int) -> list[Save]:
    return [save for save, ranks in saves.parts.items() if len(ranks) == world_size]


def until(saves: Saves, step: int) -> Saves:
    """Without the parts of newer steps."""
    return replace(saves, parts={save: ranks for save, ranks in saves.parts.items() if save[0] <= step})


def missing_ranks(saves: Saves, world_size: int) -> frozenset[int]:
    """Ranks whose part of the newest unfinished save is still missing; none if no save is under way."""
    if not saves.parts:
        return frozenset()
    return frozenset(range(world_size)) - saves.parts[max(saves.parts)].keys()


def commit(saves: Saves, checkpoint: Checkpoint) -> Saves:
    """A commit record is in the log. Repeated news change nothing."""
    if checkpoint.step <= saves.committed_step:
        return replace(saves, ever_committed=True)
    parts = {save: ranks for save, ranks in saves.parts.items() if save[0] > checkpoint.step}
    return replace(saves, commits=(*saves.commits, checkpoint)[-_MAX_KNOWN:], ever_committed=True, parts=parts)


def discard(saves: Saves, step: int, directory: str) -> Saves:
    """The parts of this save do not make a checkpoint."""
    parts = {save: ranks for save, ranks in saves.parts.items() if save != (step, directory)}
    return replace(saves, parts=parts, unusable=saves.unusable | {directory})


def quarantine(saves: Saves, *directories: str) -> Saves:
    return replace(
        saves,
        quarantined=saves.quarantined | set(directories),
        commits=tuple(commit for commit in saves.commits if commit.directory not in directories),
    )


def objection(saves: Saves, resume: Checkpoint | None) -> str:
    """Why an answer to FindCheckpoint cannot be right yet; "" if it can."""
    if resume is None:
        return "" if saves.newest is None else f"the log does not show the commit of step {saves.committed_step} yet"
    if resume.directory in saves.quarantined:
        return f"{resume.directory} is quarantined"
    if saves.rewound_to is not None and resume.step > saves.rewound_to:
        return f"step {resume.step} is newer than step {saves.rewound_to}, to which the run was rewound"
    if resume.step < saves.committed_step:
        return f"step {resume.step} is older than the commit of step {saves.committed_step}"
    return ""
