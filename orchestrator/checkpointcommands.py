"""`keepstep checkpoints ...`: thin, as cli.py is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .arguments import AsJson, CommittedStep, Root, Step

checkpoints = typer.Typer(
    help="Look at a run's committed checkpoints, prove them, keep them, let them go.", no_args_is_help=True, rich_markup_mode=None
)


@checkpoints.command("list")
def checkpoints_list(root: Root, as_json: AsJson = False) -> None:
    """Every checkpoint that exists: step, attempt, state (verified: every byte was read back), size, age, directory.

    Example: keepstep checkpoints list runs/quickstart
    """
    from .checkpoints import print_list

    print_list(root, as_json=as_json)


@checkpoints.command("verify")
def checkpoints_verify(
    root: Root,
    step: Annotated[int, typer.Option(help="Only the checkpoint of this step; default: all.")] = -1,
    quarantine: Annotated[bool, typer.Option("--quarantine", help="Record damage: the run never resumes from it again.")] = False,
    as_json: AsJson = False,
) -> None:
    """Read every byte of the checkpoints back and compare it with the hashes; exit code 3 if one is damaged.

    What is right is recorded as verified. Damage is only shown, unless --quarantine is given.

    Example: keepstep checkpoints verify runs/quickstart --step 120
    """
    from .checkpoints import verify

    raise typer.Exit(verify(root, step=step, quarantine=quarantine, as_json=as_json))


@checkpoints.command("pin")
def checkpoints_pin(root: Root, step: CommittedStep) -> None:
    """Keep a checkpoint whatever checkpoint.keep says.

    Example: keepstep checkpoints pin runs/quickstart --step 120
    """
    from .checkpoints import pin

    pin(root, step=step, pinned=True)


@checkpoints.command("unpin")
def checkpoints_unpin(root: Root, step: CommittedStep) -> None:
    """Let a pinned checkpoint go like any other.

    Example: keepstep checkpoints unpin runs/quickstart --step 120
    """
    from .checkpoints import pin

    pin(root, step=step, pinned=False)


@checkpoints.command("gc")
def checkpoints_gc(
    root: Root,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would go, and why the others stay.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete what [checkpoint] in the run's run.toml does not keep, and what killed processes left.

    A live run does the same by itself, and loses nothing by this.

    Example: keepstep checkpoints gc runs/quickstart --dry-run
    """
    from .checkpoints import collect_garbage

    raise typer.Exit(collect_garbage(root, dry_run=dry_run, as_json=as_json))


@checkpoints.command("export")
def checkpoints_export(
    root: Root,
    out: Annotated[Path, typer.Option(metavar="PATH", help="The new file or, for dcp, directory; nothing is replaced.")],
    step: Step = "",
    form: Annotated[str, typer.Option("--format", metavar="safetensors|torch|dcp|hf", help="What to make of it.")] = "safetensors",
    parts: Annotated[str, typer.Option(metavar="model,optimizer", help="What to take; default: the model, for dcp everything.")] = "",
    partial: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Leave out tensors of this name (a pattern); may be given again.")
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Put what LoRA learnt into the weights that it adapts; hf always does.")] = False,
) -> None:
    """A checkpoint for other tools: a file of safetensors or torch.save, a plain DCP directory, a folder of Hugging Face transformers.

    Every byte is verified.

    Example: keepstep checkpoints export runs/quickstart --out model.safetensors
    """
    from .tools import export_checkpoint

    export_checkpoint(root, out, step=step, form=form, parts=parts, partial=partial or [], merged=merge)
