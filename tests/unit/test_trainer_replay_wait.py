"""What the parent of a replay makes of what its processes say, and of their silence."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import pytest

from keepstep.storage.errors import DamagedCheckpoint
from keepstep.trainer import replay
from keepstep.trainer.replay import Job, ReplayFailed, Stretch
from keepstep.trainer.replaying import _failure

Words = list[list[Mapping[str, Any]]]  # by rank; who says nothing at all, or no more than "done", hangs; others end
LOST = _failure(RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:38211"))
OWN = _failure(ValueError("no such tokens"))
DAMAGED = {"damaged": ("data/a1/s3", "__1_0.distcp", "it is cut")}


def hear(monkeypatch: pytest.MonkeyPatch, words: Words) -> list[Mapping[str, Any]]:
    pipes = [Pipe(duplex=False) for _ in words]

    @contextlib.contextmanager
    def started(context: Any, job: Job) -> Iterator[tuple[list[Any], dict[Connection, int]]]:
        for (_, end), said in zip(pipes, words, strict=True):
            for word in said:
                end.send(word) if word else end.close()
        yield [SimpleNamespace(join=lambda timeout: None, exitcode=-9)] * len(words), {end: rank for rank, (end, _) in enumerate(pipes)}

    monkeypatch.setattr(replay, "_started", started)
    monkeypatch.setattr(replay, "_SILENCE_S", 0.01)
    monkeypatch.setattr(replay, "_MOMENT_S", 0.01)
    stretch = Stretch(config=None, attempt=1, world_size=len(words), after=0, last=1)  # type: ignore[arg-type]
    job = Job(stretch=stretch, origin=None, num_processes=len(words), folder="", hands_over=False, view=None)
    try:
        return replay._run(job, 0, lambda done: None)
    finally:
        for pipe in pipes:
            for end in pipe:
                end.close()


@pytest.mark.parametrize(
    ("words", "error", "said"),
    [
        ([[LOST], [{"done": 10}, DAMAGED], [OWN]], DamagedCheckpoint, "is cut"),
        ([[OWN], [LOST], [DAMAGED]], DamagedCheckpoint, "is cut"),
        ([[LOST], [LOST], [OWN]], ReplayFailed, "rank 2: ValueError: no such tokens"),
        ([[LOST], [{}]], ReplayFailed, "process 1 of the replay ended with exit code -9"),
        ([[LOST], [{"done": 10}]], ReplayFailed, "rank 0: RuntimeError"),
        ([[{"outcome": {}}], [LOST]], ReplayFailed, "rank 1: RuntimeError"),
        ([[{"done": 10}], []], ReplayFailed, "no process of the replay has said anything for"),
    ],
)
def test_the_cause_is_told_and_no_consequence(monkeypatch: pytest.MonkeyPatch, words: Words, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        hear(monkeypatch, words)


def test_every_outcome_is_given_by_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hear(monkeypatch, [[{"done": 1}, {"outcome": {"of": 0}}], [{"outcome": {"of": 1}}]]) == [{"of": 0}, {"of": 1}]
