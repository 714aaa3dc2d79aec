"""A rank's door to its agent."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path
from typing import Any

import pytest
from trainer_ranks import FolderStaging, commit, run_ranks, spec_of

from keepstep.trainer import attach as attach_module
from keepstep.trainer.attach import Attached, attach
from keepstep.trainer.contract import ENV_SPEC, MARKS, REQUEST_OFFSET, Phase, Progress, RankSpec, Request, Resume, read_marks

RESUME = Resume(step=7, directory="data/a000001/s000000007-01234567", manifest_sha256="ab")


@pytest.fixture
def spec(tmp_path: Path) -> RankSpec:
    return spec_of(tmp_path, 0, 1, RESUME)


def test_a_spec_survives_the_environment(spec: RankSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV_SPEC, spec.to_json())
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    me = attach()
    assert (me.spec, me.resume) == (spec, RESUME)
    assert (me.rank, me.world_size, me.local_rank) == (3, 4, 1)


def test_a_spec_of_another_version_is_refused(spec: RankSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV_SPEC, spec.to_json().replace('"nonce"', '"novelty"'))
    with pytest.raises(TypeError, match="novelty"):
        attach()


def test_reports_reach_the_page_and_leave_the_request_alone(spec: RankSpec) -> None:
    me = Attached(spec)
    page = Path(spec.progress_path)
    body = bytearray(page.read_bytes())
    body[REQUEST_OFFSET] = Request.STOP
    with page.open("r+b") as file:
        file.write(body)
    me.report(Phase.STEP, 41)
    me.report(Phase.STEP, 42)
    seen = Progress.read(page.read_bytes())
    assert (seen.phase, seen.request, seen.step, seen.beats, seen.limit_s) == (Phase.STEP, Request.STOP, 42, 2, 0)
    assert seen.at > 0
    assert me.request() is Request.STOP


def test_an_announced_silence_is_on_the_page_until_the_next_report(spec: RankSpec) -> None:
    me = Attached(spec)
    me.report(Phase.EVALUATE, 41, within_s=600)
    assert Progress.read(Path(spec.progress_path).read_bytes()).limit_s == 600
    me.report(Phase.STEP, 41)
    assert Progress.read(Path(spec.progress_path).read_bytes()).limit_s == 0


def test_a_milestone_is_marked_once_and_those_that_come_by_themselves_are(spec: RankSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV_SPEC, spec.to_json())
    page = Path(spec.progress_path)
    me = attach()
    me.mark("joined")
    marked = read_marks(page.read_bytes())
    assert [bool(at) for at in marked] == [True, True, False, False, False]
    me.mark("joined")
    me.report(Phase.STEP, RESUME.step)
    assert read_marks(page.read_bytes()) == marked
    me.report(Phase.STEP, RESUME.step + 1)
    stepped = read_marks(page.read_bytes())[MARKS.index("stepped")]
    me.report(Phase.SAVE, RESUME.step + 1)
    seen = Progress.read(page.read_bytes())
    assert 0 < stepped == seen.stepped_at < seen.at
    me.report(Phase.STEP, RESUME.step + 2)
    assert read_marks(page.read_bytes())[-1] == stepped < Progress.read(page.read_bytes()).stepped_at
    with pytest.raises(ValueError, match="not in tuple"):
        me.mark("lunch")


def test_the_stall_of_saves_adds_up(spec: RankSpec) -> None:
    me = Attached(spec)
    me.stalled(0.25)
    me.stalled(0.5)
    me.report(Phase.STEP, 8)
    assert Progress.read(Path(spec.progress_path).read_bytes()).stalled_s == 0.75


EXAMPLE = textwrap.dedent(attach_module.__doc__.partition("nothing is saved:\n\n")[2])  # type: ignore[union-attr]


def example(rank: int, world_size: int, root: str, attempt: int, resume: Resume | None) -> None:
    """The docstring's program, with a staging area in place of a persister; its parameters go to a file."""
    if attempt:
        os.environ[ENV_SPEC] = spec_of(Path(root), rank, attempt, resume).to_json()
        Attached.staging = FolderStaging(Path(root), attempt=attempt, rank=rank, world_size=world_size)  # type: ignore[assignment]
    names: dict[str, Any] = {}
    exec(compile(EXAMPLE, "example", "exec"), names)
    (Path(root) / f"parameters-{attempt}-{rank}").write_text(repr([p.tolist() for p in names["model"].parameters()]))


@pytest.mark.slow
def test_the_example_trains_saves_resumes_and_also_runs_alone(tmp_path: Path) -> None:
    run_ranks(2, example, str(tmp_path), 0, None)
    run_ranks(2, example, str(tmp_path), 1, None)
    assert sorted(path.name[:10] for path in tmp_path.glob("data/a000001/*")) == [f"s{step:09d}" for step in (5, 10, 15, 20)]
    (folder,) = tmp_path.glob("data/a000001/s000000010-*")
    run_ranks(2, example, str(tmp_path), 2, commit(tmp_path, str(folder.relative_to(tmp_path))))
    parameters = {path.read_text() for path in tmp_path.glob("parameters-*")}
    assert len(list(tmp_path.glob("parameters-*"))) == 6
    assert len(parameters) == 1
    seen = Progress.read((tmp_path / "scratch/progress-2-0").read_bytes())
    assert (seen.phase, seen.step) == (Phase.DONE, 20)
    assert seen.pulse_at > 0


def test_without_keepstep_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (ENV_SPEC, "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    me = attach()
    assert (me.spec, me.resume, me.staging, me.request()) == (None, None, None, Request.NONE)
    assert (me.rank, me.world_size, me.local_rank) == (0, 1, 0)
    me.report(Phase.DONE, 1)
    me.mark("loaded")
    me.stalled(0.1)
    me.record_step({"step": 1})
