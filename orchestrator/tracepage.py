"""A training on one page: HTML with inline SVG, a small inline script and no network. Readable without the script."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any, Final

import numpy as np

from keepstep.trainer.columns import Course, Steps
from keepstep.trainer.findings import Finding, nothing_found

from .curves import Floats, Line, Scale, figure, scale_of, thinned

WIDTH: Final = 960
HEIGHT: Final = 200
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 8, 22  # margins of a chart
POINTS: Final = 400  # stretches of a curve; each keeps its extremes
CELLS: Final = 120  # columns of a heat map
SHADES: Final = 9  # of a heat map, s0 to s8 in the style sheet
ROW: Final = 13  # of a heat map, pixels
HEAT: Final = (
    ("grad_norm", "gradient norm by parameter"),
    ("update_ratio", "update-to-parameter ratio by parameter"),
    ("rms", "root mean square of the output by module"),
    ("dead", "dead units by module"),
)
CHARTS: Final = (
    ("gradient norm", "before clipping", "grad_norm"),
    ("update ratio", "of an update's norm and the parameters'", "update_ratio"),
    ("parameter norm", "", "param_norm"),
    ("learning rate", "", "lr"),
    ("throughput", "tokens per second", "tokens_per_s"),
)


def page(course: Course, findings: Sequence[Finding], ledger: str = "", unlooked: Sequence[str] = ()) -> str:
    """The whole document."""
    view = _View(course)
    template = Template(files("keepstep.orchestrator").joinpath("trace.html").read_text())
    return template.substitute(
        title=escape(course.run),
        subtitle=escape(_subtitle(course)),
        ledger=f"<p>{escape(ledger)}</p>" if ledger else "",
        findings=("".join(map(_finding, findings)) or f'<p class="healthy">{nothing_found(unlooked).capitalize()}.</p>')
        + "".join(f"<p>Not looked at: {escape(sentence)}.</p>" for sentence in unlooked),
        charts="".join(view.charts()),
        heat="".join(_heat_maps(course)) or "<p>No layer statistics were recorded.</p>",
        attempts=_attempts(course),
        data=json.dumps(view.data(), allow_nan=False).replace("<", "\\u003c"),
    )


def _subtitle(course: Course) -> str:
    steps = course.steps
    parts = [
        f"steps {steps.step[0]} to {steps.step[-1]} of {course.config.run.steps}, {course.outcome or 'not over'}",
        f"attempts {len(course.attempts)}, steps lost {len(course.lost)}",
        f"{course.epochs:.2f} epochs" if course.epochs else "",
        f"held-out perplexity {figure(course.evaluations[-1].perplexity)}" if course.evaluations else "",
    ]
    return " · ".join(part for part in parts if part)


def _finding(finding: Finding) -> str:
    severity = finding.severity.name.lower()
    layers = f'<p class="layers">{escape(", ".join(finding.layers[:12]))}{" …" if len(finding.layers) > 12 else ""}</p>'
    return (
        f'<article class="{severity}"><h3><b>{severity}</b> {escape(finding.name)}, since step {finding.since}</h3>'
        f"{layers if finding.layers else ''}<p>{escape(finding.evidence)}</p><p><i>Remedy:</i> {escape(finding.remedy)}</p></article>"
    )


class _View:
    """One horizontal scale for all charts of a course."""

    def __init__(self, course: Course) -> None:
        self.course = course
        everything = np.concatenate([course.steps.step, course.lost.step])
        self.first, self.last = int(everything.min()), int(everything.max())

    def charts(self) -> Iterator[str]:
        course = self.course
        lines = [*((line, "lost") for line in _by_attempt(course.lost, "loss")), (Line(x=course.steps.step, y=course.steps.loss), "train")]
        if course.evaluations:
            nats = np.array([evaluation.nats for evaluation in course.evaluations])
            lines.append((Line(x=np.array([e.step for e in course.evaluations]), y=nats, is_dotted=True), "held-out"))
        yield self._chart("loss", "nats per token", lines)
        for title, unit, name in CHARTS:
            lost = [(line, "lost") for line in _by_attempt(course.lost, name)]
            yield self._chart(title, unit, [*lost, (Line(x=course.steps.step, y=getattr(course.steps, name)), "train")])

    def data(self) -> dict[str, Any]:
        """For the script: what stands at a step."""
        steps = self.course.steps
        chosen = np.unique(np.linspace(0, len(steps) - 1, 4 * POINTS).astype(int))
        names = [("loss", "loss"), *((title, name) for title, _, name in CHARTS)]
        return {
            "first": self.first,
            "last": self.last,
            "left": LEFT,
            "width": WIDTH - LEFT - RIGHT,
            "step": steps.step[chosen].tolist(),
            "attempt": steps.attempt[chosen].tolist(),
            "values": {title: _rounded(getattr(steps, name)[chosen]) for title, name in names},
            "heldOut": [[e.step, round(e.nats, 4)] for e in self.course.evaluations if e.nats == e.nats],
        }

    def _x(self, step: Any) -> Any:
        return LEFT + (step - self.first) / max(1, self.last - self.first) * (WIDTH - LEFT - RIGHT)

    def _chart(self, title: str, unit: str, lines: Sequence[tuple[Line, str]]) -> str:
        scale = scale_of([line.y for line, _ in lines])
        if scale is None:
            return ""
        kinds = [kind for kind in ("train", "held-out", "lost") if any(kind == known for _, known in lines)]
        legend = "".join(f'<span class="key {kind}">{kind}</span>' for kind in kinds) if len(kinds) > 1 else ""
        drawn = "".join(self._line(line, kind, scale) for line, kind in lines)
        return (
            f"<figure><figcaption><b>{escape(title)}</b> {escape(unit)}{' (log scale)' if scale.is_log else ''} {legend}</figcaption>"
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)} by step">'
            f'{_axis(scale)}{self._attempts()}{drawn}<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg></figure>'
        )

    def _line(self, line: Line, kind: str, scale: Scale) -> str:
        x, y = thinned(line.x, line.y, POINTS)
        if not len(x):
            return ""
        across, down = self._x(x), _y(y, scale)
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(across, down, strict=True))
        dots = (
            f'<circle class="{kind}" r="3.5" cx="{a:.1f}" cy="{b:.1f}"><title>step {step}: {figure(value)}</title></circle>'
            for a, b, step, value in zip(across, down, x.tolist(), y.tolist(), strict=True)
        )
        return f'<polyline class="{kind}" points="{points}"/>{"".join(dots) if line.is_dotted else ""}'

    def _attempts(self) -> str:
        """Where each attempt takes over, and the steps' numbers at both ends."""
        out = [
            f'<text x="{LEFT}" y="{HEIGHT - 6}">{self.first}</text>',
            f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" class="end">step {self.last}</text>',
        ]
        for attempt in self.course.attempts:
            kept = self.course.steps.step[self.course.steps.attempt == attempt.attempt]
            if len(kept) and kept[0] > self.first:
                x = self._x(int(kept[0]))
                out.append(f'<line class="attempt" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
                out.append(f'<text x="{x + 3:.1f}" y="{TOP + 9}">attempt {attempt.attempt}</text>')
        for attempt in np.unique(self.course.lost.attempt):
            lost = self.course.lost.step[self.course.lost.attempt == attempt]
            x, end = self._x(int(lost.min()) - 0.5), self._x(int(lost.max()) + 0.5)
            place = f'x="{x:.1f}" width="{end - x:.1f}" y="{TOP}" height="{HEIGHT - TOP - BOTTOM}"'
            out.append(f'<rect class="gone" {place}><title>attempt {attempt}: {len(lost)} steps lost</title></rect>')
        return "".join(out)


def _by_attempt(steps: Steps, name: str) -> Iterator[Line]:
    for attempt in np.unique(steps.attempt):
        chosen = steps.attempt == attempt
        yield Line(x=steps.step[chosen], y=getattr(steps, name)[chosen])


def _y(values: Floats, scale: Scale) -> Floats:
    shares: Floats = np.clip(np.nan_to_num(scale.share(values)), 0, 1)
    return HEIGHT - BOTTOM - shares * (HEIGHT - TOP - BOTTOM)


def _axis(scale: Scale) -> str:
    out = []
    for value in (scale.low, scale.middle, scale.high):
        y = float(_y(np.array([value]), scale)[0])
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<text class="end" x="{LEFT - 6}" y="{y + 4:.1f}">{figure(value)}</text>')
    return "".join(out)


def _heat_maps(course: Course) -> Iterator[str]:
    for statistic, title in HEAT:
        names, values = course.layers.named(statistic)
        if names and (scale := scale_of([values[values > 0]])):
            yield _heat_map(title, names, course.layers.step.tolist(), values, scale)


def _heat_map(title: str, names: Sequence[str], steps: Sequence[int], values: Floats, scale: Scale) -> str:
    """A row per name, a column per sampled step; darker (in the dark: lighter) is more."""
    chosen = np.unique(np.linspace(0, len(steps) - 1, CELLS).astype(int)).tolist()
    left = 8 + 7 * max(map(len, names))
    cell = (WIDTH - RIGHT - left) / max(1, len(chosen))
    shade = np.floor(np.clip(np.nan_to_num(scale.share(values)), 0, 1 - 1e-9) * SHADES).astype(int)
    out = []
    for row, name in enumerate(names):
        out.append(f'<text class="end" x="{left - 6}" y="{row * ROW + 10}">{escape(name)}</text>')
        for column, entry in enumerate(chosen):
            value = values[entry, row]
            known = f"s{shade[entry, row]}" if value == value else "unknown"
            out.append(
                f'<rect class="{known}" x="{left + column * cell:.1f}" y="{row * ROW}" width="{cell + 0.2:.1f}" height="{ROW - 1}">'
                f"<title>{escape(name)}, step {steps[entry]}: {figure(float(value)) if value == value else 'unknown'}</title></rect>"
            )
    ends = f"step {steps[chosen[0]]} to {steps[chosen[-1]]}, {figure(scale.low)} to {figure(scale.high)}"
    return (
        f"<figure><figcaption><b>{escape(title)}</b> {ends}{' (log scale)' if scale.is_log else ''}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {len(names) * ROW}" class="heat" role="img" aria-label="{escape(title)}">{"".join(out)}</svg></figure>'
    )


def _attempts(course: Course) -> str:
    rows = []
    for attempt in course.attempts:
        source = "scratch" if attempt.resume_step < 0 else f"step {attempt.resume_step}"
        computed = f"{attempt.first_step} to {attempt.last_step}" if attempt.last_step else "none"
        cells = (
            attempt.attempt,
            attempt.world_size,
            source,
            computed,
            attempt.kept_steps,
            attempt.lost_steps,
            "; ".join(course.endings(attempt.attempt)),
        )
        rows.append("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in cells) + "</tr>")
    return "".join(rows)


def _rounded(values: Floats) -> list[float | None]:
    return [float(f"{value:.5g}") if np.isfinite(value) else None for value in values.tolist()]
