"""What must hold between the keys of run.toml: every rule is broken here, and says so."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest

from keepstep.orchestrator.config import parse
from keepstep.orchestrator.errors import InputError
from keepstep.orchestrator.relations import RULES
from keepstep.orchestrator.rules import shown
from keepstep.orchestrator.sections import known_keys


def problem(text: str) -> str:
    with pytest.raises(InputError) as caught:
        parse(text, "run.toml")
    (only,) = caught.value.problems
    return only


BREAKING: Mapping[str, tuple[str, str]] = {
    "cluster.lease_s < cluster.stall_s": (
        "cluster.lease_s = 400\ncluster.stall_s = 300",
        "cluster.lease_s = 400 must be below cluster.stall_s = 300",
    ),
    "cluster.lease_s < cluster.start_timeout_s": (
        "cluster.start_timeout_s = 4",
        "cluster.lease_s = 5 must be below cluster.start_timeout_s = 4",
    ),
    "cluster.drop_grace_s <= cluster.lease_s": (
        "cluster.lease_s = 0.4",
        "cluster.drop_grace_s = 0.5 must not exceed cluster.lease_s = 0.4",
    ),
    "cluster.min_nodes <= cluster.nodes": (
        "cluster.min_nodes = 3\ncluster.nodes = 2",
        "cluster.min_nodes = 3 must not exceed cluster.nodes = 2",
    ),
    "cluster.hang_s <= cluster.stall_s": (
        "cluster.hang_s = 400",
        "cluster.hang_s = 400 must not exceed cluster.stall_s = 300",
    ),
    "cluster.notices": ('cluster.notices = ["file:here"]', 'cluster.notices = ["file:here"] must name "aws", "gcp", "azure" or "file:"'),
    "cluster.backoff_s <= cluster.max_backoff_s": (
        "cluster.max_backoff_s = 0.5",
        "cluster.backoff_s = 1 must not exceed cluster.max_backoff_s = 0.5",
    ),
    "cluster.listen": ('cluster.listen = "localhost:70000"', 'cluster.listen = "localhost:70000" must be HOST:PORT'),
    "run.root given": ('run.root = " "', 'run.root = " " must name a folder or a URL'),
    "run.root lasting": ('run.root = "memory://x"', 'run.root = "memory://x" must outlive a process'),
    "model.heads | model.width": ("model.width = 130", "model.heads = 4 must divide model.width = 130"),
    "model.context | train.batch_tokens": (
        "train.batch_tokens = 1000",
        "train.batch_tokens = 1000 must be a multiple of model.context = 128",
    ),
    "samples >= ranks": (
        "train.batch_tokens = 384\ncluster.nodes = 2\ncluster.ranks_per_node = 2",
        "train.batch_tokens = 384 with model.context = 128 gives fewer samples than there are ranks "
        "(cluster.nodes = 2, cluster.ranks_per_node = 2): every rank needs at least one",
    ),
    "data.source or data.sources": (
        'data.source = "a"\ndata.sources = ["b"]',
        'data.source = "a" and data.sources = ["b"] are both given: name all texts in data.sources',
    ),
    "as many data.weights as data.sources": (
        'data.sources = ["a", "b"]\ndata.weights = [1.0]',
        'data.weights = [1.0] must be as many as data.sources = ["a", "b"], or none',
    ),
    "data.weights > 0": (
        'data.sources = ["a", "b"]\ndata.weights = [1.0, 0.0]',
        "data.weights = [1.0, 0.0] must be above 0 each",
    ),
    "data.skip": ('data.skip = ["9:8"]', 'data.skip = ["9:8"] must be ranges of positions, "FIRST:LAST" with FIRST below LAST'),
    "data.streaming without train.loader_workers": (
        "data.streaming = true\ntrain.loader_workers = 2",
        "data.streaming = true reads ahead by itself, with connections that its forks cannot use: train.loader_workers = 2 must be 0",
    ),
    "optimizer.warmup_steps <= run.steps": ("run.steps = 10", "optimizer.warmup_steps = 20 must not exceed run.steps = 10"),
    "bert hides tokens": ('model.kind = "bert"', 'model.kind = "bert" does not go with train.objective = "next-token"'),
    "a folder of hf": ('model.kind = "hf"', 'model.kind = "hf" and model.folder = "" do not go together'),
    "model.kv_heads | model.heads": ("model.kv_heads = 3", "model.kv_heads = 3 must divide model.heads = 4"),
    "optimizer.nesterov": (
        "optimizer.nesterov = true",
        'optimizer.nesterov = true is a kind of momentum of optimizer.kind = "sgd": give that',
    ),
    "cluster.exact_reduction fully sharded": (
        'train.sharding = "none"\ncluster.exact_reduction = true\ncluster.logical_ranks = 2',
        'cluster.exact_reduction = true has an order of its own for sums: train.sharding = "none" must be "full" and',
    ),
    "train.tensor_parallel of transformers": (
        'model.kind = "gru"\ntrain.tensor_parallel = 2',
        'train.tensor_parallel = 2 is for transformers of our own: model.kind = "gru" must be',
    ),
    "train.tensor_parallel | model.heads": (
        "train.tensor_parallel = 3",
        "train.tensor_parallel = 3 must divide model.heads = 4, model.kv_heads = 0 and the inner width (model.inside = 0;",
    ),
    "train.tensor_parallel | cluster.ranks_per_node": (
        "train.tensor_parallel = 2\ncluster.ranks_per_node = 3",
        "train.tensor_parallel = 2 must divide cluster.ranks_per_node = 3: those ranks are neighbours",
    ),
    "train.tensor_parallel or train.lora.rank": (
        "train.tensor_parallel = 2\ntrain.lora.rank = 4",
        "train.tensor_parallel = 2 cuts the layers that train.lora.rank = 4 adapts",
    ),
    "train.activation_checkpointing of rows without state": (
        'model.kind = "gru"\ndata.order = "streams"\ntrain.activation_checkpointing = true',
        'train.activation_checkpointing = true would compute the state of a row twice: not with data.order = "streams"',
    ),
    "train.lora.rank of linear layers": (
        'model.kind = "gru"\ntrain.lora.rank = 4',
        'train.lora.rank = 4 adapts linear layers, and those of model.kind = "gru" are none',
    ),
    "train.objective of records": (
        'train.objective = "pairs"',
        'train.objective = "pairs" needs files of records: name a JSONL or Parquet file in data.source = "installed-docs"',
    ),
    "train.compile of transformers": (
        'model.kind = "gru"\ntrain.compile = true',
        'train.compile = true is for transformers: model.kind = "gru" has',
    ),
    "data.tokenizer": ('data.tokenizer = "word"', 'data.tokenizer = "word" must be "bpe", "unigram", "words", "characters", "bytes", or'),
    "data.order of recurrent models": ('data.order = "streams"', 'data.order = "streams" is for recurrent models'),
    "data.order of one text": (
        'model.kind = "gru"\ndata.order = "streams"\ndata.pack = "documents"',
        'data.order = "streams" needs one text without gaps: not several data.sources = [], and "stream", not data.pack = "documents"',
    ),
    "data.order without cluster.exact_reduction": (
        'model.kind = "gru"\ndata.order = "streams"\ncluster.exact_reduction = true\ncluster.logical_ranks = 2',
        'data.order = "streams" keeps the state of a row on the rank that computes it',
    ),
    "data.vocabulary of bytes": ("data.vocabulary = 200", 'data.vocabulary = 200 must be at least 258 for data.tokenizer = "bpe"'),
    "train.truncate": ("train.truncate = true", 'train.truncate = true is of pairs and classes: train.objective = "next-token" must be'),
    "train.start_without": (
        'train.start_without = ["head.weight"]',
        'train.start_without = ["head.weight"] names what train.start = "" may lack',
    ),
    "evaluate.patience": ("evaluate.patience = 2", "evaluate.patience = 2 counts evaluations: evaluate.interval = 0 must be at least 1"),
    "evaluate.generate": (
        "evaluate.generate = 2",
        'evaluate.generate = 2 completes held-out prompts: train.objective = "next-token" must be',
    ),
    "samples >= logical ranks": (
        "cluster.exact_reduction = true\ncluster.logical_ranks = 40",
        "train.batch_tokens = 4096 with model.context = 128 gives fewer samples than there are logical ranks (cluster.logical_ranks = 40)",
    ),
    "cluster.exact_reduction is the LM trainer's": (
        'train.script = "a.py"\ncluster.exact_reduction = true\ncluster.logical_ranks = 2',
        "cluster.exact_reduction = true is an order in which the LM trainer adds gradients",
    ),
    "cluster.exact_reduction needs cluster.logical_ranks": (
        "cluster.exact_reduction = true",
        "cluster.exact_reduction = true needs a number of logical ranks that no machine decides: cluster.logical_ranks = 0",
    ),
    "cluster.logical_ranks need cluster.exact_reduction": (
        "cluster.logical_ranks = 4",
        "cluster.logical_ranks = 4 is given, but cluster.exact_reduction = false",
    ),
    "checkpoint.interval": ('checkpoint.interval = "often"', 'checkpoint.interval = "often" must be a number of steps'),
    "train.script is Python": ('train.script = "a.sh"', 'train.script = "a.sh" must be a Python file'),
    "train.preload needs train.script": (
        'train.preload = ["json"]',
        'train.preload = ["json"] is given, but train.script = "": the LM trainer is imported ahead anyway',
    ),
    "train.script_args need train.script": ('train.script_args = ["x"]', 'train.script_args = ["x"] are given, but train.script = ""'),
}


class TestRelations:
    @pytest.mark.parametrize("rule", BREAKING)
    def test_a_broken_relation_is_refused_with_both_values(self, rule: str) -> None:
        text, message = BREAKING[rule]
        assert problem(text).startswith(f"run.toml: {message}")

    def test_every_rule_of_the_table_is_broken_here(self) -> None:
        broken = {rule.sentence for rule in RULES for text, _ in BREAKING.values() if problem(text) == _message(rule.sentence, text)}
        assert broken == {rule.sentence for rule in RULES}

    @pytest.mark.parametrize("interval", ["0", "-1", '"30"', '"30 s"', '"0s"', '"0.0s"', '"-3s"', '"AUTO"', '""', '"30m"'])
    def test_an_interval_is_steps_or_seconds_or_auto(self, interval: str) -> None:
        assert problem(f"checkpoint.interval = {interval}").startswith("run.toml: checkpoint.interval = ")

    @pytest.mark.parametrize("interval", ["1", '"30s"', '"2.5s"', '"auto"'])
    def test_a_good_interval_passes(self, interval: str) -> None:
        assert parse(f"checkpoint.interval = {interval}", "run.toml").checkpoint.interval == json.loads(interval)

    @pytest.mark.parametrize("listen", ["localhost", "127.0.0.1:", ":80", "a b:1", "::1:80", "[::1]", "http://h:1"])
    def test_an_address_is_a_host_and_a_port(self, listen: str) -> None:
        assert problem(f'cluster.listen = "{listen}"').startswith(f'run.toml: cluster.listen = "{listen}" must be HOST:PORT')

    @pytest.mark.parametrize("listen", ["127.0.0.1:0", "0.0.0.0:65535", "gpu07.cluster:8000", "[::1]:80"])
    def test_a_good_address_passes(self, listen: str) -> None:
        assert parse(f'cluster.listen = "{listen}"', "run.toml").cluster.listen == listen

    def test_a_script_needs_no_batch_that_fits_the_model(self) -> None:
        text = 'train.script = "mine.py"\nmodel.width = 130\ntrain.batch_tokens = 1000\nrun.steps = 1\n'
        assert parse(text, "run.toml").train.script == "mine.py"

    @pytest.mark.parametrize("skips", ['["0:5", "4:6"]', '["5"]', '["1:2", "x:y"]', '["2:2"]'])
    def test_skips_are_ranges_apart_from_each_other(self, skips: str) -> None:
        assert problem(f"data.skip = {skips}").startswith(f"run.toml: data.skip = {skips} must be ranges of positions")

    def test_skips_may_touch_and_come_in_any_order(self) -> None:
        assert parse('data.skip = ["4:6", "0:4"]', "run.toml").data.skip == ("4:6", "0:4")

    def test_as_many_samples_as_ranks_are_enough(self) -> None:
        text = "train.batch_tokens = 512\ncluster.nodes = 2\ncluster.ranks_per_node = 2"
        assert parse(text, "run.toml").train.batch_tokens == 512


def _message(sentence: str, text: str) -> str:
    """What a broken rule says about the config of `text`, computed apart from the config's own validity."""
    message = sentence
    values = {**{key: field.default for key, field in known_keys().items()}, **_assignments(text)}
    for key, value in values.items():
        message = message.replace(f"<{key}>", shown(key, value))
    return f"run.toml: {message}"


def _assignments(text: str) -> dict[str, object]:
    return {key: json.loads(value) for key, _, value in (line.partition(" = ") for line in text.splitlines())}
