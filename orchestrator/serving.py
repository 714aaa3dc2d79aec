"""The coordinator's process: bind the port, open a term, reign, leave with an exit code that a platform understands."""

from __future__ import annotations

import asyncio
import gc
import ipaddress
import os
import signal
import socket
from collections.abc import Callable, Sequence
from typing import Any, Final

from aiohttp import web

from keepstep.storage.errors import Fenced, StoreError
from keepstep.storage.layout import RUN_CONFIG_KEY
from keepstep.storage.records import Finished, Opened
from keepstep.storage.runlog import RunLog
from keepstep.storage.store import Store
from keepstep.trainer.contract import EXIT_OK, EXIT_REQUEUE

from .archive import utc_now, write_result
from .books import read_books
from .config import identity, overridden, to_toml
from .contact import address_towards
from .coordinator import Coordinator, End
from .errors import InputError
from .logbook import opened_event
from .roots import REMEDY, token_of
from .sections import RunConfig
from .server import application

IDLE_S = 15.0  # connections of hosts that are gone without a word are closed after so long; agents call every second

GARBAGE_AFTER: Final = 20_000  # new objects

Teller = Callable[[dict[str, Any]], None]


def serve(config: RunConfig, store: Store, tell: Teller) -> End:
    """Runs one coordinator until the run is over. Raises InputError where the person who started it must do something."""
    # With thousands of nodes the default thresholds spend a sixth of the time on looking for garbage among what lives on, in long pauses.
    gc.freeze()
    gc.set_threshold(GARBAGE_AFTER, 50, 100)
    with _bound_socket(config.cluster.listen) as listener:
        return asyncio.run(_serve(config, store, listener, tell))


async def _serve(config: RunConfig, store: Store, listener: socket.socket, tell: Teller) -> End:
    token = token_of(store)
    try:
        log = await asyncio.to_thread(RunLog.open, store)
        if (over := log.lineage.outcome) and isinstance(over, Finished) and over.outcome == "succeeded":
            books = await asyncio.to_thread(read_books, store, log.lineage)
            await asyncio.to_thread(write_result, store, log.lineage, books)  # its coordinator may have died just before
            return End(EXIT_OK, f"the run is over already: {over.why}")
        _check_overrides(config, log.lineage.overrides)
        await asyncio.to_thread(_open_term, log, config, _url_of(listener))
    except StoreError as error:
        raise InputError(f"run.root = {config.run.root!r}: {error}") from error
    except Fenced as error:
        return End(EXIT_REQUEUE, str(error))
    coordinator = Coordinator(config, store, log, tell)
    runner = web.AppRunner(
        application(coordinator, token), handler_cancellation=True, access_log=None, shutdown_timeout=1.0, keepalive_timeout=IDLE_S
    )
    await runner.setup()
    await web.SockSite(runner, listener).start()
    _stop_on_signals(coordinator)
    try:
        return await coordinator.reign(opened_event(log))
    finally:
        await runner.cleanup()


def _check_overrides(config: RunConfig, overrides: Sequence[str]) -> None:
    """Before anybody is fenced for a config that cannot reign."""
    try:
        overridden(config, overrides)
    except InputError as error:
        told = f"a rewind of this run set {', '.join(overrides)}, which does not fit this config"
        raise InputError(
            f"{told}: {error}", "undo the change, or set another value with `keepstep rewind ROOT --to STEP -o section.key=value`"
        ) from error


def _open_term(log: RunLog, config: RunConfig, url: str) -> Opened:
    """Of two runs that found the root empty at the same time, the one whose term is in the log has it, and its config stands there."""
    host, pid = socket.gethostname(), os.getpid()
    try:
        opened = log.open_term(run=config.run.name, identity=identity(config), host=host, pid=pid, url=url, at=utc_now())
    except ValueError as error:
        raise InputError(f"run.root = {config.run.root!r}: {error}", REMEDY) from error
    if len(log.records) == 1:
        log.store.put(RUN_CONFIG_KEY, to_toml(config).encode())
    return opened


def _stop_on_signals(coordinator: Coordinator) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        asyncio.get_running_loop().add_signal_handler(number, coordinator.ask_stop, f"the coordinator got {number.name}")


def _bound_socket(listen: str) -> socket.socket:
    host, _, port = listen.rpartition(":")
    try:
        return socket.create_server((host.strip("[]"), int(port)), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=1024)
    except OSError as error:
        raise InputError(f"cluster.listen = {listen!r}: {error.strerror}; choose another port, or 0 for any free one") from error


def _url_of(listener: socket.socket) -> str:
    """What stands in the run log, for agents on any machine."""
    host, port = listener.getsockname()[:2]
    reached = own_address(listener.family) if host in ("0.0.0.0", "::") else host
    return f"http://[{reached}]:{port}" if ":" in reached else f"http://{reached}:{port}"


def own_address(family: int) -> str:
    """Where other machines reach this one: the address of its host name or, where that is a loopback's (Debian's 127.0.1.1) or none, the
    one towards its default route; loopback where it has no network at all."""
    try:
        named = str(socket.getaddrinfo(socket.gethostname(), None, family, socket.SOCK_STREAM)[0][4][0])
    except socket.gaierror:
        named = ""
    if named and not ipaddress.ip_address(named).is_loopback:
        return named
    anywhere, loopback = ("2001:db8::1", "::1") if family == socket.AF_INET6 else ("198.51.100.1", "127.0.0.1")  # RFC 3849, RFC 5737
    try:
        return address_towards(anywhere)
    except OSError:
        return loopback
