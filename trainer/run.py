"""Everything that a step needs, put together: fresh, or resumed from the checkpoint that this attempt was told."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch.distributed as dist

from keepstep.storage.store import Store

from . import rng
from .attach import Attached
from .best import Best
from .blocks import keep_compiled
from .cadence import Cadence, parse_interval
from .carried import Carried
from .checkpoint import Checkpointer
from .config import TrainerConfig
from .contract import Phase
from .costs import Costs
from .data import Feed, feed_for
from .engine import Engine, FsdpEngine
from .engines import open_engine
from .figures import Evaluation
from .heldout import HeldOut, held_out_of
from .loader import Share
from .models import Recurrent
from .origin import look
from .parallel import World
from .parts import registry_of
from .pinned import pin, pinned
from .poison import poison
from .portions import chunks_of
from .preparing import prepare
from .registry import Registry
from .restore import resume
from .samples import Samples, samples_of
from .scaler import LossScaler
from .spikes import Window
from .start import begin
from .state import NestedTensors, RankState, flatten, tensors_of
from .steptrace import StepTrace
from .throwaway import throw_away_step
from .tokens import Tokens, open_tokens, read_index

log = logging.getLogger("keepstep.trainer")

_TOKENS_S: Final = 3600.0  # a large text becomes tokens, in one call of the library; cluster.start_timeout_s bounds it


class SaveRequests:
    """An agent shows SAVE until it is told otherwise, and its ranks see it at different steps: one showing is one save."""

    def __init__(self) -> None:
        self._shown = self._is_served = False

    def is_new(self, is_shown: bool) -> bool:
        """Whether a save is owed, given what any rank sees now."""
        self._shown = is_shown
        self._is_served = self._is_served and is_shown
        return is_shown and not self._is_served

    def served(self) -> None:
        self._is_served = self._shown


@dataclass(kw_only=True)
class Run:
    """The one mutable object of a rank. `step` and `loss_hex` are those of the last finished update."""

    config: TrainerConfig
    me: Attached
    world: World
    tokens: Tokens
    samples: Samples
    feed: Feed
    engine: Engine
    scaler: LossScaler  # of the loss; the engine multiplies with it
    tensors: NestedTensors  # the whole state by name, sharing memory with model and optimizer
    registry: Registry = field(init=False)  # the state beside it
    checkpointer: Checkpointer
    cadence: Cadence
    costs: Costs  # of saves
    save_requests: SaveRequests
    trace: StepTrace
    window: Window  # of recent losses: what is usual
    held_out: HeldOut
    best: Best = field(default_factory=Best)  # of the evaluations so far
    evaluation: Evaluation | None = None  # that of step `best.seen`, if this attempt made it
    step: int = 0
    loss_hex: str = ""
    began_at: float = 0.0  # time.monotonic() before the first step of this attempt
    is_finished: bool = False  # the checkpoint that was resumed from is the last one, with the result

    @property
    def share(self) -> Share:
        shares, num_shares = self.engine.shares
        return Share(
            samples=self.samples,
            feed=self.feed,
            shares=shares,
            num_shares=num_shares,
            micro_batch_samples=self.config.train.micro_batch_samples,
        )

    @property
    def is_over(self) -> bool:
        """Nothing is left to train: all steps are done, or evaluations got no better for too long."""
        return self.step >= self.config.run.steps or self.best.is_over(self.config.evaluate.patience)

    def rank_state(self) -> RankState:
        """What this rank keeps beside its tensors, as of now."""
        keeps_best = self.config.evaluate.patience and self.best.step
        best_step = self.best.step if keeps_best else -1
        return RankState(parts=self.registry.capture(), best_step=best_step, tensor_parallel=self.world.tensor_size)


def open_run(config: TrainerConfig, me: Attached, world: World) -> Run:
    """Collective. The run, ready for its next step.

    Raises:
        ValueError: the text is missing or too short, or the checkpoint, or what train.start names, is of another model.
        ResumeDamaged: the checkpoint that this attempt was told to resume from does not verify.
    """
    store = Store.open(config.run.root)
    if me.resume is None and world.rank == 0:
        if not me.waits:
            look(store, config.train.start)
        pin(config, store)
    tokens = _tokens(config, me, world, store)
    samples = samples_of(tokens, config)
    held_out = held_out_of(tokens, config, config.evaluate.max_tokens)
    scaler = LossScaler.of(config.train.precision)
    if config.train.compile and me.spec:
        keep_compiled(Path(me.spec.scratch))
    outputs = len(tokens.index.labels) if config.train.objective == "classes" else 0
    with pinned(config, store) as described:
        engine = open_engine(described, world, tokens.index.vocabulary, scaler, outputs=outputs)
    tensors = tensors_of(engine.sharded, engine.optimizer)
    me.mark("built")
    if me.waits:
        throw_away_step(config, world, samples, engine)
        for tensor in flatten(tensors).values():  # known, when they are to be restored
            chunks_of(tensor)
    me.standby()  # what follows belongs to the attempt
    feed = feed_for(samples.sizes, config, skips=me.spec.skips if me.spec else ())
    if config.data.order == "streams":
        _carry(engine, tensors, feed, world)
    run = Run(
        config=config,
        me=me,
        world=world,
        tokens=tokens,
        samples=samples,
        feed=feed,
        engine=engine,
        scaler=scaler,
        tensors=tensors,
        checkpointer=Checkpointer.of(me),
        cadence=Cadence(interval=parse_interval(config.checkpoint.interval), saved_step=0, saved_at=time.monotonic()),
        costs=Costs(),
        save_requests=SaveRequests(),
        trace=StepTrace(config.trace, engine.optimizer, world),
        window=Window(config.train.spike.window),
        held_out=held_out,
    )
    poison(engine.model, samples, feed)
    run.registry = registry_of(run)
    _begin(run, store)
    engine.settle()
    me.mark("loaded")
    num_parameters = sum(tensor.shape.numel() for tensor in tensors["model"].values())
    log.info("rank %d of %d: %d parameters, from step %d", world.rank, world.size, num_parameters, run.step)
    return run


def _carry(engine: Engine, tensors: NestedTensors, feed: Feed, world: World) -> None:
    """The model's state at the end of a step is part of the training's."""
    model = engine.sharded
    assert isinstance(engine, FsdpEngine)
    assert isinstance(model, Recurrent)
    engine.carried = Carried(model.state_shape, feed, world)
    tensors["carried"] = dict(engine.carried.tensors)


def _tokens(config: TrainerConfig, me: Attached, world: World, store: Store) -> Tokens:
    """Collective at a fresh start: if the root holds no tokens yet, rank 0 makes them. A checkpoint was trained on some."""
    if me.resume is None and world.gather([read_index(store) is None]).any():  # asked together: rank 0 may be done before others look
        me.report(Phase.INIT, 0, within_s=_TOKENS_S)
        if world.rank == 0:
            prepare(config, store, lambda what, done, total: me.report(Phase.INIT, 0, within_s=_TOKENS_S))
        dist.barrier()
    step = me.resume.step if me.resume else 0
    scratch = Path(me.spec.scratch) if me.spec else None
    return open_tokens(store, scratch, alive=lambda: me.report(Phase.INIT, step), streaming=config.data.streaming)


def _begin(run: Run, store: Store) -> None:
    if run.me.resume is not None:
        run.me.report(Phase.LOAD, run.me.resume.step)
        _resume(run)
        return
    begin(
        run.config,
        store,
        run.world,
        run.engine.sharded,
        run.tensors["model"],
        alive=lambda: run.me.report(Phase.INIT, 0, within_s=_TOKENS_S),
    )
    rng.seed_everything(run.config.run.seed, 0, run.world.data_rank)


def _resume(run: Run) -> None:
    resumed = resume(run.me, run.tensors, run.registry)
    run.is_finished = resumed.first_state.get("result") is not None and run.is_over
    run.cadence = run.cadence.began(run.step, time.monotonic())
