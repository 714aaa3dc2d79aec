"""The trainer's part of run.toml: one section per class, a docstring under every key, unknown keys refused. Torch-free."""

from __future__ import annotations

from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field

INSTALLED_DOCS: Final = "installed-docs"  # of data.source
TOKENIZERS: Final = ("bpe", "unigram", "words", "characters", "bytes")  # of data.tokenizer, if it is not a path
TRANSFORMERS: Final = ("gpt", "llama", "bert")  # of model.kind, those of our own
RECURRENT: Final = frozenset({"rnn", "lstm", "gru"})  # of model.kind


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
    file or a folder of files: text, JSONL (.jsonl) or Parquet (.parquet), also packed with gzip (.gz) or zstandard (.zst)."""
    sources: tuple[str, ...] = ()
    """Several of them, instead of `source`; each has its own epochs."""
    weights: tuple[float, ...] = ()
    """How often samples of each of the `sources` come, relative to each other (exact to 65,536ths of all); empty: by their size."""
    text_field: str = "text"
    """Field of a JSONL line, or column of a Parquet file, that holds a document. Pairs are read from "prompt" and "completion", classes
    from this field and "label"."""
    normalize: Literal["none", "nfc", "nfkc"] = "nfc"
    """Unicode normalization of the text; "nfkc" also replaces compatibility characters, such as ligatures and full-width letters."""
    strip_control: bool = True
    """Remove control characters but tabs and line ends, and make every line end "\\n"."""
    deduplicate: Literal["none", "exact", "near"] = "none"
    """Leave out documents that came before: "exact", with the same text; "near", with a similar one (MinHash of word 5-grams)."""
    near_threshold: float = Field(0.8, gt=0, le=1)
    """Jaccard similarity from which deduplicate = "near" takes two documents for the same."""
    order: Literal["shuffled", "blocks", "sequential", "streams"] = "shuffled"
    """Order of the samples of an epoch: "shuffled"; "blocks": blocks of consecutive samples in random order, shuffled inside, for text that
    is read from far away; "sequential": as the source has them; "streams", for recurrent models: each row of a batch goes on where that
    row of the batch before ended, and the model's state goes with it (truncated back-propagation through time)."""
    block_samples: int = Field(1024, ge=1)
    """Consecutive samples of a block, for order = "blocks"."""
    pack: Literal["stream", "documents"] = "stream"
    """"stream": documents follow each other, and samples are cut anywhere; "documents": no sample holds parts of two documents, and the
    rest of its row is padding, which does not count."""
    skip: tuple[str, ...] = ()
    """Positions of the data order that are never trained on, "FIRST:LAST" each (half-open), for example ["1024:1040"]."""
    streaming: bool = False
    """Read the token file from the root block by block, each verified, instead of copying it to every node first."""
    tokenizer: str = "bpe"
    """"bpe": byte-level BPE learnt from the text; "unigram": a Unigram model learnt from it; "words" or "characters": those of the text;
    "bytes": one token per byte; or the path or URL of a tokenizer.json, or of a run's root whose tokenizer it shall be."""
    vocabulary: int = Field(2048, ge=2, le=1 << 20)
    """At most so many tokens, all special ones included; of "words" and "characters" the most frequent. "bpe" and "unigram" need at least
    512 and hold all 256 bytes, so that they can write any text. Ignored for "bytes" and a tokenizer that exists."""
    min_frequency: int = Field(1, ge=1)
    """"words" and "characters" that occur less often become the unknown token."""
    held_out: float = Field(0.02, gt=0, lt=0.5)
    """Share of the documents of each source kept for evaluation."""
    max_bytes: int = Field(0, ge=0)
    """Use at most so many bytes of the text of each source, 0 for all."""
    shard_mb: int = Field(256, ge=1)
    """A token file holds at most so many megabytes; more text makes more files."""

    @property
    def all_sources(self) -> tuple[str, ...]:
        return self.sources or (self.source,)

    def source_key(self, number: int) -> str:
        """How messages call a source: key and value."""
        key = f"data.sources[{number}]" if self.sources else "data.source"
        return f"{key} = {self.all_sources[number]!r}"


class ModelSection(Section):
    kind: Literal["gpt", "llama", "bert", "rnn", "lstm", "gru", "hf"] = "gpt"
    """Architecture: "gpt" (GPT-2), "llama" (rotary positions, RMSNorm, SwiGLU, grouped queries), "bert" (an encoder, for
    objective = "masked" or "classes"), a recurrent one: "rnn", "lstm", "gru", or "hf": the causal model of Hugging Face transformers that
    `folder` describes."""
    folder: str = ""
    """Local folder with the config.json of kind = "hf"; its parameters are taken where train.start names the folder as well."""
    layers: int = Field(4, ge=1)
    """Transformer blocks, or recurrent layers."""
    width: int = Field(128, ge=8)
    """Size of the residual stream, or of the recurrent state."""
    heads: int = Field(4, ge=1)
    """Attention heads; must divide width."""
    kv_heads: int = Field(0, ge=0)
    """Heads of keys and values in "llama"; must divide heads. 0: as many as heads."""
    inside: int = Field(0, ge=0)
    """Width of the inner layer of an MLP; 0: 4 x width, in "llama" 8/3 x width rounded up to a multiple of 32."""
    context: int = Field(128, ge=2)
    """Tokens per sample."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout on the embeddings and on what each attention and MLP adds to the residual stream, or on what each recurrent layer gives."""
    tied: bool = True
    """The output layer uses the weights of the embedding."""
    bias: bool = False
    """Linear layers and layer norms have biases, as GPT-2's have. Those of recurrent layers always have."""
    activation: Literal["gelu", "gelu_tanh"] = "gelu"
    """Of the MLP in "gpt" and "bert"; "gelu_tanh" is GPT-2's approximation."""
    rope_base: float = Field(10000.0, gt=1)
    """Base of the rotary positions of "llama"."""


