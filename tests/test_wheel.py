"""The wheel that users install, as opposed to the editable folder that every other test runs on."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from aurora_rl.envs.sglang import ENGINE, register
from aurora_rl.remote_engines import address_variable

ROOT = Path(__file__).parents[1]
PACKAGES = {"aurora_rl": ROOT / "aurora_rl", "aurora_kernels": ROOT / "kernels" / "aurora_kernels"}
PAGE = ROOT / "aurora_rl" / "serving" / "http" / "page"
SCENARIOS = ROOT / "aurora_rl" / "adaptation" / "scenarios"


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools leaves a `build` folder, and packs what an older one still holds."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("aurora_rl", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=skip)
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", out, source)
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_both_packages_and_nothing_else(wheel: Path) -> None:
    expected = {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for package, folder in PACKAGES.items()
        for path in folder.rglob("*.py")
    }
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if name.endswith(".py")} == expected
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == set(PACKAGES)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {"aurora_rl/py.typed", "aurora_kernels/py.typed"} <= names
    page = {f"aurora_rl/serving/http/page/{path.name}" for path in PAGE.iterdir()}
    assert page <= names and len(page) >= 6
    scenarios = {f"aurora_rl/adaptation/scenarios/{path.name}" for path in SCENARIOS.iterdir()}
    assert scenarios <= names and len(scenarios) >= 7


def test_the_wheel_works_in_a_clean_environment(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=False)  # pip works on it from outside, which saves installing pip
    python = environment / "bin" / "python"
    pip("--python", python, "install", "--no-deps", "--no-index", wheel)
    # The dependencies come from the environment that runs the tests. The path of a folder in a .pth file adds that
    # folder alone: its own .pth files, by which the editable install is found, are not read.
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")

    script = "import aurora_rl, aurora_kernels; print(aurora_rl.__file__); print(aurora_kernels.__file__)"
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    run = subprocess.run(
        [python, "-c", script], cwd=tmp_path, env=clean, check=True, capture_output=True, text=True
    ).stdout
    assert [Path(line) for line in run.split()] == [site / package / "__init__.py" for package in PACKAGES]

    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"aurora-rl": "aurora_rl.cli.main:program"}
    assert os.access(environment / "bin" / "aurora-rl", os.X_OK)


def test_sglang_finds_the_plugin_in_the_wheel(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
    points = configparser.ConfigParser()
    points.read_string(archive.read(name).decode())
    assert dict(points["sglang.srt.plugins"]) == {"aurora_rl": "aurora_rl.envs.sglang:register"}
    assert dict(points["vllm.general_plugins"]) == {"aurora_rl": "aurora_rl.envs.vllm:register"}


def test_the_plugin_does_nothing_where_nobody_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(address_variable(ENGINE), raising=False)
    before = set(sys.modules)
    register()
    assert not {name for name in set(sys.modules) - before if name.startswith("sglang")}
