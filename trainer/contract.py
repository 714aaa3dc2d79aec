"""The only door between keepstep and whatever it runs: names, shapes and codes. Pure and torch-free.

A rank learns everything from its environment: torchrun's variables (RANK, WORLD_SIZE, MASTER_ADDR, ...) and, beside them, the
`KEEPSTEP_*` variables named here. `attach()` (trainer/attach.py) turns them into an object; a script that never calls it is run,
restarted and logged all the same, and keeps its own checkpoints.
"""

from __future__ import annotations

import json
import struct
from dataclasses import asdict, astuple, dataclass
from enum import IntEnum
from mmap import mmap
from typing import Final

ENV_SPEC: Final = "KEEPSTEP_RANK_SPEC"  # JSON of RankSpec
ENV_NODE: Final = "KEEPSTEP_NODE"
# To the agent, from whoever starts it:
ENV_GRACE: Final = "KEEPSTEP_GRACE_S"  # how long the platform waits after its signal; without it cluster.stop_grace_s
ENV_AZURE_METADATA: Final = "KEEPSTEP_AZURE_METADATA_ENDPOINT"  # where Azure's metadata service is looked for, "http://HOST:PORT"

EXIT_OK: Final = 0
EXIT_BAD_INPUT: Final = 2
EXIT_FAILED: Final = 3
EXIT_DO_NOT_REQUEUE: Final = 4
EXIT_REQUEUE: Final = 75
EXIT_BUG: Final = 70

# How a rank says "this checkpoint is damaged": the exception carries it as `kind`, and the directory as `directory`.
DAMAGED_KIND: Final = "damaged-checkpoint"
# How all ranks say "this step must not become part of the training": the exception carries it as `kind`, the number of the step as `step`,
# and as `skips` the positions ("FIRST:LAST") to leave out; none of them where it could not say. `ranks`: where it was found, if known.
BAD_STEP_KIND: Final = "bad-step"


class Phase(IntEnum):
    """What a rank is doing; written into its progress page, shown by `keepstep status`."""

    INIT = 0
    LOAD = 1
    STEP = 2
    SAVE = 3
    EVALUATE = 4
    FINISH = 5
    DONE = 6  # nothing is left to train (the steps are done, or evaluations got no better), final checkpoint staged
    STOPPED = 7  # left at a step boundary because it was asked to, checkpoint staged


class Request(IntEnum):
    """What people asked of a running attempt; written by the agent, agreed on by all ranks at one step boundary."""

    NONE = 0
    SAVE = 1
    STOP = 2  # save, then leave


@dataclass(frozen=True, slots=True, kw_only=True)
class Resume:
    """The one checkpoint that every rank of an attempt must load."""

    step: int
    directory: str  # key below the root, e.g. "data/a000007/s000001200-1f2e3d4c"
    manifest_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSpec:
    """Everything keepstep tells a rank beyond torchrun's environment."""

    run: str
    attempt: int
    nonce: str  # random hex, the same for all ranks of the attempt; part of its checkpoint directories' names
    root: str  # fsspec URL or local path
    config_path: str  # resolved run.toml as JSON, on this node
    scratch: str  # this node's own directory
    progress_path: str  # this rank's progress page, see PROGRESS
    staging_socket: str  # the node's persister
    error_path: str  # where the reason of a failure goes, JSON
    resume: Resume | None
    skips: tuple[str, ...] = ()  # positions "FIRST:LAST" that are never consumed, on top of [data] skip

    def to_json(self) -> str:
        """What goes into `KEEPSTEP_RANK_SPEC`."""
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> RankSpec:
        """Inverse of `to_json`; TypeError if a name is missing or unknown: agent and trainer are of different versions."""
        fields = json.loads(text)
        resume, skips = fields.pop("resume"), tuple(fields.pop("skips", ()))
        return RankSpec(resume=Resume(**resume) if resume else None, skips=skips, **fields)


# The progress page: one small memory-mapped file per rank, written by the rank, read by its agent; `request` goes the other way.
# phase, request: uint32; step, beats: 64 bit; at, limit_s, pulse_at: float64; collective: int64; stalled_s, stepped_at: float64.
PROGRESS: Final = struct.Struct("<IIqQdddqdd")
PROGRESS_BYTES: Final = 4096
REQUEST_OFFSET: Final = 4
STALLED_OFFSET: Final = 56
STEPPED_OFFSET: Final = 64

