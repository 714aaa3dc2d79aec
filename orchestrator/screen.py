"""What `keepstep run` shows: a progress bar and the story on a terminal, plain lines everywhere else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from keepstep.storage.errors import StoreError
from keepstep.storage.steps import newest_loss
from keepstep.storage.store import Store

from .archive import read_result
from .lines import event_line, time_table
from .sections import RunConfig

PLAIN_LINES = 10  # progress lines of a whole run where there is no terminal


class Screen:
    """Everything goes through one rich console, so that the bar and the lines do not overwrite each other."""

    def __init__(self, config: RunConfig, store: Store, console: Console | None = None) -> None:
        self._config = config
        self._store = store
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._bar = _bar(self._console) if self._console.is_terminal else None
        self._task = self._bar.add_task("training", total=config.run.steps, loss="") if self._bar else None
        self._told_tenth = 0

    def say(self, text: str) -> None:
        self._console.print(text, markup=False)

    def event(self, event: Mapping[str, Any]) -> None:
        """One event of the coordinator."""
        if event["kind"] == "progress":
            self._progress(event["attempt"], event["step"], event["steps"])
        else:
            self.say(event_line(event))

    def finish(self, code: int, elapsed_s: float) -> None:
        if self._bar:
            self._bar.stop()
        try:
            result = read_result(self._store)
        except StoreError as error:
            self.say(f"result.json could not be read: {error}")
            result = None
        for line in summary(result, code, elapsed_s, self._config.run.root):
            self.say(line)

    def _progress(self, attempt: int, step: int, steps: int) -> None:
        """`steps` of the whole run are those in force: a rewind may have changed them."""
        if self._bar and self._task is not None:
            self._bar.start()
            self._bar.update(self._task, completed=step, total=steps, loss=self._loss(attempt))
        elif (tenth := step * PLAIN_LINES // steps) != self._told_tenth:
            self._told_tenth = tenth
            self.say(f"step {step}/{steps} {self._loss(attempt)}".rstrip())

    def _loss(self, attempt: int) -> str:
        """Of the newest step record; "" while there is none, or for a script that writes none."""
        try:
            loss = newest_loss(self._store, attempt)
        except StoreError:
            return ""  # the bar goes on without it
        return "" if loss is None else f"loss {loss:.4f}"


def _bar(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True)


def summary(result: Mapping[str, Any] | None, code: int, elapsed_s: float, root: str) -> list[str]:
    """The last lines of a run."""
    if result is None:
        return [f"ended with code {code}, without a result.json", f"root: {root}"]
    lines = [
        f"{result['outcome']} at step {result['step']} after {elapsed_s:.1f} s: {result['why']}",
        f"attempts {result['attempts']}, failures {len(result['failures'])}, steps computed again {result['lost_steps']}, "
        f"goodput {100 * result['goodput']:.1f} %",
    ]
    lines += _held_out(result)
    if result.get("state_sha256"):
        lines.append(f"state sha256 {result['state_sha256']}")
    return [*lines, f"root: {root}", *time_table(result.get("seconds", {}))]


def _held_out(result: Mapping[str, Any]) -> list[str]:
    """What the last evaluation found out, and which was the best."""
    shown = {"perplexity": ".2f", "bits_per_byte": ".4f", "accuracy": ".4f", "f1": ".4f", "bleu": ".2f", "chrf": ".2f"}
    found = {name: result[name] for name in shown if isinstance(result.get(name), float) and math.isfinite(result[name])}
    figures = ", ".join(f"{name.replace('_', ' ')} {value:{shown[name]}}" for name, value in found.items())
    ending = [f"stopped early: {result['stopped_early']}"] if result.get("stopped_early") else []
    best = [f"best at step {result['best_step']}; its checkpoint stays (--step best)"] if result.get("best_step") else []
    return [*([f"held-out {figures}"] if figures else []), *ending, *best]