class OptimizerSection(Section):
    kind: Literal["adamw", "adam", "sgd", "rmsprop", "adagrad"] = "adamw"
    """Optimizer."""
    lr: float = Field(3e-3, gt=0)
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant", "wsd", "one-cycle"] = "cosine"
    """How the learning rate goes on after the warm-up: down along half a cosine wave or a line, not at all, after staying for long
    ("wsd": warm up, stay, decay); or up and down by itself ("one-cycle", without warm-up)."""
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    """Learning rate at the last step as a share of the peak."""
    warmup_steps: int = Field(20, ge=0)
    """Updates of linear warm-up."""
    decay_share: float = Field(0.2, gt=0, le=1)
    """Share of the updates after the warm-up in which "wsd" decays, the last of them."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the first moment in "adam" and "adamw"."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """Decay of the second moment in "adam", "adamw" and "rmsprop"."""
    eps: float = Field(1e-8, gt=0)
    """Added to the denominator."""
    momentum: float = Field(0.0, ge=0, lt=1)
    """Of "sgd" and "rmsprop"."""
    nesterov: bool = False
    """Nesterov's momentum, in "sgd"; needs momentum."""
    weight_decay: float = Field(0.1, ge=0)
    """Weight decay of matrices, decoupled in "adamw", else added to the gradient (L2); vectors (biases, norms) are exempt."""
    l1: float = Field(0.0, ge=0)
    """This times the sign of each weight of a matrix is added to its gradient, after clipping (L1)."""
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


class LoraSection(Section):
    """Low-rank adaptation (Hu et al. 2021): the model stays as it is, and small matrices beside its linear layers are trained."""

    rank: int = Field(0, ge=0)
    """Rank of those matrices; 0: no adaptation, the model itself is trained."""
    alpha: float = Field(16.0, gt=0)
    """What they add is scaled with alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on what they are given."""
    layers: tuple[str, ...] = ("*.qkv", "*.q", "*.k", "*.v", "*.out", "*.up", "*.gate")
    """Patterns of the names of the linear layers that are adapted."""


class TrainSection(Section):
    objective: Literal["next-token", "masked", "pairs", "classes"] = "next-token"
    """What is learnt: "next-token"; "masked": tokens that were masked, from both sides (BERT); "pairs": to complete the field "prompt" with
    the field "completion", the loss being that of the completion; "classes": the field "label" of a document."""
    start: str = ""
    """Begin with these parameters instead of random ones: a run's root ("ROOT", its newest checkpoint, or "ROOT@STEP"), a .safetensors
    file, or a folder of Hugging Face transformers."""
    start_without: tuple[str, ...] = ()
    """Patterns of the names of parameters that `start` may lack or have in another shape; they begin with random values."""
    freeze: tuple[str, ...] = ()
    """Patterns of the names of parameters that are not trained."""
    truncate: bool = False
    """Cut pairs and documents of classes that are longer than model.context at their end; false: refuse them."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """So much of the target's probability is spread over all tokens (Szegedy et al. 2016). Evaluations are without."""
    mask_share: float = Field(0.15, gt=0, lt=1)
    """Share of the tokens that objective = "masked" asks for; of these 80 % are masked, 10 % are another token, 10 % stay."""
    lora: LoraSection = LoraSection()
    """Low-rank adaptation."""
    sharding: Literal["full", "node", "none"] = "full"
    """What a rank keeps: "full", its part of the parameters among all ranks (FSDP2); "node", its part among the ranks of its node, of which
    every node has all (hybrid sharding); "none", all of them (DDP)."""
    tensor_parallel: int = Field(1, ge=1)
    """So many ranks of a node compute the heads and inner widths of one transformer together (tensor parallelism)."""
    activation_checkpointing: bool = False
    """Keep only what goes into each block, and compute its activations again in the backward pass: less memory, more time."""
    compile: bool = False
    """Compile each block with torch.compile; what was compiled is kept on the node, and a restart finds it."""
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
    """A node writes checkpoints with at most so many megabytes per second, but the last one of a run and those of best evaluations; 0: as
    fast as it goes."""
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
    top_k: int = Field(5, ge=1)
    """Share of the tokens that are among the so many most probable ones."""
    generate: int = Field(0, ge=0)
    """With objective = "pairs": complete so many held-out prompts after the last step, greedily, for BLEU, chrF and exact matches."""
    patience: int = Field(0, ge=0)
    """End the training after so many evaluations in a row that were not better than the best; 0: never. The best one's checkpoint stays
    (`--step best`)."""
    min_delta: float = Field(0.0, ge=0)
    """An evaluation is better when its loss is lower by more than so many nats."""


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
