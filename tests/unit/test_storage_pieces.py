"""The small pure pieces: names, fault plans, retries, and what an ambiguous answer means."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from keepstep.storage import layout
from keepstep.storage.errors import DamagedCheckpoint, NotFound, StoreUnavailable
from keepstep.storage.faults import InjectedError, fault_point, parse_plan
from keepstep.storage.put_new import put_new_remote
from keepstep.storage.retry import RetryPolicy
from keepstep.storage.store import StorageOptions, Store


class TestNames:
    def test_a_name_gives_back_what_it_was_made_of(self) -> None:
        assert layout.parse_log_key(layout.log_key(42)) == 42
        assert layout.parse_checkpoint_directory(layout.checkpoint_directory(7, 1200, "n")) == (7, 1200)
        assert layout.parse_rank_index_name(layout.rank_index_name(3)) == 3
        assert layout.parse_steps_key(layout.steps_key(1)) == 1
        assert layout.parse_steps_key(layout.segment_key(layout.steps_key(1), 5)) == 1

    def test_names_are_those_of_the_interface(self) -> None:
        assert layout.log_key(42) == "log/0000000042.json"
        assert layout.checkpoint_directory(7, 1200, "n").startswith("data/a000007/s000001200-")
        assert layout.rank_index_name(3) == "rank-00003.json"
        assert layout.steps_key(1) == "steps/attempt-000001.jsonl"
        assert layout.rank_log_key(1, 3) == "logs/attempt-000001/rank-00003.log"
        assert layout.shard_name(3) == "__3_0.distcp"

    @pytest.mark.parametrize("key", ["log/42.json", "log/0000000042.json.tmp", "data/0000000042.json", ""])
    def test_other_names_are_no_records(self, key: str) -> None:
        assert layout.parse_log_key(key) is None

    def test_all_ranks_find_the_same_directory_and_no_two_saves_share_one(self) -> None:
        names = {layout.checkpoint_directory(attempt, step, nonce) for attempt in (1, 2) for step in (1, 2) for nonce in "ab"}
        assert len(names) == 8
        assert layout.checkpoint_directory(1, 2, "a") == layout.checkpoint_directory(1, 2, "a")

    def test_the_directory_of_a_file_is_found(self) -> None:
        directory = layout.checkpoint_directory(1, 2, "a")
        assert layout.directory_of(f"{directory}/__0_0.distcp") == directory
        assert layout.directory_of("log/0000000001.json") is None


class TestFaults:
    def test_a_plan_is_points_with_facts(self) -> None:
        first, second = parse_plan("rank.step:step=7:rank=1;coordinator.commit.before:once=marker:signal=STOP")
        assert (first.point, first.facts, first.once) == ("rank.step", (("rank", "1"), ("step", "7")), "")
        assert (second.point, second.facts, second.once) == ("coordinator.commit.before", (), "marker")

    def test_a_plan_that_is_not_understood_is_refused(self) -> None:
        with pytest.raises(ValueError, match="is not POINT:key=value"):
            parse_plan("rank.step:7")
        with pytest.raises(ValueError, match="no action 'sleep'; known are raise, exit"):
            parse_plan("rank.step:action=sleep")

    def test_a_trigger_fires_for_the_process_that_was_meant_and_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KEEPSTEP_FAULTS", f"rank.step:action=raise:when={tmp_path}/raise-{{rank}}")
        (tmp_path / "raise-1").touch()
        fault_point("rank.step", rank=0)
        with pytest.raises(InjectedError):
            fault_point("rank.step", rank=1)
        fault_point("rank.step", rank=1)

    @pytest.mark.slow
    def test_a_fault_kills_once_per_marker_and_only_where_its_facts_fit(self, tmp_path: Path) -> None:
        script = "import sys; from keepstep.storage.faults import fault_point; fault_point('rank.step', step=int(sys.argv[1]))"
        plan = {**os.environ, "KEEPSTEP_FAULTS": f"rank.step:step=7:once={tmp_path / 'fired'}"}
        codes = [subprocess.run([sys.executable, "-c", script, step], env=plan, check=False).returncode for step in ("6", "7", "7")]
        assert codes == [0, -signal.SIGKILL, 0]


class TestRetries:
    def policy(self, waits: list[float], tries: int = 5) -> RetryPolicy:
        return RetryPolicy(max_tries=tries, first_wait_s=1.0, max_wait_s=4.0, sleep=waits.append)

    def failing(self, *errors: Exception) -> Callable[[float], str]:
        left = list(errors)

        def work(_: float) -> str:
            if left:
                raise left.pop(0)
            return "done"

        return work

    def test_transient_errors_are_tried_again_with_bounded_waits(self) -> None:
        waits: list[float] = []
        work = self.failing(*[TimeoutError()] * 4)
        assert self.policy(waits).call(work, is_transient=lambda e: isinstance(e, TimeoutError), what="read x") == "done"
        assert len(waits) == 4
        assert all(0 <= wait <= bound for wait, bound in zip(waits, (1, 2, 4, 4), strict=True))

    def test_other_errors_are_raised_at_once(self) -> None:
        waits: list[float] = []
        with pytest.raises(PermissionError):
            self.policy(waits).call(self.failing(PermissionError()), is_transient=lambda e: isinstance(e, TimeoutError), what="read x")
        assert waits == []

    def test_the_last_error_is_in_the_message(self) -> None:
        with pytest.raises(StoreUnavailable, match=r"cannot read x: 3 tries, the last one said: TimeoutError: slow"):
            self.policy([], tries=3).call(self.failing(*[TimeoutError("slow")] * 9), is_transient=lambda _: True, what="read x")

    def test_the_deadline_ends_it(self) -> None:
        policy = RetryPolicy(deadline_s=0.0, sleep=lambda _: None)
        with pytest.raises(StoreUnavailable, match="1 tries"):
            policy.call(self.failing(*[TimeoutError()] * 9), is_transient=lambda _: True, what="read x")


class TestAmbiguousAnswers:
    """A fake object store that answers as we say, whatever it does."""

    def attempt(self, held: bytes | None, answer: bool | Exception) -> bool:
        def create() -> bool:
            if isinstance(answer, Exception):
                raise answer
            return answer

        def read() -> bytes:
            if held is None:
                raise NotFound("no object")
            return held

        return put_new_remote(create, read, b"mine", is_ambiguous=lambda error: isinstance(error, TimeoutError))

    def test_created_is_won(self) -> None:
        assert self.attempt(b"mine", True)

    def test_taken_by_another_is_lost(self) -> None:
        assert not self.attempt(b"theirs", False)

    def test_taken_by_our_own_repeated_request_is_won(self) -> None:
        assert self.attempt(b"mine", False)

    def test_after_a_time_out_the_object_tells(self) -> None:
        assert self.attempt(b"mine", TimeoutError())
        assert not self.attempt(b"theirs", TimeoutError())

    def test_a_time_out_that_wrote_nothing_is_raised_for_the_next_try(self) -> None:
        with pytest.raises(TimeoutError):
            self.attempt(None, TimeoutError())

    def test_a_clear_refusal_is_raised(self) -> None:
        with pytest.raises(PermissionError):
            self.attempt(b"mine", PermissionError())


class TestOptions:
    def test_they_cross_a_process_border(self, monkeypatch: pytest.MonkeyPatch) -> None:
        options = StorageOptions(endpoint_url="http://127.0.0.1:1", secret="s", deadline_s=7.0)
        monkeypatch.setenv("KEEPSTEP_STORAGE_OPTIONS", options.to_json())
        assert StorageOptions.from_env() == options

    def test_the_secret_is_not_shown(self) -> None:
        assert "hush" not in repr(StorageOptions(secret="hush"))

    @pytest.mark.parametrize(("url", "why"), [("teapot://x", "cannot be opened"), ("s3://", "names no bucket")])
    def test_a_url_that_cannot_be_opened_is_refused(self, url: str, why: str) -> None:
        with pytest.raises(ValueError, match=why):
            Store.open(url)


def test_a_damaged_checkpoint_crosses_a_process_border() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(DamagedCheckpoint("data/x", "f", "is missing")))
    assert (error.directory, error.file, error.why, str(error)) == ("data/x", "f", "is missing", "damaged checkpoint data/x: f: is missing")
