"""`keepstep rewind`: what it does to a run that nobody coordinates, what it refuses, and what the log's keeper answers."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from io import StringIO
from pathlib import Path

import pytest
from aiohttp import web
from rich.console import Console
from tiny import TinyRun
from typer.testing import CliRunner

from keepstep.orchestrator import config as configs
from keepstep.orchestrator import events as ev
from keepstep.orchestrator import logbook, rewinding
from keepstep.orchestrator.agent import replaced
from keepstep.orchestrator.archive import read_events
from keepstep.orchestrator.cli import app
from keepstep.orchestrator.errors import InputError
from keepstep.orchestrator.logbook import newest_checkpoint, opened_event
from keepstep.orchestrator.rewinding import order
from keepstep.orchestrator.roots import claim, stored_config, token_of
from keepstep.orchestrator.screen import Screen
from keepstep.orchestrator.sections import RunConfig
from keepstep.orchestrator.wire import RewindWish
from keepstep.storage.records import Commit, Finished, Retire, Rewind
from keepstep.storage.runlog import RunLog
from keepstep.storage.store import Store

SAMPLES = 32  # of a step


class Kept(TinyRun):
    """Nothing is retired."""

    def tidy(self) -> None:
        return


@pytest.fixture
def run(tmp_path: Path) -> Kept:
    """Commits at 10, 20 and 30; then the run succeeded."""
    store = Store.open(tmp_path)
    claim(store, configs.parse(f'[run]\nroot = "{tmp_path}"\nsteps = 30\n', "run.toml"))
    token_of(store)
    made = Kept(store)
    made.launch()
    for step in (10, 20, 30):
        made.save(step)
    made.log.append(Finished(term=made.term, step=30, outcome="succeeded", why="all steps are done"))
    return made


def command(run: TinyRun, *arguments: str) -> str:
    return CliRunner().invoke(app, ["rewind", run.store.name, *arguments], catch_exceptions=False).output


def reread(run: TinyRun) -> RunLog:
    return RunLog.open(run.store)


def ordered(run: TinyRun, to: int, skip: Sequence[str] = (), override: Sequence[str] = ()) -> ev.LogRewind:
    return order(reread(run).lineage, stored_config(run.store), to=to, skip=skip, override=override)


def test_an_ended_run_goes_back_and_its_end_is_void(run: Kept) -> None:
    told = command(run, "--to", "25", "--skip", "700:720", "-o", "optimizer.lr=0.001")
    assert "rewound to step 20 (data/a000001/s000000020" in told
    assert "leaving out the samples at 700:720, with optimizer.lr=0.001" in told
    assert "its end (all steps are done) is void" in told
    assert "keepstep run" in told
    log = reread(run)
    assert (log.lineage.outcome, log.lineage.committed_step, log.lineage.term) == (None, 20, 2)
    opened = opened_event(log)
    assert (opened.ended, opened.rewound, opened.skips, opened.overrides) == (True, True, ("700:720",), ("optimizer.lr=0.001",))
    (event,) = [event for event in read_events(run.store) if event["kind"] == "rewound"]
    assert event["why"].startswith("rewound to step 20")


def test_the_old_history_stays_open_to_inspection(run: Kept) -> None:
    command(run, "--to", "10")
    listed = CliRunner().invoke(app, ["checkpoints", "list", run.store.name]).output.splitlines()
    states = [line.split("│")[3].strip() for line in listed if "data/" in line]
    assert states == ["abandoned", "abandoned, pinned (the last before a rewind)", "committed"]


def test_one_rewind_after_the_other(run: Kept) -> None:
    command(run, "--to", "20", "--skip", "700:720", "-o", "optimizer.lr=0.001", "-o", "optimizer.eps=1e-7")
    command(run, "--to", "10", "--skip", "710:730", "-o", "optimizer.lr=0.002")
    lineage = reread(run).lineage
    assert (lineage.skips, lineage.overrides) == (("700:730",), ("optimizer.lr=0.002", "optimizer.eps=1e-7"))
    assert (lineage.committed_step, lineage.tips) == (10, {commit.directory for commit in lineage.abandoned})


def test_to_the_beginning(run: Kept) -> None:
    assert "rewound to the beginning" in command(run, "--to", "0", "--skip", "5:6")
    assert opened_event(reread(run)).ever_committed is False


def test_the_same_run_toml_continues_with_the_overrides_on_top(run: Kept) -> None:
    command(run, "--to", "20", "-o", "optimizer.lr=0.001", "-o", "train.spike.budget=9")
    stored = stored_config(run.store)
    assert claim(run.store, stored) == stored
    lineage = reread(run).lineage
    config = configs.overridden(stored, lineage.overrides)
    assert (config.optimizer.lr, config.train.spike.budget, config.optimizer.eps) == (0.001, 9, stored.optimizer.eps)


@pytest.mark.parametrize(
    ("to", "skip", "override", "why"),
    [
        (9, [], [], "no usable checkpoint at or before step 9 in the history; there are: 10, 20, 30; step 0 is the beginning"),
        (31, [], [], "--to 31: the run has 30 steps"),
        (20, ["7:7"], [], "--skip: '7:7' must be FIRST:LAST"),
        (20, ["600:700"], [], "step 20 has consumed the samples before position 640; go back further, or leave out 640:700"),
        (20, [], ["model.layers=9"], "model.layers cannot be changed by a rewind: the checkpoints hold this model"),
        (20, [], ["train.lora.alpha=9"], "train.lora.alpha cannot be changed by a rewind: the checkpoints hold the parameters that follow"),
        (0, [], ["train.objective=masked"], "train.objective cannot be changed by a rewind: the checkpoints hold the parameters"),
        (20, [], ["data.skip=[]"], "leave samples out with --skip"),
        (20, [], ["data.source=/x"], "the order of the samples"),
        (20, [], ["run.seed=3"], "it decides the order of the samples"),
        (20, [], ["run.root=/x"], "it is what the root belongs to"),
        (20, [], ["train.batch_tokens=8192"], "where a step begins"),
        (20, [], ["train.script=x.py"], "another script"),
        (20, [], ["cluster.nodes=3"], "change it in run.toml"),
        (20, [], ["cluster.exact_reduction=true"], "in which order gradients are added, and with it the bits of every step"),
        (20, [], ["cluster.logical_ranks=2"], "in which order gradients are added"),
        (30, [], ["run.steps=25"], "run.steps = 25 must not be below step 30, to which the run goes back"),
        (20, [], ["optimizer.lr=-1"], "optimizer.lr = -1 must be"),
        (20, [], ["optimizer.rl=1"], "optimizer.rl is not a key"),
        (20, [], ["lr"], "must be section.key=value"),
        (20, [], ["optimizer.warmup_steps=99"], "must not exceed"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(run: Kept, to: int, skip: list[str], override: list[str], why: str) -> None:
    with pytest.raises(InputError) as refused:
        ordered(run, to, skip, override)
    assert why in str(refused.value)
    assert not any(isinstance(record, Rewind) for record in reread(run).records)


def test_nothing_is_left_out_of_a_scripts_own_data(run: Kept) -> None:
    config = stored_config(run.store)
    script = config.model_copy(update={"train": config.train.model_copy(update={"script": "train.py"})})
    with pytest.raises(InputError, match="--skip: a script reads its own data"):
        order(reread(run).lineage, script, to=20, skip=["700:701"], override=[])


def test_all_problems_are_named_at_once(run: Kept) -> None:
    with pytest.raises(InputError) as refused:
        ordered(run, 20, ["1:2", "600:601"], ["model.layers=9", "run.seed=1"])
    assert len(refused.value.problems) == 4


def test_what_is_left_out_already_may_be_named_again(run: Kept) -> None:
    command(run, "--to", "10", "--skip", "400:410")
    assert ordered(run, 10, ["400:405"]).skips == ("400:410",)


def test_skips_of_before_shift_where_the_next_ones_may_begin(run: Kept) -> None:
    """Step 20 has consumed 640 samples; ten positions among them were left out."""
    command(run, "--to", "10", "--skip", "400:410")
    run.log.refresh()
    again = Kept(run.store)
    found = again.logbook.carry_out(ev.FindCheckpoint())
    assert isinstance(found, ev.Found)
    asked = ev.LogAttempt(attempt=2, gang=("tiny#1",), world_size=2, resume=found.resume, skips=("400:410",))
    assert isinstance(again.logbook.carry_out(asked), ev.Logged)
    again.save(20)
    with pytest.raises(InputError, match="before position 650"):
        ordered(again, 20, ["645:660"])
    assert ordered(again, 20, ["650:660"]).to == 20


def test_a_save_that_comes_later_is_not_gone_back_to(run: Kept) -> None:
    """--to 29 chose step 20; were step 25 committed meanwhile, it might have consumed what is to be left out."""
    assert ordered(run, 29).to == 20


def test_ranks_of_an_attempt_that_was_rewound_stop_although_nobody_tells_them(run: Kept) -> None:
    assert "the run is over" in replaced(reread(run).lineage, 1)
    command(run, "--to", "20")
    assert replaced(reread(run).lineage, 1) == "attempt 1 was rewound: a person asked to go back to step 20"


def test_nothing_was_trained_yet(tmp_path: Path) -> None:
    log = RunLog.open(Store.open(tmp_path))
    log.open_term(run="x", identity="i", host="h", pid=1)
    with pytest.raises(InputError, match="nothing was trained yet"):
        order(log.lineage, RunConfig(), to=0, skip=[], override=[])


def test_a_commit_of_the_last_moment_is_thought_of(run: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody whom the command could not see had committed more: what is left out is judged by the log that is ours."""
    command(run, "--to", "20")
    run.log.refresh()
    again = Kept(run.store)
    again.logbook.carry_out(ev.FindCheckpoint())
    again.logbook.carry_out(ev.LogAttempt(attempt=2, gang=("tiny#1",), world_size=2, resume=newest_checkpoint(again.log)))
    visit = rewinding.visit

    def visit_then_commit(root: str) -> tuple[Store, RunLog]:
        found = visit(root)
        again.save(25)
        return found

    monkeypatch.setattr(rewinding, "visit", visit_then_commit)
    with pytest.raises(InputError, match="step 25 has consumed the samples before position 800"):
        command(run, "--to", "25", "--skip", "700:720")
    assert "rewound to step 25" in command(run, "--to", "25")
    commits = [record.step for record in reread(run).records if isinstance(record, Commit)]
    assert commits == [10, 20, 30, 25]


