"""The trainer's tools on the command line. Torch is imported when one of them is used, not before."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from keepstep.storage.runlog import RunLog
from keepstep.storage.store import Store

from .errors import InputError
from .roots import claim, open_as_stored, open_root
from .sections import RunConfig
from .viewing import open_console

if TYPE_CHECKING:
    from keepstep.trainer.index import TokenIndex
    from keepstep.trainer.trained import Wanted


def prepare_tokens(config: RunConfig, store: Store) -> TokenIndex:
    """The root's token files, made unless they are there. Raises InputError where text, train.start or a library is missing."""
    from keepstep.trainer import pinned
    from keepstep.trainer.descent import check_start
    from keepstep.trainer.origin import look
    from keepstep.trainer.preparing import prepare
    from keepstep.trainer.tokens import read_index

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("looking for text", total=None)

        def show(what: str, done: int, total: int) -> None:
            progress.update(task, description=what, completed=done, total=total or None)

        try:
            begun = RunLog.open(store).newest_opened() is not None  # then it needs neither text nor train.start any more
            if not begun and read_index(store) is None:
                look(store, config.train.start)
                pinned.look(config, store)
            index = prepare(config, store, show)
            if not begun:
                check_start(store, config, index)
                _check_samples(store, config)
            return index
        except (ValueError, ImportError) as error:
            raise InputError(str(error)) from error


def _check_samples(store: Store, config: RunConfig) -> None:
    """Documents too long, sources too short: said now, not by ranks. Raises ValueError, and the tokens are gone: other text may come."""
    from keepstep.trainer import index
    from keepstep.trainer.data import feed_for
    from keepstep.trainer.heldout import held_out_of
    from keepstep.trainer.samples import samples_of
    from keepstep.trainer.tokens import open_tokens

    with tempfile.TemporaryDirectory(prefix="keepstep-") as scratch:
        tokens = open_tokens(store, Path(scratch), streaming=True)
        try:
            feed_for(samples_of(tokens, config).sizes, config)
            held_out_of(tokens, config)
        except ValueError:
            store.delete(index.INDEX)  # first: without it there are no tokens
            store.delete_tree(index.FOLDER)
            raise


def prepare_data(config: RunConfig, *, as_json: bool) -> None:
    from keepstep.trainer.index import describe, read_index

    store = open_root(config)
    config = claim(store, config)
    try:
        was_there = read_index(store) is not None
    except ValueError as error:
        raise InputError(str(error)) from error
    began = time.monotonic()
    figures = describe(prepare_tokens(config, store))
    if as_json:
        print(json.dumps({"was_there": was_there, **figures}))
        return
    seconds = time.monotonic() - began
    table = Table("tokens", config.run.root, title="prepared before, nothing to do" if was_there else f"prepared in {seconds:.1f} s")
    for name, value in figures.items():
        table.add_row(name.replace("_", " "), f"{value:,}")
    Console().print(table)


def evaluate_checkpoint(root: str, *, step: str, generate: int, partial: Sequence[str], as_json: bool) -> None:
    from keepstep.trainer.evaluate import evaluate_root

    open_as_stored(root)
    try:
        result = evaluate_root(root, step=_wanted(step), partial=partial, generate=generate)
    except (ImportError, ValueError) as error:
        raise InputError(f"{root}: {error}") from error
    if as_json:
        print(json.dumps(result))
        return
    classes = result.pop("classes", {})
    for name, value in result.items():
        print(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")
    if classes:
        open_console().print(_class_table(classes))


def _class_table(classes: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table("class", "rows", "precision", "recall", "F1")
    for label, found in classes.items():
        table.add_row(Text(label), str(found["rows"]), *(f"{found[name]:.4f}" for name in ("precision", "recall", "f1")))
    return table


def _wanted(step: str) -> Wanted:
    """Of the option --step. Raises InputError."""
    if step in {"", "best"}:
        return "best" if step else None
    if step.isdecimal():
        return int(step)
    raise InputError(f"--step {step!r} must be the number of a committed step, or best")


def generate_text(root: str, *, prompts: Sequence[str], tokens: int, seed: int, step: str, partial: Sequence[str], **sampling: Any) -> None:
    """One text as it comes; several when all are there, one below the other."""
    from keepstep.trainer.generate import generate
    from keepstep.trainer.sampling import Sampling

    open_as_stored(root)
    texts = ["" for _ in prompts]
    try:
        how = Sampling(**sampling)
        chosen = _wanted(step)
        for news in generate(root, prompts, max_tokens=tokens, sampling=how, seed=seed, step=chosen, partial=partial):
            texts = [text + new for text, new in zip(texts, news, strict=True)]
            if len(texts) == 1:
                print(news[0], end="", flush=True)
    except ValueError as error:
        raise InputError(f"{root}: {error}") from error
    print("" if len(texts) == 1 else "\n\n".join(texts))


def classify_texts(root: str, *, texts: Sequence[str], step: str, as_json: bool) -> None:
    from keepstep.trainer.classify import classify

    open_as_stored(root)
    try:
        found = classify(root, texts, step=_wanted(step))
    except ValueError as error:
        raise InputError(f"{root}: {error}") from error
    if as_json:
        print(json.dumps([dict(each) for each in found]))
        return
    for text, probabilities in zip(texts, found, strict=True):
        likeliest = max(probabilities, key=lambda label: probabilities[label])
        print(f"{likeliest} {probabilities[likeliest]:.4f}" + (f"  {text}" if len(texts) > 1 else ""))


def export_checkpoint(root: str, out: Path, *, step: str, form: str, parts: str, partial: Sequence[str], merged: bool) -> None:
    from keepstep.trainer.export import export

    open_as_stored(root)
    wanted = [part.strip() for part in parts.split(",") if part.strip()]
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("verifying and copying", total=None)
        show: Callable[[int, int], None] = lambda done, total: progress.update(task, completed=done, total=total)  # noqa: E731
        try:
            made = export(root, out, form=form, step=_wanted(step), parts=wanted, partial=partial, merged=merged, report=show)
        except ValueError as error:
            raise InputError(f"{root}: {error}") from error
    left_out = f"; left out: {', '.join(made.left_out)}" if made.left_out else ""
    print(f"step {made.step} of {made.directory}: {made.num_tensors} tensors, {made.num_bytes} bytes, verified, in {out}{left_out}")


def sample(root: str, prompt: str) -> str:
    """A few lines from the newest checkpoint of a run that this process has open."""
    from keepstep.trainer.generate import generate

    return "".join(news for (news,) in generate(root, [prompt], max_tokens=80))
