"""The trainer's part of run.toml: one section per class, a docstring under every key, unknown keys refused. Torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)


class RunSection(Section):
    """What the run is called, where it keeps everything, and how long it is."""

    name: str = Field("keepstep", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Name of the run: letters, digits, '.', '_' and '-'."""
    root: str = "runs/keepstep"
    """Where everything goes: a local path or any fsspec URL (s3://bucket/prefix)."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of initialisation, data order and dropout."""
    steps: int = Field(200, ge=1)
    """Optimizer updates of the whole run."""


class DataSection(Section):
    source: str = "installed-docs"
    """Text to train on: "installed-docs" (the English documentation installed with Python, PyTorch and NumPy), or a path or URL of a
    text file or a folder of text files."""
    sources: tuple[str, ...] = ()
    """Several of them, instead of `source`; each has its own epochs."""
    weights: tuple[float, ...] = ()
    """How often samples of each of the `sources` come, relative to each other (exact to 65,536ths of all); empty: by their size."""
    order: Literal["shuffled", "blocks", "sequential"] = "shuffled"
    """Order of the samples of an epoch: "shuffled"; "blocks": blocks of consecutive samples in random order, shuffled inside, for text that
    is read from far away; "sequential": as the source has them."""
    block_samples: int = Field(1024, ge=1)
    """Consecutive samples of a block, for order = "blocks"."""
    pack: Literal["stream", "documents"] = "stream"
    """"stream": documents follow each other, and samples are cut anywhere; "documents": no sample holds parts of two documents, and the
    rest of its row is padding, which does not count."""
    skip: tuple[str, ...] = ()
    """Positions of the data order that are never trained on, "FIRST:LAST" each (half-open), for example ["1024:1040"]."""
    streaming: bool = False
    """Read the token file from the root block by block, each verified, instead of copying it to every node first."""
    tokenizer: Literal["bpe", "bytes"] = "bpe"
    """"bpe": byte-level BPE learnt from the text; "bytes": one token per byte."""
    vocabulary: int = Field(2048, ge=257, le=1 << 20)
    """Number of tokens of the BPE vocabulary, the 256 bytes and the end-of-text token included. Ignored for "bytes"."""
    held_out: float = Field(0.02, gt=0, lt=0.5)
    """Share of the documents of each source kept for evaluation."""
    max_bytes: int = Field(0, ge=0)
    """Use at most so many bytes of the text of each source, 0 for all."""

    @property
    def all_sources(self) -> tuple[str, ...]:
        return self.sources or (self.source,)

    def source_key(self, number: int) -> str:
        """How messages call a source: key and value."""
        key = f"data.sources[{number}]" if self.sources else "data.source"
        return f"{key} = {self.all_sources[number]!r}"


class ModelSection(Section):
    kind: Literal["gpt"] = "gpt"
    """Architecture."""
    layers: int = Field(4, ge=1)
    """Transformer blocks."""
    width: int = Field(128, ge=8)
    """Size of the residual stream."""
    heads: int = Field(4, ge=1)
    """Attention heads; must divide width."""
    context: int = Field(128, ge=2)
    """Tokens per sample."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout on the embeddings and on what each attention and MLP adds to the residual stream."""


class OptimizerSection(Section):
    kind: Literal["adamw"] = "adamw"
    """Optimizer."""
    lr: float = Field(3e-3, gt=0)
    """Peak learning rate."""
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    """Learning rate at the last step as a share of the peak (cosine schedule)."""
    warmup_steps: int = Field(20, ge=0)
    """Updates of linear warm-up."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """Decay of the second moment."""
    eps: float = Field(1e-8, gt=0)
    """Added to the denominator."""
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled weight decay of matrices; vectors (biases, norms) are exempt."""
    clip_norm: float = Field(1.0, ge=0)
    """Global gradient norm is clipped to this; 0 switches clipping off."""


class SpikeSection(Section):
    """Steps that must not become part of the training. A loss or gradient that is not finite always is one; here stands what else is,
    and what is done about it."""

    sigmas: float = Field(12, ge=0)
    """A loss is a spike when it lies so many robust standard deviations (1.4826 times the median absolute deviation) above the median
    of the recent steps; 0: no finite loss is one."""
    nats: float = Field(1.5, ge=0)
    """And at least so much above it, in nats per token."""
    window: int = Field(64, ge=8, le=4096)
    """How many recent steps that is; nothing is a spike before half of them were seen."""
    gradient_factor: float = Field(0, ge=0)
    """A gradient norm beyond so many times the median of the recent steps is a spike as well; 0: none is."""
    skip: Literal["samples", "batch"] = "samples"
    """What a rewind leaves out: the samples that are to blame (the whole batch where none can be), or always the whole batch."""
    budget: int = Field(3, ge=0)
    """Rewinds that a run may make by itself; the next bad step ends it with exit code 4."""


