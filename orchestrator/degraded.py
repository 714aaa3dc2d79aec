"""Training goes on while storage does not: since when, why, and when it was over. Pure."""

from __future__ import annotations

from dataclasses import replace

from .run import Degraded, Run, progress_sentence, say


def note_storage(run: Run) -> Run:
    """Says once that storage is in trouble, and once that it is not any more; what the trouble is may change in between."""
    why, known = _trouble(run), run.degraded
    if known is None:
        return _begin(run, why) if why else run
    if not why:
        return say(replace(run, degraded=None), "recovered", f"storage works again after {run.now - known.since:.1f} s ({known.why})")
    return run if why == known.why else replace(run, degraded=replace(known, why=why))


def _begin(run: Run, why: str) -> Run:
    run = replace(run, degraded=Degraded(why=why, since=run.now))
    return say(run, "degraded", f"storage is in the way: {why} ({progress_sentence(run)})")


def _trouble(run: Run) -> str:
    """What a node that runs ranks says of its checkpoints comes first: that is where the bytes are."""
    nodes = (node.report for node in run.members.nodes.values())
    troubled = min(((report.node, report.storage) for report in nodes if report.storage and report.attempt == run.attempt), default=None)
    if troubled:
        return ": ".join(troubled)
    refused = next((ask for ask in run.asks if ask.refusals), None)
    return f"{type(refused.request).__name__}: {refused.why}" if refused else ""