@pytest.mark.parametrize("status", [409, 500, 503])
def test_a_coordinator_that_answers_anything_lives(run: Kept, status: int) -> None:
    """Nobody else writes its log then, and its reason reaches the person."""

    async def refuse(_: web.Request) -> web.Response:
        return web.Response(status=status, text="not now")

    with answering(run, refuse), pytest.raises(InputError, match=f"{status} not now"):
        command(run, "--to", "20")
    assert not any(isinstance(record, Rewind) for record in reread(run).records)


def test_hundreds_of_samples_may_be_left_out(run: Kept) -> None:
    heard: list[RewindWish] = []

    async def hear(request: web.Request) -> web.Response:
        heard.append(RewindWish.model_validate_json(await request.read()))
        return web.Response(text="going back")

    skip = tuple(f"{1_000_000 + 2 * number}:{1_000_001 + 2 * number}" for number in range(2000))
    with answering(run, hear):
        arguments = (argument for text in skip for argument in ("--skip", text))
        assert command(run, "--to", "20", *arguments, "-o", "optimizer.lr=0.1") == "going back\n"
    assert heard == [RewindWish(to=20, skip=skip, override=("optimizer.lr=0.1",))]


@contextmanager
def answering(run: Kept, handler: Callable[[web.Request], Awaitable[web.Response]]) -> Iterator[None]:
    """Somebody at the address in the log's newest `opened`."""
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    run.log.open_term(run="tiny", identity="tiny", host="h", pid=1, url=url)
    over = threading.Event()

    async def serve() -> None:
        application = web.Application()
        application.add_routes([web.post("/v1/rewind", handler)])
        runner = web.AppRunner(application)
        await runner.setup()
        await web.SockSite(runner, listener).start()
        await asyncio.to_thread(over.wait)
        await runner.cleanup()

    server = threading.Thread(target=asyncio.run, args=(serve(),))
    server.start()
    try:
        yield
    finally:
        over.set()
        server.join()


