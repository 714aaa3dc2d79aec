"""The command line. Thin: parse, call, print; every user's mistake is one message on standard error and exit code 2."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from keepstep.storage.errors import StorageError
from keepstep.trainer.contract import EXIT_BAD_INPUT, EXIT_BUG

from . import config as configs
from .arguments import AsJson, Overrides, Partial, Root, RunFile, Step, Where
from .checkpointcommands import checkpoints
from .errors import InputError
from .sections import RunConfig

app = typer.Typer(
    name="keepstep",
    help="Trains language models on machines that fail, and ends with the same bits as if none had failed.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(checkpoints, name="checkpoints")


def _config(path: Path, overrides: list[str] | None) -> RunConfig:
    config = configs.load(path, overrides or [])
    if "://" in config.run.root:
        return config
    return config.model_copy(update={"run": config.run.model_copy(update={"root": str(Path(config.run.root).absolute())})})


@app.command()
def run(
    path: RunFile,
    override: Overrides = None,
    demo: Annotated[bool, typer.Option("--demo", help="Kill a rank, later a whole node, on purpose, and show what happens.")] = False,
) -> None:
    """A whole run on this machine: a coordinator and simulated nodes. Continues if the root has a history.

    Example: keepstep run examples/quickstart.toml -o run.root=/tmp/r -o run.steps=60
    """
    from .commands import run_locally

    raise typer.Exit(run_locally(_config(path, override), demo=demo))


@app.command()
def chaos(
    path: Annotated[Path, typer.Argument(metavar="PLAN.toml", help="What to break, when, and in which run.")],
    root: Annotated[str, typer.Option(metavar="DIR", help="Folder of both runs; default: chaos-PLAN beside the plan.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the drawn plan.")] = False,
    as_json: AsJson = False,
) -> None:
    """Break a run on purpose, as planned, and compare it with itself undisturbed. Exit code 3 if anything did not hold.

    Example: keepstep chaos examples/chaos.toml
    """
    from .chaos import chaos as wreak

    raise typer.Exit(wreak(path, root=root, dry_run=dry_run, as_json=as_json))


@app.command()
def coordinator(
    path: RunFile,
    override: Overrides = None,
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="Address to serve on, instead of cluster.listen.")] = "",
    managed: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """The coordinator alone; nodes join over the network.

    Example: keepstep coordinator run.toml --listen 0.0.0.0:7700
    """
    from .commands import coordinate

    overrides = [*(override or []), *([f'cluster.listen="{listen}"'] if listen else [])]
    raise typer.Exit(coordinate(_config(path, overrides), managed=managed))


@app.command()
def agent(
    coordinator: Annotated[str, typer.Option(metavar="URL", help="The coordinator's URL; the token comes from KEEPSTEP_TOKEN.")] = "",
    root: Annotated[str, typer.Option(metavar="ROOT", help="Find the coordinator through the run's root instead.")] = "",
    node: Annotated[str, typer.Option(metavar="NAME", help="This node's name; default: SLURMD_NODENAME or the host name.")] = "",
    scratch: Annotated[str, typer.Option(metavar="DIR", help="This node's own directory; default: below the temporary directory.")] = "",
) -> None:
    """One per node: runs and guards this node's ranks.

    Example: KEEPSTEP_TOKEN=... keepstep agent --coordinator http://head:7700
    """
    from .commands import serve_agent

    raise typer.Exit(serve_agent(url=coordinator, root=root, node=node, scratch=scratch))


@app.command()
def status(where: Where, as_json: AsJson = False) -> None:
    """Phase, reason, attempt, step, nodes, ranks, pids, last commit, goodput.

    Example: keepstep status runs/quickstart
    """
    from .viewing import print_status

    print_status(where, as_json=as_json)


@app.command()
def events(
    where: Where, as_json: AsJson = False, follow: Annotated[bool, typer.Option("--follow", help="Go on until the run is over.")] = False
) -> None:
    """The story of the run, one line per event. With --json one JSON document (with --follow one per line).

    Example: keepstep events runs/quickstart --follow
    """
    from .viewing import print_events

    print_events(where, as_json=as_json, follow=follow)


@app.command()
def stop(where: Where) -> None:
    """Checkpoint at one step boundary and leave (exit code 75 of the run: requeue me).

    Example: keepstep stop runs/quickstart
    """
    from .viewing import post

    print(post(where, "/v1/stop"), end="")


@app.command()
def save(where: Where) -> None:
    """Checkpoint now and go on.

    Example: keepstep save runs/quickstart
    """
    from .viewing import post

    print(post(where, "/v1/save"), end="")


@app.command()
def drain(node: Annotated[str, typer.Argument(metavar="NODE")], where: Where) -> None:
    """Move the run off a node.

    Example: keepstep drain gpu07 runs/quickstart
    """
    from .viewing import post

    print(post(where, "/v1/drain", node=node), end="")


@app.command()
def readmit(node: Annotated[str, typer.Argument(metavar="NODE")], where: Where) -> None:
    """Trust a node again: it is not drained any more, and the failures that it caused are forgotten.

    Example: keepstep readmit gpu07 runs/quickstart
    """
    from .viewing import post

    print(post(where, "/v1/readmit", node=node), end="")


@app.command()
def resize(nodes: Annotated[int, typer.Argument(metavar="NODES", min=1)], where: Where) -> None:
    """Go on with so many nodes: fewer from the next step on, more at the next checkpoint after they have joined.

    The global batch stays the same. The order outlives the coordinator, until cluster.nodes is changed.

    Example: keepstep resize 4 runs/quickstart
    """
    from .viewing import post

    print(post(where, "/v1/resize", nodes=str(nodes)), end="")


@app.command()
def rewind(
    where: Where,
    to: Annotated[
        int, typer.Option("--to", metavar="STEP", min=0, help="A step; the newest committed one at or before it; 0: the beginning.")
    ],
    skip: Annotated[
        list[str] | None, typer.Option(metavar="FIRST:LAST", help="Leave out the samples at these positions; may be given again.")
    ] = None,
    override: Overrides = None,
) -> None:
    """Go back to a checkpoint and on from there: without some samples, with another learning rate. Live or not, ended or not.

    The steps after it leave the history; their records stay, and so does their last checkpoint until it is unpinned. Skips and overrides
    (optimizer.*, train.*, evaluate.*, trace.*, run.steps) hold for the rest of the run, on top of run.toml.

    Example: keepstep rewind runs/quickstart --to 120 --skip 1024:1040 -o optimizer.lr=0.001
    """
    from .rewinding import rewind as go_back

    print(go_back(where, to=to, skip=skip or [], override=override or []))


@app.command()
def prepare(path: RunFile, override: Overrides = None, as_json: AsJson = False) -> None:
    """Turn data.source into token files below the run's root. `keepstep run` does it by itself. One that was killed goes on where it was.

    Example: keepstep prepare run.toml -o data.source=/data/books
    """
    from .tools import prepare_data

    prepare_data(_config(path, override), as_json=as_json)


@app.command()
def evaluate(
    root: Root,
    step: Step = "",
    generate: Annotated[int, typer.Option(metavar="N", min=0, help="Of pairs: complete so many held-out prompts; BLEU and chrF.")] = 0,
    partial: Partial = None,
    as_json: AsJson = False,
) -> None:
    """Loss, perplexity, bits per byte and accuracy of a committed checkpoint on all of the held-out text, on one process.

    Of classes also precision, recall and F1, each by itself and their means.

    Example: keepstep evaluate runs/quickstart
    """
    from .tools import evaluate_checkpoint

    evaluate_checkpoint(root, step=step, generate=generate, partial=partial or [], as_json=as_json)


@app.command()
def generate(
    root: Root,
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue; may be given again.", show_default="The ")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to add.")] = 100,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Sample among so many likeliest tokens; 0: all.")] = 50,
    top_p: Annotated[float, typer.Option(max=1, help="Sample among the likeliest tokens that have this probability together.")] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(help="Makes tokens that are there already less likely; 1: does not.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    step: Step = "",
    partial: Partial = None,
) -> None:
    """Text from a committed checkpoint, on one process.

    Example: keepstep generate runs/quickstart --prompt "Return a list of"
    """
    from .tools import generate_text

    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "repetition_penalty": repetition_penalty}
    generate_text(root, prompts=prompt or ["The "], tokens=tokens, seed=seed, step=step, partial=partial or [], **sampling)


@app.command()
def classify(
    root: Root, text: Annotated[list[str], typer.Option(help="May be given again.")], step: Step = "", as_json: AsJson = False
) -> None:
    """The likeliest class of a text and its probability, from a run of train.objective = "classes", on one process.

    Example: keepstep classify runs/reviews --text "A film to fall asleep over."
    """
    from .tools import classify_texts

    classify_texts(root, texts=text, step=step, as_json=as_json)


@app.command()
def replay(
    root: Root,
    step: Annotated[int, typer.Option(min=1, help="The step to compute again.")],
    rank: Annotated[int | None, typer.Option(min=0, help="Only the samples and activations of this rank.")] = None,
    attempt: Annotated[int | None, typer.Option(help="As this attempt computed it, also if that was lost; default: the history's.")] = None,
    dump: Annotated[str, typer.Option(metavar="gradients,activations,parameters", help="Write these tensors down as safetensors.")] = "",
    out: Annotated[str, typer.Option(metavar="DIR", help="New folder for them; default: replay-stepN.")] = "",
    processes: Annotated[int, typer.Option(min=0, help="1: one process does the work of all ranks; 0: as many as there were.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Compute a step again, from the checkpoint before it, and look into it. Exit code 3 unless the recorded loss comes out, to the bit.

    Example: keepstep replay runs/quickstart --step 57 --dump gradients --out step57
    """
    from .replaycommand import Asked
    from .replaycommand import replay as compute_again

    asked = Asked(root=root, step=step, attempt=attempt, rank=rank, dump=dump, out=out, processes=processes, as_json=as_json)
    raise typer.Exit(compute_again(asked))


