"""The trainer's tools on the command line. Torch is imported when one of them is used, not before."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress

from keepstep.storage.store import Store

from .errors import InputError
from .roots import claim, open_as_stored, open_root
from .sections import RunConfig

if TYPE_CHECKING:
    from keepstep.trainer.tokens import TokenIndex


def prepare_tokens(config: RunConfig, store: Store) -> TokenIndex:
    """The root's token shards, made unless they are there. Raises InputError where the text is the problem."""
    from keepstep.trainer.tokens import prepare

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("preparing", total=1.0)
        show: Callable[[str, float], None] = lambda what, share: progress.update(task, description=what, completed=share)  # noqa: E731
        try:
            return prepare(config.data, store, show)
        except ValueError as error:
            raise InputError(str(error)) from error


def prepare_data(config: RunConfig) -> None:
    from keepstep.trainer.tokens import describe

    store = open_root(config)
    config = claim(store, config)
    for name, value in describe(prepare_tokens(config, store)).items():
        print(f"{name}: {value}")


def evaluate_checkpoint(root: str, *, step: int, partial: Sequence[str], as_json: bool) -> None:
    from keepstep.trainer.evaluate import evaluate_root

    open_as_stored(root)
    try:
        result = evaluate_root(root, step=None if step < 0 else step, partial=partial)
    except ValueError as error:
        raise InputError(f"{root}: {error}") from error
    if as_json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")


def generate_text(root: str, *, prompt: str, step: int, partial: Sequence[str], **settings: Any) -> None:
    """`settings`: those of the sampling, see `generate`."""
    from keepstep.trainer.generate import generate

    open_as_stored(root)
    try:
        print(generate(root, prompt, step=None if step < 0 else step, partial=partial, **settings))
    except ValueError as error:
        raise InputError(f"{root}: {error}") from error


def export_checkpoint(root: str, out: Path, *, step: int, form: str, parts: str, partial: Sequence[str]) -> None:
    from keepstep.trainer.export import export

    open_as_stored(root)
    wanted = [part.strip() for part in parts.split(",") if part.strip()]
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("verifying and copying", total=None)
        show: Callable[[int, int], None] = lambda done, total: progress.update(task, completed=done, total=total)  # noqa: E731
        try:
            made = export(root, out, form=form, step=None if step < 0 else step, parts=wanted, partial=partial, report=show)
        except ValueError as error:
            raise InputError(f"{root}: {error}") from error
    left_out = f"; left out: {', '.join(made.left_out)}" if made.left_out else ""
    print(f"step {made.step} of {made.directory}: {made.num_tensors} tensors, {made.num_bytes} bytes, verified, in {out}{left_out}")


def sample(root: str, prompt: str) -> str:
    """A few lines from the newest checkpoint of a run that this process has open."""
    from keepstep.trainer.generate import generate

    return generate(root, prompt, max_tokens=80)