class TrainSection(Section):
    script: str = ""
    """Run this Python script instead of the LM trainer, as torchrun would. Empty: the LM trainer."""
    script_args: tuple[str, ...] = ()
    """Arguments of the script."""
    preload: tuple[str, ...] = ()
    """Modules that the script imports, slow ones, to be imported once per node before ranks are forked: a restart does not wait for them.
    Only what, while it is imported, starts no thread, touches no GPU and reads no RANK."""
    batch_tokens: int = Field(4096, ge=2)
    """Tokens per optimizer update over all ranks, constant whatever the world size; a multiple of model.context."""
    micro_batch_samples: int = Field(0, ge=0)
    """At most so many samples per forward pass on a rank (gradients accumulate); 0: all of the rank's share at once."""
    loader_workers: int = Field(0, ge=0)
    """Processes of every rank that read batches ahead of time; 0: the rank reads them itself, which suffices for a local disk."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the forward and backward pass; master weights stay fp32. With "fp16" the loss is scaled as far as gradients allow."""
    reshard: bool = False
    """Free a block's gathered parameters after its forward pass and gather them again for the backward pass: saves memory, costs
    communication."""
    spike: SpikeSection = SpikeSection()
    """Steps that must not become part of the training."""


class CheckpointSection(Section):
    interval: int | str = "auto"
    """Optimizer updates between checkpoints; or seconds as text ("30s"); or "auto": from what a save costs and how often this run fails,
    as measured, so that the least time is lost to both."""
    max_overhead: float = Field(0.05, gt=0, lt=1)
    """With interval = "auto", saves cost at most this share of the time, however often the run fails."""
    keep: int = Field(3, ge=1)
    """Newest checkpoints that are kept, counting those that were read back and found right; older ones are deleted. See also
    `keepstep checkpoints pin`."""
    keep_every: int = Field(0, ge=0)
    """Of every so many steps one checkpoint stays for ever; 0: none does."""
    nice: int = Field(0, ge=0, le=19)
    """Niceness of the process that writes and hashes checkpoints: how far training goes before it. 0: they compete. Where ranks keep all
    cores busy, a nice persister may be starved, and commits come late."""
    write_mb_per_s: float = Field(0, ge=0)
    """A node writes checkpoints with at most so many megabytes per second, the last one of a run excepted; 0: as fast as it goes."""
    scrub: bool = True
    """Read each new checkpoint back in the background and compare every byte with its hash; false: what the store acknowledged counts
    as right."""
    scrub_mb_per_s: float = Field(200, ge=0)
    """Read back at most so many megabytes per second; 0: as fast as it goes."""
    scrub_period_s: float = Field(86400, gt=0)
    """Read the kept checkpoints back again after so many seconds, a day by default."""


class EvaluateSection(Section):
    interval: int = Field(0, ge=0)
    """Updates between evaluations on the held-out text; 0: only at the end."""
    max_tokens: int = Field(65536, ge=1)
    """Evaluate on at most so many held-out tokens."""


class TraceSection(Section):
    """What is recorded of the inside of a step; no bit of the training depends on it."""

    interval: int = Field(50, ge=0)
    """Look into every layer at step 1 and at each multiple of this; 0: never."""
    updates: bool = True
    """Compare every update with the parameters that it changes; needs room for a copy of each rank's shard of them."""


class ReductionSection(Section):
    """What the trainer reads of [cluster]."""

    model_config = ConfigDict(extra="ignore")

    exact_reduction: bool = False
    """The same bits at every world size: gradients are those of `logical_ranks` parts of a batch, added in an order that does not depend on
    how many ranks there are. Costs memory, communication and time, see trainer/README.md."""
    logical_ranks: int = Field(0, ge=0)
    """Parts of a batch under exact_reduction, fixed at the run's start; a rank computes several of them one after the other. 0: nodes x
    ranks_per_node of the start."""


class TrainerConfig(BaseModel):
    """What the trainer reads of the resolved run.toml; the sections it does not know are the orchestrator's."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    run: RunSection = RunSection()
    data: DataSection = DataSection()
    model: ModelSection = ModelSection()
    optimizer: OptimizerSection = OptimizerSection()
    train: TrainSection = TrainSection()
    checkpoint: CheckpointSection = CheckpointSection()
    evaluate: EvaluateSection = EvaluateSection()
    trace: TraceSection = TraceSection()
    cluster: ReductionSection = ReductionSection()
