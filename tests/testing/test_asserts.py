"""What the conformance checks assert with."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from aurora_rl.testing.asserts import close, require


def test_a_condition_that_fails_raises_its_message() -> None:
    require(True, "unused")
    with pytest.raises(AssertionError, match="^the promise$"):
        require(False, "the promise")


def test_python_without_asserts_keeps_it() -> None:
    names: dict[str, Any] = {}
    exec(compile(inspect.getsource(require), "require", "exec", optimize=1), names)  # as `python -O` reads it
    with pytest.raises(AssertionError, match="^kept$"):
        names["require"](False, "kept")


def test_log_probabilities_are_close_within_nats_and_where_both_are_infinite() -> None:
    log_p = torch.tensor([-1.0, -torch.inf])
    assert close(log_p, log_p + 0.25, atol=0.25)
    assert not close(log_p, log_p + 0.25, atol=0.2)
    assert not close(log_p, torch.tensor([-1.0, -50.0]), atol=1.0)
    assert not close(log_p, torch.tensor([-1.0, torch.nan]), atol=1.0)
    assert not close(log_p, log_p[:1], atol=1.0)  # would broadcast
