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
from .viewing import open_console

Json = dict[str, Any]
Say = Callable[[str], None]
NUM_WORST: Final = 5
INDEX: Final = "index.json"
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
    """The whole of the command; its exit code: 3 where the recorded loss did not come out. Raises InputError."""
    words = _dump_words(asked.dump)
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
        _print(open_console(), report)
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
    return {
        "step": step,
        "attempt": outcome.attempt,
        "world_size": archive.world_size(outcome.attempt),
        "from_step": route.base.step if route.base else 0,
        "from_checkpoint": route.base.directory if route.base else "",
        "steps_computed": route.num_steps,
        "steps_compared": comparison.num_compared,
        "checked": f"loss within {comparison.tolerance:g}" if comparison.tolerance else "bits of the loss",
        "holds": comparison.holds and bool(refused) == bool(view["rejected"]),
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


def _print(console: Console, report: Json) -> None:
    def say(text: str) -> None:
        console.print(printable(text), markup=False, soft_wrap=True)

    for note in report["notes"]:
        say(note)
    begin = f"the checkpoint of step {report['from_step']}" if report["from_checkpoint"] else "scratch (no checkpoint before it is left)"
    ranks, computed = report["world_size"], report["steps_computed"]
    say(f"step {report['step']} of attempt {report['attempt']} ({ranks} ranks), {computed} steps from {begin}")
    _print_comparison(say, report)
    if report["rejected_then"]:
        say(f"it was refused: {report['rejected_then']}")
        say("it is refused again" if report["rejected"] else "NOT EQUAL: it is not refused now")
    if report["lr"] is not None:
        first, last = report["positions"]
        say(f"learning rate {report['lr']:.6g}, gradient norm {_brief(report['grad_norm']['computed'])}, positions {first} to {last - 1}")
    console.print(_parameter_table(report))
    console.print(_activation_table(report))
    _print_worst(say, report)
    if "dump" in report:
        say(f"dumped into {report['dump']['folder']}: {', '.join(report['dump']['files'])}; {INDEX} says what is what")


def _print_comparison(say: Say, report: Json) -> None:
    loss, first = report["loss"], report["first_difference"]
    if loss["computed"] is not None:
        say(f"loss {loss['computed']:.6f} nats per token ({report['loss_hex']['computed']}), recorded {_number(loss['recorded'])}")
    if not report["steps_compared"]:
        say("compared with nothing: no step on the way was recorded, or the records were lost with their node")
        return
    if first is None:
        widest = f" (widest relative difference {report['widest_relative_difference']:.1e})" if "within" in report["checked"] else ""
        say(f"checked: {report['checked']}, equal in all {report['steps_compared']} steps{widest}")
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


def _parameter_table(report: Json) -> Table:
    table = Table("parameter", *_FIGURES, *(f"gradient {figure}" for figure in (*_FIGURES, "not finite")), "update / norm")
    gradients, parameters, updates = (report.get(name) or {} for name in ("gradients", "parameters", "updates"))
    for name in gradients | parameters:
        own, gradient, update = parameters.get(name, {}), gradients.get(name, {}), updates.get(name, {})
        ratio = update.get("norm") and own.get("norm") and update["norm"] / own["norm"]
        table.add_row(
            escape(name),
            *(_brief(own.get("norm")), _brief(own.get("mean")), _brief(_abs_max(own)), _share(own.get("zeros"))),
            *(_brief(gradient.get("norm")), _brief(gradient.get("mean")), _brief(_abs_max(gradient)), _share(gradient.get("zeros"))),
            *(_share(gradient.get("nonfinite")), _brief(ratio) if ratio is not None else "?"),
        )
    return table


def _abs_max(statistics: Mapping[str, Any]) -> float | None:
    low, high = statistics.get("min"), statistics.get("max")
    return None if low is None or high is None else max(abs(low), abs(high))


def _activation_table(report: Json) -> Table:
    table = Table("output of", "min", "max", "mean", "std", "zeros", "not finite")
    for name, own in report["activations"].items():
        mean, rms = own["mean"], own["rms"]
        std = None if mean is None or rms is None else math.sqrt(max(0.0, rms * rms - mean * mean))
        values = (_brief(own["min"]), _brief(own["max"]), _brief(mean), _brief(std))
        table.add_row(escape(name), *values, _share(own["zeros"]), _share(own["nonfinite"]))
    return table


def _print_worst(say: Say, report: Json) -> None:
    whose = "" if report["rank"] is None else f" of rank {report['rank']}"
    say(f"the worst of {len(report['samples'])} samples{whose}, by their own loss:")
    for sample in report["worst"]:
        say(f"  {_number(sample['loss'], 4)} nats per token: position {sample['position']} (rank {sample['rank']}, {sample['place']})")
        say(f"    {sample['text']}")


def printable(text: str) -> str:
    """One line that a terminal shows as it is: no control characters, no escape sequences, nothing that turns the line around."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
