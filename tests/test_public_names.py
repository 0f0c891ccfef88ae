"""What `import aurora_rl` gives: sixteen names, at once and without torch; and that errors are called so."""

from __future__ import annotations

import ast
import builtins
import importlib
import importlib.metadata
import subprocess
import sys
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
    thing = getattr(aurora_rl, name)
    assert thing.__name__ == name and ">>> " in thing.__doc__
    assert "+SKIP" not in thing.__doc__


def test_the_version_is_that_of_the_package() -> None:
    assert aurora_rl.__version__ == importlib.metadata.version("aurora-rl")


def test_other_names_are_refused_as_usual() -> None:
    with pytest.raises(AttributeError, match="module 'aurora_rl' has no attribute 'LLn'"):
        aurora_rl.LLn  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'LLn'"):
        exec("from aurora_rl import LLn")
    with pytest.raises(ModuleNotFoundError, match="No module named 'aurora_rl.no_such_module'"):
        importlib.import_module("aurora_rl.no_such_module")


def test_the_name_of_an_exception_ends_in_error() -> None:
    files = [file for home in aurora_rl.__path__ for file in Path(home).rglob("*.py")]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    bases = {
        node.name: {ast.unparse(base).rpartition(".")[2] for base in node.bases}
        for node in nodes
        if isinstance(node, ast.ClassDef)
    }
    errors = {name for name, each in vars(builtins).items() if isinstance(each, type) and issubclass(each, Exception)}
    while more := {name for name, of in bases.items() if of & errors} - errors:
        errors |= more
    own = errors & bases.keys()
    assert len(own) > 15 and {name for name in own if not name.endswith("Error")} == set()
