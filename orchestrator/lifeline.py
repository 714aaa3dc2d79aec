"""Imported by the forkserver before anything else: it must not outlive the agent that started it."""

from __future__ import annotations

from .processes import die_with_parent_if_told

die_with_parent_if_told()
