"""A trained model from a run's root, whole, in one process: for evaluating and generating anywhere."""

from __future__ import annotations

import tempfile
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from keepstep.storage.errors import NotFound
from keepstep.storage.layout import RUN_CONFIG_KEY
from keepstep.storage.store import Store
from keepstep.storage.verify import CheckpointReader, read_manifest

from .config import TrainerConfig
from .models import LanguageModel, build_model
from .origin import Wanted, commit_of_step
from .parallel import initialise
from .pinned import pinned
from .restore import restore
from .tokens import Tokens, open_tokens

__all__ = ["Trained", "Wanted", "commit_of_step", "load_trained"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    config: TrainerConfig
    tokens: Tokens
    model: LanguageModel  # in evaluation mode, on the CPU
    step: int
    skipped: tuple[str, ...] = ()  # tensors that differ, and may: as `initialise` made them


def load_trained(root: str, step: Wanted = None, *, partial: Sequence[str] = ()) -> Trained:
    """The model of a committed checkpoint, of the newest one for None, of that with the best evaluation for "best". Every byte is verified.

    Args:
        partial: patterns of the names of tensors that may differ from those that run.toml describes; see `restore`.

    Raises:
        ValueError: the root holds no run, nothing is committed yet, or not this step; a pattern matches nothing.
        CheckpointMismatch: it is not of the model that run.toml describes.
        DamagedCheckpoint: the bytes are not those that were committed.
    """
    store = Store.open(root)
    config = _config(store)
    commit = commit_of_step(store, step)
    with tempfile.TemporaryDirectory(prefix="keepstep-") as scratch:  # mapped files stay readable after they are gone
        tokens = open_tokens(store, Path(scratch), streaming=True)  # nobody reads the training text
    outputs = len(tokens.index.labels) if config.train.objective == "classes" else 0
    with pinned(config, store) as described:
        model = build_model(described.model, tokens.index.vocabulary, outputs=outputs, train=config.train)
    manifest = read_manifest(store, commit.directory, commit.manifest_sha256)
    reader = CheckpointReader(store, commit.directory, manifest)
    if partial:
        initialise(model, seed=config.run.seed)
    restored = restore(manifest, reader, {"model": {name: value.detach() for name, value in model.named_parameters()}}, partial=partial)
    return Trained(config=config, tokens=tokens, model=model.eval(), step=commit.step, skipped=restored.skipped)


def _config(store: Store) -> TrainerConfig:
    try:
        return TrainerConfig.model_validate(tomllib.loads(store.get(RUN_CONFIG_KEY).decode()))
    except NotFound:
        raise ValueError(f"{store.name} holds no run: there is no {RUN_CONFIG_KEY} in it") from None