@app.command()
def trace(
    root: Root,
    attempt: Annotated[int, typer.Option(metavar="A", min=0, help="As it stood at the end of this attempt; default: now.")] = 0,
    first: Annotated[int, typer.Option("--from", metavar="STEP", help="Show from this step on.")] = 0,
    last: Annotated[int, typer.Option("--to", metavar="STEP", help="Show up to this step.")] = 0,
    ledger: Annotated[bool, typer.Option("--ledger", help="Prove that each sample was consumed once; reads all of them again.")] = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write one self-contained page, with heat maps by layer.")] = None,
    parquet: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write all steps and layer statistics for pandas and others.")
    ] = None,
    tensorboard: Annotated[Path | None, typer.Option(metavar="DIR", help="Write event files for TensorBoard.")] = None,
    as_json: AsJson = False,
) -> None:
    """The training's course: loss, gradients, updates, speed, attempts and lost work; and what is wrong with it, with a remedy.

    Exit code 3 if --ledger proves nothing.

    Example: keepstep trace runs/quickstart --html trace.html
    """
    from . import tracing

    files = {"html": html, "parquet": parquet, "tensorboard": tensorboard}
    wanted = tracing.Wanted(attempt=attempt, first=first, last=last, ledger=ledger, as_json=as_json, **files)
    raise typer.Exit(tracing.trace(root, wanted))


