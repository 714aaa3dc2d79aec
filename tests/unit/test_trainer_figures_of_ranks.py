"""Real ranks with a sharded model: figures and completions have the same bits in worlds of one, two and four."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trainer_ranks import run_ranks

pytestmark = pytest.mark.slow
VOCABULARY, END, CONTEXT = 61, 60, 12
PROMPTS = [[i % 50, (7 * i) % 50, END][i % 2 :] for i in range(37)]  # three batches, the last with five of them


def figures(rank: int, world_size: int, folder: str, kind: str) -> None:
    import torch

    from keepstep.trainer.attach import Attached
    from keepstep.trainer.config import ModelSection
    from keepstep.trainer.evaluate import evaluate
    from keepstep.trainer.heldout import Windows
    from keepstep.trainer.models import build_model
    from keepstep.trainer.parallel import initialise, join, shard
    from keepstep.trainer.tokenizer import ByteTokenizer
    from keepstep.trainer.translation import complete

    world = join(Attached(None))
    model = build_model(ModelSection(kind=kind, layers=2, width=16, heads=2, context=CONTEXT, dropout=0.2), VOCABULARY)  # type: ignore[arg-type]
    shard(model, world, precision="fp32", reshard=False)
    initialise(model, seed=4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.ndim > 1 else 1)
    text = (
        np.random.default_rng(2).integers(0, VOCABULARY, 100 * CONTEXT + 5).astype(np.uint16)
    )  # four batches of windows, the last is short
    found = evaluate(model, Windows(text, ByteTokenizer, CONTEXT, 10**6), vocabulary=VOCABULARY, top_k=3, company=world)
    completions = complete(model, PROMPTS, world, end_of_text=END)
    told = {"nats": found.nats.hex(), "counts": [found.tokens, found.first, found.top_k], "completions": completions}
    (Path(folder) / f"{world_size}-{rank}.json").write_text(json.dumps(told))


@pytest.mark.parametrize("kind", ["gpt", "lstm"])
def test_every_rank_of_every_world_finds_the_same(kind: str, tmp_path: Path) -> None:
    sizes = (1, 2, 4)
    for size in sizes:
        run_ranks(size, figures, str(tmp_path), kind)
    found: list[Any] = [json.loads((tmp_path / f"{size}-{rank}.json").read_text()) for size in sizes for rank in range(size)]
    assert all(one == found[0] for one in found)
    assert found[0]["counts"][0] == 100 * CONTEXT + 4
    assert 0 < found[0]["counts"][1] < found[0]["counts"][2]
    assert len({tuple(ids) for ids in found[0]["completions"]}) > 5
