"""What must hold between the keys of run.toml: tables of rules, and who asks them. Pure.

A rule's sentence names its keys as <section.key>; they are shown with their values, and a rule is only asked when each of its keys
is valid by itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from math import isfinite
from typing import Any

from keepstep.trainer.cadence import parse_interval

from .modelrules import MODEL_RULES
from .rules import Problem, Rule, shown, trains_lm
from .sections import RunConfig, values


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


def _is_interval(value: int | str) -> bool:
    try:
        parse_interval(value)
    except ValueError:
        return False
    return True


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
        lambda c: trains_lm(c) or not c.cluster.exact_reduction,
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
        lambda c: _is_interval(c.checkpoint.interval),
        '<checkpoint.interval> must be a number of steps from 1, seconds as text such as "30s", or "auto"',
    ),
    Rule(
        lambda c: trains_lm(c) or c.train.script.endswith(".py"),
        "<train.script> must be a Python file (*.py)",
    ),
    Rule(
        lambda c: not trains_lm(c) or not c.train.script_args,
        "<train.script_args> are given, but <train.script> is empty: name the script, or remove its arguments",
    ),
    Rule(
        lambda c: not trains_lm(c) or not c.train.preload,
        "<train.preload> is given, but <train.script>: the LM trainer is imported ahead anyway",
    ),
    *MODEL_RULES,
)
