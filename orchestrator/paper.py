"""What a run would need, from its run.toml alone: memory of a rank and a node, checkpoint, step, interval. Pure.

`keepstep doctor --paper` asks it, so that a job of many machines can be looked at on a laptop. What a file does not say of the machines
is in `Machines`, with defaults that the sentences name; a run measures all of it itself and then decides by that (interval.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from keepstep.trainer.counting import ModelSize, activation_bytes, gradient_bytes, model_size, state_bytes

from .interval import MAX_S, MIN_S, best_seconds
from .lines import human_bytes
from .sections import RunConfig

WEIGHT_BYTES: Final = 4  # master weights are float32
BUFFERS: Final = 2  # staged checkpoints that a node keeps in memory
COPY_BYTES_PER_S: Final = 20e9  # from a GPU into pinned memory, PCIe 4.0
# 419 unexpected interruptions in 54 days on 16,384 GPUs (Grattafiori et al. 2024, "The Llama 3 Herd of Models", section 3.3.4).
RANK_DAYS_PER_FAILURE: Final = 54 * 16384 / 419


@dataclass(frozen=True, slots=True, kw_only=True)
class Machines:
    """What run.toml does not say."""

    rank_memory_gb: float = 80.0
    """Of a rank's device."""
    tflops: float = 400.0
    """Operations that a rank really does per second in the precision of training, in 10^12."""
    write_mb_per_s: float = 1000.0
    """Of a node, to the root."""
    mtbf_hours: float = 0.0
    """Between failures of the whole job; 0: from the number of ranks, as in the Llama 3 training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Bytes and seconds."""

    size: ModelSize
    ranks: int
    state: int  # of a rank: its part of parameters, moments and gradients
    gathered: int  # parameters of other ranks that it holds while it computes
    activations: int
    checkpoint: int
    staging: int  # of a node
    step_s: float
    persist_s: float
    stall_s: float
    mtbf_s: float
    interval_s: float

    @property
    def rank_bytes(self) -> int:
        return self.state + self.gathered + self.activations


def needs(config: RunConfig, machines: Machines) -> Needs:
    """Raises ValueError where the file leaves a size open."""
    model, train, cluster = config.model, config.train, config.cluster
    if train.script:
        raise ValueError("train.script brings its own model: nothing is known of its size")
    if not cluster.ranks_per_node:
        raise ValueError("cluster.ranks_per_node = 0 leaves open how many ranks there are: give the number")
    size = model_size(model, config.data.vocabulary)
    ranks = cluster.nodes * cluster.ranks_per_node
    parts = {"full": ranks, "node": cluster.ranks_per_node, "none": train.tensor_parallel}[train.sharding]
    trained = 0 if train.lora.rank else size.parameters
    checkpoint = state_bytes(trained, config.optimizer) if trained else WEIGHT_BYTES * size.parameters
    node_bytes = -(-checkpoint // cluster.nodes)  # what several ranks have alike is written once
    stall_s = node_bytes / cluster.ranks_per_node / COPY_BYTES_PER_S
    flops = size.flops_per_token * train.batch_tokens * (4 / 3 if train.activation_checkpointing else 1)
    mtbf_s = machines.mtbf_hours * 3600 or 86400 * RANK_DAYS_PER_FAILURE / ranks
    persist_s = node_bytes / (machines.write_mb_per_s * 1e6)
    return Needs(
        size=size,
        ranks=ranks,
        state=-(-(checkpoint + gradient_bytes(trained)) // parts),
        gathered=_gathered(config, size) if parts > 1 or train.precision != "fp32" else 0,
        activations=_activations(config, ranks),
        checkpoint=checkpoint,
        staging=BUFFERS * node_bytes,
        step_s=flops / (ranks * machines.tflops * 1e12),
        persist_s=persist_s,
        stall_s=stall_s,
        mtbf_s=mtbf_s,
        interval_s=_interval_s(stall_s, persist_s, mtbf_s, config.checkpoint.max_overhead),
    )


def _element_bytes(config: RunConfig) -> int:
    return 4 if config.train.precision == "fp32" else 2


def _gathered(config: RunConfig, size: ModelSize) -> int:
    """With train.reshard a block and the next one are whole at a time, else all of them."""
    whole = 2 * size.block + size.embeddings + size.last if config.train.reshard else size.parameters
    return whole * _element_bytes(config) // config.train.tensor_parallel


def _activations(config: RunConfig, ranks: int) -> int:
    train = config.train
    share = -(-(train.batch_tokens // config.model.context) * train.tensor_parallel // ranks)
    whole = activation_bytes(
        config.model,
        config.data.vocabulary,
        min(share, train.micro_batch_samples or share),
        element_bytes=_element_bytes(config),
        checkpointing=train.activation_checkpointing,
    )
    return whole // train.tensor_parallel


def _interval_s(stall_s: float, persist_s: float, mtbf_s: float, max_overhead: float) -> float:
    """As interval.decide has it, with what is measured there."""
    return max(min(best_seconds(stall_s, mtbf_s), MAX_S), MIN_S, persist_s, stall_s * (1 - max_overhead) / max_overhead)


def sentences(config: RunConfig, machines: Machines) -> Iterator[tuple[str, bool, str]]:
    """(what, whether it fits, the sentence)."""
    found = needs(config, machines)
    size, room = found.size, machines.rank_memory_gb * 1e9
    yield "model", True, f"{size.parameters:,} parameters, {size.flops_per_token / 1e9:.3g} GFLOP for each token of training"
    parts = f"state {human_bytes(found.state)}, gathered {human_bytes(found.gathered)}, activations {human_bytes(found.activations)}"
    remedy = "" if found.rank_bytes <= room else f"; {_remedy(config)}"
    yield (
        "memory of a rank",
        not remedy,
        f"about {human_bytes(found.rank_bytes)} ({parts}) of {machines.rank_memory_gb:g} GB{remedy}",
    )
    yield "memory of a node", True, f"{human_bytes(found.staging)} of shared memory for checkpoints on their way to the root"
    yield (
        "checkpoint",
        True,
        f"{human_bytes(found.checkpoint)} in all; a save holds ranks up for {found.stall_s:.2g} s, and nodes write it in "
        f"{found.persist_s:.3g} s at {machines.write_mb_per_s:g} MB/s each",
    )
    yield "step", True, f"{found.step_s:.3g} s at {machines.tflops:g} TFLOP/s of each of {found.ranks} ranks"
    lost = found.interval_s / 2 / found.mtbf_s + found.stall_s / found.interval_s
    steps = max(1, round(found.interval_s / found.step_s))
    yield (
        "interval",
        True,
        f"a failure every {found.mtbf_s / 3600:.3g} h would make it {found.interval_s:.3g} s, or {steps} steps; {100 * lost:.2g} % of the "
        "time is lost to saves and to work that is done again",
    )


def _remedy(config: RunConfig) -> str:
    """What lowers it, the cheapest first."""
    train = config.train
    remedies = {
        "train.activation_checkpointing = true": not train.activation_checkpointing,
        "train.micro_batch_samples = 1": train.micro_batch_samples != 1,
        "train.reshard = true": not train.reshard,
        'train.sharding = "full"': train.sharding != "full",
        'train.precision = "bf16"': train.precision == "fp32",
        "more nodes": True,
    }
    return "try " + ", ".join(remedy for remedy, helps in remedies.items() if helps)
