"""The house's own rules: folders of a readable size, every one of them on the map, plain words."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from store.settings import StoreSettings

ROOT = Path(__file__).parents[1]
PACKAGES = ("api", "benchmarks", "cli", "heft_engine", "migrations", "store", "worker")
#: The most modules that a reader takes in at a glance.
MOST_MODULES = 25
#: A docstring says what a thing is or does; these words begin a riddle.
OBLIQUE = re.compile(r"(What|Who|Whose|Which|Where|Whether|When|How|Of|As|That|So|Once)\b")
#: Names that say that there is a value, and not which.
VAGUE = frozenset({"found", "made", "held", "own", "one", "given", "wanted", "kept", "told", "asked"})


def sources(*folders: str) -> list[Path]:
    """All Python files below these folders of the repository."""
    return sorted(
        path
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        if "__pycache__" not in path.parts and "results" not in path.parts
    )


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every docstring of a file."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree_of(path)):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            yield getattr(node, "lineno", 1), text


def modules_by_folder() -> Counter[str]:
    """The number of modules of every folder; `__init__`, `__main__` and `conftest` are none."""
    files = [
        path
        for path in sources(*PACKAGES, "tests")
        if not path.stem.startswith("__") and path.name != "conftest.py"
    ]
    return Counter(str(path.parent.relative_to(ROOT)) for path in files)


def test_no_folder_is_crowded_or_has_a_single_module() -> None:
    counts = modules_by_folder()
    # Alembic wants env.py, and one folder for all revisions; this file is the only one in tests/ itself.
    for folder in ("migrations", "migrations/versions", "tests"):
        del counts[folder]
    assert [folder for folder, count in counts.items() if count > MOST_MODULES] == []
    assert [folder for folder, count in counts.items() if count == 1] == []


def test_the_readme_maps_every_folder_and_no_other() -> None:
    section = (ROOT / "README.md").read_text().split("\n## Map\n")[1].split("\n## ")[0]
    mapped = set(re.findall(r"^\| `([\w/]+)/` \|", section, re.MULTILINE))
    folders = {folder for folder in modules_by_folder() if not folder.startswith("tests/")}
    assert folders - mapped == set()
    assert [folder for folder in sorted(mapped) if not (ROOT / folder).is_dir()] == []


def test_the_manual_has_every_setting_of_the_service() -> None:
    manual = (ROOT / "docs" / "settings.md").read_text()
    assert not [name for name in StoreSettings.model_fields if not re.search(rf"[_…]{name.upper()}`", manual)]


def test_the_files_that_the_architecture_names_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    names = set(
        re.findall(r"`((?:api|cli|heft_engine|migrations|store|worker|tests|docs|benchmarks)/[\w./]+)`", text)
    )
    assert names
    assert [name for name in sorted(names) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("package", [*PACKAGES, "tests"])
def test_docstrings_begin_with_what_a_thing_is_or_does(package: str) -> None:
    riddles = [
        f"{path.relative_to(ROOT)}:{line}: {text.splitlines()[0]}"
        for path in sources(package)
        for line, text in docstrings(path)
        if OBLIQUE.match(text)
    ]
    assert riddles == []


def locals_of(path: Path) -> Iterator[ast.Name]:
    """Names that a file assigns to. Fields of classes are none: some are names in JSON that can't change."""
    tree = tree_of(path)
    fields = {
        statement.target
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for statement in node.body
        if isinstance(statement, ast.AnnAssign)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node not in fields:
            yield node


@pytest.mark.parametrize("package", PACKAGES)
def test_locals_are_named_by_their_content(package: str) -> None:
    vague = [
        f"{path.relative_to(ROOT)}:{name.lineno}: {name.id}"
        for path in sources(package)
        for name in locals_of(path)
        if name.id in VAGUE
    ]
    assert vague == []
