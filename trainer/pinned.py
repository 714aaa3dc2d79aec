"""The config.json of a model of Hugging Face transformers, kept in the root: a run goes on, and its checkpoints are used, with the one that
it began with, whether or not model.folder still has it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from keepstep.storage.errors import NotFound
from keepstep.storage.store import Store

from .config import TrainerConfig

MODEL_KEY: Final = "model.json"

log = logging.getLogger("keepstep.trainer")


def pin(config: TrainerConfig, store: Store) -> None:
    """Rank 0 only, when a run begins. Raises ValueError where neither the root nor the folder has a config.json."""
    if config.model.kind != "hf":
        return
    look(config, store)
    with contextlib.suppress(OSError):  # then the root has it
        if not store.put_new(MODEL_KEY, _given(config)):
            folder = json.dumps(config.model.folder)
            log.warning("model.folder = %s has another config.json than this run, which goes on with its own (%s)", folder, MODEL_KEY)


def look(config: TrainerConfig, store: Store) -> None:
    """Raises ValueError where neither the root nor the folder has a config.json; other kinds than "hf" need none."""
    if config.model.kind != "hf" or _kept(store) is not None:
        return
    try:
        _given(config)
    except OSError as error:
        folder = json.dumps(config.model.folder)
        raise ValueError(
            f"model.folder = {folder} holds no config.json that can be read: {error}; name the local folder of a model"
        ) from error


@contextlib.contextmanager
def pinned(config: TrainerConfig, store: Store) -> Iterator[TrainerConfig]:
    """The config with a model.folder, for as long as the `with` lasts, of what the root keeps. Raises ValueError where it keeps none."""
    if config.model.kind != "hf":
        yield config
        return
    body = _kept(store)
    if body is None:
        raise ValueError(f'{store.name} holds no {MODEL_KEY}: no run of model.kind = "hf" has begun there')
    with tempfile.TemporaryDirectory(prefix="keepstep-") as folder:
        Path(folder, "config.json").write_bytes(body)
        yield config.model_copy(update={"model": config.model.model_copy(update={"folder": folder})})


def _given(config: TrainerConfig) -> bytes:
    return Path(config.model.folder, "config.json").read_bytes()


def _kept(store: Store) -> bytes | None:
    try:
        return store.get(MODEL_KEY)
    except NotFound:
        return None
