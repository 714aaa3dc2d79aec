"""What a coordinator knows of a run's past that its successor must know too; it travels with each attempt's record. Pure.

Without it a crash loop that takes the coordinator along would never spend its budget, and a drained host would get ranks again.
"""

from __future__ import annotations

import json
from dataclasses import replace

from . import events as ev
from . import membership
from .interval import Pace
from .run import Run


def standing(run: Run) -> str:
    """JSON text for `LogAttempt.standing`. Strikes go as counts: instants mean nothing on another machine's clock."""
    members = run.members
    counts = {host: membership.num_strikes(members, run.policy, host, run.now) for host in members.strikes}
    kept = {
        "failures": run.failures,
        "last_error": run.last_error,
        "strikes": {host: count for host, count in counts.items() if count},
        "drained": members.drained,
        "resized": run.resized,
        "pace": run.pace.kept(),
    }
    return json.dumps({name: value for name, value in kept.items() if value}, sort_keys=True, separators=(",", ":"))


def restored(run: Run, event: ev.Opened) -> Run:
    """The run as its predecessor saw it. Commits since the attempt began have refilled the budget; a run that had ended, or that people
    sent back, begins anew."""
    if not event.last_standing:
        return run
    kept = json.loads(event.last_standing)
    strikes = {host: (run.now,) * count for host, count in kept.get("strikes", {}).items()}
    members = replace(run.members, strikes=strikes, drained=kept.get("drained", {}))
    run = replace(run, members=members, pace=Pace.restored(kept.get("pace", {})))
    run = _resized(run, kept.get("resized"))
    if event.ended or event.forgiven:
        return run
    last_error = kept.get("last_error")
    return replace(
        run, failures=0 if _has_progressed(event) else kept.get("failures", 0), last_error=tuple(last_error) if last_error else None
    )


def _has_progressed(event: ev.Opened) -> bool:
    """Whether the attempt committed; not so where the newest checkpoint lies before its beginning: a rewind, a quarantine."""
    newest, began = event.newest_commit, event.last_resume
    return newest is not None and (began is None or newest.step > began.step)


def _resized(run: Run, resized: list[int] | None) -> Run:
    """An order to resize stands until somebody changes the config."""
    if not resized or resized[0] != run.policy.nodes:
        return run
    return resize(run, resized[1])


def resize(run: Run, nodes: int) -> Run:
    """From now on a full gang has so many nodes, whatever the config says."""
    policy, configured = run.policy, run.resized[0] if run.resized else run.policy.nodes
    policy = replace(policy, nodes=nodes, min_nodes=min(policy.min_nodes, nodes))
    return replace(run, policy=policy, resized=None if nodes == configured else (configured, nodes), short_since=None)
