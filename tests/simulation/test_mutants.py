"""The simulation is worth something only if it notices: each protection is switched off once, and must be missed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
from sim_faults import STEPS, Simulation
from sim_world import Violation

from keepstep.orchestrator import asking, directives, draining, forming, hangs, machine, membership, phases, rewinds, standby, verdict
from keepstep.orchestrator import events as ev
from keepstep.orchestrator.run import Run, Standby, wait
from keepstep.orchestrator.wire import Launch

pytestmark = pytest.mark.slow


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One protection less."""

    name: str
    why: str  # part of what the simulation says
    faults: tuple[str, ...]  # drawn from, so that it is found soon
    patch: tuple[object, str, Callable[..., Any]] | None = None  # of the machine
    seeds: int = 300
    steps: int = STEPS


def _restart_for_ever(run: Run, culprit: verdict.Evidence, _nodes: set[str]) -> Run:
    return wait(run, f"after attempt {run.attempt}: {culprit.why}")


def _ignore_commits(asks: asking.Asks, kind: type[ev.Asking]) -> bool:
    return kind is not ev.Commit and _pending(asks, kind)


def _forget_what_is_skipped(run: Run, record: ev.RewindRecord) -> Run:
    return replace(_take_logged_rewind(run, record), skips=run.skips)


def _tell_ranks_nothing(*what: Any) -> Launch:
    return _make(*what).model_copy(update={"skips": ()})


def _why_unfit_but_for_seats(run: Run, standby: Standby, attempt: phases.Attempt) -> str:
    """Looks at what the nodes say, and not at who they are."""
    return "" if len(standby.ready) == len(standby.group.seats) else "not ready"


def _why_unfit_but_for_readiness(run: Run, standby: Standby, attempt: phases.Attempt) -> str:
    why = _why_unfit(run, standby, attempt)
    return "" if "not ready" in why else why


_note_alone = membership.note_alone
_pending = asking.pending
_why_unfit = standby._why_unfit
_take_logged_rewind = machine.take_logged_rewind
_make = directives._make
_ask_rewind = rewinds.ask_rewind

MUTANTS = [
    Mutant(name="no-lease", why="lives on", faults=("isolate", "isolate", "kill_rank")),
    Mutant(name="no-term-check", why="reigns", faults=("second_coordinator", "kill_rank")),
    Mutant(name="trusts-unproven", why="lives on", faults=("second_coordinator",), steps=60),
    Mutant(name="goes-on-without-a-word", why="lives on", faults=("isolate_bit_by_bit",)),
    Mutant(name="says-that-it-ended-and-goes-on", why="lives on", faults=("isolate_bit_by_bit",)),
    Mutant(name="proof-while-ranks-live", why="lives on", faults=("kill_agent",)),
    Mutant(
        name="nobody-is-asked-whether-it-goes-on",
        why="lives on",
        faults=("isolate_bit_by_bit",),
        patch=(membership, "note_alone", lambda members, asked, _, now: _note_alone(members, asked, frozenset(), now)),
    ),
    Mutant(
        name="no-fence-wait",
        why="lives on",
        faults=("isolate", "isolate", "kill_rank"),
        patch=(membership, "outlasted", lambda members, policy, now: frozenset(members.suspects)),
    ),
    Mutant(
        name="no-drain-wait",
        why="lives on",
        faults=("kill_rank", "leave", "drain"),
        patch=(membership, "says_clean", lambda *_, **__: True),
    ),
    Mutant(
        name="no-budget",
        why="not over",
        faults=("kill_rank",),
        patch=(draining, "_charge", _restart_for_ever),
    ),
    Mutant(
        name="first-report-is-the-culprit",
        why="a victim of",
        faults=("kill_rank", "bad_weather"),
        patch=(verdict, "better", lambda _, known: known),
    ),
    Mutant(
        name="who-is-quiet-longest-hangs",
        why="a victim of",
        faults=("hang_rank", "bad_weather"),
        patch=(hangs, "_innocence", lambda one: -one.quiet_s),
    ),
    Mutant(
        name="any-checkpoint-will-do",
        why="resumes from",
        faults=("kill_rank",),
        patch=(forming.saves, "objection", lambda *_: ""),
    ),
    Mutant(
        name="no-waiting-for-commits",
        why="commit|resumes",
        faults=("bad_weather", "kill_rank", "kill_rank"),
        patch=(asking, "pending", _ignore_commits),
    ),
    Mutant(
        name="nobody-is-ever-lost",
        why="not over",
        faults=("kill_agent",),
        patch=(membership, "absence", lambda *_: ""),
    ),
    Mutant(
        name="forgets-what-is-skipped",
        why="skips",
        faults=("poison",),
        patch=(machine, "take_logged_rewind", _forget_what_is_skipped),
    ),
    Mutant(
        name="ranks-hear-of-no-skips",
        why="the history consumed|left out already",
        faults=("poison", "rewind"),
        patch=(directives, "_make", _tell_ranks_nothing),
    ),
    Mutant(
        name="rewinds-for-ever",
        why="the budget is",
        faults=("poison",),
        patch=(rewinds, "_why_no_use", lambda *_: ""),
    ),
    Mutant(
        name="adopts-what-was-rewound",
        why="not over|rewound|resumes from",
        faults=("rewind_alone",),
    ),
    Mutant(
        name="chooses-before-it-went-back",
        why="not over|resumes from|skips",
        faults=("poison", "rewind"),
        patch=(forming, "ask_rewind", lambda run: replace(_ask_rewind(run), asks=run.asks)),
    ),
    Mutant(name="standby-begins-unasked", why="was launched while|lives on", faults=("kill_rank",)),
    Mutant(
        name="any-standby-fits",
        why="was formed as|never ready",
        faults=("resize", "resize", "kill_rank"),
        patch=(standby, "_why_unfit", lambda *_: ""),
    ),
    Mutant(
        name="standby-of-another-gang",
        why="was formed as|never ready",
        faults=("resize", "resize", "drain", "kill_rank"),
        patch=(standby, "_why_unfit", _why_unfit_but_for_seats),
    ),
    Mutant(
        name="standby-not-ready",
        why="never ready",
        faults=("kill_rank", "kill_standby"),
        patch=(standby, "_why_unfit", _why_unfit_but_for_readiness),
    ),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_missing_protection_is_noticed(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    if mutant.patch is not None:
        monkeypatch.setattr(*mutant.patch)
    with pytest.raises(Violation, match=mutant.why):
        _play(mutant)


def _play(mutant: Mutant) -> None:
    for seed in range(mutant.seeds):
        Simulation(seed, mutant=mutant.name, faults=mutant.faults, steps=mutant.steps).run()


@pytest.mark.parametrize("faults", sorted({mutant.faults for mutant in MUTANTS}), ids="-".join)
def test_the_same_faults_are_borne_with_all_protections(faults: tuple[str, ...]) -> None:
    for seed in range(40):
        Simulation(seed, faults=faults).run()
