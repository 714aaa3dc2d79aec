"""Everything that is done to a run's root before anybody reigns: open it, check it, bind it to one run, share its token."""

from __future__ import annotations

import os
import secrets
from typing import Final

from keepstep.storage.errors import NotFound, StorageError, StoreError
from keepstep.storage.layout import RUN_CONFIG_KEY
from keepstep.storage.runlog import RunLog
from keepstep.storage.store import ENV_OPTIONS, StorageOptions, Store

from . import config as configs
from .errors import InputError
from .sections import RunConfig, StorageSection

TOKEN_KEY: Final = "token"
ENV_TOKEN: Final = "KEEPSTEP_TOKEN"


def storage_options(section: StorageSection) -> StorageOptions:
    return StorageOptions(
        endpoint_url=section.endpoint_url,
        region=section.region,
        ca_file=section.ca,
        deadline_s=section.timeout_s,
        max_connections=section.connections,
    )


def open_root(config: RunConfig) -> Store:
    """The store of a config; children of this process open it in the same way (through their environment)."""
    options = storage_options(config.storage)
    os.environ[ENV_OPTIONS] = options.to_json()
    try:
        return Store.open(config.run.root, options)
    except ValueError as error:
        raise InputError(f"run.root = {config.run.root!r}: {error}") from error


def claim(store: Store, config: RunConfig) -> RunConfig:
    """Makes the root this run's, or checks that it is already; returns the config to go on with. Raises InputError with the remedy.

    The resolved config of the newest `run` is what stands in run.toml. The identity never changes once a coordinator has begun the
    run's log: a first start that was refused, for its data or its model, leaves no run behind.
    """
    try:
        stored = _stored_config(store)
        config = configs.settled(config, stored)
        if stored is None:
            store.probe()
        elif (differences := configs.explain_difference(stored, config)) and RunLog.open(store).newest_opened():
            raise InputError(*(f"{config.run.root} holds another run: {text}" for text in differences), REMEDY)
        store.put(RUN_CONFIG_KEY, configs.to_toml(config).encode())
    except StoreError as error:
        raise InputError(f"run.root = {config.run.root!r}: {error}") from error
    return config


REMEDY: Final = (
    "choose another run.root, or give the config that the root was made with; optimizer.*, train.* and run.steps of a run are changed by "
    "`keepstep rewind ROOT --to STEP -o section.key=value`"
)


def token_of(store: Store) -> str:
    """The run's token: whoever can read the root may steer the run. Made at the first start."""
    try:
        store.put_new(TOKEN_KEY, secrets.token_hex(16).encode())
        return store.get(TOKEN_KEY).decode()
    except StoreError as error:
        raise InputError(f"run.root = {store.name!r}: {error}") from error


def known_token(store: Store) -> str:
    """For those who only visit: the environment's token, else the root's. Raises InputError where there is none."""
    if given := os.environ.get(ENV_TOKEN):
        return given
    try:
        return store.get(TOKEN_KEY).decode()
    except NotFound:
        raise InputError(f"{store.name}: no run lives there (no {TOKEN_KEY!r}); check the path, or start one with `keepstep run`") from None
    except StorageError as error:
        raise InputError(f"{store.name}: {error}") from error


def stored_config(store: Store) -> RunConfig:
    """The run that a root holds. Raises InputError where there is none."""
    try:
        config = _stored_config(store)
    except StoreError as error:
        raise InputError(f"{store.name}: {error}") from error
    if config is None:
        raise InputError(f"{store.name}: no run lives there (no {RUN_CONFIG_KEY}); check the path, or start one with `keepstep run`")
    return config


def open_as_stored(root: str) -> RunConfig:
    """The run that a root holds; opens it as its own [storage] section says, for whatever opens it again below. Raises InputError."""
    try:
        config = stored_config(Store.open(root))
    except ValueError as error:
        raise InputError(f"{root}: {error}") from error
    open_root(config.model_copy(update={"run": config.run.model_copy(update={"root": root})}))
    return config


def _stored_config(store: Store) -> RunConfig | None:
    try:
        return configs.parse(store.get(RUN_CONFIG_KEY).decode(), f"{store.name}/{RUN_CONFIG_KEY}")
    except NotFound:
        return None
