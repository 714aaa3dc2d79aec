"""Training text that is there already: the documentation that is installed, as documents in a fixed order.

"installed-docs" is the English that every machine running keepstep has: Python's language reference (`pydoc_data.topics`) and the
docstrings of the standard library, PyTorch and NumPy. Source files are parsed, never imported, so what comes out depends on the
installed versions alone.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import sysconfig
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Final

_SKIPPED_FOLDERS: Final = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "lib2to3", "pydoc_data"})
# PyTorch and NumPy keep the documentation of their C functions as string arguments in files of these names.
_LITERAL_DOC_FILES: Final = ("_docs.py", "_newdocs.py", "_add_newdocs_scalars.py")
_MIN_LITERAL_CHARS: Final = 80
_TRIPLE_QUOTES: Final = ('"' * 3, "'" * 3)
_PREFIX: Final = re.compile(r"[a-zA-Z]+\Z")
# Reads past comments and ordinary strings, so that a quote inside them opens nothing. A lexer of one expression: `ast` takes
# twenty seconds for the same files, because it builds every node of 60 MB of source.
_LITERAL_OR_COMMENT: Final = re.compile(
    r"""\#[^\n]*
      | \"{3}[^"\\]*(?:(?:\\.|"(?!""))[^"\\]*)*\"{3}
      | '{3}[^'\\]*(?:(?:\\.|'(?!''))[^'\\]*)*'{3}
      | "[^"\\\n]*(?:\\.[^"\\\n]*)*"
      | '[^'\\\n]*(?:\\.[^'\\\n]*)*'""",
    re.DOTALL | re.VERBOSE,
)


def installed_docs() -> Iterator[tuple[str, str]]:
    """(name, text) of each document, always in the same order."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    return chain(_topics(), _docstrings("python", stdlib), *(_docstrings(name, _package(name)) for name in ("torch", "numpy")))


def _topics() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"topics/{name}", topics[name]


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)  # finds a top-level package without importing it
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _docstrings(package: str, folder: Path) -> Iterator[tuple[str, str]]:
    """One document per source file that has any documentation."""
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).parts
        if _SKIPPED_FOLDERS.isdisjoint(parts) and (text := _documentation(path)):
            yield "/".join((package, *parts)), text


def _documentation(path: Path) -> str:
    source = path.read_text("utf-8", errors="replace")
    literals = _long_literals(source) if path.name.endswith(_LITERAL_DOC_FILES) else _docstring_literals(source)
    return "\n\n".join(dict.fromkeys(text for literal in literals if (text := _value(literal))))


def _docstring_literals(source: str) -> Iterator[str]:
    """Triple-quoted strings on lines of their own that follow the colon of a `class` or `def`, or begin the module."""
    before, end = "", 0  # the last character of code so far, and where it was looked for
    for match in _LITERAL_OR_COMMENT.finditer(source):
        literal, start = _with_prefix(source, match)
        code = source[end:start].rstrip()
        before, end = code[-1:] or before, match.end()
        if match[0].startswith("#"):
            continue
        if match[0].startswith(_TRIPLE_QUOTES) and before in ("", ":") and _begins_its_line(source, start):
            yield literal
        before = match[0][-1]


def _long_literals(source: str) -> Iterator[str]:
    for match in _LITERAL_OR_COMMENT.finditer(source):
        if match[0].startswith(_TRIPLE_QUOTES) and len(match[0]) >= _MIN_LITERAL_CHARS:
            yield _with_prefix(source, match)[0]


def _with_prefix(source: str, match: re.Match[str]) -> tuple[str, int]:
    """The literal with the `r` of r\"\"\"...\"\"\", and where that begins."""
    prefix = _PREFIX.search(source, max(0, match.start() - 2), match.start())
    start = prefix.start() if prefix else match.start()
    return source[start : match.end()], start


def _begins_its_line(source: str, start: int) -> bool:
    return not source[source.rfind("\n", 0, start) + 1 : start].strip()


def _value(literal: str) -> str:
    try:
        value = ast.literal_eval(literal)
    except (SyntaxError, ValueError):  # an f-string, or a template's placeholder inside: not documentation
        return ""
    return inspect.cleandoc(value).encode(errors="replace").decode() if isinstance(value, str) else ""  # lone surrogates exist