@app.command()
def doctor(
    path: RunFile,
    override: Overrides = None,
    paper: Annotated[bool, typer.Option("--paper", help="Look at the file alone: what ranks, nodes and the root would need.")] = False,
    rank_memory_gb: Annotated[float, typer.Option(min=0.001, help="Memory of a rank's device, for --paper.")] = 80.0,
    tflops: Annotated[float, typer.Option(min=0.001, help="10^12 operations per second that a rank really does, for --paper.")] = 400.0,
    write_mb_per_s: Annotated[float, typer.Option(min=0.001, help="Of a node to the root, for --paper.")] = 1000.0,
    mtbf_hours: Annotated[float, typer.Option(min=0, help="Between failures of the job, for --paper; 0: as for Llama 3.")] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Store probe, versions, ports, memory, disk: says what would fail before it does. Exit code 2 if something would.

    Example: keepstep doctor run.toml
    """
    from .doctor import estimate, examine
    from .paper import Machines

    config = _config(path, override)
    if paper:
        machines = Machines(rank_memory_gb=rank_memory_gb, tflops=tflops, write_mb_per_s=write_mb_per_s, mtbf_hours=mtbf_hours)
        raise typer.Exit(estimate(config, machines, as_json=as_json))
    raise typer.Exit(examine(config, as_json=as_json))


def main() -> None:
    """Process entry: nothing leaves as a traceback but our own bugs."""
    try:
        app()
    except (InputError, StorageError) as error:
        print(f"keepstep: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except BrokenPipeError:  # `keepstep events ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except Exception:  # noqa: BLE001  (the process entry: a bug has an exit code of its own)
        traceback.print_exc()
        sys.exit(EXIT_BUG)


if __name__ == "__main__":
    main()
