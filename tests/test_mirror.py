"""Tests mirror the package, and no file is longer than 450 lines."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"
LONGEST = 450
# Modules as `folder/name`, those of `aurora_kernels` as `kernels/name`; `_name.py` has its tests in `test_name.py`.
MODULES = {
    path.relative_to(ROOT / "aurora_rl").with_suffix("").as_posix().replace("/_", "/").lstrip("_")
    for path in (ROOT / "aurora_rl").rglob("*.py")
    if path.name != "__init__.py"
} | {f"kernels/{path.stem}" for path in (ROOT / "kernels" / "aurora_kernels").glob("*.py") if path.stem != "__init__"}
FILES = sorted(path.relative_to(TESTS).as_posix() for path in TESTS.rglob("test_*.py"))
# Parts of the front, which its tests see as clients of a real server do.
OF_THE_FRONT = {f"serving/http/{name}" for name in ("bodies", "errors", "prompts", "streams")}
EXCEPTIONS = {
    "faults/test_attach.py": "processes of all rooms, by the commands of docs/production.md",
    "faults/test_fleet.py": "`aurora-rl fleet` on a Ray cluster of this machine",
    "faults/test_flywheel.py": "processes that are killed and restarted, of all rooms",
    "faults/test_forks.py": "tests/support/forked_commands.py",
    "faults/test_ranks.py": "`aurora-rl learn` as the processes that torchrun starts",
    "faults/test_recovery.py": "processes of all rooms, through faults one after the other",
    "faults/test_serve.py": "processes that are killed and restarted, of all rooms",
    "faults/test_serve_and_learn.py": "processes that are killed and restarted, of all rooms",
    "faults/test_soak.py": "benchmarks/soak.py on a tiny model",
    "test_benchmarks.py": "the scripts of benchmarks/",
    "test_benchmarks_drafters.py": "benchmarks/adapters.py, drafters.py and likeliest.py",
    "test_deploy.py": "deploy/",
    "test_docs.py": "the pages",
    "test_docs_commands.py": "the commands of the pages that run in a second",
    "test_docs_families.py": "docs/families.md, tried on every family of transformers",
    "test_examples.py": "the examples",
    "test_gpu_script.py": "benchmarks/gpu.sh",
    "test_imports.py": "the order of imports",
    "test_mirror.py": "the tests",
    "test_public_names.py": "`aurora_rl/__init__.py`",
    "test_roads.py": "the pages of a public checkpoint's road",
    "test_sgl_kernel_stand_in.py": "tests/sglang_cpu/sgl_kernel",
    "test_smollm2.py": "the embedded model, through all rooms",
    "test_wheel.py": "the wheel",
    "vllm/test_vllm.py": "runs in an environment of its own, which has no other tests",
}


def module_of(file: str) -> str | None:
    """The module of a test file: `a/test_<module>.py` or `a/test_<module>_<aspect>.py`, the longest that exists."""
    folder, _, name = file.rpartition("/")
    words = name.removeprefix("test_").removesuffix(".py").split("_")
    names = ["_".join(words[:count]) for count in range(len(words), 0, -1)]
    return next((path for path in (f"{folder}/{name}".lstrip("/") for name in names) if path in MODULES), None)


def test_a_part_of_a_file_is_of_its_module() -> None:
    assert module_of("serving/test_server_swaps.py") == "serving/server"
    assert module_of("policies/test_tree_search.py") == "policies/tree_search"
    assert module_of("test_server.py") is None


@pytest.mark.parametrize("file", FILES)
def test_a_test_file_is_of_a_module(file: str) -> None:
    assert (module_of(file) is None) == (file in EXCEPTIONS)


def test_an_exception_exists() -> None:
    assert EXCEPTIONS.keys() <= set(FILES)


@pytest.mark.parametrize("module", sorted(MODULES - OF_THE_FRONT))
def test_a_module_has_a_test_file(module: str) -> None:
    assert module in {module_of(file) for file in FILES}


@pytest.mark.parametrize("folder", ["aurora_rl", "kernels", "tests"])
def test_no_file_is_too_long(folder: str) -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in (ROOT / folder).rglob("*.py")}
    assert {str(path): length for path, length in lengths.items() if length > LONGEST} == {}
