"""Documentation out of source files."""

from __future__ import annotations

import ast
import inspect
import json
from pathlib import Path

import pytest

from keepstep.trainer import installed

SOURCE = '''# A comment with "quotes and 'more
"""Module."""
import os  # it's here

NOT_DOCUMENTATION = """data"""


class A:  # why: because
    r"""Raw \\d.

    Second line.
    """

    def f(self, x="""default"""):
        # "unbalanced
        \'\'\'Single quotes.\'\'\'
        return {"key": """value"""}

    async def g(
        self,
    ) -> str:
        """Over "two" lines \\"""of\\""" text.
        """


def empty(): ...
'''


def write(folder: Path, name: str, body: str) -> Path:
    (folder / name).write_text(body)
    return folder / name


def test_docstrings_are_those_that_python_sees(tmp_path: Path) -> None:
    nodes = [n for n in ast.walk(ast.parse(SOURCE)) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))]
    expected = {doc for node in nodes if (doc := ast.get_docstring(node))}
    found = installed._documentation(write(tmp_path, "a.py", SOURCE))
    assert set(found.split("\n\n")) == {part for doc in expected for part in doc.split("\n\n")}


@pytest.mark.parametrize("module", [json, inspect, ast])
def test_real_modules_give_what_python_sees(module: object) -> None:
    path = Path(inspect.getsourcefile(module) or "")  # type: ignore[arg-type]
    nodes = ast.walk(ast.parse(path.read_text()))
    expected = [
        doc
        for node in nodes
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and (doc := ast.get_docstring(node))
    ]
    found = installed._documentation(path)
    total = sum(map(len, expected))
    assert sum(len(doc) for doc in expected if doc not in found) < 0.005 * total  # docstrings in single quotes
    assert len(found) <= total + 2 * len(expected)


def test_the_documentation_of_c_functions_is_found_in_its_literals(tmp_path: Path) -> None:
    body = (
        'add_docstr(abs, r"""\nabs(x) -> number\n\nThe distance from zero, which is never negative and zero only for zero itself.\n""")\n'
    )
    found = installed._documentation(write(tmp_path, "_torch_docs.py", body))
    assert found.startswith("abs(x) -> number")
    assert installed._documentation(write(tmp_path, "other.py", body)) == ""


def test_tests_and_installed_packages_are_no_documentation(tmp_path: Path) -> None:
    for folder in ("kept", "tests", "site-packages"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder, "a.py", SOURCE)
    assert [name for name, _ in installed._docstrings("x", tmp_path)] == ["x/kept/a.py"]


def test_topics_come_first_and_in_order() -> None:
    topics = list(installed._topics())
    assert len(topics) > 50
    assert topics == sorted(topics)
