"""`keepstep checkpoints`: what people see, what it changes, and what it refuses."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny import TinyRun
from typer.testing import CliRunner

from keepstep.orchestrator import config as configs
from keepstep.orchestrator.cli import app
from keepstep.orchestrator.errors import InputError
from keepstep.orchestrator.lines import human_age
from keepstep.orchestrator.roots import claim
from keepstep.storage.disposal import GRACE_S
from keepstep.storage.layout import log_key, shard_name
from keepstep.storage.records import Pin, Quarantine, Verified
from keepstep.storage.runlog import RunLog
from keepstep.storage.store import Store


class Untidy(TinyRun):
    """Commits, and leaves the rest to the commands."""

    def tidy(self) -> None:
        return


class Root:
    """A run with commits at 10, 20, 30 and 40, of which two are kept."""

    def __init__(self, path: Path) -> None:
        self.path = path
        store = Store.open(path)
        claim(store, configs.parse(f'[run]\nroot = "{path}"\n[checkpoint]\nkeep = 2\n', "run.toml"))
        self.run = Untidy(store)
        self.run.launch()
        for step in (10, 20, 30, 40):
            self.run.save(step)

    def directory(self, step: int) -> str:
        return next(commit.directory for commit in self.run.log.lineage.live if commit.step == step)

    def log(self) -> RunLog:
        return RunLog.open(self.run.store)

    def stored_steps(self) -> list[int]:
        return sorted(int(path.name[1:10]) for path in self.path.glob("data/*/s*"))

    def spoil(self, step: int) -> None:
        path = self.path / self.directory(step) / shard_name(1)
        body = bytearray(path.read_bytes())
        body[-1] ^= 1
        path.write_bytes(bytes(body))

    def age(self, directory: str) -> None:
        """As if it had been written long ago."""
        for path in (self.path / directory).iterdir():
            written_at = path.stat().st_mtime - GRACE_S - 60
            os.utime(path, (written_at, written_at))


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path / "root")


def command(root: Root, name: str, *arguments: str, code: int = 0) -> str:
    """What `keepstep checkpoints NAME ROOT ...` prints on standard output."""
    result = CliRunner().invoke(app, ["checkpoints", name, str(root.path), *arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.stdout


def document(root: Root, name: str, *arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["checkpoints", name, str(root.path), *arguments, "--json"], catch_exceptions=False)
    assert (result.exit_code, result.stderr) == (code, ""), "a script gets nothing but the document"
    return json.loads(result.stdout)


def refusal(root: Root, name: str, *arguments: str) -> str:
    with pytest.raises(InputError) as caught:
        command(root, name, *arguments)
    return str(caught.value)


def steps(rows: Sequence[dict[str, Any]]) -> list[int]:
    return sorted(row["step"] for row in rows)


class TestList:
    def test_what_is_known_of_each(self, root: Root) -> None:
        log = root.run.log
        log.append(Verified(term=1, directory=root.directory(20)))
        log.append(Pin(term=1, directory=root.directory(20)))
        log.append(Quarantine(term=1, directory=root.directory(40), why="damaged"))
        rows = document(root, "list")
        assert [(row["step"], row["state"], row["verified"], row["pinned"]) for row in rows] == [
            (10, "committed", False, False),
            (20, "verified", True, True),
            (30, "committed", False, False),
            (40, "quarantined", False, False),
        ]
        folder = root.path / root.directory(10)
        assert rows[0]["bytes"] == sum(path.stat().st_size for path in folder.iterdir() if path.suffix != ".json")
        assert all(0 <= row["age_s"] < 600 for row in rows)
        shown = command(root, "list")
        assert "verified, pinned" in shown
        assert "1.8 KiB" in shown

    def test_what_left_the_history(self, root: Root) -> None:
        root.run.log.append(Quarantine(term=1, directory=root.directory(40), why="damaged"))
        root.run.log.append(Quarantine(term=1, directory=root.directory(30), why="damaged"))
        Untidy(root.run.store).launch()
        assert [(row["step"], row["state"]) for row in document(root, "list")] == [
            (30, "quarantined"),
            (40, "quarantined"),
            (10, "committed"),
            (20, "committed"),
        ]

    def test_a_manifest_that_cannot_be_read_hides_only_the_size(self, root: Root) -> None:
        (root.path / root.directory(10) / "MANIFEST.json").unlink()
        assert [row["bytes"] is None for row in document(root, "list")] == [True, False, False, False]
        assert "?" in command(root, "list")

    def test_ages_for_people(self) -> None:
        assert [human_age(seconds) for seconds in (None, 3.4, 300, 7300, 90_000, 900_000)] == ["?", "3 s", "5 min", "2 h", "25 h", "10 d"]


class TestVerify:
    def test_what_is_right_is_recorded_once(self, root: Root) -> None:
        assert "step 20: every byte is right" in command(root, "verify", "--step", "20")
        assert root.log().lineage.verified == {root.directory(20)}
        assert {row["verdict"] for row in document(root, "verify")} == {"every byte is right"}
        count = root.log().count
        command(root, "verify")
        assert (len(root.log().lineage.verified), root.log().count) == (4, count)

    def test_damage_is_shown_and_recorded_on_request_only(self, root: Root) -> None:
        root.spoil(40)
        shown = command(root, "verify", "--step", "40", code=3)
        assert f"step 40: DAMAGED: {shard_name(1)}: block 0" in shown
        assert "with --quarantine it is never resumed from again" in shown
        assert root.log().lineage.quarantined == frozenset()
        rows = document(root, "verify", "--quarantine", code=3)
        assert [row["note"] for row in rows] == ["", "", "", "quarantined"]
        lineage = root.log().lineage
        assert lineage.quarantined == {root.directory(40)}
        newest = lineage.newest_committed()
        assert newest
        assert newest.step == 30
        assert "(quarantined)" in command(root, "verify", "--step", "40", code=3)

    def test_a_quarantined_one_that_is_right_is_not_made_good_again(self, root: Root) -> None:
        root.run.log.append(Quarantine(term=1, directory=root.directory(40), why="read wrong"))
        assert "every byte is right (although it is quarantined)" in command(root, "verify", "--step", "40")
        assert root.log().lineage.quarantined == {root.directory(40)}

    def test_a_step_that_was_never_committed(self, root: Root) -> None:
        assert "no committed checkpoint of step 15; there are: 10, 20, 30, 40" in refusal(root, "verify", "--step", "15")

    def test_a_run_without_a_checkpoint(self, tmp_path: Path) -> None:
        TinyRun(Store.open(tmp_path))
        result = CliRunner().invoke(app, ["checkpoints", "verify", str(tmp_path)])
        assert "no committed checkpoint yet" in str(result.exception)


class TestPin:
    def test_it_is_kept_until_it_is_unpinned(self, root: Root) -> None:
        assert f"step 10 of attempt 1 ({root.directory(10)}) is pinned" in command(root, "pin", "--step", "10")
        assert root.log().lineage.pinned == {root.directory(10)}
        count = root.log().count
        assert "is pinned already" in command(root, "pin", "--step", "10")
        assert root.log().count == count
        command(root, "verify")
        assert steps(document(root, "gc")["goes"]) == [20]
        command(root, "unpin", "--step", "10")
        assert "is not pinned already" in command(root, "unpin", "--step", "10")
        assert steps(document(root, "gc")["goes"]) == [10]

    def test_of_several_of_one_step_that_of_the_history_is_meant(self, root: Root) -> None:
        for step in (30, 40):
            root.run.log.append(Quarantine(term=1, directory=root.directory(step), why="damaged"))
        again = Untidy(root.run.store)
        again.launch()
        again.save(30)
        command(root, "pin", "--step", "30")
        command(root, "pin", "--step", "40")
        newest = again.log.lineage.newest_committed()
        assert newest
        assert root.log().lineage.pinned == {newest.directory, root.directory(40)}

    def test_under_the_term_of_whoever_reigns(self, root: Root) -> None:
        root.run.log.open_term(run="tiny", identity="tiny", host="here", pid=1)
        command(root, "pin", "--step", "10")
        assert root.log().lineage.pinned
        assert root.run.log.alarms == []

    def test_not_under_a_term_that_a_record_nobody_can_read_may_have_ended(self, root: Root) -> None:
        root.run.store.put(log_key(root.log().count), b"rubbish")
        assert "a newer term may be among them" in refusal(root, "pin", "--step", "20")
        assert "(the run log does not know: fenced:" in command(root, "verify", "--step", "10")

    def test_a_step_that_was_never_committed(self, root: Root) -> None:
        assert "no committed checkpoint of step 15; there are: 10, 20, 30, 40" in refusal(root, "pin", "--step", "15")


class TestGc:
    def test_nothing_goes_while_nothing_is_verified_and_it_says_what_helps(self, root: Root) -> None:
        shown = command(root, "gc")
        assert "nothing retired: none of 4 usable checkpoints is verified yet" in shown
        assert "keepstep checkpoints verify" in shown
        assert root.stored_steps() == [10, 20, 30, 40]

    def test_a_dry_run_shows_everything_and_changes_nothing(self, root: Root) -> None:
        command(root, "verify")
        count = root.log().count
        shown = command(root, "gc", "--dry-run")
        assert "would be freed; nothing was changed" in shown
        assert shown.count("would go") == 2
        found = document(root, "gc", "--dry-run")
        assert (steps(found["goes"]), steps(found["stays"]), found["dry_run"]) == ([10, 20], [30, 40], True)
        assert found["bytes"] == sum(path.stat().st_size for step in (10, 20) for path in (root.path / root.directory(step)).iterdir())
        assert (root.stored_steps(), root.log().count) == ([10, 20, 30, 40], count)

    def test_what_the_config_does_not_keep_goes_and_the_rest_has_its_reason(self, root: Root) -> None:
        command(root, "verify")
        command(root, "pin", "--step", "10")
        found = document(root, "gc")
        assert {row["step"]: row["why"] for row in found["goes"]} == {20: "not among the newest 2 verified"}
        assert {row["step"]: row["why"] for row in found["stays"]} == {
            10: "pinned",
            30: "among the newest 2 verified",
            40: "among the newest 2 verified",
        }
        assert root.stored_steps() == [10, 30, 40]
        assert steps(document(root, "gc")["goes"]) == []

    def test_what_may_still_be_committed_or_is_being_written_stays(self, root: Root) -> None:
        old, young, next_ = (root.run.persist(step).directory for step in (5, 6, 50))
        root.age(old)
        root.age(next_)
        found = document(root, "gc")
        assert {row["directory"]: row["why"] for row in found["goes"]} == {old: "nobody can commit it any more"}
        reasons = {row["directory"]: row["why"] for row in found["stays"]}
        assert reasons[next_] == "its attempt may still commit it"
        assert reasons[young].endswith("goes after 900 s")
        assert root.stored_steps() == [6, 10, 20, 30, 40, 50]

    def test_what_cannot_be_deleted_is_said_and_goes_the_next_time(self, root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
        command(root, "verify")
        stuck = root.directory(10)
        with monkeypatch.context() as patch:
            patch.setattr("keepstep.orchestrator.checkpoints.dispose", _refuse)
            shown = command(root, "gc", code=3)
        assert shown.count("could not be deleted: cannot delete: Permission denied") == 2
        root.age(stuck)
        assert [row["directory"] for row in document(root, "gc")["goes"]] == [stuck]


def _refuse(store: Store, directory: str) -> None:
    from keepstep.storage.errors import StoreForbidden

    raise StoreForbidden("cannot delete: Permission denied")
