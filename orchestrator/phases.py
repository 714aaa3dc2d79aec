"""Where a run can be. Each phase holds only what is valid in it; TRANSITIONS is every way from one to another. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

from immutables import Map

from .events import AttemptRecord, EndRecord, LogAttempt, LogEnd
from .hangs import Stood
from .verdict import Evidence

Nodes: TypeAlias = Map[str, None]  # a set of nodes: one more costs the same however many there are


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """A node's place in a gang."""

    group_rank: int
    first_rank: int
    num_ranks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """An attempt whose seats are known."""

    record: AttemptRecord
    seats: Mapping[str, Seat]  # in seat order
    standby: int = 0  # its ranks are those of this standby; 0: they are started for it

    @property
    def number(self) -> int:
        return self.record.attempt

    @property
    def resume_step(self) -> int:
        return self.record.resume_step


@dataclass(frozen=True, slots=True, kw_only=True)
class Departure:
    """The ranks were asked to save at one step boundary and leave."""

    aim: Literal["stop", "move"]  # end the run | go on with another gang
    why: str
    until: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Phase:
    since: float
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening(_Phase):
    """Our term is not in the log yet: nothing is decided."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting(_Phase):
    """No attempt runs; not enough nodes are ready, or the pause after a failure is not over."""

    not_before: float
    ready: frozenset[str] = frozenset()  # as last looked at


@dataclass(frozen=True, slots=True, kw_only=True)
class Adopting(_Phase):
    """A predecessor's attempt may be running: its nodes are expected to say so."""

    record: AttemptRecord
    places: Mapping[str, int]  # of the gang's nodes in it
    is_rewound: bool = False  # the history has gone back since: its ranks are to end


@dataclass(frozen=True, slots=True, kw_only=True)
class Choosing(_Phase):
    """A gang is there; the checkpoint is being chosen, then the attempt logged."""

    wanted: LogAttempt | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fencing(_Phase):
    """The attempt is in the log, which fences the older ones; some of their ranks are not known to be dead yet."""

    attempt: Attempt


@dataclass(frozen=True, slots=True, kw_only=True)
class Starting(_Phase):
    """The ranks are launched; not all of them have finished a step of this attempt."""

    attempt: Attempt
    stepped: Nodes = field(default_factory=Map)  # nodes whose ranks all have
    finished: Nodes = field(default_factory=Map)  # nodes whose ranks have all exited with 0
    departure: Departure | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Training(_Phase):
    """All ranks step."""

    attempt: Attempt
    finished: Nodes = field(default_factory=Map)
    finished_at: float | None = None  # when the last node finished
    departure: Departure | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Draining(_Phase):
    """The attempt is over; its ranks are being stopped, evidence comes in, a save in flight may still land."""

    record: AttemptRecord
    seats: Mapping[str, Seat]  # empty when they were never known
    culprit: Evidence  # the best evidence so far
    stood: tuple[Stood, ...] = ()  # of a hang: every rank as it stood; their stacks are taken before they are stopped
    unseen: frozenset[str] = frozenset()  # nodes that cannot be observed: waiting for their word is no use, the fence will deal with them


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending(_Phase):
    """The outcome is decided and on its way into the log."""

    end: LogEnd


@dataclass(frozen=True, slots=True, kw_only=True)
class Succeeded(_Phase):
    end: EndRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped(_Phase):
    end: EndRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed(_Phase):
    end: EndRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Superseded(_Phase):
    """A newer coordinator reigns: we decide nothing and answer nobody."""

    term: int


Phase: TypeAlias = (
    Opening | Waiting | Adopting | Choosing | Fencing | Starting | Training | Draining | Ending | Succeeded | Stopped | Failed | Superseded
)

TERMINAL: Final = (Succeeded, Stopped, Failed, Superseded)

TRANSITIONS: Final[Mapping[tuple[type[Phase], type[Phase]], str]] = {
    (Opening, Waiting): "no attempt is unfinished",
    (Opening, Adopting): "the last attempt has no end",
    (Waiting, Choosing): "enough nodes are ready",
    (Waiting, Ending): "asked to stop, too few nodes stay after a notice, nothing to rewind to",
    (Adopting, Starting): "every node of the gang reported",
    (Adopting, Fencing): "nobody runs it yet, older ranks may live",
    (Adopting, Draining): "a node is missing, a rank died, rewind",
    (Choosing, Waiting): "a node went away, rewind",
    (Choosing, Fencing): "the attempt is logged",
    (Choosing, Ending): "no checkpoint verifies, asked to stop",
    (Fencing, Starting): "every older rank is known dead",
    (Fencing, Waiting): "a node went away, rewind",
    (Fencing, Ending): "asked to stop",
    (Starting, Training): "every rank made a step",
    (Starting, Draining): "a rank died, a node was lost, time is up, rewind",
    (Training, Draining): "a rank died, a node was lost, it stalled, resize, rewind",
    (Training, Ending): "all ranks are done and committed",
    (Draining, Waiting): "every older rank is dead or beyond sight, budget left",
    (Draining, Ending): "budget spent, same error twice, asked to stop",
    (Ending, Succeeded): "logged",
    (Ending, Stopped): "logged",
    (Ending, Failed): "logged",
    **{
        (phase, Superseded): "a newer term"
        for phase in (Opening, Waiting, Adopting, Choosing, Fencing, Starting, Training, Draining, Ending)
    },
}


def name_of(phase: Phase | type[Phase]) -> str:
    """ "TRAINING"."""
    return (phase if isinstance(phase, type) else type(phase)).__name__.upper()


def mermaid() -> str:
    """TRANSITIONS as a state diagram; the one in README.md must equal it."""
    arrows = [f"    {name_of(old)} --> {name_of(new)}: {why}" for (old, new), why in TRANSITIONS.items()]
    return "\n".join(["stateDiagram-v2", "    [*] --> OPENING", *arrows])
