"""The repository's own rules, as tests: what a reviewer would otherwise have to look for."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("orchestrator", "trainer", "storage")
FOLDERS = (*PACKAGES, "trainer/models")  # of code; all else is flat
MAX_FUNCTION_LINES = 80
MAX_FILE_LINES = 450
MACHINE_PATH = re.compile(r"(?<![\w.:/~}])/(?:work|home|root|Users|opt)/[\w.-]+")
LINK = re.compile(r"\]\(([^)\s]+)\)")

Node = TypeVar("Node", bound=ast.AST)


@cache
def repository_files() -> tuple[Path, ...]:
    """What git holds or would take: tracked files, and new ones that it does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return tuple(path for line in listing.splitlines() if (path := ROOT / line).is_file() and not path.is_symlink())


@cache
def trees() -> tuple[tuple[Path, ast.Module], ...]:
    return tuple((path, ast.parse(path.read_text())) for path in repository_files() if path.suffix == ".py")


def found(kind: type[Node]) -> Iterator[tuple[Path, Node]]:
    return ((path, node) for path, tree in trees() for node in ast.walk(tree) if isinstance(node, kind))


def place(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


@cache
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


class TestPackages:
    def test_every_folder_of_code_is_a_package_and_every_package_a_flat_folder(self) -> None:
        setuptools = pyproject()["tool"]["setuptools"]
        folders = {path.parent.relative_to(ROOT).as_posix() for path, _ in trees() if path.relative_to(ROOT).parts[0] in PACKAGES}
        assert folders == set(FOLDERS)
        assert set(setuptools["packages"]) == {f"keepstep.{name.replace('/', '.')}" for name in FOLDERS}
        assert setuptools["package-dir"] == {f"keepstep.{name.replace('/', '.')}": name for name in FOLDERS}

    @pytest.mark.parametrize("name", PACKAGES)
    def test_every_package_is_typed_has_its_link_for_type_checkers_and_its_design_document(self, name: str) -> None:
        assert (ROOT / name / "py.typed").is_file()
        assert (ROOT / ".types" / "keepstep" / name).resolve() == ROOT / name
        assert (ROOT / name / "README.md").is_file()

    def test_nobody_imports_a_package_by_its_bare_name(self) -> None:
        """`import trainer` from the repository's root makes a second module object beside keepstep.trainer."""
        plain = ((path, node.lineno, alias.name) for path, node in found(ast.Import) for alias in node.names)
        from_ = ((path, node.lineno, node.module or "") for path, node in found(ast.ImportFrom) if node.level == 0)
        assert [place(path, line) for path, line, module in (*plain, *from_) if module.partition(".")[0] in PACKAGES] == []

    def test_every_dependency_is_pinned_within_its_range(self) -> None:
        project = pyproject()["project"]
        lines = (line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#"))
        pins = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
        wanted = [Requirement(text) for text in (*project["dependencies"], *project["optional-dependencies"]["dev"])]
        assert [str(r) for r in wanted if not r.specifier.contains(pins.get(canonicalize_name(r.name), "0"))] == []


class TestCode:
    def test_functions_fit_on_a_screen(self) -> None:
        functions = [*found(ast.FunctionDef), *found(ast.AsyncFunctionDef)]
        lengths = ((path, node, (node.end_lineno or node.lineno) - node.lineno + 1) for path, node in functions)
        assert [f"{place(path, node.lineno)} {node.name}: {n}" for path, node, n in lengths if n > MAX_FUNCTION_LINES] == []

    def test_a_file_holds_one_idea(self) -> None:
        lengths = ((path, path.read_text().count("\n")) for path, _ in trees())
        assert [f"{place(path, 1)}: {lines} lines" for path, lines in lengths if lines > MAX_FILE_LINES] == []

    def test_a_dropped_error_says_whom_it_could_hurt_and_is_never_any_error(self) -> None:
        dropped = ((path, node) for path, node in found(ast.ExceptHandler) if all(isinstance(child, ast.Pass) for child in node.body))
        assert [place(path, node.lineno) for path, node in dropped if _is_broad(node) or not _has_comment(path, node)] == []

    @pytest.mark.slow
    def test_shellcheck_has_nothing_to_say_about_any_shell_script(self) -> None:
        scripts = [path for path in repository_files() if any(line.startswith("#!") and "bash" in line for line in _lines(path)[:1])]
        done = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True, check=False)
        assert scripts
        assert done.stdout + done.stderr == ""

    def test_no_test_sleeps(self) -> None:
        calls = ((path, node) for path, node in found(ast.Call) if path.is_relative_to(ROOT / "tests"))
        assert [place(path, node.lineno) for path, node in calls if ast.unparse(node.func) in {"time.sleep", "sleep"}] == []

    def test_nothing_names_a_place_of_one_machine(self) -> None:
        texts = ((path, number, line) for path in repository_files() for number, line in enumerate(_lines(path), start=1))
        assert [f"{place(path, number)}: {line.strip()}" for path, number, line in texts if MACHINE_PATH.search(line)] == []


def _is_broad(handler: ast.ExceptHandler) -> bool:
    return handler.type is None or ast.unparse(handler.type) in {"Exception", "BaseException"}


def _has_comment(path: Path, handler: ast.ExceptHandler) -> bool:
    return any("#" in line for line in path.read_text().splitlines()[handler.lineno - 1 : handler.end_lineno])


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except UnicodeDecodeError:  # a picture, say
        return []


class TestDocuments:
    def test_links_between_documents_resolve(self) -> None:
        documents = [path for path in repository_files() if path.suffix == ".md"]
        links = ((path, target.partition("#")[0]) for path in documents for target in LINK.findall(path.read_text()))
        local = ((path, target) for path, target in links if target and "://" not in target and not target.startswith("mailto:"))
        assert [f"{path.relative_to(ROOT)}: {target}" for path, target in local if not (path.parent / target).exists()] == []

    def test_every_make_target_that_a_document_names_exists(self) -> None:
        targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
        named = {(path, target) for path, code in _code() for target in re.findall(r"(?:^|`|\s)make ([a-z]+)\b", code)}
        assert [f"{path.relative_to(ROOT)}: make {target}" for path, target in named if target not in targets] == []

    def test_every_keepstep_command_that_a_document_names_exists(self) -> None:
        from typer.main import get_command

        from keepstep.orchestrator.cli import app

        commands = set(get_command(app).commands)  # type: ignore[attr-defined]
        named = {(path, command) for path, code in _code() for command in re.findall(r"(?:^|/|\s)keepstep ([a-z]+)\b", code)}
        assert [f"{path.relative_to(ROOT)}: keepstep {command}" for path, command in named if command not in commands] == []

    def test_every_key_that_a_document_overrides_exists(self) -> None:
        from keepstep.orchestrator.sections import known_keys

        named = {(path, key) for path, code in _code() for key in re.findall(r"-o ([\w.]+)=", code)}
        known = {"section.key", *known_keys()}
        assert [f"{path.relative_to(ROOT)}: -o {key}" for path, key in named if key not in known] == []

    def test_ci_runs_the_tests(self) -> None:
        assert os.access(ROOT / ".ci" / "run", os.X_OK)


def _code() -> Iterator[tuple[Path, str]]:
    """Fenced blocks and code spans of every document: what a reader may paste into a shell."""
    for path in repository_files():
        if path.suffix == ".md":
            pieces = re.findall(r"```\w*\n(.*?)```|`([^`\n]+)`", path.read_text(), flags=re.DOTALL)
            yield from ((path, block or span) for block, span in pieces)
