"""Which engine a run has: FSDP2's, or that of exact reduction."""

from __future__ import annotations

from .config import TrainerConfig
from .engine import Engine, FsdpEngine
from .exact import ExactEngine
from .models import build_model
from .optim import ShardOptimizer
from .parallel import COMPUTES_IN, World, shard
from .scaler import LossScaler


def open_engine(config: TrainerConfig, world: World, vocabulary: int, scaler: LossScaler) -> Engine:
    """Its shards have no values yet: fill them, then `settle`. Raises ValueError for a model or logical ranks that cannot be."""
    model = build_model(config.model, vocabulary)
    shard(model, world, precision=config.train.precision, reshard=config.train.reshard)
    batch_tokens = config.train.batch_tokens
    if not config.cluster.exact_reduction:
        return FsdpEngine(model, ShardOptimizer(model, config.optimizer), world=world, batch_tokens=batch_tokens, scaler=scaler)
    if not config.cluster.logical_ranks:
        raise ValueError("cluster.exact_reduction needs cluster.logical_ranks: keepstep takes nodes x ranks_per_node, here nobody has")
    replica = build_model(config.model, vocabulary, world.device)
    return ExactEngine(
        replica.to(COMPUTES_IN[config.train.precision]),
        model,
        ShardOptimizer(model, config.optimizer, fused=world.device.type != "cpu"),
        world=world,
        seed=config.run.seed,
        logical_ranks=config.cluster.logical_ranks,
        batch_tokens=batch_tokens,
        scaler=scaler,
    )
