"""Imported by the forkserver before anything else: it must not outlive the agent that started it.

Nor may it die before its agent: Slurm sends SIGTERM, or what a person asks for, to every process of a node, and the ranks go with the
forkserver. What such a signal means is the agent's business.
"""

from __future__ import annotations

import signal
from types import FrameType

from .processes import die_with_parent_if_told


def _leave_it_to_the_agent(number: int, frame: FrameType | None) -> None:
    """A handler and not SIG_IGN, which programs that a rank starts would inherit."""


die_with_parent_if_told()
for _number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(_number, _leave_it_to_the_agent)
