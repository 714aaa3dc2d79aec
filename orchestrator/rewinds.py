"""Going back: to the checkpoint before a step that the ranks refused, or to where people want to go on from. Pure.

A rewind is wanted (`Run.rewind`) until nothing runs and no commit is under way; then it is asked for (`LogRewind`), and no checkpoint is
chosen before the answer. Everything that later attempts need to know of it stands in the log: what they leave out, what overrides run.toml,
and how many bad steps there were.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from keepstep.storage import skips

from . import asking, phases, saves
from .events import LogRewind, RewindAsked, RewindRecord, RewindVoid
from .run import Run, ask, drop_asks, end, progress_sentence, say, wait
from .verdict import Evidence


def is_wanted(run: Run) -> bool:
    """Whether the history is to go back and has not yet."""
    return run.rewind is not None or asking.pending(run.asks, LogRewind)


def overridden(*groups: Iterable[str]) -> tuple[str, ...]:
    """All overrides, the last one of each key."""
    by_key = {text.partition("=")[0].strip(): text.strip() for group in groups for text in group}
    return tuple(by_key.values())


def take_rewind_asked(run: Run, asked: RewindAsked) -> Run:
    """People's order. Whoever decides the end already cannot hear it any more; see `Coordinator.ask_rewind`."""
    if isinstance(run.phase, phases.Ending):
        return run
    run = want(run, LogRewind(to=asked.to, skips=asked.skips, overrides=asked.overrides, why=asked.why))
    return say(run, "rewind-asked", asked.why, step=asked.to)


def want(run: Run, wanted: LogRewind) -> Run:
    """Two that are wanted at the same time are one: as far back as either, with what both leave out; people's, if one of them is."""
    if (known := run.rewind) is not None:
        wanted = LogRewind(
            to=min(known.to, wanted.to),
            skips=skips.union(known.skips, wanted.skips),
            overrides=overridden(known.overrides, wanted.overrides),
            bad_step=min(known.bad_step, wanted.bad_step),
            why=f"{known.why}; {wanted.why}",
        )
    return replace(run, rewind=wanted)


def ask_rewind(run: Run) -> Run:
    """What is wanted, on top of what is in force."""
    wanted = run.rewind
    assert wanted
    complete = replace(wanted, skips=skips.union(run.skips, wanted.skips), overrides=overridden(run.overrides, wanted.overrides))
    return ask(replace(run, rewind=None), complete)


def rewind_past(run: Run, bad: Evidence) -> Run:
    """All ranks refused a step: on from the checkpoint before it, without the samples that spoilt it; or the end, where that is no use."""
    if not is_wanted(run) and (why := _why_no_use(run, bad)):
        return end(run, "failed", f"{why} ({progress_sentence(run)})", requeue=False)
    left_out = ", ".join(bad.skips)
    number = "with the rewind that was asked for" if is_wanted(run) else f"rewind {run.rewinds + 1} of {run.policy.rewinds}"
    run = want(run, LogRewind(to=bad.step - 1, skips=bad.skips, bad_step=bad.step, why=bad.why))
    return wait(run, f"after attempt {run.attempt}: {bad.why}; going back and leaving out the samples at {left_out} ({number})")


def _why_no_use(run: Run, bad: Evidence) -> str:
    if skips.cover(run.skips, bad.skips):
        return f"{bad.why}; the samples at {', '.join(bad.skips)} are left out already, so it would happen again"
    if run.rewinds < run.policy.rewinds:
        return ""
    budget = f"train.spike.budget = {run.policy.rewinds}"
    if not run.rewinds:
        return f"{bad.why}; {budget} allows no rewind"
    tried = f"{run.rewinds} rewind{'s' if run.rewinds > 1 else ''} left out the samples at {', '.join(run.skips)}"
    return f"{bad.why}; {tried}, and {budget} allows no more: look at the data and the learning rate"


def take_logged_rewind(run: Run, record: RewindRecord) -> Run:
    """It is in the log: the history is shorter, and the next attempt knows what to leave out."""
    if not asking.pending(run.asks, LogRewind):
        return run  # said twice
    run = replace(
        drop_asks(run, LogRewind),
        skips=record.skips,
        overrides=record.overrides,
        rewinds=run.rewinds + (record.bad_step >= 0),
        saves=saves.rewind(run.saves, record.resume),
        reached=record.resume.step if record.resume else 0,
        save_above=None,
        committed_at=None,
    )
    if record.bad_step < 0:
        run = replace(run, failures=0, last_error=None)  # people have mended something
    where = f"to step {record.resume.step} ({record.resume.directory})" if record.resume else "to the beginning"
    left_out = f", leaving out the samples at {', '.join(record.skips)}" if record.skips else ""
    changed = f", with {', '.join(record.overrides)}" if record.overrides else ""
    return say(run, "rewound", f"rewound {where}{left_out}{changed}: {record.why}", step=record.resume.step if record.resume else 0)


def take_void_rewind(run: Run, void: RewindVoid) -> Run:
    """The checkpoint is gone since it was asked for. People can ask again; a bad step would come again."""
    if not asking.pending(run.asks, LogRewind):
        return run
    run = say(drop_asks(run, LogRewind), "rewind-failed", void.why)
    if void.request.bad_step < 0 or not isinstance(run.phase, phases.Waiting):
        return run
    return end(run, "failed", f"{void.request.why}; {void.why}", requeue=False)
