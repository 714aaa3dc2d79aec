"""Where a rank stands: its threads' stacks, taken while it hangs, before it is killed.

Each rank has Python's faulthandler answer a signal by writing all stacks to a file of its own. The handler runs in C, so it also answers
for a rank whose native code holds the interpreter's lock. Where nothing comes (a stopped process, uninterruptible sleep), py-spy reads
the stacks from outside, if it is installed and the kernel lets it.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import json
import os
import re
import signal
import sysconfig
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

# Of 64. Below are those that users, Slurm, torch (CHLD, TERM, USR1, USR2) and profilers (ALRM, PROF) take, and glibc's own (32, 33); above,
# those of JVMs (62) and Valgrind (64). Nobody was found who takes this one.
SIGNAL: Final = signal.SIGRTMAX - 4
ANSWER_S: Final = 0.5  # faulthandler needs a few milliseconds; whoever has not answered by then will not
DEADLINE_S: Final = 2.0  # for everything together
LOOK_S: Final = 0.02
STOPPED: Final = ("T", "t")  # whoever is stopped or traced answers nothing
MAX_BYTES: Final = 256 << 10
SHOWN_FRAMES: Final = 3

_THREAD: Final = re.compile(r"^(?:Current thread|Thread) 0x([0-9a-f]+)", re.MULTILINE)
_FRAME: Final = re.compile(r'^  File "(.*)", line (\d+) in (.*)$', re.MULTILINE)
_MAIN: Final = "main thread 0x"

# Frames of torch that only pass a call on.
_PLUMBING: Final = ("/torch/_ops.py", "/torch/utils/_contextlib.py", "/torch/distributed/c10d_logger.py", "/torch/nn/modules/module.py")
# Below these, torch works on its own; anything else of torch.distributed that is innermost waits for other ranks.
_NO_WAIT: Final = ("/torch/distributed/checkpoint/", "/torch/distributed/elastic/")

_answers: IO[str] | None = None  # faulthandler keeps the descriptor, not the file


@dataclass(frozen=True, slots=True)
class Frame:
    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{Path(self.file).name}:{self.line} {self.function}"


@dataclass(frozen=True, slots=True)
class Stacks:
    """Of one process. `text`: of all threads, for people, or why there are none; `main`: of its main thread, innermost first."""

    text: str
    main: tuple[Frame, ...] = ()

    @property
    def where(self) -> str:
        """ "loop.py:57 backward > parallel.py:40 gather": the innermost lines, outermost first, without what only passes a call on."""
        telling = [frame for frame in self.main if not frame.file.endswith(_PLUMBING)]
        return " > ".join(map(str, reversed(telling[:SHOWN_FRAMES])))

    @property
    def waits(self) -> bool:
        """Whether it stands in torch's code that waits for other ranks: a collective, a barrier, the store."""
        for frame in self.main:
            if "/torch/" not in frame.file or "/torch/nn/" in frame.file or any(part in frame.file for part in _NO_WAIT):
                return False
            if "/torch/distributed/" in frame.file:
                return True
        return False


@dataclass(frozen=True, slots=True)
class Subject:
    """A process, and the file that it answers to."""

    pid: int
    answers: Path


def answer_path(scratch: str | os.PathLike[str], attempt: int, local_rank: int) -> Path:
    return Path(scratch) / f"stacks-{attempt:06d}-{local_rank}"


def answer_to(path: Path) -> None:
    """In the rank, main thread: from now on it answers. Children that it forks would, too; nobody asks them."""
    global _answers
    with contextlib.suppress(OSError):  # the disk is full: it does not answer, and trains
        _answers = path.open("w")
        _answers.write(f"{_MAIN}{threading.main_thread().ident:016x}\n")
        _answers.flush()
        faulthandler.register(SIGNAL, _answers, all_threads=True)


async def take(subjects: Sequence[Subject]) -> list[Stacks]:
    """The stacks of all of them, at the same time, within DEADLINE_S. None is killed or held up."""
    return list(await asyncio.gather(*map(_take_one, subjects)))


