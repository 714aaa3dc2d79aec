"""What `keepstep replay` prints, and what it writes beside the root."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from keepstep.trainer.contract import EXIT_FAILED, EXIT_OK
from keepstep.trainer.replay import DUMPS, ReplayFailed, View

from .errors import InputError
from .replaying import Archive, Outcome, Way, travel

Json = dict[str, Any]
Say = Callable[[str], None]
NUM_WORST: Final = 5
INDEX: Final = "index.json"
_WIDE: Final = 400  # where there is no terminal: a script that reads it finds every column
_FIGURES: Final = ("norm", "mean", "abs max", "zeros")


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The command line."""

    root: str
    step: int
    attempt: int | None = None
    rank: int | None = None
    dump: str = ""
    out: str = ""
    processes: int = 0  # 0: as many as the run had
    as_json: bool = False


def replay(asked: Asked) -> int:
    """The whole of the command; its exit code: 3 unless the recorded loss of the step came out. Raises InputError."""
    words = _dump_words(asked.dump)
    if asked.out and not words:
        raise InputError(f"--out {asked.out}: nothing would be written; say what, with --dump {','.join(DUMPS)}")
    out = Path(asked.out or f"replay-step{asked.step}")
    if words and out.exists():
        raise InputError(f"--out {out} exists, and nothing is overwritten: name another folder, or remove it")
    archive = Archive(asked.root)
    attempt = archive.attempt(asked.step, asked.attempt)
    world_size = archive.world_size(attempt)
    if asked.rank is not None and asked.rank >= world_size:
        raise InputError(f"--rank {asked.rank}: step {asked.step} was computed by ranks 0 to {world_size - 1} (attempt {attempt})")
    if asked.processes not in (0, 1, world_size):
        raise InputError(f"--processes {asked.processes}: step {asked.step} was computed by {world_size} ranks; give 1, or leave it out")
    with _folder(out if words else None) as folder, _progress(asked) as progress, _ended_by_sigterm():
        view = View(step=asked.step, rank=asked.rank, dump=words, out=str(folder or ""))
        way = Way(on_one_process=asked.processes == 1, view=view, progress=progress)
        try:
            outcome = travel(archive, attempt, asked.step, way)
        except ReplayFailed as error:
            raise InputError(f"{asked.root}: step {asked.step} could not be computed again: {error}") from error
        report = _report(archive, asked, outcome)
        if folder:
            report["dump"] = _index(folder, out, report)
            (folder / INDEX).write_text(json.dumps(report, indent=1) + "\n")
    if asked.as_json:
        print(json.dumps(report))
    else:
        _print(_console(), report)
    return EXIT_OK if report["holds"] else EXIT_FAILED


def _dump_words(text: str) -> frozenset[str]:
    words = frozenset(word.strip() for word in text.split(",") if word.strip())
    if unknown := sorted(words - set(DUMPS)):
        raise InputError(f"--dump {', '.join(unknown)}: not known; give one or more of {','.join(DUMPS)}")
    return words


