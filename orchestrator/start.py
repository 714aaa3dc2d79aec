"""The first moments of an agent's process: the forkserver imports torch on one core while the agent imports its own modules on another.

So this module imports little, and the order of what it does is all that it is about.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from .contact import Contact
from .forkserver import forget_main_module, start_forkserver
from .processes import ENV_SCRATCH, adopt_orphans, bury, die_with_parent_if_told, print_or_lose
from .scratch import Scratch


def serve(name: str, contact: Contact, scratch_path: Path) -> int:
    """The agent process; its exit code. Raises InputError where the person who started it must do something."""
    die_with_parent_if_told()
    print_or_lose()
    adopt_orphans()
    scratch = Scratch(scratch_path)
    os.environ[ENV_SCRATCH] = str(scratch.path)
    scratch.lock()
    bury(scratch.path)
    scratch.gather_temporary_files()

    forget_main_module()
    start_forkserver(contact.root)
    from .agent import meet_and_run  # half a second of imports, beside those of the forkserver

    return asyncio.run(meet_and_run(name, contact, scratch))
