"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RunFile = Annotated[Path, typer.Argument(metavar="RUN.toml", help="The run's config; every key has a default.")]
Overrides = Annotated[list[str] | None, typer.Option("-o", metavar="section.key=value", help="Override one key; may be given again.")]
Where = Annotated[str, typer.Argument(metavar="ROOT|URL", help="The run's root (path or fsspec URL), or its coordinator's URL.")]
Root = Annotated[str, typer.Argument(metavar="ROOT", help="The run's root: a local path or any fsspec URL.")]
Step = Annotated[str, typer.Option(metavar="STEP|best", help="A committed step, or that of the best evaluation; default: the newest.")]
CommittedStep = Annotated[int, typer.Option("--step", help="Step of the checkpoint.")]
Partial = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="Let tensors of this name (a pattern: 'model.blocks.3.*') differ from run.toml; may be given again."),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on standard output, nothing else.")]
