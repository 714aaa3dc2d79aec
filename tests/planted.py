"""A text that a model soon knows by heart, with samples of pure chance in it at chosen positions of the data order: a true loss spike."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from keepstep.trainer.config import DataSection, ModelSection, RunSection, TrainerConfig, TrainSection
from keepstep.trainer.data import feed_for
from keepstep.trainer.splitting import held_out_of

DOCUMENTS = 40
SAMPLES = 20  # of a document
ALPHABET = "abcdefgh"
CHANCE = "0123456789!#$%&()*+,-./:;<=>?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[]^_{|}~ijklmnopqrstuvwxyz"


def plant(folder: Path, positions: Iterable[int], *, seed: int, context: int) -> None:
    """Writes text files for tokenizer "bytes". Each file is a whole number of samples long, its end-of-text included."""
    length = SAMPLES * context - 1
    texts = {f"{i:02d}.txt": (ALPHABET * length)[i % len(ALPHABET) :][:length] for i in range(DOCUMENTS)}
    for name, text in texts.items():
        (folder / name).write_text(text)
    held_out = held_out_of([f"{name}#0" for name in sorted(texts)], DataSection().held_out)
    train = [name for number, name in enumerate(sorted(texts)) if number not in held_out]
    num_samples = (len(train) * SAMPLES * context - 1) // context
    config = TrainerConfig(run=RunSection(seed=seed), model=ModelSection(context=context), train=TrainSection(batch_tokens=context))
    numbers = feed_for((num_samples,), config).order.samples(np.array(list(positions), dtype=np.uint64))
    chance = random.Random(seed)
    for number in numbers.tolist():
        document, sample = divmod(number, SAMPLES)
        path = folder / train[document]
        text, start = path.read_text(), sample * context + 1  # the first token is also the last target of the sample before
        noise = "".join(chance.choices(CHANCE, k=min(context - 1, length - start)))
        path.write_text(text[:start] + noise + text[start + len(noise) :])
