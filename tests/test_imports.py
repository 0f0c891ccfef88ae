"""Modules import only what stands above them in the list of docs/design.md."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "aurora_rl"
TREE = (ROOT / "docs" / "design.md").read_text().split("## The tree")[1].split("\n## ")[0]
# Place of each room and top-level module; modules of one row are level.
PLACES = {
    name.rstrip("/"): place
    for place, row in enumerate(re.findall(r"^\| (`.*?) \|", TREE, re.MULTILINE))
    for name in re.findall(r"`([\w/.]+)`", row)
}
FILES = [
    file
    for file in sorted(PACKAGE.rglob("*.py"))
    if file.parent.name != "testing" and file.name not in ("_moved.py",) and file != PACKAGE / "__init__.py"
]


def place(path: str) -> int:
    """The place of a module or package, by its path below the package: that of the innermost room that is listed."""
    while path not in PLACES:
        path = path.rpartition("/")[0]
        assert path, "no row of docs/design.md has it"
    return PLACES[path]


def imported(file: Path) -> set[str]:
    """Paths of the modules and packages of this library that a file imports, in its functions too."""
    paths = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("aurora_rl."):
            for name in [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]:
                path = name.removeprefix("aurora_rl.").replace(".", "/")
                paths |= {each for each in (path, f"{path}.py") if (PACKAGE / each).exists()}
    return paths


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_import_goes_up(file: Path) -> None:
    here = place(str(file.relative_to(PACKAGE)))
    assert {path for path in imported(file) if place(path) > here} == set()


def test_folders_import_each_other_only_where_the_page_says_so() -> None:
    edges = {
        (file.relative_to(PACKAGE).parts[0], path.split("/")[0])
        for file in FILES
        for path in imported(file)
        if file.parent != PACKAGE
    }
    assert {(a, b) for a, b in edges if a < b and (b, a) in edges} == {("envs", "policies")}
