"""The examples run as a reader would run them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments], capture_output=True, text=True, timeout=280
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def test_collector_delivers_what_it_was_asked_for() -> None:
    lines = run("collector.py").splitlines()
    assert [line.split()[0] for line in lines] == ["16", "16", "16"]
    delivered = [float(re.search(r"and ([\d.]+) tokens", line).group(1)) for line in lines]
    assert all(1 <= value <= 4 for value in delivered)  # a bonus token, and at most the three accepted ones


@pytest.mark.smollm2
def test_flywheel_serves_learns_and_swaps(smollm2_path: Path) -> None:
    out = run("flywheel.py", "--model", str(smollm2_path), "--requests", "8", "--round", "4", "--max-new-tokens", "12")
    versions = [int(v) for v in re.findall(r"^version (\d+): acceptance length [\d.]+", out, re.MULTILINE)]
    assert versions == list(range(len(versions))) and len(versions) >= 2
