"""Writes the data of three examples as JSONL: `python examples/data.py numbers|facts|reviews FOLDER`.

numbers   pairs for translation: numbers in English words and in German ones, by the library num2words
facts     pairs for question answering: currency, language and first day of the week of each country, in five phrasings; the facts are
          those of the Unicode CLDR in the library Babel
reviews   classes for sentiment: 14,000 sentences of film and product reviews with the mean rating of twenty people each
          (Hutto and Gilbert 2014, "VADER"), from the source distribution of the package vaderSentiment, MIT licence, fetched with pip
"""

from __future__ import annotations

import argparse
import contextlib
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
PHRASINGS = {
    "currency": (
        "What do people pay with in {}?",
        "Which currency does {} use?",
        "What money is used in {}?",
        "Name the currency of {}.",
        "In {}, what is the currency?",
    ),
    "language": (
        "What do people speak in {}?",
        "Which language does {} use?",
        "What language is spoken in {}?",
        "Name the official language of {}.",
        "In {}, what is the language?",
    ),
    "day": (
        "When does the week begin in {}?",
        "Which day does a week in {} start with?",
        "What is the first day of the week in {}?",
        "Name the first weekday of {}.",
        "In {}, on which day does a week begin?",
    ),
}
NEUTRAL = 0.5  # ratings go from -4 to 4; those nearer to 0 are of neither class
SNIPPETS = ("movieReviewSnippets_GroundTruth.txt", "amazonReviewSnippets_GroundTruth.txt")
Record = Mapping[str, str]


def numbers(chance: random.Random) -> Iterator[Record]:
    """Each number once, small ones as often as large ones."""
    from num2words import num2words

    chosen = {int(10 ** chance.uniform(0, 6)) for _ in range(4 * NUMBERS)}
    for number in chance.sample(sorted(chosen), min(NUMBERS, len(chosen))):
        yield {"prompt": num2words(number, lang="en"), "completion": num2words(number, lang="de")}


def facts(chance: random.Random) -> Iterator[Record]:
    """Each fact in every phrasing: the one that is held out is asked in words that were not used of this territory before."""
    from babel import Locale, UnknownLocaleError
    from babel.languages import get_official_languages
    from babel.numbers import get_territory_currencies

    english = Locale("en")
    asked = []
    for code, territory in sorted(english.territories.items()):
        if not (currencies := get_territory_currencies(code)):
            continue
        answers = {"currency": english.currencies.get(currencies[0])}
        if languages := get_official_languages(code):
            answers["language"] = english.languages.get(languages[0])
            with contextlib.suppress(UnknownLocaleError):
                answers["day"] = english.days["format"]["wide"][Locale.parse(f"{languages[0]}_{code}").first_week_day]
        for what, answer in answers.items():
            asked += [(phrasing.format(territory), answer) for phrasing in PHRASINGS[what] if answer]
    chance.shuffle(asked)
    for question, answer in asked:
        yield {"prompt": question, "completion": f" {answer}"}


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
    makers = {"numbers": numbers, "facts": facts, "reviews": reviews}
    parser.add_argument("what", choices=makers)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    path = options.folder / f"{options.what}.jsonl"
    print(f"{path}: {write(makers[options.what](random.Random(1)), path)} records")


if __name__ == "__main__":
    main()
