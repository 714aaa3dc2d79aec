"""Which nodes are there, which of them are fit, who sits where, and where ranks of an older attempt may still live. Pure.

"Cannot observe" and "observed dead" are different: a node that is silent stays a *suspect* until it says itself that its ranks have
ended, until the kernel has proved that its processes are gone, until a successor on its host has buried it, or until a fence in the log has
outlasted its lease.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, TypeVar

from immutables import Map

from .changing import replace
from .policy import Policy
from .wire import AgentReport

T = TypeVar("T")

MAX_STRIKES: Final = 16  # remembered of a host
ASK_AGAIN_S: Final = 0.25  # whether a node that goes on without us still does


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One incarnation that reports to us."""

    report: AgentReport  # the newest
    heard_at: float
    broken_at: float | None = None  # its connection broke, and it has not been heard since


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspect:
    """Ranks of `attempt` or older may be alive on this node."""

    attempt: int
    since: float
    revision: int  # a node that has obeyed it will not launch them any more
    listens: bool  # it obeys our term: no predecessor can prolong its lease
    fenced_at: float | None = None  # when we knew that a newer attempt is in the log
    goes_alone: bool | None = None  # whether it had said, by then, that the log is enough for it; None: not known
    asked_at: float = 0.0  # when that was last looked up


@dataclass(frozen=True, slots=True, kw_only=True)
class Members:
    nodes: Map[str, Node] = field(default_factory=Map)  # persistent maps: a report changes one of ten thousand entries
    buried: frozenset[str] = frozenset()  # incarnations whose processes are confirmed dead
    proven: frozenset[str] = frozenset()  # those of them whose death the kernel told
    suspects: Map[str, Suspect] = field(default_factory=Map)
    strikes: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # by host: when it caused a failure
    drained: Mapping[str, str] = field(default_factory=dict)  # node or host -> why people want it empty
    seats: tuple[str, ...] = ()  # hosts of the newest gang, in seat order

    def report_of(self, node: str) -> AgentReport | None:
        known = self.nodes.get(node)
        return known.report if known else None


def host_of(node: str) -> str:
    """ "gpu07" of "gpu07#3f9c"."""
    return node.partition("#")[0]


# Presence.


def hear(members: Members, report: AgentReport, now: float) -> Members:
    """A new report; the incarnations that it buries are gone for good."""
    heard = replace(members, nodes=members.nodes.set(report.node, Node(report=report, heard_at=now)))
    is_known = all(name in members.buried and name not in members.nodes for name in report.buried)
    return heard if is_known else _bury(heard, frozenset(report.buried))


def _bury(members: Members, dead: frozenset[str]) -> Members:
    return replace(
        members,
        buried=members.buried | dead,
        nodes=_without(members.nodes, dead),
        suspects=_without(members.suspects, dead),
    )


def prove_dead(members: Members, name: str) -> Members:
    """Its last report stays: it may hold evidence, or the notice that it had."""
    suspects = _without(members.suspects, [name])
    return replace(members, buried=members.buried | {name}, proven=members.proven | {name}, suspects=suspects)


def _without(known: Map[str, T], names: Iterable[str]) -> Map[str, T]:
    for name in names:
        known = known.delete(name) if name in known else known
    return known


def lose_connection(members: Members, name: str, now: float) -> Members:
    node = members.nodes.get(name)
    if node is None or node.broken_at is not None:
        return members
    return replace(members, nodes=members.nodes.set(name, replace(node, broken_at=now)))


def excuse(members: Members, deaf_s: float) -> Members:
    """We heard nothing for `deaf_s` because we were not listening: that is not the nodes' silence."""
    nodes = {
        name: replace(node, heard_at=node.heard_at + deaf_s, broken_at=None if node.broken_at is None else node.broken_at + deaf_s)
        for name, node in members.nodes.items()
    }
    return replace(members, nodes=Map(nodes))


def absence(members: Members, policy: Policy, name: str, now: float, opened_at: float) -> str:
    """Why a node counts as absent, as the end of a sentence that begins with "lost NODE: "; "" while it is there.

    Args:
        opened_at: when this term began; nodes have a lease and its margin to find the new coordinator.
    """
    if name in members.proven:
        return "the kernel closed its tether, all its processes are dead"
    if name in members.buried:
        return "its agent died; its successor on the host found its processes dead"
    node = members.nodes.get(name)
    if node is None:
        patience_s = policy.lease_s + policy.fence_s
        return f"it did not report to this coordinator within {patience_s:g} s" if now - opened_at > patience_s else ""
    if node.broken_at is not None and now - node.broken_at >= policy.drop_grace_s:
        return f"its agent vanished (connection broken {now - node.broken_at:.1f} s ago)"
    if now - node.heard_at > policy.lease_s:
        return f"silent for over {policy.lease_s:g} s"
    return ""


