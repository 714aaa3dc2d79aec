"""How fast `keepstep prepare` turns text into token files, beside the library `tokenizers` alone with the same text and settings.

    python benchmarks/prepare.py                       results/prepare.json and a table
    python benchmarks/prepare.py --rounds 1 --megabytes 4

The text is the documentation that is installed, as JSONL, a document a line. Both learn a byte-level BPE from it and encode it, in
alternating runs, each in a process of its own (imports do not count). The library alone has the texts in memory, cleans nothing, splits
nothing off, and forgets the ids; prepare reads the file twice and writes verified files. Bytes are those of the text in UTF-8.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import Verdict, machine, parser, publish, spread
from rich.console import Console
from rich.table import Table

from keepstep.trainer.installed import installed_docs

VOCABULARY = 8192
AT_LEAST = 0.8
OURS = """
import json, sys, time
import tokenizers
from keepstep.storage.store import Store
from keepstep.trainer.config import TrainerConfig
from keepstep.trainer.preparing import prepare
config = TrainerConfig.model_validate({"data": {"source": sys.argv[1], "vocabulary": int(sys.argv[2]), "held_out": 0.001}})
began, cpu = time.perf_counter(), time.process_time()
index = prepare(config, Store.open(sys.argv[3]))
print(json.dumps([time.perf_counter() - began, time.process_time() - cpu, index.train.tokens + index.held_out.tokens]))
"""
ALONE = """
import json, sys, time
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
texts = [json.loads(line)["text"] for line in open(sys.argv[1])]
began, cpu = time.perf_counter(), time.process_time()
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
trainer = trainers.BpeTrainer(
    vocab_size=int(sys.argv[2]), special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
)
tokenizer.train_from_iterator(texts, trainer)
tokens = sum(len(each) for start in range(0, len(texts), 1000) for each in tokenizer.encode_batch_fast(texts[start : start + 1000]))
print(json.dumps([time.perf_counter() - began, time.process_time() - cpu, tokens + len(texts)]))
"""


def write_text(path: Path, megabytes: int) -> int:
    """As JSONL; the number of bytes of its texts, some more than asked for or as many as there are."""
    num_bytes = 0
    with path.open("w") as file:
        for _, text in installed_docs():
            file.write(json.dumps({"text": text}) + "\n")
            num_bytes += len(text.encode())
            if num_bytes >= megabytes << 20:
                break
    return num_bytes


def timed(program: str, *arguments: object) -> list[float]:
    """[seconds, seconds of all cores, tokens] of one run."""
    command = [sys.executable, "-W", "ignore", "-c", program, *map(str, arguments)]
    found: list[float] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--megabytes", type=int, default=16)
    options = made.parse_args()
    rounds, megabytes = (1, 3) if options.quick else (options.rounds, options.megabytes)
    began_on = machine()
    found: dict[str, list[list[float]]] = {"keepstep prepare": [], "tokenizers alone": []}
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.jsonl"
        num_bytes = write_text(text, megabytes)
        for number in range(rounds):
            found["tokenizers alone"].append(timed(ALONE, text, VOCABULARY))
            found["keepstep prepare"].append(timed(OURS, text, VOCABULARY, Path(folder) / f"root{number}"))
    speeds = {name: [num_bytes / seconds / 1e6 for seconds, *_ in runs] for name, runs in found.items()}
    show(speeds, found)
    ratio = statistics.median(speeds["keepstep prepare"]) / statistics.median(speeds["tokenizers alone"])
    verdict = Verdict(
        what=f"prepare of {num_bytes / 1e6:.0f} MB of text, BPE of {VOCABULARY}",
        target=f">= {AT_LEAST} x tokenizers alone",
        result=f"{ratio:.2f} x, {spread(speeds['keepstep prepare'], 'MB/s')}",
        met=None if options.quick else ratio >= AT_LEAST,
    )
    publish("prepare", [verdict], {"bytes": num_bytes, "seconds_cpu_tokens": found}, began_on=began_on)


def show(speeds: dict[str, list[float]], found: dict[str, list[Any]]) -> None:
    table = Table("what", "MB/s", "CPU seconds", "tokens")
    for name, values in speeds.items():
        table.add_row(name, spread(values, "MB/s"), spread([cpu for _, cpu, _ in found[name]]), f"{found[name][0][2]:,.0f}")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
