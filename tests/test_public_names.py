"""What `import aurora_rl` gives: sixteen names, at once and without torch; and what no name may be."""

from __future__ import annotations

import ast
import builtins
import importlib
import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import aurora_rl

NAMES = [name for name in aurora_rl.__all__ if name != "__version__"]


def test_the_import_alone_is_fast_and_loads_no_torch() -> None:
    code = """if True:
        import sys, time
        began = time.process_time()
        import aurora_rl
        seconds = time.process_time() - began
        names = dir(aurora_rl)
        print(seconds, "torch" in sys.modules, set(aurora_rl.__all__) <= set(names))
    """
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout
    seconds, torch, listed = out.split()
    assert float(seconds) < 0.3 and torch == "False" and listed == "True"


@pytest.mark.parametrize("name", NAMES)
def test_each_name_is_there_and_has_an_example(name: str) -> None:
    public = getattr(aurora_rl, name)
    assert public.__name__ == name and ">>> " in public.__doc__
    assert "+SKIP" not in public.__doc__


def test_the_version_is_that_of_the_package() -> None:
    assert aurora_rl.__version__ == importlib.metadata.version("aurora-rl")


def test_other_names_are_refused_as_usual() -> None:
    with pytest.raises(AttributeError, match="module 'aurora_rl' has no attribute 'LLn'"):
        aurora_rl.LLn  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'LLn'"):
        exec("from aurora_rl import LLn")
    with pytest.raises(ModuleNotFoundError, match="No module named 'aurora_rl.no_such_module'"):
        importlib.import_module("aurora_rl.no_such_module")


def nodes_of(*folders: str) -> Iterator[tuple[str, ast.AST]]:
    """The nodes of all files in folders, each with its file's name. They are too many to keep."""
    for folder in folders:
        for file in (Path(__file__).parents[1] / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                yield file.name, node


def test_the_name_of_an_exception_ends_in_error() -> None:
    bases = {
        node.name: {ast.unparse(base).rpartition(".")[2] for base in node.bases}
        for _, node in nodes_of("aurora_rl")
        if isinstance(node, ast.ClassDef)
    }
    errors = {name for name, each in vars(builtins).items() if isinstance(each, type) and issubclass(each, Exception)}
    while more := {name for name, of in bases.items() if of & errors} - errors:
        errors |= more
    own = errors & bases.keys()
    assert len(own) > 15 and {name for name in own if not name.endswith("Error")} == set()


def test_a_variable_is_called_what_it_is() -> None:
    """These words say nothing of a thing."""
    names = [
        (file, node.arg if isinstance(node, ast.arg) else node.id)
        for file, node in nodes_of("aurora_rl", "kernels", "examples", "benchmarks")
        if isinstance(node, ast.arg) or (isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))
    ]
    assert len(names) > 10_000 and {each for each in names if each[1] in WORDS} == set()


WORDS = {"made", "given", "theirs", "one", "other", "it"}