# Milestones of a rank's start, in this order: its process runs, its process group is formed, its model is wrapped, its state is restored
# (or fresh), its first step is finished. Each lies in the page as the float64 time.monotonic() of the rank's host; 0: not yet.
MARKS: Final = ("forked", "joined", "built", "loaded", "stepped")
MARKS_OFFSET: Final = 1024
_MARKS: Final = struct.Struct(f"<{len(MARKS)}d")


def read_marks(page: bytes | bytearray | mmap) -> tuple[float, ...]:
    """The instants of MARKS; 0 for what has not come yet, or will not: a script need not mark anything."""
    return _MARKS.unpack_from(page, MARKS_OFFSET)


STANDS_BY_OFFSET: Final = 1536  # one byte, 1: what runs here can be a hot standby, see `Attached.standby`

# Where `[checkpoint] interval = "auto"`: the interval in force, written by the agent, and what saves cost, written by rank 0.
PACING_OFFSET: Final = 2048
_PACING: Final = struct.Struct("<qq")
COSTS_OFFSET: Final = 2560
_COSTS: Final = struct.Struct("<4d")


@dataclass(frozen=True, slots=True)
class Pacing:
    """How often to save, as the coordinator decided."""

    every: int = 0  # steps between saves; 0: not decided yet
    soon: bool = True  # the first save comes at once, the next ones whenever the attempt has gone twice as far, until that is `every`

    @staticmethod
    def read(page: bytes | bytearray | mmap) -> Pacing:
        every, late = _PACING.unpack_from(page, PACING_OFFSET)
        return Pacing(every, not late)

    def write(self, page: bytearray | mmap) -> None:
        _PACING.pack_into(page, PACING_OFFSET, self.every, not self.soon)


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveCosts:
    """What one save costs, and a step: medians of the recent ones, in seconds. Rank 0 measures them: its steps wait for all others."""

    step_s: float  # while nothing is being written; above 0
    stall_s: float  # of training, while tensors are copied
    drag_s: float  # by which the steps beside the writing were longer, all together: slow-down x time
    persist_s: float  # from the copy until all ranks' parts were durable, rounded up to whole steps

    @property
    def cost_s(self) -> float:
        """How much later training ends for one save."""
        return self.stall_s + self.drag_s

    @staticmethod
    def read(page: bytes | bytearray | mmap) -> SaveCosts | None:
        """None: not measured yet."""
        step_s, stall_s, drag_s, persist_s = _COSTS.unpack_from(page, COSTS_OFFSET)
        return SaveCosts(step_s=step_s, stall_s=stall_s, drag_s=drag_s, persist_s=persist_s) if step_s > 0 else None

    def write(self, page: bytearray | mmap) -> None:
        _COSTS.pack_into(page, COSTS_OFFSET, self.step_s, self.stall_s, self.drag_s, self.persist_s)


@dataclass(frozen=True, slots=True)
class Progress:
    """What a progress page says. Instants are time.monotonic() of the rank's host."""

    phase: Phase
    request: Request
    step: int  # finished optimizer steps
    beats: int  # grows with every report
    at: float  # of the last report, or of the page's making
    limit_s: float = 0.0  # the rank may be silent for so long now, as it announced; 0: it announced nothing
    pulse_at: float = 0.0  # when its interpreter last ran the pulse's thread; 0: it has none
    collective: int = -1  # sequence number of the newest collective of the default group that it has begun; -1: unknown
    stalled_s: float = 0.0  # how long saves have held up training so far, in this attempt
    stepped_at: float = 0.0  # when it finished `step`; 0: no step of this attempt is finished

    @staticmethod
    def read(page: bytes | bytearray | mmap) -> Progress:
        """A torn read of a page being written costs at most one wrong number for one look; nothing is decided on it alone."""
        phase, request, *rest = PROGRESS.unpack_from(page, 0)
        return Progress(Phase(phase), Request(request), *rest)

    def to_bytes(self) -> bytes:
        return PROGRESS.pack(*astuple(self))
