"""Events and numbers as lines for people. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

_SHOWN_S: Final = 0.05


def event_line(event: Mapping[str, Any]) -> str:
    """ "attempt 2, step 41: rank 3 on node1#ab12 was killed by SIGKILL", and below it what a failed rank printed last."""
    place = ", ".join(part for part in (_numbered("attempt", event, 1), _numbered("step", event, 0)) if part)
    at = f"{event['at'][11:19]} " if event.get("at") else ""
    printed = "".join(f"\n    | {line}" for line in event.get("detail") or ())
    return f"{at}{event['kind']:<10} {place + ': ' if place else ''}{event['why']}{printed}"


def _numbered(name: str, event: Mapping[str, Any], smallest: int) -> str:
    number = event.get(name)
    return f"{name} {number}" if isinstance(number, int) and number >= smallest else ""


def time_table(seconds: Mapping[str, float]) -> list[str]:
    """Where the time went, one line per class that has any; shares are of all of it but what was spent away."""
    present_s = sum(seconds.values()) - seconds.get("away", 0.0)
    lines = [f"{'where the time went':<20}{'seconds':>10}{'share':>9}"]
    for name, value in seconds.items():
        if value >= _SHOWN_S:
            share = f"{100 * value / present_s:.1f} %" if name != "away" and present_s > 0 else "-"
            lines.append(f"  {name:<18}{value:>10.1f}{share:>9}")
    return [*lines, f"  {'all':<18}{sum(seconds.values()):>10.1f}"] if len(lines) > 1 else []


def human_bytes(number: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"


def human_age(seconds: float | None) -> str:
    """ "42 s", "5 min", "3 h", "2 d"; None is "?"."""
    if seconds is None:
        return "?"
    for unit, size, limit in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172_800)):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86_400:.0f} d"