def forget_long_gone(members: Members, policy: Policy, now: float) -> Members:
    """Drops nodes that have been silent for ten leases: they come back as new ones, if at all."""
    silent = (name for name, node in members.nodes.items() if now - node.heard_at > 10 * policy.lease_s)
    gone = [name for name in silent if name not in members.suspects]
    return replace(members, nodes=_without(members.nodes, gone)) if gone else members


# Suspects.


def suspect(members: Members, suspects: Mapping[str, Suspect]) -> Members:
    """More suspects; those that are buried are none."""
    alive = {name: found for name, found in suspects.items() if name not in members.buried}
    return replace(members, suspects=members.suspects.update(alive))


def clear(members: Members, names: Iterable[str]) -> Members:
    return replace(members, suspects=_without(members.suspects, names))


def fence(members: Members, now: float) -> Members:
    """A newer attempt is in the log: whoever reads it stops, whoever cannot read it runs out of its lease."""
    fenced = {name: found if found.fenced_at is not None else replace(found, fenced_at=now) for name, found in members.suspects.items()}
    return replace(members, suspects=Map(fenced))


def unasked(members: Members, now: float) -> tuple[tuple[str, int], ...]:
    """Fenced suspects, with their attempts, of which it is not known whether they go on without us, or whether they still do."""
    return tuple(sorted((name, found.attempt) for name, found in members.suspects.items() if _is_unasked(found, now)))


def _is_unasked(found: Suspect, now: float) -> bool:
    if found.fenced_at is None or not found.listens or found.goes_alone is False:
        return False
    return found.goes_alone is None or now - found.asked_at >= ASK_AGAIN_S


def note_alone(members: Members, asked: Iterable[tuple[str, int]], alone: frozenset[str], now: float) -> Members:
    """What was found after the fence stays true: who says so later reads of the fence."""
    known = {(name, each.attempt): each for name, each in members.suspects.items() if each.fenced_at is not None}
    wanted = ((name, known[name, attempt]) for name, attempt in asked if (name, attempt) in known)
    found = {name: replace(suspect, goes_alone=name in alone, asked_at=now) for name, suspect in wanted}
    return replace(members, suspects=members.suspects.update(found))


def says_clean(report: AgentReport, found: Suspect, policy: Policy, *, term: int, now: float) -> bool:
    """The node says that no rank of the suspected attempt lives, nor will."""
    if any(rank.state == "running" for rank in report.ranks):
        return False
    if report.attempt == found.attempt and report.ranks:
        return True  # an attempt is launched at most once by an incarnation
    if report.term != term:
        return False  # it may still listen to our predecessor
    return report.obeyed >= found.revision or now - found.since > policy.lease_s + policy.fence_s


def outlasted(members: Members, policy: Policy, now: float) -> frozenset[str]:
    """Suspects whose lease has certainly ended: fenced, and unheard of (or without ranks) for long enough since then."""
    return frozenset(name for name, found in members.suspects.items() if _is_outlasted(members.nodes.get(name), found, policy, now))


def _is_outlasted(node: Node | None, found: Suspect, policy: Policy, now: float) -> bool:
    if found.fenced_at is None:
        return False
    if found.goes_alone is False and found.listens and node is not None:
        return now >= node.heard_at + policy.lease_s + policy.fence_s  # nothing but our answers to its reports prolonged its lease
    # A predecessor that cannot read the log either says so after a lease, and then the node looks for itself within another.
    lease_s = policy.lease_s if found.listens else 2 * policy.lease_s
    runs = node is not None and any(rank.state == "running" for rank in node.report.ranks)
    last_sign = max(found.fenced_at, node.heard_at) if node is not None and runs else found.fenced_at
    return now >= last_sign + lease_s + policy.fence_s


# Gangs.