async def _take_one(subject: Subject) -> Stacks:
    end = time.monotonic() + DEADLINE_S
    answer = await _asked(subject) or await _spied(subject.pid, end)
    return Stacks(f"{_condition(subject.pid)}\n{answer.text}", answer.main)


async def _asked(subject: Subject) -> Stacks | None:
    """What faulthandler wrote; None when nothing came, or not all."""
    before = _size(subject.answers)
    if state(subject.pid) in STOPPED or not _ask(subject.pid):
        return None
    end, seen = time.monotonic() + ANSWER_S, before
    while time.monotonic() < end:
        await asyncio.sleep(LOOK_S)
        size = _size(subject.answers)
        if size == seen > before and (found := parse(_read(subject.answers, before))).main:
            return found
        seen = size
    return None


def _ask(pid: int) -> bool:
    """Sends the signal to a process that has a handler for it; whoever has none (it has executed something else) would die of it."""
    try:
        caught = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt:"))
        if int(caught.split()[1], 16) >> (SIGNAL - 1) & 1:
            os.kill(pid, SIGNAL)
            return True
    except (OSError, StopIteration):
        return False  # gone
    return False


def parse(text: str) -> Stacks:
    """Of faulthandler's output, headed by the line that names the main thread."""
    ident = text.partition(_MAIN)[2][:16]
    _, *parts = _THREAD.split(text)
    blocks = dict(zip(parts[::2], parts[1::2], strict=True))  # thread -> its lines
    frames = (Frame(file, int(line), function) for file, line, function in _FRAME.findall(blocks.get(ident, "")))
    return Stacks(text.strip(), tuple(frames))


async def _spied(pid: int, end: float) -> Stacks:
    program = Path(sysconfig.get_path("scripts")) / "py-spy"
    if not program.exists():
        return Stacks("it answers no signal, and py-spy is not installed")
    process = await asyncio.create_subprocess_exec(
        program,
        *("dump", "--nonblocking", "--json", "--pid", str(pid)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(end - time.monotonic()):
            out, complaint = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        return Stacks("it answers no signal, and py-spy was too slow")
    if process.returncode != 0:
        return Stacks(f"it answers no signal, and py-spy failed: {complaint.decode(errors='replace').strip()[:500]}")
    return parse_spied(out, pid)


def parse_spied(body: bytes, pid: int) -> Stacks:
    """Of py-spy's JSON, in faulthandler's words."""
    text, main = ["read from outside by py-spy"], tuple[Frame, ...]()
    for thread in json.loads(body):
        frames = tuple(map(_spied_frame, thread["frames"]))
        if thread.get("os_thread_id") == pid:
            main = frames
        text += ["", f"Thread {thread.get('os_thread_id')} {thread.get('thread_name') or ''} (most recent call first):"]
        text += [f'  File "{frame.file}", line {frame.line} in {frame.function}' for frame in frames]
    return Stacks("\n".join(text), main)


def _spied_frame(frame: dict[str, Any]) -> Frame:
    return Frame(frame["filename"], int(frame["line"]), frame["name"])


def state(pid: int) -> str:
    """The kernel's letter for a process's state, "" when it is gone."""
    with contextlib.suppress(OSError):
        stat = Path(f"/proc/{pid}/stat").read_text()
        return stat[stat.rindex(")") + 2]
    return ""


def _condition(pid: int) -> str:
    """What the kernel says about it, for people."""
    at = ""
    with contextlib.suppress(OSError):
        at = Path(f"/proc/{pid}/wchan").read_text().strip("0\n")
    return f"pid {pid}, state {state(pid) or 'gone'}{f', in the kernel at {at}' if at else ''}"


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0


def _read(path: Path, start: int) -> str:
    """The head line and what was written since `start`."""
    with path.open("rb") as file:
        head = file.readline()
        file.seek(max(start, len(head)))
        return (head + file.read(MAX_BYTES)).decode(errors="replace")
