"""What a platform says before it takes a node away, read from the words of its services. Pure.

Times are the service's own, by its clock. They are compared with this host's wall clock, which may be wrong: where that gives a time that
the service cannot have meant, what it promises at the least is taken, and the sentence says so.

A notice in a file: its text is the reason. A first line such as "in 90" says how many seconds are left; it is no part of the reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final

# From the announcement to the end, at the least. AWS hibernates at once: https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/ (spot
# instance interruption notices). Azure's scheduled events promise a Preempt 30 s and a Terminate 5 minutes, which people may prolong to 15.
AWS_LEAST_S: Final[Mapping[str, float]] = {"terminate": 120.0, "stop": 120.0, "hibernate": 0.0}
AZURE_LEAST_S: Final[Mapping[str, float]] = {"Preempt": 30.0, "Terminate": 300.0}
GCP_LEAST_S: Final = 30.0
AWS_MOST_S: Final = 180.0
AZURE_MOST_S: Final = 1000.0
MAX_REASON: Final = 200  # characters

_SECONDS: Final = re.compile(r"in\s+(\d{1,6}(?:\.\d+)?)\s*s?", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """This node will be taken away. Two that are equal are one notice, read twice."""

    source: str  # "aws", "gcp", "azure", "file:PATH"
    what: str  # the service's word for it, or the file's text
    at: datetime | None = None  # when, by the service's clock
    least_s: float | None = None  # how long it promises at the least, or how long the file says; None: nobody said
    most_s: float = 0.0  # no time further away than this can have been meant


class Nonsense(ValueError):
    """The service answered, and what it said is no notice and no "none"."""


def time_left(notice: Notice, now: datetime) -> tuple[float | None, str]:
    """(seconds, remark): None where nobody said how long; a remark where the service's time cannot be right."""
    if notice.at is None:
        return notice.least_s, ""
    left_s = (notice.at - now).total_seconds()
    if 0 < left_s <= notice.most_s:
        return left_s, ""
    return notice.least_s, f"its time {notice.at.isoformat()} cannot be right here, so the least that it promises"


def sentence(notice: Notice, seconds: float, remark: str = "") -> str:
    """ "aws: terminate in 118 s"."""
    return f"{notice.source}: {notice.what} in {seconds:.0f} s" + (f" ({remark})" if remark else "")


def from_aws(body: str) -> Notice:
    """The answer of /latest/meta-data/spot/instance-action where there is one: {"action": "terminate", "time": "2026-11-22T10:00:00Z"}.

    Raises Nonsense.
    """
    said = _mapping(_parsed("aws", body), "aws")
    action = said.get("action")
    if not isinstance(action, str) or action not in AWS_LEAST_S:
        raise Nonsense(f"aws announced the action {_short(action)}, not one of {', '.join(AWS_LEAST_S)}")
    return Notice(source="aws", what=action, at=_iso(said.get("time")), least_s=AWS_LEAST_S[action], most_s=AWS_MOST_S)


def from_gcp(body: str) -> Notice | None:
    """The value of /computeMetadata/v1/instance/preempted: TRUE or FALSE. It tells no time. Raises Nonsense."""
    match body.strip().upper():
        case "TRUE":
            return Notice(source="gcp", what="preempted", least_s=GCP_LEAST_S)
        case "FALSE":
            return None
        case _:
            raise Nonsense(f"gcp says preempted = {_short(body)}, neither TRUE nor FALSE")


def from_azure(body: str, machine: str) -> Notice | None:
    """The Preempt or Terminate that comes first among the scheduled events of this virtual machine; None if there is none.

    The service tells every machine of a scale set about all of them: only events whose Resources name `machine` are ours.

    Raises Nonsense.
    """
    events = _mapping(_parsed("azure", body), "azure").get("Events")
    if not isinstance(events, list):
        raise Nonsense(f"azure's scheduled events are {_short(events)}, not a list")
    return min(_ours(events, machine), key=lambda notice: notice.at.timestamp() if notice.at else 0.0, default=None)


def _ours(events: Iterable[Any], machine: str) -> Iterable[Notice]:
    for event in events:
        said = _mapping(event, "azure")
        kind, resources = said.get("EventType"), said.get("Resources")
        if isinstance(kind, str) and kind in AZURE_LEAST_S and isinstance(resources, list) and machine in resources:
            # NotBefore is empty once an event has started.
            yield Notice(source="azure", what=kind, at=_rfc(said.get("NotBefore")), least_s=AZURE_LEAST_S[kind], most_s=AZURE_MOST_S)


def from_file(text: str, path: str) -> Notice:
    """Whatever a notice file holds is a notice."""
    lines = [line.strip() for line in text.strip().splitlines()]
    match = _SECONDS.fullmatch(lines[0]) if lines else None
    reason = " ".join(filter(None, lines[1:] if match else lines))
    return Notice(source=f"file:{path}", what=reason[:MAX_REASON] or "leave", least_s=float(match[1]) if match else None)


def _parsed(source: str, body: str) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise Nonsense(f"{source} says {_short(body)}, which is no JSON") from None


def _mapping(value: Any, source: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise Nonsense(f"{source} says {_short(value)}, which is no JSON object")
    return value


def _iso(value: Any) -> datetime | None:
    """None for what is no time: the notice counts all the same."""
    try:
        return _aware(datetime.fromisoformat(value))
    except (TypeError, ValueError, OverflowError):
        return None


def _rfc(value: Any) -> datetime | None:
    """ "Mon, 19 Sep 2016 18:29:47 GMT"; newer versions of the service use ISO 8601."""
    if not isinstance(value, str):
        return None
    try:
        return _aware(parsedate_to_datetime(value))
    except (TypeError, ValueError, OverflowError, IndexError):
        return _iso(value)


def _aware(at: datetime) -> datetime:
    """In UTC; so is a time without a zone."""
    return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