def why_unfit(members: Members, policy: Policy, name: str, now: float) -> str:
    """Why a node cannot join a gang; "" if it can."""
    node = members.nodes[name]
    report = node.report
    if name in members.buried:
        return "dead"
    if why := why_going(members, name) or report.problem:
        return why
    if node.broken_at is not None:
        return "connection broken"
    if now - node.heard_at > policy.lease_s:
        return f"silent for over {policy.lease_s:g} s"
    if name in members.suspects:
        return "older ranks may be alive on it"
    return "" if report.ready else "not ready"


def why_going(members: Members, name: str) -> str:
    """Why a node that is there should be left; "" if it should not."""
    report = members.report_of(name)
    if report is not None and report.leaving:
        return f"it leaves ({report.leaving})"
    why = members.drained.get(name) or members.drained.get(host_of(name))
    return f"it is to be drained ({why})" if why else ""


def leaves_in_s(members: Members, name: str, now: float) -> float | None:
    """How long a node with a notice will still be there, as far as the notice says."""
    node = members.nodes.get(name)
    if node is None or not node.report.leaving or node.report.leaves_in_s is None:
        return None
    return node.heard_at + node.report.leaves_in_s - now


def fit(members: Members, policy: Policy, now: float) -> frozenset[str]:
    """Nodes that could run ranks now."""
    return frozenset(name for name in members.nodes if not why_unfit(members, policy, name, now))


def sound(members: Members, policy: Policy, now: float) -> frozenset[str]:
    """Fit nodes without those on hosts that failed too often."""
    return frozenset(name for name in fit(members, policy, now) if num_strikes(members, policy, host_of(name), now) < policy.strikes)


def candidates(members: Members, policy: Policy, now: float) -> frozenset[str]:
    """Nodes that a gang is made of: a quarantined host is better than no gang at all."""
    good = sound(members, policy, now)
    return good if len(good) >= policy.min_nodes else fit(members, policy, now)


def staying(members: Members, policy: Policy, now: float, opened_at: float) -> frozenset[str]:
    """Nodes that are there, ready or not, and have no notice."""
    return frozenset(
        name for name, node in members.nodes.items() if not node.report.leaving and not absence(members, policy, name, now, opened_at)
    )


def noticed(members: Members) -> tuple[str, ...]:
    """Nodes that had a notice, those that have left since included."""
    return tuple(sorted(name for name, node in members.nodes.items() if node.report.leaving))


def seat(members: Members, policy: Policy, ready: Iterable[str], num_nodes: int, now: float) -> tuple[str, ...]:
    """The gang, in seat order: former members (or their hosts' new incarnations) keep their seats, others fill the gaps.

    Hosts with too many strikes come last, then former members come first, then names decide.
    """
    former = {host: place for place, host in enumerate(members.seats)}

    def preference(name: str) -> tuple[bool, bool, tuple[tuple[int, str], ...]]:
        host = host_of(name)
        return num_strikes(members, policy, host, now) >= policy.strikes, host not in former, _natural(name)

    chosen = sorted(ready, key=preference)[:num_nodes]
    return _keep_places(chosen, {name: former.get(host_of(name), -1) for name in chosen})


def _keep_places(chosen: list[str], former: Mapping[str, int]) -> tuple[str, ...]:
    places: dict[int, str] = {}
    for name in chosen:
        if 0 <= former[name] < len(chosen):
            places.setdefault(former[name], name)
    seated = frozenset(places.values())
    others = iter(
        sorted((name for name in chosen if name not in seated), key=lambda name: (former[name] < 0, former[name], _natural(name)))
    )
    return tuple(places[place] if place in places else next(others) for place in range(len(chosen)))


def _natural(name: str) -> tuple[tuple[int, str], ...]:
    """node2 before node10."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name))


def num_ranks(report: AgentReport, policy: Policy) -> int:
    return report.slots or policy.ranks_per_node


def num_strikes(members: Members, policy: Policy, host: str, now: float) -> int:
    return sum(now - at < policy.strike_memory_s for at in members.strikes.get(host, ()))


def strike(members: Members, node: str, now: float) -> Members:
    host = host_of(node)
    return replace(members, strikes={**members.strikes, host: (*members.strikes.get(host, ()), now)[-MAX_STRIKES:]})


def readmit(members: Members, name: str) -> Members:
    """People trust a node, or its host, again: no strikes, no order to drain it."""
    host = host_of(name)
    return replace(
        members,
        strikes={known: strikes for known, strikes in members.strikes.items() if known != host},
        drained={known: why for known, why in members.drained.items() if host_of(known) != host},
    )
