"""Classes of texts, from a committed checkpoint of a run that learnt them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from .cleaning import clean
from .samples import IGNORED, class_rows
from .trained import Trained, Wanted, load_trained


def classify(root: str, texts: Sequence[str], *, step: Wanted = None) -> list[Mapping[str, float]]:
    """Of each text: by class, its probability. The newest checkpoint for step None.

    Raises:
        ValueError: nothing is committed, or not this step; the run did not learn classes; a text is too long for it.
        DamagedCheckpoint: its bytes are not those that were committed.
    """
    trained = load_trained(root, step)
    if (objective := trained.config.train.objective) != "classes":
        raise ValueError(f'train.objective = "{objective}": this run did not learn classes; use `keepstep generate`')
    labels = trained.tokens.index.labels
    return [dict(zip(labels, probabilities(trained, text), strict=True)) for text in texts]


@torch.no_grad()
def probabilities(trained: Trained, text: str) -> list[float]:
    """Of each class in turn. One row at a time: no padding, and no neighbour. Raises ValueError for a text that is too long."""
    tokenizer, context = trained.tokens.tokenizer, trained.model.context
    (encoded,) = tokenizer.encode_all([clean(text, trained.config.data)])
    ids = [*encoded, tokenizer.end_of_text]
    if len(ids) > context and not trained.config.train.truncate:
        raise ValueError(f"a text has {len(ids)} tokens, more than model.context = {context}, and train.truncate = false: shorten it")
    row = np.array([[*ids[:context], IGNORED]], dtype=np.int64)
    rows = class_rows(row, np.zeros(1, dtype=np.uint32))
    place = int((rows.targets[0] != IGNORED).argmax())
    logits_BTV = trained.model(torch.from_numpy(rows.inputs))
    found: list[float] = torch.softmax(logits_BTV[0, place].double(), 0).tolist()
    return found
