"""Modules import only what stands above them in the list of docs/design.md, and packages that are declared."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from itertools import chain
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
    assert {(a, b) for a, b in edges if a < b and (b, a) in edges} == {
        ("collectors", "envs"),
        ("envs", "policies"),
    }


def test_every_package_that_is_imported_is_declared() -> None:
    """By the distribution that has it: what another package brings may go with a release of that."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = chain(project["dependencies"], *project["optional-dependencies"].values())
    declared = {distribution(re.split(r"[\[<>=; ]", line)[0]) for line in wanted}
    own = ("aurora_rl", "aurora_kernels")
    files = [file for home in (PACKAGE, ROOT / "kernels" / "aurora_kernels") for file in home.rglob("*.py")]
    names = {name for file in files for name in packages(file)} - sys.stdlib_module_names - {*own}
    homes = packages_distributions()  # one that is not installed here has the name of its package
    assert {name for name in names if not declared & set(map(distribution, homes.get(name, [name])))} == set()


def distribution(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def packages(file: Path) -> set[str]:
    """The packages that a file imports, in its functions too."""
    nodes = list(ast.walk(ast.parse(file.read_text())))
    whole = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    parts = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    return {name.partition(".")[0] for name in whole | parts}
