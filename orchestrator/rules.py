"""What a rule between keys of run.toml is, and how keys are shown. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .sections import RunConfig, value_of

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


def trains_lm(config: RunConfig) -> bool:
    """A script brings its own model and batches: those sections mean nothing to it."""
    return not config.train.script


def samples(config: RunConfig) -> int:
    """Of a batch."""
    return config.train.batch_tokens // config.model.context