def test_the_steps_that_are_shown_are_those_in_force(run: Kept) -> None:
    command(run, "--to", "20", "-o", "run.steps=60")
    assert "step 20/60" in CliRunner().invoke(app, ["status", run.store.name]).output
    shown = StringIO()
    screen = Screen(stored_config(run.store), run.store, Console(file=shown))
    screen.event({"kind": "progress", "attempt": 2, "step": 30, "steps": 60})
    assert shown.getvalue() == "step 30/60\n"


class TestLogbook:
    REQUEST = ev.LogRewind(to=25, skips=("700:702",), bad_step=26, why="step 26 is bad")

    @pytest.fixture
    def live(self, tmp_path: Path) -> Kept:
        made = Kept(Store.open(tmp_path))
        made.launch()
        for step in (10, 20):
            made.save(step)
        return made

    def test_asked_twice_it_is_logged_once(self, live: Kept) -> None:
        answers = [live.logbook.carry_out(self.REQUEST) for _ in range(2)]
        assert isinstance(answers[0], ev.Logged)
        assert isinstance(answers[1], ev.Logged)
        assert answers[0].record == answers[1].record
        assert sum(isinstance(record, Rewind) for record in live.log.records) == 1

    def test_what_is_whole_in_storage_is_committed_first(self, live: Kept) -> None:
        live.persist(24)
        answer = live.logbook.carry_out(self.REQUEST)
        assert isinstance(answer, ev.Logged)
        assert isinstance(answer.record, ev.RewindRecord)
        assert answer.record.resume
        assert answer.record.resume.step == 24

    def test_what_a_rewound_attempt_left_whole_is_never_committed(self, live: Kept) -> None:
        live.logbook.carry_out(ev.LogRewind(to=10, why="p"))
        live.persist(24)
        found = live.logbook.carry_out(ev.FindCheckpoint())
        assert isinstance(found, ev.Found)
        assert found.resume
        assert (found.resume.step, found.rolled_forward) == (10, False)

    def test_a_bad_step_before_every_commit_leads_to_the_beginning(self, tmp_path: Path) -> None:
        made = Kept(Store.open(tmp_path))
        made.launch()
        answer = made.logbook.carry_out(ev.LogRewind(to=4, bad_step=5, why="b"))
        assert isinstance(answer, ev.Logged)
        assert isinstance(answer.record, ev.RewindRecord)
        assert answer.record.resume is None

    @pytest.mark.parametrize("to", [4, 0])
    def test_a_bad_step_never_throws_away_what_is_committed(self, live: Kept, to: int) -> None:
        answer = live.logbook.carry_out(ev.LogRewind(to=to, bad_step=to + 1, why="b"))
        assert isinstance(answer, ev.RewindVoid)
        assert "no usable checkpoint" in answer.why
        assert len(live.log.lineage.commits) == 2

    def test_a_checkpoint_that_is_retired_at_this_moment_makes_the_rewind_void(self, live: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
        def retire(point: str, **_: object) -> None:
            if point == "coordinator.rewind.before":
                other = RunLog.open(live.store)
                other.append(Retire(term=live.term, directories=(other.lineage.commits[0].directory,)))

        monkeypatch.setattr(logbook, "fault_point", retire)
        answer = live.logbook.carry_out(ev.LogRewind(to=10, why="p"))
        assert isinstance(answer, ev.RewindVoid)
        assert "not a usable commit of the history" in answer.why

    @pytest.mark.parametrize(("bad_step", "forgiven"), [(-1, True), (26, False)])
    def test_a_successor_hears_whether_people_sent_the_run_back(self, live: Kept, bad_step: int, forgiven: bool) -> None:
        live.logbook.carry_out(ev.LogRewind(to=25, bad_step=bad_step, why="x"))
        opened = opened_event(live.log)
        assert (opened.rewound, opened.forgiven) == (True, forgiven)

    def test_people_are_asked_to_say_so(self, live: Kept) -> None:
        assert isinstance(live.logbook.carry_out(ev.LogRewind(to=4, why="p")), ev.RewindVoid)

    def test_never_from_scratch_because_all_is_quarantined(self, live: Kept) -> None:
        for commit in live.log.lineage.commits:
            live.logbook.carry_out(ev.LogQuarantine(commit.directory, "damaged"))
        assert isinstance(live.logbook.carry_out(self.REQUEST), ev.RewindVoid)
