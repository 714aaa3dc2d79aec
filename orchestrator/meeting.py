"""How an agent finds its run: through a coordinator's URL, or through the root, whose log names the newest coordinator."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from dataclasses import replace

from keepstep.storage.errors import StorageError
from keepstep.storage.runlog import RunLog
from keepstep.storage.store import Store

from .client import CoordinatorClient, CoordinatorRefused, CoordinatorUnreachable
from .contact import Contact
from .errors import InputError
from .roots import ENV_TOKEN, TOKEN_KEY, open_root
from .sections import RunConfig

RETRY_S = 0.1
COMPLAIN_PERIOD_S = 10.0


async def meet(contact: Contact) -> tuple[Contact, RunConfig, Store]:
    """Waits until a coordinator answers (nodes may come before it). Raises InputError when it answers and refuses us."""
    store = Store.open(contact.root) if contact.root else None
    complain_at = time.monotonic() + COMPLAIN_PERIOD_S
    while True:
        try:
            found = await asyncio.to_thread(_look_up, store, contact) if store else contact
            config = await _config_from(found)
            return replace(found, root=config.run.root), config, open_root(config)
        except (CoordinatorUnreachable, StorageError) as error:
            if time.monotonic() > complain_at:
                complain_at += COMPLAIN_PERIOD_S
                print(f"keepstep agent: still waiting for the coordinator: {error}", file=sys.stderr)  # noqa: T201
            await asyncio.sleep(RETRY_S)
        except CoordinatorRefused as error:
            raise InputError(str(error)) from error


def _look_up(store: Store, contact: Contact) -> Contact:
    opened = RunLog.open(store).newest_opened()
    if opened is None or not opened.url:
        raise CoordinatorUnreachable(f"{store.name} names no coordinator yet")
    token = os.environ.get(ENV_TOKEN) or store.get(TOKEN_KEY).decode()
    return Contact(root=contact.root, url=opened.url, token=token)


async def _config_from(contact: Contact) -> RunConfig:
    async with CoordinatorClient(contact.url, contact.token) as client:
        return RunConfig.model_validate(json.loads(await client.get("/v1/config")))
