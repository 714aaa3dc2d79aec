"""How to reach a run: its coordinator, its root, or both."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Contact:
    root: str = ""
    url: str = ""
    token: str = ""
