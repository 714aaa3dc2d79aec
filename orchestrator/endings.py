"""How a run ended, as the exit code that schedulers act on."""

from __future__ import annotations

from typing import assert_never

from keepstep.trainer.contract import EXIT_DO_NOT_REQUEUE, EXIT_FAILED, EXIT_OK, EXIT_REQUEUE

from .events import LogEnd


def exit_code_of(end: LogEnd) -> int:
    match end.outcome:
        case "succeeded":
            return EXIT_OK
        case "stopped":
            return EXIT_REQUEUE
        case "failed":
            return EXIT_FAILED if end.requeue else EXIT_DO_NOT_REQUEUE
        case _:
            assert_never(end.outcome)
