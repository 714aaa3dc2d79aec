"""Which engine a run has: FSDP2's, or that of exact reduction."""

from __future__ import annotations

from .blocks import equip
from .config import RECURRENT, TrainerConfig
from .engine import Engine, FsdpEngine
from .exact import ExactEngine
from .models import LanguageModel, build_model
from .optim import ShardOptimizer
from .parallel import COMPUTES_IN, World, counted_in, shard
from .scaler import LossScaler
from .tensor_parallel import split


def open_engine(config: TrainerConfig, world: World, vocabulary: int, scaler: LossScaler, *, outputs: int = 0) -> Engine:
    """Its shards have no values yet: fill them, then `settle`. Raises ValueError for a model or logical ranks that cannot be.

    Args:
        outputs: see `build_model`.
    """
    train, batch_tokens = config.train, config.train.batch_tokens
    if config.cluster.exact_reduction and (train.sharding != "full" or train.tensor_parallel != 1):
        raise ValueError(
            f'run.toml: cluster.exact_reduction = true has an order of its own for sums: train.sharding = "{train.sharding}" must be '
            f'"full" and train.tensor_parallel = {train.tensor_parallel} must be 1'
        )
    if train.compile and config.model.kind in RECURRENT:
        raise ValueError(
            f'run.toml: train.compile = true is for transformers, and model.kind = "{config.model.kind}" has kernels of its own over all '
            "positions, which torch.compile would replace by one step after the other: set it to false"
        )
    model = build_model(config.model, vocabulary, outputs=outputs, train=train)
    if world.tensor is not None:
        split(model, config.model, world.tensor)
    shard(model, world, precision=train.precision, reshard=train.reshard)
    if not config.cluster.exact_reduction:
        _equip(model, config)
        return FsdpEngine(
            model,
            ShardOptimizer(model, config.optimizer, counted=counted_in(model, world)),
            world=world,
            batch_tokens=batch_tokens,
            scaler=scaler,
            label_smoothing=train.label_smoothing,
        )
    if not config.cluster.logical_ranks:
        raise ValueError("cluster.exact_reduction needs cluster.logical_ranks: keepstep takes nodes x ranks_per_node, here nobody has")
    replica = build_model(config.model, vocabulary, world.device, outputs=outputs, train=train)
    _equip(replica, config)
    return ExactEngine(
        replica.to(COMPUTES_IN[train.precision]),
        model,
        ShardOptimizer(model, config.optimizer, fused=world.device.type != "cpu"),
        world=world,
        seed=config.run.seed,
        logical_ranks=config.cluster.logical_ranks,
        batch_tokens=batch_tokens,
        scaler=scaler,
        label_smoothing=config.train.label_smoothing,
    )


def _equip(model: LanguageModel, config: TrainerConfig) -> None:
    equip(model, recompute=config.train.activation_checkpointing, compiled=config.train.compile)
