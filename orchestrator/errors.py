"""The errors of the orchestrator, and what each means to whoever started the run.

    ValueError
      x InputError    what the user wrote is wrong: nothing was started, nothing was lost; exit code 2

What the world did (a lost node, a full disk) is not an exception here: it reaches the machine as an event and leaves as a reason.
"""

from __future__ import annotations


class InputError(ValueError):
    """What the user wrote is wrong. Carries every problem that was found, one sentence each: where, what, got, and what to do."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems
