"""What a save asks of the training thread: no collective after the first one, and nothing may change before its copy is whole."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sharded_state import sharded, simulated, whole_state
from torch import Tensor
from trainer_ranks import TINY, FolderStaging, run_ranks, spec_of

from keepstep.storage.layout import checkpoint_directory, shard_name
from keepstep.trainer.attach import Attached
from keepstep.trainer.checkpoint import Checkpointer
from keepstep.trainer.contract import Phase
from keepstep.trainer.copying import Copier, Wait

STEPS = 8


def num_collectives() -> int:
    """That this rank has begun in the default group."""
    return int(dist.distributed_c10d._get_default_group()._get_sequence_number_for_group())


class Late:
    """A copy that takes place when it is waited for, as a GPU's does at the latest; finds out whether anything changed meanwhile."""

    def __init__(self) -> None:
        self.num_begun = self.num_ended = 0

    def __call__(self, destinations: Sequence[Tensor], sources: Sequence[Tensor]) -> Wait:
        before = [source.detach().clone() for source in sources]
        self.num_begun += 1

        def wait() -> None:
            assert all(torch.equal(old, new) for old, new in zip(before, sources, strict=True)), "changed while it was copied"
            Copier()(destinations, sources)
            self.num_ended += 1

        return wait


def save_again_and_again(rank: int, world_size: int, root: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo")
    tensors = sharded(whole_state(), init_device_mesh("cpu", (world_size,)))
    staging = FolderStaging(Path(root), attempt=1, rank=rank, world_size=world_size)
    saver = Checkpointer(staging, rank=rank, attempt=1, nonce="n")
    before = num_collectives()
    saver.get_ready(tensors)
    planned = num_collectives()
    assert planned > before, "this is how a collective shows"
    for step in range(1, 5):
        assert saver.save(step, tensors, {"rank": rank})
    assert num_collectives() == planned


def train_and_count(rank: int, world_size: int, root: str) -> None:
    from keepstep.trainer.config import TrainerConfig
    from keepstep.trainer.loop import train
    from keepstep.trainer.parallel import join
    from keepstep.trainer.run import open_run

    counts: dict[int, int] = {}

    class Me(Attached):
        def report(self, phase: Phase, step: int, *, within_s: float = 0.0) -> None:
            if phase is Phase.STEP and dist.is_initialized():
                counts.setdefault(step, num_collectives())
            super().report(phase, step, within_s=within_s)

    me = Me(spec_of(Path(root), rank, 1, None))
    me.__dict__["staging"] = FolderStaging(Path(root), attempt=1, rank=rank, world_size=world_size)
    config = TINY | {"run": {"steps": STEPS}, "checkpoint": {"interval": 3}}
    run = open_run(TrainerConfig.model_validate(config), me, join(me))
    run.checkpointer._copy = late = Late()
    train(run)
    per_step = {later - earlier for earlier, later in itertools.pairwise(counts[step] for step in range(2, STEPS + 1))}
    assert len(per_step) == 1, f"a step after a save began more collectives than others: {counts}"
    assert (late.num_begun, late.num_ended) == (3, 3), "after 3, 6 and the last one"


@pytest.mark.slow
class TestRanks:
    def test_no_collective_runs_in_a_save_after_the_plan(self, tmp_path: Path) -> None:
        run_ranks(2, save_again_and_again, str(tmp_path))

    def test_the_loop_saves_without_a_collective_and_changes_nothing_that_is_being_copied(self, tmp_path: Path) -> None:
        run_ranks(2, train_and_count, str(tmp_path))


@pytest.fixture
def staging(tmp_path: Path) -> FolderStaging:
    return FolderStaging(tmp_path, attempt=1, rank=0, world_size=1)


def shard_of(root: Path, step: int) -> bytes:
    return (root / checkpoint_directory(1, step, "n") / shard_name(0)).read_bytes()


class TestOneRank:
    def saver(self, staging: FolderStaging, **options: Any) -> Checkpointer:
        return Checkpointer(staging, rank=0, attempt=1, nonce="n", **options)

    def test_nothing_is_handed_over_before_its_copy_is_whole(self, staging: FolderStaging, tmp_path: Path) -> None:
        tensors = {"model": {"w": torch.arange(5.0)}}
        with simulated(0, 1):
            saver = self.saver(staging, copy=Late())
            assert saver.begin_save(1, tensors, {})
            assert saver.busy
            assert not (tmp_path / checkpoint_directory(1, 1, "n")).exists()
            saver.end_save()
            assert not saver.busy
            tensors["model"]["w"] += 1
            assert torch.arange(5.0).numpy().tobytes() in shard_of(tmp_path, 1)

    def test_a_save_ends_the_one_before_it(self, staging: FolderStaging, tmp_path: Path) -> None:
        tensors = {"model": {"w": torch.arange(5.0)}}
        with simulated(0, 1):
            saver = self.saver(staging, copy=Late())
            saver.begin_save(1, tensors, {})
            saver.begin_save(2, tensors, {})
            saver.end_save()
        assert shard_of(tmp_path, 1) == shard_of(tmp_path, 2)

    @pytest.mark.parametrize(
        "change",
        [
            lambda tensors: tensors["model"].update(w=torch.arange(6.0)),
            lambda tensors: tensors["model"].update(w=torch.arange(5)),
            lambda tensors: tensors.update(model={"v": torch.arange(5.0)}),
            lambda tensors: tensors.update(more={"w": torch.zeros(1)}),
            lambda tensors: setattr(tensors["model"]["w"], "data", torch.arange(7.0)),
        ],
        ids=["shape", "dtype", "name", "another", "in place"],
    )
    def test_whatever_changes_in_the_state_stands_in_the_next_save(self, staging: FolderStaging, tmp_path: Path, change: Any) -> None:
        """A layout that is used again for another state would save garbage without a word."""
        tensors: dict[str, Any] = {"model": {"w": torch.arange(5.0), "b": torch.ones(3)}}
        with simulated(0, 1):
            saver = self.saver(staging)
            saver.save(1, tensors, {})
            change(tensors)
            saver.save(2, tensors, {})
            self.saver(staging).save(3, tensors, {})
        assert shard_of(tmp_path, 2) == shard_of(tmp_path, 3)

    def test_the_same_tensors_in_another_order_keep_their_names(self, staging: FolderStaging, tmp_path: Path) -> None:
        one, two = torch.zeros(4), torch.ones(4)
        with simulated(0, 1):
            saver = self.saver(staging)
            saver.save(1, {"model": {"a": one, "b": two}}, {})
            saver.save(2, {"model": {"b": two, "a": one}}, {})
            self.saver(staging).save(3, {"model": {"b": two, "a": one}}, {})
        assert shard_of(tmp_path, 2) == shard_of(tmp_path, 3)
