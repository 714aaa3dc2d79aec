"""Curves for a terminal: braille dots, two by four to a character, or plain ASCII where there is nothing better."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from rich.text import Text

Floats = npt.NDArray[np.float64]
AXIS: Final = 10  # characters left of a curve
_BITS: Final = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of a braille character, by row and column
_BRAILLE: Final = 0x2800
LOG_FROM: Final = 50.0  # values that differ by more are drawn on a logarithmic scale


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Line:
    x: npt.NDArray[np.int64]
    y: Floats
    style: str = ""
    is_dotted: bool = False  # a mark at every point instead of a line through them


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """From a value to a share of the way between two ends."""

    low: float
    high: float
    is_log: bool = False

    def share(self, values: Floats) -> Floats:
        low, high = (math.log(self.low), math.log(self.high)) if self.is_log else (self.low, self.high)
        with np.errstate(divide="ignore", invalid="ignore"):
            scaled: Floats = ((np.log(values) if self.is_log else values) - low) / (high - low or 1.0)
        return scaled

    @property
    def middle(self) -> float:
        return math.sqrt(self.low * self.high) if self.is_log else (self.low + self.high) / 2


def scale_of(values: Sequence[Floats]) -> Scale | None:
    """Over all finite values; logarithmic where they need it. None: there are none."""
    known = np.concatenate([value[np.isfinite(value)] for value in values]) if values else np.zeros(0)
    if not len(known):
        return None
    low, high = float(known.min()), float(known.max())
    if low == high:
        margin = abs(low) / 20 or 1.0
        return Scale(low=low - margin, high=high + margin)
    return Scale(low=low, high=high, is_log=low > 0 and high / low > LOG_FROM)


def thinned(x: npt.NDArray[np.int64], y: Floats, buckets: int) -> tuple[npt.NDArray[np.int64], Floats]:
    """At most first, lowest, highest and last point of each of so many equal stretches of x: no spike is lost."""
    known = np.isfinite(y)
    x, y = x[known], y[known]
    if len(x) <= 4 * buckets:
        return x, y
    bucket = (x - x[0]) * buckets // (x[-1] - x[0] + 1)
    starts = np.flatnonzero(np.diff(bucket, prepend=-1))
    ends = np.append(starts[1:], len(x))
    chosen = {int(i) for start, end in zip(starts, ends, strict=True) for i in (start, end - 1, *_extremes(y, int(start), int(end)))}
    order = np.array(sorted(chosen))
    return x[order], y[order]


def _extremes(y: Floats, start: int, end: int) -> tuple[int, int]:
    return start + int(y[start:end].argmin()), start + int(y[start:end].argmax())


class Canvas:
    """Dots of several styles; where two meet in a character, the later style is seen."""

    def __init__(self, width: int, height: int, *, ascii_only: bool) -> None:
        self.width, self.height, self._ascii = width, height, ascii_only
        self.columns, self.rows = (width, height) if ascii_only else (2 * width, 4 * height)
        self._bits = [[0] * width for _ in range(height)]
        self._marks: dict[tuple[int, int], str] = {}
        self._styles = [[""] * width for _ in range(height)]

    def draw(self, line: Line, first: int, last: int, scale: Scale) -> None:
        x, y = thinned(line.x, line.y, self.columns)
        across = np.rint((x - first) / max(1, last - first) * (self.columns - 1)).astype(int)
        up = np.rint((1 - np.clip(np.nan_to_num(scale.share(y)), 0, 1)) * (self.rows - 1)).astype(int)
        points = list(zip(across.tolist(), up.tolist(), strict=True))
        if line.is_dotted:
            for column, row in points:
                self._mark(column, row, line.style)
        else:
            for i, point in enumerate(points):
                self._stroke(points[max(0, i - 1)], point, line.style)

    def lines(self) -> list[Text]:
        return [self._line(row) for row in range(self.height)]

    def _stroke(self, start: tuple[int, int], end: tuple[int, int], style: str) -> None:
        length = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
        for i in range(length + 1):
            column = start[0] + (end[0] - start[0]) * i // length
            row = start[1] + (end[1] - start[1]) * i // length
            cell_row, cell_column = (row, column) if self._ascii else (row // 4, column // 2)
            self._bits[cell_row][cell_column] |= 1 if self._ascii else _BITS[row % 4][column % 2]
            self._styles[cell_row][cell_column] = style

    def _mark(self, column: int, row: int, style: str) -> None:
        cell = (row, column) if self._ascii else (row // 4, column // 2)
        self._marks[cell] = "o" if self._ascii else "●"
        self._styles[cell[0]][cell[1]] = style

    def _line(self, row: int) -> Text:
        text = Text(no_wrap=True)
        for column in range(self.width):
            bits = self._bits[row][column]
            dots = ("*" if self._ascii else chr(_BRAILLE + bits)) if bits else " "
            text.append(self._marks.get((row, column), dots), self._styles[row][column])
        return text


def chart(title: Text, lines: Sequence[Line], first: int, last: int, *, width: int, height: int, ascii_only: bool) -> list[Text]:
    """Title, curves with their axis. Just the title with "nothing recorded" where no line has a value."""
    scale = scale_of([line.y for line in lines])
    if scale is None:
        return [title + Text("  nothing recorded", style="dim")]
    canvas = Canvas(width - AXIS, height, ascii_only=ascii_only)
    for line in lines:
        canvas.draw(line, first, last, scale)
    labels = {0: scale.high, height - 1: scale.low} | ({height // 2: scale.middle} if height >= 6 else {})
    bar = "|" if ascii_only else "┤"
    rule = "|" if ascii_only else "│"
    rows = [
        Text(f"{figure(labels[row]):>{AXIS - 2}} {bar}" if row in labels else " " * (AXIS - 1) + rule, style="dim") + drawn
        for row, drawn in enumerate(canvas.lines())
    ]
    return [title, *rows]


def lane(label: str, spans: Sequence[tuple[int, int, str, str]], first: int, last: int, *, width: int) -> Text:
    """A strip below the curves. Each span is (from step, to step, the character that fills it, what stands at its begin)."""
    cells = [" "] * (width - AXIS)
    for start, end, fill, name in spans:
        left, right = (int((step - first) / max(1, last - first) * (len(cells) - 1) + 0.5) for step in (start, end))
        for i in range(max(0, left), min(right, len(cells) - 1) + 1):
            cells[i] = name[i - left] if i - left < len(name) else fill
    return Text(f"{label:>{AXIS - 1}} ", style="dim") + Text("".join(cells))


def figure(value: float) -> str:
    """At most eight characters."""
    if value and (abs(value) >= 1e6 or abs(value) < 1e-3):
        return f"{value:.1e}"
    return f"{value:.4g}" if abs(value) < 1e3 else f"{value:.0f}"
