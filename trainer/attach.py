"""The public door for training scripts: what keepstep tells a rank, and what a rank may tell keepstep. Torch-free.

A script under `[train] script = "my_train.py"` runs and is restarted without any of this. To have its state kept and shown, it
attaches. Complete, and the same under plain torchrun, where nothing is saved:

    import torch
    import torch.distributed as dist

    from keepstep.trainer import rng
    from keepstep.trainer.attach import attach
    from keepstep.trainer.checkpoint import Checkpointer
    from keepstep.trainer.contract import Phase, Request
    from keepstep.trainer.registry import Registry
    from keepstep.trainer.restore import resume
    from keepstep.trainer.stateful import param_groups, stateful

    class Batches:  # stands for any loader that can say where it is, such as torchdata's
        def __init__(self, rank):
            self.generator = torch.Generator().manual_seed(rank)
        def draw(self):
            return torch.randn(4, 8, generator=self.generator)
        def state_dict(self):
            return {"generator": self.generator.get_state()}
        def load_state_dict(self, state):
            self.generator.set_state(state["generator"])

    STEPS = 20
    me = attach()
    dist.init_process_group()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 1), torch.nn.Dropout(0.2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)
    batches = Batches(me.rank)
    tensors = {"model": dict(model.named_parameters())}  # DTensors and plain tensors, in dictionaries
    registry = Registry(rank=me.rank, world_size=me.world_size)  # all else that must survive: a part each, and all of them or none
    registry.add(*rng.parts(), param_groups(optimizer), stateful("schedule", schedule), stateful("batches", batches, per_rank=True))
    me.standby()  # all that needs no checkpoint is built: with cluster.hot_standby, a second group of ranks waits here for its turn
    saver = Checkpointer.of(me)
    step = 0
    if me.resume is not None:  # the one checkpoint that every rank of this attempt must load
        step = resume(me, tensors, registry).step
    while step < STEPS:
        model(batches.draw()).square().mean().backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        step += 1
        me.report(Phase.STEP, step)  # a microsecond; much longer silence than usual counts as a hang
        votes = [None] * me.world_size  # requests and busy persisters show at different moments: all ranks must decide alike
        dist.all_gather_object(votes, (me.request(), saver.busy))
        if any(request is Request.STOP for request, _ in votes):
            break
        if step % 5 == 0 and step < STEPS and not any(busy for _, busy in votes):
            saver.save(step, tensors, registry.state())  # a copy into shared memory; it is written while training goes on
    if saver.can_save:
        saver.save_and_wait(step, tensors, registry.state(), alive=lambda: me.report(Phase.SAVE, step))
    me.report(Phase.EVALUATE, step, within_s=60)  # what comes now may take so long without a word
    model(torch.ones(4, 8))
    me.report(Phase.DONE if step == STEPS else Phase.STOPPED, step)
    dist.destroy_process_group()
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from .contract import (
    ENV_SPEC,
    MARKS,
    MARKS_OFFSET,
    PROGRESS_BYTES,
    REQUEST_OFFSET,
    STALLED_OFFSET,
    STANDS_BY_OFFSET,
    STEPPED_OFFSET,
    Pacing,
    Phase,
    RankSpec,
    Request,
    Resume,
    SaveCosts,
    read_marks,
)
from .pulse import Pulse

if TYPE_CHECKING:
    from keepstep.storage.arena import Staging

# The page's fields around `request`, which belongs to the agent, and before the pulse's: see contract.PROGRESS.
_PHASE: Final = struct.Struct("<I")
_REQUEST: Final = struct.Struct("<I")
_STEP_BEATS_AT_LIMIT: Final = struct.Struct("<qQdd")
_STEP_OFFSET: Final = 8
_SECONDS: Final = struct.Struct("<d")


_wait_for_order: Callable[[], str] | None = None  # in a rank of a hot standby


def be_standby(wait_for_order: Callable[[], str]) -> None:
    """For keepstep's rank processes: this one is of a hot standby.

    Args:
        wait_for_order: says that the rank is ready, and returns its RankSpec as JSON when an attempt is launched into the standby.
    """
    global _wait_for_order
    _wait_for_order = wait_for_order


def attach() -> Attached:
    """What this process is, from its environment: torchrun's variables, and keepstep's if it started us.

    Raises TypeError or ValueError when `KEEPSTEP_RANK_SPEC` was written by another version of keepstep.
    """
    text = os.environ.get(ENV_SPEC)
    me = Attached(RankSpec.from_json(text) if text else None)
    me.mark("forked")
    me.start_pulse()
    return me


class Attached:
    """One rank's connection to its node's agent. Detached (`spec` is None) it is silent and asks for nothing."""

    def __init__(self, spec: RankSpec | None) -> None:
        self.spec = spec
        self.rank = _env_int("RANK", 0)
        self.world_size = _env_int("WORLD_SIZE", 1)
        self.local_rank = _env_int("LOCAL_RANK", 0)
        self.local_world_size = _env_int("LOCAL_WORLD_SIZE", 1)
        self._page = _map_page(spec.progress_path) if spec else None
        self._beats = 0
        self.stalled_s = 0.0  # how long saves have held up training so far
        self._step = spec.resume.step if spec and spec.resume else 0

    @property
    def resume(self) -> Resume | None:
        """The checkpoint to load before the first step; None: start from scratch."""
        return self.spec.resume if self.spec else None

    @cached_property
    def staging(self) -> Staging | None:
        """The way to this node's persister, connected at first use; None when detached."""
        if self.spec is None:
            return None
        from keepstep.storage.arena import Staging

        return Staging.connect(self.spec.staging_socket, attempt=self.spec.attempt, rank=self.rank, world_size=self.world_size)

    @property
    def waits(self) -> bool:
        """Whether this is a rank of a hot standby that has no attempt yet: `standby` will wait. There is time for a throw-away step."""
        return _wait_for_order is not None

    def standby(self) -> None:
        """Once: all that needs no attempt is built. In a rank of a hot standby it waits until an attempt is launched into that standby;
        elsewhere it returns at once. A script that never calls it has no hot standby (`cluster.hot_standby`).

        Before it there is no `resume` and nothing may be saved, and whatever a throw-away step changes must be put back.
        """
        global _wait_for_order
        if self._page is not None:
            self._page[STANDS_BY_OFFSET] = 1
        if _wait_for_order is None:
            return
        assert self._page is not None
        marks = read_marks(self._page)
        self.spec = RankSpec.from_json(_wait_for_order())
        _wait_for_order = None
        self._page = _map_page(self.spec.progress_path)
        self._page[STANDS_BY_OFFSET] = 1
        self._beats, self._step = 0, self.resume.step if self.resume else 0
        for name, at in zip(MARKS[: MARKS.index("built") + 1], marks, strict=False):
            self._mark(name, at)
        self.report(Phase.LOAD if self.resume else Phase.INIT, self._step)
        self.start_pulse()

    def start_pulse(self) -> None:
        """Once per page: shows the agent that this interpreter runs, even while the rank itself is silent."""
        if self._page is not None:
            Pulse(self._page).start()

    def report(self, phase: Phase, step: int, *, within_s: float = 0.0) -> None:
        """Says that this rank is alive, in `phase`, with `step` optimizer updates finished. Cheap enough for every step.

        A rank that is silent for much longer than it usually is in this phase hangs, and is killed.

        Args:
            within_s: the next report may take so long, whatever was usual; the next report takes that back. 0: as usual.
        """
        if self._page is None:
            return
        self._beats += 1
        _PHASE.pack_into(self._page, 0, phase)
        now = time.monotonic()
        _STEP_BEATS_AT_LIMIT.pack_into(self._page, _STEP_OFFSET, step, self._beats, now, within_s)
        if step > self._step:
            self._step = step
            _SECONDS.pack_into(self._page, STEPPED_OFFSET, now)
            self._mark("stepped", now)

    def mark(self, name: str) -> None:
        """Notes that this rank has just reached this milestone of its start (one of contract.MARKS), for `keepstep status`. Optional.

        The first time counts; "forked" and "stepped" are noted by `attach` and `report`.
        """
        self._mark(name, time.monotonic())

    def _mark(self, name: str, at: float) -> None:
        index = MARKS.index(name)
        if self._page is not None and not read_marks(self._page)[index]:
            _SECONDS.pack_into(self._page, MARKS_OFFSET + index * _SECONDS.size, at)

    def stalled(self, seconds: float) -> None:
        """Notes that a save has just held up training for so long. `Checkpointer` does so by itself."""
        self.stalled_s += seconds
        if self._page is not None:
            _SECONDS.pack_into(self._page, STALLED_OFFSET, self.stalled_s)

    def request(self) -> Request:
        """What this rank's agent asks for at this moment; ranks must agree on it before they act (see `Request`)."""
        if self._page is None:
            return Request.NONE
        return Request(_REQUEST.unpack_from(self._page, REQUEST_OFFSET)[0])

    def pacing(self) -> Pacing:
        """How often to save, at this moment, where run.toml leaves that to keepstep. For rank 0 to read and for all to agree on."""
        return Pacing() if self._page is None else Pacing.read(self._page)

    def cost(self, costs: SaveCosts | None) -> None:
        """Tells what saves have turned out to cost, where there is news. Rank 0's word counts."""
        if self._page is not None and costs is not None:
            costs.write(self._page)

    def record_step(self, record: Mapping[str, Any]) -> None:
        """Appends one JSON line to the run's step records. Rank 0 only, once per step; detached it does nothing."""
        if self.staging is not None:
            self.staging.record_step(dict(record))


def _env_int(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


def _map_page(path: str) -> mmap.mmap:
    descriptor = os.open(path, os.O_RDWR)
    try:
        return mmap.mmap(descriptor, PROGRESS_BYTES)
    finally:
        os.close(descriptor)
