"""What `keepstep run`, `coordinator` and `agent` do, between the command line and the processes."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from keepstep.storage.store import Store
from keepstep.trainer.contract import EXIT_OK

from . import config as configs
from .contact import Contact
from .errors import InputError
from .lines import event_line
from .processes import die_with_parent_if_told
from .roots import ENV_TOKEN, claim, open_root
from .scratch import default_scratch
from .sections import RunConfig
from .tools import prepare_tokens

SAMPLE_PROMPT = "Return a new "


def run_locally(config: RunConfig, *, demo: bool) -> int:
    """The whole of `keepstep run`; its exit code."""
    from .conducting import Witness
    from .demo import demonstration
    from .launchers import LocalPlatform
    from .screen import Screen

    began = time.monotonic()
    store, config_path = ready(config)
    screen = Screen(config, store)
    screen.say(f"run {config.run.name!r} in {config.run.root}")
    if demo:
        witness = Witness(screen)
        conduct = demonstration(config, store, witness).conduct()
        code = asyncio.run(LocalPlatform(config, config_path, witness).run(conduct))
    else:
        code = asyncio.run(LocalPlatform(config, config_path, screen).run())
    screen.finish(code, time.monotonic() - began)
    if demo and code == EXIT_OK:
        _show_off(config, store, screen.say)
    return code


def ready(config: RunConfig) -> tuple[Store, Path]:
    """The root claimed for this run, its tokens there; and the resolved config for the coordinator. Raises InputError."""
    store = open_root(config)
    config = claim(store, config)
    if not config.train.script:
        prepare_tokens(config, store)  # a user's script brings its own data
    return store, _write_resolved(config)


def _write_resolved(config: RunConfig) -> Path:
    """For the coordinator that `run` starts; in the run's root the same text stands for people."""
    path = default_scratch(config.run.root, "run.toml")
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.write_text(configs.to_toml(config))
    return path


def _show_off(config: RunConfig, store: Store, say: Callable[[str], None]) -> None:
    from .demo import same_bits

    say(same_bits(store))
    if not config.train.script:
        from .tools import sample

        say(f"sample: {sample(config.run.root, SAMPLE_PROMPT)!r}")


def coordinate(config: RunConfig, *, managed: bool) -> int:
    """The whole of `keepstep coordinator`; its exit code. `managed`: `keepstep run` reads our events as JSON lines."""
    from .serving import serve

    die_with_parent_if_told()
    store = open_root(config)
    config = claim(store, config)
    end = serve(config, store, _tell_json if managed else _tell_person)
    if not managed:
        print(f"keepstep: {end.why}", flush=True)
    return end.exit_code


def serve_agent(*, url: str, root: str, node: str, scratch: str) -> int:
    """The whole of `keepstep agent`; its exit code."""
    from .start import serve

    if not url and not root:
        raise InputError("keepstep agent needs --coordinator URL or --root ROOT: how else would it find its run?")
    token = os.environ.get(ENV_TOKEN, "")
    if url and not token:
        raise InputError(f"--coordinator {url}: set {ENV_TOKEN} to the run's token; it stands in the file `token` of the run's root")
    name = node or os.environ.get("SLURMD_NODENAME") or socket.gethostname().partition(".")[0]
    root = root if "://" in root or not root else str(Path(root).absolute())
    return serve(name, Contact(root=root, url=url, token=token), Path(scratch) if scratch else default_scratch(root or url, name))


def _tell_json(event: dict[str, Any]) -> None:
    print(json.dumps(event), flush=True)


def _tell_person(event: dict[str, Any]) -> None:
    if event["kind"] != "progress":
        print(event_line(event), flush=True)
