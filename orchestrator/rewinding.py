"""`keepstep rewind`: people send a run back to a checkpoint, to go on from there without some samples, or with other settings.

A coordinator that answers does it. Where none does, the command opens a term of its own (a coordinator that lives where we cannot see it is
fenced by that) and writes the record; whoever coordinates the run next goes on from there.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from typing import Final

from keepstep.storage import skips
from keepstep.storage.errors import Fenced, StoreError
from keepstep.storage.lineage import Lineage
from keepstep.storage.records import Commit
from keepstep.storage.runlog import RunLog
from keepstep.storage.store import Store

from . import config as configs
from . import events as ev
from .archive import EventFile, utc_now
from .client import CoordinatorUnable, CoordinatorUnreachable
from .errors import InputError
from .logbook import rewind_record, why_no_rewind
from .rewinds import overridden
from .roots import stored_config
from .sections import RunConfig, known_keys
from .viewing import call, is_coordinator, visit
from .wire import RewindWish

_CHANGEABLE: Final = ("optimizer.", "train.", "evaluate.", "trace.", "run.steps")
_ORDER_OF_SUMS: Final = "it decides in which order gradients are added, and with it the bits of every step"
_WHY_FIXED: Final = {
    "data.skip": "it holds from the first step on; leave samples out with --skip",
    "data.": "the order of the samples would be another one, and nobody could say any more which of them were consumed",
    "model.": "the checkpoints hold this model",
    "run.seed": "it decides the order of the samples",
    "run.": "it is what the root belongs to",
    "train.batch_tokens": "where a step begins in the data follows from it",
    "train.script": "another script is another run",
    **dict.fromkeys(
        ("train.objective", "train.start", "train.freeze", "train.lora."), "the checkpoints hold the parameters that follow from it"
    ),
    "cluster.exact_reduction": _ORDER_OF_SUMS,
    "cluster.logical_ranks": _ORDER_OF_SUMS,
    "": "it is no part of the training: change it in run.toml, at any start",
}


def rewind(where: str, *, to: int, skip: Sequence[str], override: Sequence[str]) -> str:
    """What was done, as sentences. Raises InputError."""
    try:
        wish = RewindWish(to=to, skip=tuple(skip), override=tuple(override))
        return call(where, "POST", "/v1/rewind", wish).decode().strip()
    except CoordinatorUnable as error:  # whoever answers lives: nobody else may write its log
        raise InputError(str(error)) from error
    except CoordinatorUnreachable as error:
        if is_coordinator(where):
            raise InputError(f"{where}: no coordinator answers ({error}); name the run's root instead") from error
    return _rewind_alone(where, to=to, skip=skip, override=override)


def _rewind_alone(root: str, *, to: int, skip: Sequence[str], override: Sequence[str]) -> str:
    store, log = visit(root)

    def wish() -> ev.LogRewind:
        return order(log.lineage, stored_config(store), to=to, skip=skip, override=override)

    wish()  # nobody is fenced for what cannot be
    outcome = log.lineage.outcome
    done = _append(store, log, wish)
    void = f"; its end ({outcome.why}) is void" if outcome else ""
    return f"{done}{void}\nnobody coordinates this run now: go on with `keepstep run` and the run.toml that it was started with"


def _append(store: Store, log: RunLog, wish: Callable[[], ev.LogRewind]) -> str:
    """What is wished for is worked out again once the term is ours: until then somebody else may have committed, rewound or retired."""
    lineage = log.lineage
    try:
        term = log.open_term(run=lineage.run, identity=lineage.identity, host=socket.gethostname(), pid=os.getpid(), at=utc_now()).term
        request = wish()
        record = log.append(rewind_record(log.lineage, request, term))
    except Fenced as error:
        raise InputError(f"{error}: a coordinator has just started; ask again") from error
    except (StoreError, ValueError) as error:
        raise InputError(str(error)) from error
    log.tidy()
    done = f"rewound {where_to(log.lineage.commit_of(record.directory), request)}"
    events = EventFile(store, lineage.run)
    events.append(
        {"term": term, "kind": "rewound", "why": f"{done}: {request.why}", "attempt": _attempt(lineage), "step": max(record.step, 0)}
    )
    events.flush()
    return done


def _attempt(lineage: Lineage) -> int:
    newest = lineage.newest_attempt()
    return newest.attempt if newest else 0


def where_to(target: Commit | ev.Checkpoint | None, request: ev.LogRewind | ev.RewindRecord) -> str:
    """ "to step 40 (data/...), leaving out the samples at 400:416, with optimizer.lr=0.001"."""
    left_out = f", leaving out the samples at {', '.join(request.skips)}" if request.skips else ""
    changed = f", with {', '.join(request.overrides)}" if request.overrides else ""
    return f"to {f'step {target.step} ({target.directory})' if target else 'the beginning'}{left_out}{changed}"


def order(lineage: Lineage, config: RunConfig, *, to: int, skip: Sequence[str], override: Sequence[str]) -> ev.LogRewind:
    """People's wish as a request, complete. Raises InputError with every reason why it cannot be.

    It goes to the checkpoint that is chosen here, or an older one; a newer one may have consumed what is to be left out.

    Args:
        config: of the run, without overrides of earlier rewinds.
    """
    wanted = ev.LogRewind(to=to, why="a person asked to go back" + (f" to step {to}" if to else " to the beginning"))
    if lineage.newest_attempt() is None:
        raise InputError("nothing was trained yet: there is nothing to go back from")
    if why := why_no_rewind(lineage, wanted):
        raise InputError(why)
    if to > (steps := configs.overridden(config, lineage.overrides).run.steps):
        raise InputError(f"--to {to}: the run has {steps} steps")
    overrides = overridden(lineage.overrides, override)
    target = lineage.newest_until(to)
    problems = [*_wrong_overrides(config, override, overrides, target), *_wrong_skips(lineage, config, to, skip)]
    if problems:
        raise InputError(*problems)
    return ev.LogRewind(to=target.step if target else 0, skips=skips.union(lineage.skips, skip), overrides=overrides, why=wanted.why)


def _wrong_overrides(config: RunConfig, given: Sequence[str], complete: Sequence[str], target: Commit | None) -> list[str]:
    keys = [text.partition("=")[0].strip() for text in given]
    fixed = {key: why for key in keys if key in known_keys() and (why := _why_fixed(key))}
    problems = [f"-o: {key} cannot be changed by a rewind: {why}" for key, why in fixed.items()]
    try:
        steps = configs.overridden(config, [text for text in complete if text.partition("=")[0].strip() not in fixed]).run.steps
    except InputError as error:
        return [*problems, *error.problems]
    if target and steps < target.step and "run.steps" in keys:
        problems.append(f"-o: run.steps = {steps} must not be below step {target.step}, to which the run goes back")
    return problems


def _why_fixed(key: str) -> str:
    """Why a rewind cannot change this; "" if it can."""
    start = next(start for start in _WHY_FIXED if key.startswith(start))
    is_named = start not in ("", "run.")
    return "" if key.startswith(_CHANGEABLE) and not is_named else _WHY_FIXED[start]


def _wrong_skips(lineage: Lineage, config: RunConfig, to: int, given: Sequence[str]) -> list[str]:
    """What the checkpoint has consumed already cannot be left out of it."""
    try:
        known = skips.union(config.data.skip, lineage.skips)
        wanted = [skips.parse(text) for text in given]
    except ValueError as error:
        return [f"--skip: {error}"]
    if config.train.script and given:
        return ["--skip: a script reads its own data, so nobody but the script can leave samples out"]
    target = lineage.newest_until(to)
    if target is None or target.step == 0:
        return []
    turns = target.step * (config.train.batch_tokens // config.model.context)
    end = skips.position_of(turns - 1, known) + 1
    return [
        f"--skip {first}:{last}: step {target.step} has consumed the samples before position {end}; go back further, or leave out "
        f"{max(first, end)}:{max(last, end + 1)}"
        for first, last in wanted
        if first < end and not skips.cover(known, [f"{first}:{min(last, end)}"])
    ]