@contextlib.contextmanager
def _folder(out: Path | None) -> Iterator[Path | None]:
    """Made beside its place, and put there when it is whole."""
    if out is None:
        yield None
        return
    os.umask(mask := os.umask(0))
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.absolute().parent))
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror or error}") from error
    try:
        yield temporary
        for path in (temporary, *temporary.iterdir()):  # as the umask says, not as temporary files are
            path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """As by Ctrl-C: the processes die, and the temporary folders go."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _progress(asked: Asked) -> Iterator[Any]:
    with Progress(console=Console(stderr=True), transient=True, disable=asked.as_json) as progress:
        task = progress.add_task("computing steps again", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


# --- the report -------------------------------------------------------------------------------------------------------


def _report(archive: Archive, asked: Asked, outcome: Outcome) -> Json:
    """Everything that is shown, as JSON."""
    comparison, route, step = outcome.comparison, outcome.route, asked.step
    computed, recorded = outcome.replayed.records.get(step, {}), outcome.recorded.get(step, {})
    first, view = comparison.first, _merged(outcome.replayed.views)
    refused = (archive.refused(outcome.attempt, step) or {}).get("why", "")
    is_compared = step in outcome.recorded and step in outcome.replayed.records
    return {
        "step": step,
        "attempt": outcome.attempt,
        "world_size": archive.world_size(outcome.attempt),
        "from_step": route.base.step if route.base else 0,
        "from_checkpoint": route.base.directory if route.base else "",
        "steps_computed": route.num_steps,
        "steps_compared": comparison.num_compared,
        "checked": f"loss within {comparison.tolerance:g}" if comparison.tolerance else "bits of the loss",
        "step_compared": is_compared,  # a refused step has no record; that it is refused again stands for it
        "holds": comparison.holds and (is_compared or bool(refused)) and bool(refused) == bool(view["rejected"]),
        "widest_relative_difference": comparison.widest,
        "first_difference": None
        if first is None
        else {
            "step": first.step,
            "recorded": first.recorded_hex,
            "computed": first.computed_hex,
            "ulps": first.ulps,
            "relative": _finite(first.relative),
            "sentence": first.sentence(),
            "causes": list(outcome.causes(archive)),
        },
        "notes": list(outcome.notes),
        "rejected_then": refused,
        "loss": {"recorded": recorded.get("loss"), "computed": computed.get("loss")},
        "loss_hex": {"recorded": recorded.get("loss_hex"), "computed": computed.get("loss_hex")},
        "grad_norm": {"recorded": recorded.get("grad_norm"), "computed": computed.get("grad_norm")},
        "lr": computed.get("lr"),
        "positions": computed.get("samples"),
        "rank": asked.rank,
        **view,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _merged(views: Sequence[Mapping[str, Any]]) -> Json:
    """Rank 0 has what all have together; samples come from each."""
    samples = [sample for view in views for sample in view["samples"]]
    worst = sorted((sample for view in views for sample in view["worst"]), key=_badness, reverse=True)[:NUM_WORST]
    return {
        **views[0],
        "samples": [sample | {"loss": _finite(sample["loss"])} for sample in samples],
        "worst": [sample | {"loss": _finite(sample["loss"])} for sample in worst],
    }


def _badness(sample: Mapping[str, Any]) -> float:
    loss = float(sample["loss"])
    return math.inf if math.isnan(loss) else loss


def _index(folder: Path, out: Path, report: Json) -> Json:
    """What the files of a dump are."""
    meanings = {
        "gradients.safetensors": "gradient of the mean loss by parameter, whole: reduced over all ranks, before clipping",
        "parameters-before.safetensors": "parameters that the step's forward pass used, whole",
        "parameters-after.safetensors": "parameters after the step's update, whole",
    }
    activations = "outputs by module of rank {}, its micro-batches one behind the other along the first dimension"
    files = {path.name: meanings.get(path.name) or activations.format(int(path.stem[-5:])) for path in sorted(folder.iterdir())}
    return {"folder": str(out), "files": files}


# --- for people -------------------------------------------------------------------------------------------------------


def _console() -> Console:
    """As wide as the terminal, or as COLUMNS says; else wide enough for every column."""
    console = Console(highlight=False)
    return console if console.is_terminal or os.environ.get("COLUMNS", "").isdigit() else Console(highlight=False, width=_WIDE)


def counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _print(console: Console, report: Json) -> None:
    def say(text: str) -> None:
        console.print(printable(text), markup=False, soft_wrap=True)

    for note in report["notes"]:
        say(note)
    ranks, computed = counted(report["world_size"], "rank"), counted(report["steps_computed"], "step")
    say(f"step {report['step']} of attempt {report['attempt']} ({ranks}), {computed} from {_begin(report)}")
    _print_comparison(say, report)
    if report["rejected_then"]:
        say(f"it was refused: {report['rejected_then']}")
        say("it is refused again" if report["rejected"] else "NOT EQUAL: it is not refused now")
    if report["lr"] is not None:
        first, last = report["positions"]
        say(f"learning rate {report['lr']:.6g}, gradient norm {_brief(report['grad_norm']['computed'])}, positions {first} to {last - 1}")
    for table in (_parameter_table(report, console.width), _activation_table(report, console.width)):
        console.print(table)
    _print_worst(say, report)
    if "dump" in report:
        say(f"dumped into {report['dump']['folder']}: {', '.join(report['dump']['files'])}; {INDEX} says what is what")


def _begin(report: Json) -> str:
    if report["from_checkpoint"]:
        return f"the checkpoint of step {report['from_step']}"
    return "scratch" if report["step"] == 1 else "scratch (no checkpoint before it is left)"


def _print_comparison(say: Say, report: Json) -> None:
    loss, first = report["loss"], report["first_difference"]
    if loss["computed"] is not None:
        say(f"loss {loss['computed']:.6f} nats per token ({report['loss_hex']['computed']}), recorded {_number(loss['recorded'])}")
    lost = f"the record of step {report['step']} was lost with its node, or never written"
    if not report["steps_compared"] and not report["rejected_then"]:
        say(f"NOT CHECKED: compared with nothing: {lost}, and so were those on the way")
        return
    if first is None:
        widest = f" (widest relative difference {report['widest_relative_difference']:.1e})" if "within" in report["checked"] else ""
        is_checked, compared = report["step_compared"] or report["rejected_then"], report["steps_compared"]
        equal = "equal" if compared == 1 else f"equal in all {compared} steps"
        if not is_checked:
            say(f"NOT CHECKED: {lost}. {counted(compared, 'step')} on the way: {report['checked']}, {equal}{widest}")
        elif compared:
            say(f"checked: {report['checked']}, {equal}{widest}")
        return
    say(f"NOT EQUAL. Checked: {report['checked']}. {first['sentence']}")
    for cause in first["causes"]:
        say(f"  perhaps: {cause}")


def _number(value: float | None, places: int = 6) -> str:
    return "?" if value is None else f"{value:.{places}f}"


def _brief(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3g}"


def _share(value: float | None) -> str:
    return "?" if value is None else "0" if value == 0 else f"{100 * value:.3g} %"


def _parameter_table(report: Json, width: int) -> Table:
    gradients, parameters, updates = (report.get(name) or {} for name in ("gradients", "parameters", "updates"))
    heads = ("parameter", *_FIGURES, *(f"gradient {figure}" for figure in (*_FIGURES, "not finite")), "update / norm")
    rows = []
    for name in gradients | parameters:
        own, gradient, update = parameters.get(name, {}), gradients.get(name, {}), updates.get(name, {})
        ratio = update.get("norm") and own.get("norm") and update["norm"] / own["norm"]
        rows.append(
            (
                name,
                *(_brief(own.get("norm")), _brief(own.get("mean")), _brief(_abs_max(own)), _share(own.get("zeros"))),
                *(_brief(gradient.get("norm")), _brief(gradient.get("mean")), _brief(_abs_max(gradient)), _share(gradient.get("zeros"))),
                *(_share(gradient.get("nonfinite")), _brief(ratio) if ratio is not None else "?"),
            )
        )
    return fitting(heads, rows, ("parameter", "norm", "gradient norm", "update / norm", "gradient not finite"), width)


def fitting(heads: Sequence[str], rows: Sequence[Sequence[str]], first: Sequence[str], width: int) -> Table:
    """As many columns as the width holds: those of `first`, then the others, in the order of `heads`. Nothing in a cell is cut.

    The first column is always there; where nothing fits beside it, so is the second.
    """
    lengths = {head: max(map(len, (*head.split(), *(row[i] for row in rows)))) for i, head in enumerate(heads)}
    chosen: list[str] = []
    used = 1
    for head in (*first, *(head for head in heads if head not in first)):
        if len(chosen) > 1 and used + lengths[head] + 3 > width:
            continue
        chosen.append(head)
        used += lengths[head] + 3  # a line and two blanks
    table = Table()
    for head in (kept := [head for head in heads if head in chosen]):
        table.add_column(head, overflow="fold", min_width=lengths[head] if head != heads[0] else None)
    for row in rows:
        table.add_row(*(escape(cell) for head, cell in zip(heads, row, strict=True) if head in kept))
    return table


def _abs_max(statistics: Mapping[str, Any]) -> float | None:
    low, high = statistics.get("min"), statistics.get("max")
    return None if low is None or high is None else max(abs(low), abs(high))


def _activation_table(report: Json, width: int) -> Table:
    heads = ("output of", "min", "max", "mean", "std", "zeros", "not finite")
    rows = []
    for name, own in report["activations"].items():
        mean, rms = own["mean"], own["rms"]
        std = None if mean is None or rms is None else math.sqrt(max(0.0, rms * rms - mean * mean))
        values = (_brief(own["min"]), _brief(own["max"]), _brief(mean), _brief(std))
        rows.append((name, *values, _share(own["zeros"]), _share(own["nonfinite"])))
    return fitting(heads, rows, ("output of", "min", "max", "not finite"), width)


def _print_worst(say: Say, report: Json) -> None:
    whose = "" if report["rank"] is None else f" of rank {report['rank']}"
    say(f"the worst of {counted(len(report['samples']), 'sample')}{whose}, by their own loss:")
    for sample in report["worst"]:
        say(f"  {_number(sample['loss'], 4)} nats per token: position {sample['position']} (rank {sample['rank']}, {sample['place']})")
        say(f"    {sample['text']}")


def printable(text: str) -> str:
    """One line that a terminal shows as it is: no control characters, no escape sequences, nothing that turns the line around."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
