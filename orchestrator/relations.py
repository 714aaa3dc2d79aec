"""What must hold between the keys of run.toml: a table of rules. Pure.

A rule's sentence names its keys as <section.key>; they are shown with their values, and a rule is only asked when each of its keys
is valid by itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise
from math import isfinite
from typing import Any

from keepstep.storage import skips
from keepstep.trainer.cadence import parse_interval
from keepstep.trainer.config import DataSection

from .sections import RunConfig, value_of, values

_KEY = re.compile(r"<(\w+(?:\.\w+)+)>")


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong, and with which keys."""

    keys: frozenset[str]
    text: str


@dataclass(frozen=True, slots=True)
class Rule:
    holds: Callable[[RunConfig], bool]
    sentence: str

    @property
    def keys(self) -> frozenset[str]:
        return frozenset(_KEY.findall(self.sentence))

    def problem(self, config: RunConfig) -> Problem:
        return Problem(self.keys, _KEY.sub(lambda key: shown(key[1], value_of(config, key[1])), self.sentence))


def shown(key: str, value: Any) -> str:
    """`cluster.lease_s = 400`: a key and its value as a person would have written them."""
    return f"{key} = {json.dumps(value, ensure_ascii=False, default=str).removesuffix('.0')}"


def nearest(word: str, known: Iterable[str], prefix: str = "") -> str:
    """The remedy for a name that is not known: the one that was probably meant, else all of them."""
    names = list(known)
    close = get_close_matches(word, names, n=1)
    return f"did you mean {prefix}{close[0]}?" if close else f"known are {', '.join(names)}"


def broken(config: RunConfig) -> Iterator[Problem]:
    """Every rule that the config breaks."""
    yield from (rule.problem(config) for rule in RULES if not rule.holds(config))
    yield from (Problem(frozenset({key}), f"{shown(key, value)} must be finite") for key, value in values(config) if not _finite(value))


def _finite(value: Any) -> bool:
    return not isinstance(value, float) or isfinite(value)


def _trains_lm(config: RunConfig) -> bool:
    """A script brings its own model and batches: those sections mean nothing to it."""
    return not config.train.script


def _samples(config: RunConfig) -> int:
    return config.train.batch_tokens // config.model.context


def _is_interval(value: int | str) -> bool:
    try:
        parse_interval(value)
    except ValueError:
        return False
    return True


def _are_skips(texts: Sequence[str]) -> bool:
    try:
        found = sorted(map(skips.parse, texts))
    except ValueError:
        return False
    return all(last <= first for (_, last), (first, _) in pairwise(found))


def _is_address(listen: str) -> bool:
    match = re.fullmatch(r"(?:\[[0-9a-fA-F:]+\]|[^\s:\[\]]+):(\d{1,5})", listen)
    return match is not None and int(match[1]) <= 65535


RULES = (
    Rule(
        lambda c: c.cluster.lease_s < c.cluster.stall_s,
        "<cluster.lease_s> must be below <cluster.stall_s>: a lost node must be noticed before its peers seem to hang",
    ),
    Rule(
        lambda c: c.cluster.lease_s < c.cluster.start_timeout_s,
        "<cluster.lease_s> must be below <cluster.start_timeout_s>: a node lost at the start must be noticed first",
    ),
    Rule(
        lambda c: c.cluster.drop_grace_s <= c.cluster.lease_s,
        "<cluster.drop_grace_s> must not exceed <cluster.lease_s>: a broken connection is a stronger sign than silence",
    ),
    Rule(
        lambda c: c.cluster.min_nodes <= c.cluster.nodes,
        "<cluster.min_nodes> must not exceed <cluster.nodes>; 0 means as many as nodes",
    ),
    Rule(
        lambda c: c.cluster.hang_s <= c.cluster.stall_s,
        "<cluster.hang_s> must not exceed <cluster.stall_s>: what is learnt about a phase may only shorten the patience with it",
    ),
    Rule(
        lambda c: all(notice in ("aws", "gcp", "azure") or notice.startswith("file:/") for notice in c.cluster.notices),
        '<cluster.notices> must name "aws", "gcp", "azure" or "file:" and an absolute path',
    ),
    Rule(
        lambda c: c.cluster.backoff_s <= c.cluster.max_backoff_s,
        "<cluster.backoff_s> must not exceed <cluster.max_backoff_s>",
    ),
    Rule(
        lambda c: _is_address(c.cluster.listen),
        "<cluster.listen> must be HOST:PORT, an IPv6 host in brackets, the port from 0 (any free one) to 65535",
    ),
    Rule(
        lambda c: c.run.root.strip() != "",
        "<run.root> must name a folder or a URL",
    ),
    Rule(
        lambda c: not c.run.root.startswith("memory:"),
        "<run.root> must outlive a process, which memory does not: use a local path or a URL such as s3://bucket/prefix",
    ),
    Rule(
        lambda c: not _trains_lm(c) or c.model.width % c.model.heads == 0,
        "<model.heads> must divide <model.width>",
    ),
    Rule(
        lambda c: not _trains_lm(c) or c.train.batch_tokens % c.model.context == 0,
        "<train.batch_tokens> must be a multiple of <model.context>",
    ),
    Rule(
        lambda c: not _trains_lm(c) or _samples(c) >= c.cluster.nodes * max(1, c.cluster.ranks_per_node),
        "<train.batch_tokens> with <model.context> gives fewer samples than there are ranks (<cluster.nodes>, <cluster.ranks_per_node>): "
        "every rank needs at least one per step, so raise train.batch_tokens",
    ),
    Rule(
        lambda c: not _trains_lm(c) or not c.cluster.exact_reduction or _samples(c) >= c.cluster.logical_ranks,
        "<train.batch_tokens> with <model.context> gives fewer samples than there are logical ranks (<cluster.logical_ranks>): every one "
        "needs at least one per step",
    ),
    Rule(
        lambda c: _trains_lm(c) or not c.cluster.exact_reduction,
        "<cluster.exact_reduction> is an order in which the LM trainer adds gradients: <train.script> adds its own",
    ),
    Rule(
        lambda c: not c.cluster.exact_reduction or c.cluster.logical_ranks > 0 or c.cluster.ranks_per_node > 0,
        "<cluster.exact_reduction> needs a number of logical ranks that no machine decides: <cluster.logical_ranks> and "
        "<cluster.ranks_per_node> leave it open, so give one of them",
    ),
    Rule(
        lambda c: c.cluster.exact_reduction or not c.cluster.logical_ranks,
        "<cluster.logical_ranks> is given, but <cluster.exact_reduction>: switch it on, or remove it",
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
        lambda c: not _trains_lm(c) or c.optimizer.warmup_steps <= c.run.steps,
        "<optimizer.warmup_steps> must not exceed <run.steps>",
    ),
    Rule(
        lambda c: _is_interval(c.checkpoint.interval),
        '<checkpoint.interval> must be a number of steps from 1, seconds as text such as "30s", or "auto"',
    ),
    Rule(
        lambda c: _trains_lm(c) or c.train.script.endswith(".py"),
        "<train.script> must be a Python file (*.py)",
    ),
    Rule(
        lambda c: not _trains_lm(c) or not c.train.script_args,
        "<train.script_args> are given, but <train.script> is empty: name the script, or remove its arguments",
    ),
    Rule(
        lambda c: not _trains_lm(c) or not c.train.preload,
        "<train.preload> is given, but <train.script>: the LM trainer is imported ahead anyway",
    ),
)
