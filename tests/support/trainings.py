"""Short runs of `aurora-rl train` on a tiny model."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aurora_rl.cli import main as cli


def training_pairs(tiny_folder: Path) -> list[str]:
    """Keys of a training on the target in a folder."""
    return [
        *(f"model={tiny_folder}", "device=cpu", "dtype=float32", "drafter.vocab_size=64", "drafter.name=eagle3"),
        *("drafter.feature_layers=[1,2]", "engine.max_length=256", "engine.threads=1", "max_new_tokens=8"),
        *("traffic.requests=6", "learner.batch_size=2"),
    ]


def train(*words: str) -> int:
    """Run the command with options and `key=value` pairs in any order."""
    options = [word for word in words if "=" not in word]
    return cli.main(["train", *options, *(word for word in words if "=" in word)])


def chats(path: Path, *messages: list[tuple[str, str]]) -> str:
    """Write chats of (role, text), and return the pair that names the file."""
    lines = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in messages]
    path.write_text("\n".join(map(json.dumps, lines)))
    return f"traffic.path={path}"


def interrupt(monkeypatch: pytest.MonkeyPatch, owner: type, method: str, call: int) -> None:
    """Send this process Ctrl-C after a call of a method."""
    original: Callable[..., Any] = getattr(owner, method)
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        result = original(*args, **kwargs)
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGINT)
        return result

    monkeypatch.setattr(owner, method, counted)
