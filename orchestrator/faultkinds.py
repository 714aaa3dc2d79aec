"""Every fault that can be inflicted on a run on purpose, and what an honest verdict about it must say. Pure.

A fault's *expected* verdict is part of its description, so that code decides whether the run named the right culprit, not an eye.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from keepstep.trainer.contract import DAMAGED_KIND

Aim: TypeAlias = Literal["rank", "node", "coordinator", "root"]
Lasts: TypeAlias = Literal["no", "may", "must"]  # whether a plan says how long the fault goes on

FAILURE: Final = "failure"  # kind of the event that carries the verdict about an attempt


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What is done, and to whom. A fault on a node that names a rank hits the node that runs it."""

    name: str
    aim: Aim
    about: str
    lasts: Lasts = "no"
    needs_hosts: bool = False  # hosts of their own, in network namespaces
    signal: str = ""  # of a rank
    action: str = ""  # of a rank's fault point (storage/faults.py)


@dataclass(frozen=True, slots=True)
class AtStep:
    step: int

    def __str__(self) -> str:
        return f"step {self.step}"


@dataclass(frozen=True, slots=True)
class After:
    """So many seconds after all ranks began to train."""

    seconds: float

    def __str__(self) -> str:
        return f"{self.seconds:g} s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault of a plan."""

    kind: Kind
    moment: AtStep | After
    rank: int
    node: str = ""  # name of a node ("node1"); empty: the one that runs `rank`
    lasting_s: float | None = None  # None: for ever

    def __str__(self) -> str:
        aim = {"rank": f" {self.rank}", "node": f" {self.node or f'of rank {self.rank}'}"}.get(self.kind.aim, "")
        return f"{self.kind.name}{aim}" + (f" for {self.lasting_s:g} s" if self.lasting_s is not None else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What the run may and must say about a fault."""

    causes: frozenset[str] = frozenset()  # causes of failures that are right; none: no failure may be reported
    names: Aim | Literal[""] = ""  # whom such a failure must name
    says: str = ""  # part of its sentence
    also: frozenset[str] = frozenset()  # causes of further failures that follow from it, whoever they name
    sign: str = ""  # kind of the event that must be seen; "": it may pass unnoticed


def _rank(name: str, about: str, *, lasts: Lasts = "no", signal: str = "", action: str = "") -> Kind:
    return Kind(name=name, aim="rank", about=about, lasts=lasts, signal=signal, action=action)


def _node(name: str, about: str, *, lasts: Lasts = "no", needs_hosts: bool = False) -> Kind:
    return Kind(name=name, aim="node", about=about, lasts=lasts, needs_hosts=needs_hosts)


_ALL: Final = (
    _rank("kill-rank", "SIGKILL to a rank", signal="SIGKILL"),
    _rank("term-rank", "SIGTERM to a rank, as from a careless script", signal="SIGTERM"),
    _rank("segfault-rank", "SIGSEGV to a rank, as from a bad kernel", signal="SIGSEGV"),
    _rank("abort-rank", "SIGABRT to a rank, as from a library that gives up", signal="SIGABRT"),
    _rank("stop-rank", "SIGSTOP to a rank, and SIGCONT after lasting_s", signal="SIGSTOP", lasts="may"),
    _rank("raise-rank", "a rank raises an exception", action="raise"),
    _rank("exit-rank", "a rank calls sys.exit(3)", action="exit"),
    _rank("leave-rank", "a rank calls os._exit(0) in mid-run", action="leave"),
    _rank("hang-rank", "a rank sleeps for ever before a collective", action="hang"),
    _rank("spin-rank", "a rank spins for ever with the interpreter's lock held", action="spin"),
    _rank("oom-rank", "a rank eats memory until the kernel's OOM killer finds it (needs root)", action="eat"),
    _node("kill-agent", "SIGKILL to a node's agent; its ranks die with it"),
    _node("kill-node", "SIGKILL to a node's agent and ranks at once"),
    _node("stop-node", "SIGSTOP to all processes of a node, and SIGCONT after lasting_s", lasts="must"),
    _node("kill-persister", "SIGKILL to the process that writes a node's checkpoints"),
    _node("preempt-node", "SIGTERM to a node's agent: the notice that its host will be taken away"),
    Kind(name="kill-coordinator", aim="coordinator", about="SIGKILL to the coordinator"),
    _node(
        "damage-checkpoint", "flips a bit in a rank's part of the newest checkpoint, then kills its node, so that it is read from the root"
    ),
    Kind(name="store-away", aim="root", about="the root's folder is away for lasting_s (a file stands in its place)", lasts="must"),
    _node("cut", "a host's cable is pulled for lasting_s", lasts="must", needs_hosts=True),
    _node("cut-one-way", "nothing that a host sends arrives anywhere for lasting_s", lasts="must", needs_hosts=True),
    _node("cut-between", "a host and the next one do not reach each other for lasting_s", lasts="must", needs_hosts=True),
    _node("freeze-host", "a host stands still for lasting_s, its kernel included", lasts="must", needs_hosts=True),
    _node("kill-host", "a host loses power, and boots again after lasting_s", lasts="must", needs_hosts=True),
    _node("loss", "a host loses a tenth of its packets for lasting_s", lasts="must", needs_hosts=True),
    _node("memory-limit", "a host has hardly any memory left for lasting_s", lasts="must", needs_hosts=True),
)
KINDS: Final[Mapping[str, Kind]] = {kind.name: kind for kind in _ALL}


def expected(fault: Fault, *, lease_s: float) -> Expected:
    """What must be said about a fault in a run with this lease."""
    match fault.kind.name:
        case "stop-rank" | "hang-rank" | "spin-rank":
            return Expected(causes=frozenset({"stall"}), names="rank", sign=FAILURE if fault.lasting_s is None else "")
        case "kill-rank" | "term-rank" | "segfault-rank":
            return Expected(causes=frozenset({"signal"}), names="rank", says=fault.kind.signal, sign=FAILURE)
        case "abort-rank":
            return Expected(causes=frozenset({"abort"}), names="rank", says="SIGABRT", sign=FAILURE)
        case "raise-rank":
            return Expected(causes=frozenset({"exception"}), names="rank", says="InjectedError", sign=FAILURE)
        case "exit-rank" | "leave-rank":
            code = 3 if fault.kind.name == "exit-rank" else 0
            return Expected(causes=frozenset({"exit"}), names="rank", says=f"exit code {code}", sign=FAILURE)
        case "oom-rank":
            return Expected(causes=frozenset({"oom"}), names="rank", sign=FAILURE)
        case "kill-coordinator":
            return Expected(sign="adopted")
        case "preempt-node":
            return Expected(sign="moved")
        case "store-away":
            return Expected()
        case _:
            return _expected_of_node(fault, lease_s)


def _expected_of_node(fault: Fault, lease_s: float) -> Expected:
    match fault.kind.name:
        case "kill-agent" | "kill-node" | "kill-host":
            return Expected(causes=frozenset({"lost"}), names="node", sign=FAILURE)
        case "damage-checkpoint":  # a newer commit may come in between: then nobody reads the damaged one
            return Expected(causes=frozenset({"lost"}), names="node", also=frozenset({DAMAGED_KIND}), sign=FAILURE)
        case "kill-persister":
            return Expected(causes=frozenset({"persister"}), names="node", sign=FAILURE)
        case "memory-limit":
            return Expected(causes=frozenset({"oom", "lost", "persister"}), names="node")
        case "cut-between":  # each of the two is as good a culprit as the other
            return Expected(also=frozenset({"stall", "peer-lost", "start-timeout", "exception"}))
        case "loss":
            return Expected(also=frozenset({"stall", "lost", "lease", "peer-lost"}))
        case _:
            return _expected_of_silence(fault.lasting_s, lease_s)


def _expected_of_silence(lasting_s: float | None, lease_s: float) -> Expected:
    """A node that nobody hears: lost for certain after a lease, and perhaps not noticed at all before."""
    causes = frozenset({"lost", "lease", "stall"})
    return Expected(causes=causes, names="node", sign=FAILURE if lasting_s is None or lasting_s > 1.5 * lease_s else "")
