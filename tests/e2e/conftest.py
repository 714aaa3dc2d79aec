"""One undisturbed run to compare with, and live runs that are checked for what must always hold."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from e2e.live import LiveRun, Outcome, config_text

Start = Callable[..., LiveRun]


@pytest.fixture(scope="session")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run.toml with a text of its own: words of a small vocabulary, the same on every machine."""
    folder = tmp_path_factory.mktemp("e2e")
    chance = random.Random(5)
    words = ["".join(chance.choice("abcdefghijklmnop") for _ in range(chance.randint(2, 7))) for _ in range(60)]
    documents = [" ".join(chance.choices(words, k=120)) for _ in range(60)]
    text = folder / "text"
    text.mkdir()
    for i, document in enumerate(documents):
        (text / f"{i:03d}.txt").write_text(document)
    path = folder / "run.toml"
    path.write_text(config_text(text))
    return path


@pytest.fixture(scope="session")
def undisturbed_run(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> LiveRun:
    """Finished. Tests may look at its root, and change nothing that others see."""
    run = LiveRun(config_file, str(tmp_path_factory.mktemp("undisturbed") / "root")).start()
    assert run.wait() == 0, run.said()
    run.check_what_always_holds()
    return run


@pytest.fixture(scope="session")
def undisturbed(undisturbed_run: LiveRun) -> Outcome:
    return undisturbed_run.outcome()


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """For scratch directories: a Unix socket's path has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="ks-") as folder:
        yield Path(folder)


@pytest.fixture
def start(config_file: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts runs; afterwards whatever they left is killed, and what always holds is checked."""
    runs: list[LiveRun] = []

    def begin(*overrides: str, faults: str = "", **kwargs: object) -> LiveRun:
        run = LiveRun(config_file, str(kwargs.pop("root", tmp_path / f"root{len(runs)}")), overrides, **kwargs)  # type: ignore[arg-type]
        runs.append(run)
        return run.start(faults=faults)

    yield begin
    for run in runs:
        if run.process and run.process.poll() is None:
            run.kill_everything()
