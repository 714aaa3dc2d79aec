"""Names of everything below a run's root, in one place. Pure.

run.toml  events.jsonl  result.json
log/0000000042.json                          the run log
snapshots/0000000256.json  hint.json         what the first 256 records mean, and how many there are: only to open the log quickly
data/a000007/s000001200-1f2e3d4c/            a checkpoint's directory
alone/000002-000007-1f2e3d4c5b6a7988         a node of attempt 7 goes on without the answers of term 2's coordinator
steps/attempt-000001.jsonl                   step records
logs/attempt-000001/rank-00003.log           what ranks print
logs/attempt-000001/rank-00003.stacks.txt    where a rank stood when it was killed because it hung
probe/<hex>/                                 the start-up probe's, removed at its end
"""

from __future__ import annotations

import hashlib
import re
from typing import Final

RUN_CONFIG_KEY: Final = "run.toml"
EVENTS_KEY: Final = "events.jsonl"
RESULT_KEY: Final = "result.json"
HINT_KEY: Final = "hint.json"
LOG: Final = "log"
SNAPSHOTS: Final = "snapshots"
DATA: Final = "data"
ALONE: Final = "alone"
ALONE_ENDED: Final = b"ended"  # what such an object holds when that node's ranks are dead
STEPS: Final = "steps"
LOGS: Final = "logs"
PROBE: Final = "probe"

MANIFEST_NAME: Final = "MANIFEST.json"
METADATA_NAME: Final = ".metadata"  # of torch.distributed.checkpoint

_LOG_KEY: Final = re.compile(r"^log/(\d{10})\.json$")
_SNAPSHOT_KEY: Final = re.compile(r"^snapshots/(\d{10})\.json$")
_DIRECTORY: Final = re.compile(r"^data/a(\d{6,})/s(\d{9,})-([0-9a-f]{8})$")
_ALONE_KEY: Final = re.compile(r"^alone/(\d{6,})-\d{6,}-[0-9a-f]{16}$")
_RANK_INDEX: Final = re.compile(r"^rank-(\d{5,})\.json$")
_STEPS_KEY: Final = re.compile(r"^steps/attempt-(\d{6,})\.jsonl(?:/.*)?$")


def log_key(sequence: int) -> str:
    return f"{LOG}/{sequence:010d}.json"


def parse_log_key(key: str) -> int | None:
    """The sequence number of a run-log key, None for any other key."""
    match = _LOG_KEY.match(key)
    return int(match[1]) if match else None


def snapshot_key(count: int) -> str:
    """Where the meaning of the first `count` records lies."""
    return f"{SNAPSHOTS}/{count:010d}.json"


def parse_snapshot_key(key: str) -> int | None:
    """The number of records that a snapshot covers, None for any other key."""
    match = _SNAPSHOT_KEY.match(key)
    return int(match[1]) if match else None


def attempt_directory(attempt: int) -> str:
    """Where all checkpoints of an attempt lie."""
    return f"{DATA}/a{attempt:06d}"


def checkpoint_directory(attempt: int, step: int, nonce: str) -> str:
    """Where an attempt's checkpoint of a step goes: all ranks compute the same name without talking.

    `nonce` is random per attempt, so that even two attempts with one number (two histories after a disaster) never share a directory.
    """
    suffix = hashlib.sha256(f"{nonce}-{step}".encode()).hexdigest()[:8]
    return f"{attempt_directory(attempt)}/s{step:09d}-{suffix}"


def parse_checkpoint_directory(directory: str) -> tuple[int, int] | None:
    """(attempt, step) of a checkpoint's directory, None for any other key."""
    match = _DIRECTORY.match(directory)
    return (int(match[1]), int(match[2])) if match else None


def directory_of(key: str) -> str | None:
    """The checkpoint directory that holds `key`, None when it lies elsewhere."""
    directory = key.rpartition("/")[0]
    return directory if _DIRECTORY.match(directory) else None


def alone_key(term: int, attempt: int, node: str) -> str:
    """Where a node says that it goes on with an attempt although that term's coordinator does not answer it."""
    return f"{ALONE}/{term:06d}-{attempt:06d}-{hashlib.sha256(node.encode()).hexdigest()[:16]}"


def parse_alone_key(key: str) -> int | None:
    """The term, None for any other key."""
    match = _ALONE_KEY.match(key)
    return int(match[1]) if match else None


def shard_name(rank: int, index: int = 0) -> str:
    """The name under which torch.distributed.checkpoint looks for a rank's tensors."""
    return f"__{rank}_{index}.distcp"


def rank_index_name(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def parse_rank_index_name(name: str) -> int | None:
    match = _RANK_INDEX.match(name)
    return int(match[1]) if match else None


def steps_key(attempt: int) -> str:
    return f"{STEPS}/attempt-{attempt:06d}.jsonl"


def parse_steps_key(key: str) -> int | None:
    """The attempt of a steps file or of one of its segments."""
    match = _STEPS_KEY.match(key)
    return int(match[1]) if match else None


def rank_log_key(attempt: int, rank: int) -> str:
    return f"{LOGS}/attempt-{attempt:06d}/rank-{rank:05d}.log"


def rank_stacks_key(attempt: int, rank: int) -> str:
    return f"{LOGS}/attempt-{attempt:06d}/rank-{rank:05d}.stacks.txt"


def segment_key(key: str, number: int) -> str:
    """A growing file of an object store is a folder of numbered segments."""
    return f"{key}/{number:09d}.part"
