"""Every golden story is told as written. `--rewrite` accepts what the machine says now."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from scenario_script import Script

STORIES = sorted(Path(__file__).parent.glob("*.txt"))


def tell(text: str) -> str:
    """The story with what follows each event told anew."""
    return "".join(f"{line}\n" for line in _lines(text))


def _lines(text: str) -> Iterator[str]:
    script = Script.begin("policy")
    for line in text.splitlines():
        if line.startswith("    "):
            continue  # what an event led to when the story was written
        yield line
        if line.startswith("policy"):
            script = Script.begin(line)
        if line.startswith(">"):
            yield from (f"    {told}" for told in script.play(line))


@pytest.mark.parametrize("path", STORIES, ids=lambda path: path.stem)
def test_story(path: Path, rewrite: bool) -> None:
    text = path.read_text()
    told = tell(text)
    if rewrite:
        path.write_text(told)
    assert told == path.read_text(), f"{path.name}: the machine decides differently now; `pytest --rewrite` shows how"


def test_there_are_enough_stories() -> None:
    assert len(STORIES) >= 20
