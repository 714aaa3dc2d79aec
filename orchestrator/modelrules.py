"""What must hold between the keys of run.toml that the LM trainer reads. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import isfinite

from keepstep.storage import skips
from keepstep.trainer.config import INSTALLED_DOCS, RECURRENT, TOKENIZERS, TRANSFORMERS, DataSection
from keepstep.trainer.counting import inner_width

from .rules import Rule, samples, trains_lm


def _are_skips(texts: Sequence[str]) -> bool:
    try:
        found = sorted(map(skips.parse, texts))
    except ValueError:
        return False
    return all(last <= first for (_, last), (first, _) in pairwise(found))


MODEL_RULES = (
    Rule(
        lambda c: not trains_lm(c) or c.model.kind not in TRANSFORMERS or c.model.width % c.model.heads == 0,
        "<model.heads> must divide <model.width>",
    ),
    Rule(
        lambda c: not c.model.kv_heads or c.model.heads % c.model.kv_heads == 0,
        "<model.kv_heads> must divide <model.heads>",
    ),
    Rule(
        lambda c: not c.optimizer.nesterov or (c.optimizer.kind == "sgd" and c.optimizer.momentum > 0),
        '<optimizer.nesterov> is a kind of momentum of optimizer.kind = "sgd": give that (<optimizer.kind>) and <optimizer.momentum>',
    ),
    Rule(
        lambda c: not trains_lm(c) or c.train.batch_tokens % c.model.context == 0,
        "<train.batch_tokens> must be a multiple of <model.context>",
    ),
    Rule(
        lambda c: not trains_lm(c) or samples(c) * c.train.tensor_parallel >= c.cluster.nodes * max(1, c.cluster.ranks_per_node),
        "<train.batch_tokens> with <model.context> gives fewer samples than there are ranks (<cluster.nodes>, <cluster.ranks_per_node>): "
        "every rank needs at least one per step, so raise train.batch_tokens",
    ),
    Rule(
        lambda c: not trains_lm(c) or not c.cluster.exact_reduction or samples(c) >= c.cluster.logical_ranks,
        "<train.batch_tokens> with <model.context> gives fewer samples than there are logical ranks (<cluster.logical_ranks>): every one "
        "needs at least one per step",
    ),
    Rule(
        lambda c: not c.data.sources or c.data.source == DataSection().source,
        "<data.source> and <data.sources> are both given: name all texts in data.sources",
    ),
    Rule(
        lambda c: len(c.data.weights) in (0, len(c.data.sources)),
        "<data.weights> must be as many as <data.sources>, or none (then samples come by the size of their source)",
    ),
    Rule(
        lambda c: all(isfinite(weight) and weight > 0 for weight in c.data.weights),
        "<data.weights> must be above 0 each; take a source out that is not to be trained on",
    ),
    Rule(
        lambda c: _are_skips(c.data.skip),
        '<data.skip> must be ranges of positions, "FIRST:LAST" with FIRST below LAST, that do not overlap, for example ["1024:1040"]',
    ),
    Rule(
        lambda c: not c.data.streaming or not c.train.loader_workers,
        "<data.streaming> reads ahead by itself, with connections that its forks cannot use: <train.loader_workers> must be 0",
    ),
    Rule(
        lambda c: not trains_lm(c) or c.optimizer.warmup_steps <= c.run.steps,
        "<optimizer.warmup_steps> must not exceed <run.steps>",
    ),
    Rule(
        lambda c: not trains_lm(c) or (c.model.kind == "bert") == (c.train.objective == "masked") or c.train.objective == "classes",
        '<model.kind> does not go with <train.objective>: "bert" learns "masked" tokens or "classes", all others anything but "masked"',
    ),
    Rule(
        lambda c: not trains_lm(c) or (c.model.kind == "hf") == bool(c.model.folder),
        '<model.kind> and <model.folder> do not go together: "hf" needs a folder with the config.json of a model, no other kind has one',
    ),
    Rule(
        lambda c: c.data.order != "streams" or (c.model.kind in RECURRENT and c.train.objective == "next-token"),
        '<data.order> is for recurrent models, which carry their state on: <model.kind> must be "rnn", "lstm" or "gru", and '
        '<train.objective> "next-token"',
    ),
    Rule(
        lambda c: c.data.order != "streams" or (len(c.data.all_sources) == 1 and c.data.pack == "stream"),
        '<data.order> needs one text without gaps: not several <data.sources>, and "stream", not <data.pack>',
    ),
    Rule(
        lambda c: c.data.order != "streams" or not c.cluster.exact_reduction,
        "<data.order> keeps the state of a row on the rank that computes it, and <cluster.exact_reduction> moves rows between ranks",
    ),
    Rule(
        lambda c: c.data.tokenizer not in {"bpe", "unigram"} or c.data.vocabulary >= 258,
        "<data.vocabulary> must be at least 258 for <data.tokenizer>: 256 bytes, the end of a text, and one more",
    ),
    Rule(
        lambda c: not c.cluster.exact_reduction or (c.train.sharding == "full" and c.train.tensor_parallel == 1),
        '<cluster.exact_reduction> has an order of its own for sums: <train.sharding> must be "full" and <train.tensor_parallel> 1',
    ),
    Rule(
        lambda c: not trains_lm(c) or c.train.tensor_parallel == 1 or c.model.kind in TRANSFORMERS,
        "<train.tensor_parallel> is for transformers of our own: <model.kind> must be " + ", ".join(f'"{kind}"' for kind in TRANSFORMERS),
    ),
    Rule(
        lambda c: (
            not trains_lm(c)
            or c.model.kind not in TRANSFORMERS
            or all(each % c.train.tensor_parallel == 0 for each in (c.model.heads, c.model.kv_heads, inner_width(c.model)))
        ),
        "<train.tensor_parallel> must divide <model.heads>, <model.kv_heads> and the inner width (<model.inside>; 0: from width)",
    ),
    Rule(
        lambda c: not c.cluster.ranks_per_node or c.cluster.ranks_per_node % c.train.tensor_parallel == 0,
        "<train.tensor_parallel> must divide <cluster.ranks_per_node>: those ranks are neighbours on one node",
    ),
    Rule(
        lambda c: c.train.tensor_parallel == 1 or not c.train.lora.rank,
        "<train.tensor_parallel> cuts the layers that <train.lora.rank> adapts: use one of the two",
    ),
    Rule(
        lambda c: not c.train.activation_checkpointing or c.data.order != "streams",
        "<train.activation_checkpointing> would compute the state of a row twice: not with <data.order>",
    ),
    Rule(
        lambda c: not c.train.lora.rank or c.model.kind not in RECURRENT,
        "<train.lora.rank> adapts linear layers, and those of <model.kind> are none",
    ),
    Rule(
        lambda c: c.train.objective not in {"pairs", "classes"} or INSTALLED_DOCS not in c.data.all_sources,
        "<train.objective> needs files of records: name a JSONL or Parquet file in <data.source>",
    ),
    Rule(
        lambda c: not c.train.compile or c.model.kind not in RECURRENT,
        "<train.compile> is for transformers: <model.kind> has kernels of its own over all positions",
    ),
    Rule(
        lambda c: c.data.tokenizer in TOKENIZERS or "/" in c.data.tokenizer or c.data.tokenizer.endswith(".json"),
        "<data.tokenizer> must be "
        + ", ".join(f'"{name}"' for name in TOKENIZERS)
        + ", or the path of a tokenizer.json or of a run's root",
    ),
    Rule(
        lambda c: not c.train.truncate or c.train.objective in {"pairs", "classes"},
        '<train.truncate> is of pairs and classes: <train.objective> must be "pairs" or "classes"',
    ),
    Rule(
        lambda c: not c.train.start_without or bool(c.train.start),
        "<train.start_without> names what <train.start> may lack: give that, or remove it",
    ),
    Rule(
        lambda c: not c.evaluate.patience or c.evaluate.interval > 0,
        "<evaluate.patience> counts evaluations: <evaluate.interval> must be at least 1",
    ),
    Rule(
        lambda c: not c.evaluate.generate or c.train.objective == "pairs",
        '<evaluate.generate> completes held-out prompts: <train.objective> must be "pairs"',
    ),
)
