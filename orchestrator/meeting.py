"""How an agent finds its run: through a coordinator's URL, or through the root, whose log names the newest coordinator.

An agent that was told a URL learns the root from the coordinator there, and remembers it in its scratch directory: when it comes back and
nobody answers at that URL, the log tells it who rules now, on whatever machine.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

from keepstep.storage.errors import StorageError
from keepstep.storage.runlog import RunLog
from keepstep.storage.store import Store

from .client import CoordinatorClient, CoordinatorRefused, CoordinatorUnreachable
from .contact import Contact
from .errors import InputError
from .roots import TOKEN_KEY, open_root
from .sections import RunConfig

RETRY_S = 0.1
MEMORY = "met.json"  # in the scratch directory
MEETING_S = 2.0  # for an answer, before another way is tried
COMPLAIN_PERIOD_S = 10.0


async def meet(contact: Contact, scratch: Path) -> tuple[Contact, RunConfig, Store]:
    """Waits until a coordinator answers (nodes may come before it). Raises InputError when it answers and refuses us."""
    store = Store.open(contact.root) if contact.root else _remembered(contact, scratch)
    complain_at = time.monotonic() + COMPLAIN_PERIOD_S
    ways = itertools.cycle([way for way, is_open in ((_ask_url, contact.url), (_ask_root, store)) if is_open])
    while True:
        try:
            found, config = await next(ways)(contact, store)
            _remember(contact, config, scratch)
            return replace(found, root=config.run.root), config, open_root(config)
        except (CoordinatorUnreachable, StorageError) as error:
            if time.monotonic() > complain_at:
                complain_at += COMPLAIN_PERIOD_S
                print(f"keepstep agent: still waiting for the coordinator: {error}", file=sys.stderr)  # noqa: T201
            await asyncio.sleep(RETRY_S)
        except CoordinatorRefused as error:
            raise InputError(str(error)) from error


def _remember(contact: Contact, config: RunConfig, scratch: Path) -> None:
    (scratch / MEMORY).write_text(json.dumps({"url": contact.url, "config": config.model_dump(mode="json")}))


def _remembered(contact: Contact, scratch: Path) -> Store | None:
    """The root of the run that was met at this URL before."""
    try:
        met = json.loads((scratch / MEMORY).read_text())
        config = RunConfig.model_validate(met["config"])
    except (OSError, ValueError, KeyError):  # never met, torn by a crash, another version's: the URL must do
        return None
    return open_root(config) if met["url"] == contact.url else None


async def _ask_url(contact: Contact, _: Store | None) -> tuple[Contact, RunConfig]:
    return contact, await _config_from(contact)


async def _ask_root(contact: Contact, store: Store | None) -> tuple[Contact, RunConfig]:
    assert store
    found = await asyncio.to_thread(_look_up, store, contact)
    return found, await _config_from(found)


def _look_up(store: Store, contact: Contact) -> Contact:
    opened = RunLog.open(store).newest_opened()
    if opened is None or not opened.url:
        raise CoordinatorUnreachable(f"{store.name} names no coordinator yet")
    token = contact.token or store.get(TOKEN_KEY).decode()
    return Contact(root=contact.root, url=opened.url, token=token)


async def _config_from(contact: Contact) -> RunConfig:
    async with CoordinatorClient(contact.url, contact.token, patience_s=MEETING_S) as client:
        return RunConfig.model_validate(json.loads(await client.get("/v1/config")))
