"""What an agent and the coordinator say to each other: whole states, never deltas. Pure."""

from __future__ import annotations

from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from keepstep.trainer.contract import Pacing, SaveCosts

AGENT_PATH: Final = "/v1/agent"  # of the WebSocket between an agent and the coordinator
REFUSED: Final = 4009  # its close code where the coordinator does not want the agent, with the reason
PARTING: Final = 4010  # where a living agent turns away: it heard nothing for too long, or follows another coordinator


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RewindWish(Message):
    """What a person asks for with `keepstep rewind`."""

    to: int = Field(ge=0)
    skip: tuple[str, ...] = ()
    override: tuple[str, ...] = ()


class RankReport(Message):
    """One rank of the attempt that the node runs or ran last."""

    rank: int
    local_rank: int
    pid: int
    state: Literal["running", "exited"]
    phase: int = 0  # contract.Phase
    step: int = 0  # optimizer steps finished
    beats: int = 0  # grows while the rank makes progress
    quiet_s: float = 0.0  # since the last beat, by the node's own monotonic clock; time in which the agent itself did not run left out
    limit_s: float = 0.0  # longer silence is a hang: announced by the rank, or learnt from its phase; 0: nothing is known yet
    step_s: float = 0.0  # how long its steps usually take; 0: unknown
    collective: int = -1  # sequence number of the newest collective that it has begun; -1: unknown
    pulse_s: float = -1.0  # since its interpreter last ran another thread; -1: unknown
    process: str = ""  # the kernel's letter for its state when that is remarkable: "T" stopped, "D" uninterruptible
    where: str = ""  # innermost lines of its main thread's stack, outermost first, once its stacks were dumped: "loop.py:57 backward"
    waits: bool = False  # that stack waits for other ranks
    exit_code: int | None = None  # negative: signal number, as subprocess does
    exit_order: int | None = None  # 0 for the rank that ended first on this node
    stopped_by_agent: bool = False  # we ended it: never a culprit
    kind: str = ""  # of a failure: "signal", "oom", "exit", "exception", "peer-lost", "damaged-checkpoint", "persister"
    why: str = ""  # one line: exception type and message, or signal name
    damaged: str = ""  # directory of the checkpoint that did not verify
    bad_step: int = -1  # of a "bad-step": which one,
    bad_ranks: tuple[int, ...] = ()  # where it was found, if the ranks know,
    skips: tuple[str, ...] = ()  # and the positions to leave out ("FIRST:LAST")
    tail: tuple[str, ...] = ()  # after a failure: the last lines that it printed, its traceback among them
    # Instants, in seconds since the agent got the order to launch, by the node's monotonic clock; before the order: negative.
    marks_s: tuple[float | None, ...] = ()  # of contract.MARKS; None: not reached
    stepped_s: float | None = None  # of its newest finished step
    ended_s: float | None = None  # of its exit
    stalled_s: float = 0.0  # how long saves have held it up so far
    costs: SaveCosts | None = None  # of a save, as rank 0 has measured them in this attempt
    stands_by: bool = False  # what it runs can wait as a hot standby: it passed `Attached.standby()`


class Persisted(Message):
    """One rank's part of a checkpoint is durable: its files and its rank index are in storage."""

    attempt: int
    step: int
    rank: int
    directory: str
    index_sha256: str
    num_bytes: int
    best_step: int = -1  # the best evaluation up to it is of this step, whose checkpoint is to be committed as well; -1: none


class StoreAddress(Message):
    """Where the attempt's own TCPStore listens (hosted by the agent of the first node of the gang)."""

    attempt: int
    host: str
    port: int


class StandbyReport(Message):
    """The node's part of a hot standby."""

    term: int  # whose order it is
    number: int
    state: Literal["forming", "ready", "failed"]
    why: str = ""  # it failed, as a sentence
    pids: tuple[int, ...] = ()
    store: StoreAddress | None = None  # where its ranks meet; told by the first node of its gang


