"""Writes the data of three examples as JSONL: `python examples/data.py numbers|places|reviews FOLDER`.

numbers   pairs for translation: numbers in English words and in German ones, by the library num2words
places    pairs for question answering: stories about who goes where and one question each, in the manner of bAbI's first task
          (Weston et al. 2015, "Towards AI-Complete Question Answering"), made here
reviews   classes for sentiment: 14,000 sentences of film and product reviews with the mean rating of twenty people each
          (Hutto and Gilbert 2014, "VADER"), from the source distribution of the package vaderSentiment, MIT licence, fetched with pip
"""

from __future__ import annotations

import argparse
import io
import json
import random
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

NUMBERS = 20_000  # of those below a million
STORIES = 20_000
PEOPLE = ("Mary", "John", "Daniel", "Sandra", "Anna", "Peter")
PLACES = ("kitchen", "garden", "office", "bathroom", "hallway", "bedroom")
MOVES = ("went to", "moved to", "walked to", "ran to")
NEUTRAL = 0.5  # ratings go from -4 to 4; those nearer to 0 are of neither class
SNIPPETS = ("movieReviewSnippets_GroundTruth.txt", "amazonReviewSnippets_GroundTruth.txt")
Record = Mapping[str, str]


def numbers(chance: random.Random) -> Iterator[Record]:
    """Each number once, small ones as often as large ones."""
    from num2words import num2words

    chosen = {int(10 ** chance.uniform(0, 6)) for _ in range(4 * NUMBERS)}
    for number in chance.sample(sorted(chosen), min(NUMBERS, len(chosen))):
        yield {"prompt": num2words(number, lang="en"), "completion": num2words(number, lang="de")}


def places(chance: random.Random) -> Iterator[Record]:
    for _ in range(STORIES):
        where: dict[str, str] = {}
        sentences = []
        for _ in range(chance.randint(2, 5)):
            person = chance.choice(PEOPLE)
            where[person] = chance.choice(PLACES)
            sentences.append(f"{person} {chance.choice(MOVES)} the {where[person]}.")
        asked = chance.choice(sorted(where))
        yield {"prompt": f"{' '.join(sentences)} Where is {asked}?", "completion": where[asked]}


def reviews(chance: random.Random) -> Iterator[Record]:
    found = [
        {"text": text, "label": "positive" if float(rating) > 0 else "negative"}
        for name in SNIPPETS
        for _, rating, text in (line.split("\t", 2) for line in _snippets(name).splitlines() if line.count("\t") >= 2)
        if abs(float(rating)) > NEUTRAL
    ]
    chance.shuffle(found)
    yield from found


def _snippets(name: str) -> str:
    """A file of the archive inside the package's source distribution."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            "download",
            "--quiet",
            "--no-deps",
            "--no-binary",
            ":all:",
            "--no-build-isolation",
            "--dest",
            folder,
            "vaderSentiment==3.3.2",
        ]
        subprocess.run([sys.executable, "-m", "pip", *command], check=True)
        (package,) = Path(folder).glob("*.tar.gz")
        with tarfile.open(package) as outer:
            inner_name = next(member for member in outer.getnames() if member.endswith("hutto_ICWSM_2014.tar.gz"))
            inner = outer.extractfile(inner_name)
            assert inner
            with tarfile.open(fileobj=io.BytesIO(inner.read())) as archive:
                file = archive.extractfile(next(member for member in archive.getnames() if member.endswith(name)))
                assert file
                return file.read().decode("utf-8", errors="replace")


def write(records: Iterable[Record], path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return len(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    makers = {"numbers": numbers, "places": places, "reviews": reviews}
    parser.add_argument("what", choices=makers)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    path = options.folder / f"{options.what}.jsonl"
    print(f"{path}: {write(makers[options.what](random.Random(1)), path)} records")


if __name__ == "__main__":
    main()