class AgentReport(Message):
    """The whole state of one node."""

    node: str  # "gpu07#3f9c": host and incarnation, never reused
    host: str
    pid: int
    address: str  # where other nodes reach this one
    slots: int  # ranks it can run; 0: follow [cluster] ranks_per_node
    sequence: int  # grows with every report of this incarnation
    term: int  # newest term this agent obeys
    obeyed: int = 0  # newest revision, of that term, that this node complies with for good: what it forbids has ended and will not begin
    ready: bool  # can launch at once (forkserver warm, persister up)
    buried: tuple[str, ...] = ()  # earlier incarnations on this host whose processes are confirmed dead
    attempt: int = 0  # attempt of `ranks`; 0: none yet
    ordered_s: float = 0.0  # since the agent got the order to launch it
    ranks: tuple[RankReport, ...] = ()
    store: StoreAddress | None = None
    standby: StandbyReport | None = None
    persisted: tuple[Persisted, ...] = ()  # of every attempt, until the coordinator's directive says that they are settled
    leaving: str = ""  # the node is about to go: the reason (SIGTERM, spot notice)
    leaves_in_s: float | None = None  # how long it will still be there, as far as the notice says
    save_s: float = 0.0  # how long the newest saves of this node's ranks took until they were durable; 0: none did yet
    problem: str = ""  # why it cannot run ranks now, e.g. a full scratch disk
    storage: str = ""  # why its checkpoints do not reach storage, as a sentence; training goes on


class ResumeFrom(Message):
    step: int
    directory: str
    manifest_sha256: str


class Launch(Message):
    """Run this attempt's ranks, nothing else."""

    attempt: int
    nonce: str
    first_rank: int
    num_ranks: int
    group_rank: int  # index of the node in the gang
    num_nodes: int
    world_size: int
    store_node: str  # the agent that hosts the TCPStore
    store: StoreAddress | None  # None: not known yet; the store node hosts and reports it, the others wait
    resume: ResumeFrom | None
    skips: tuple[str, ...] = ()  # positions that it leaves out
    overrides: tuple[str, ...] = ()  # "section.key=value" on top of the run's config
    request: int = 0  # contract.Request
    request_why: str = ""
    pacing: Pacing = Pacing()
    standby: int = 0  # the standby of this term that becomes its ranks, instead of new ones


class Standby(Message):
    """Form these ranks beside those that run, and wait with them."""

    number: int  # unique within the term
    first_rank: int
    num_ranks: int
    group_rank: int
    num_nodes: int
    world_size: int
    store_node: str
    store: StoreAddress | None  # None: not known yet
    overrides: tuple[str, ...] = ()


class Directive(Message):
    """What the node should be doing now. Idempotent; the newest term wins."""

    term: int
    revision: int = 0  # grows with every decision of the term; an agent never goes back to an older one
    launch: Launch | None  # None: run no ranks, stop what runs
    standby: Standby | None = None  # None: have no standby; one that `launch` names is none any more
    autopsy: int = 0  # the ranks of this attempt hang: dump their stacks before you stop them
    committed_step: int = -1  # newest committed; persisted reports up to here are settled
    settled_attempt: int = 0  # persisted reports of older attempts are settled too
    unproven: bool = False  # we could not read the log for a lease, somebody may have succeeded us: read it yourself, if you can
    over: bool = False  # the run ended: stop the ranks and leave
    forget: bool = False  # the coordinator does not know this incarnation any more: start anew


class Answer(Message):
    """What the coordinator says: after each report, and whenever it changes its mind."""

    heard: int = -1  # sequence of the newest report that it has taken in: what it proves, it proves of the moment when that was told
    directive: Directive | None = None  # where it differs from the newest that it sent over this connection
    report_s: float = 1.0  # report at least so often
    unable: str = ""  # it may not answer now, and why: read the log yourself
