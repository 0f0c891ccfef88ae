"""Errors of a block get the name of what they are of."""

from __future__ import annotations

import errno

import pytest
import torch

from aurora_rl.cli.errors import ConfigError, may_pass, naming
from aurora_rl.models.loading import ModelError, load_target


def test_an_error_is_named_and_other_kinds_pass() -> None:
    with pytest.raises(ConfigError, match="^drafter.options: no such thing$"), naming("drafter.options"):
        raise ValueError("no such thing")
    with pytest.raises(KeyError), naming("drafter.options"):
        raise KeyError("other")
    with pytest.raises(ConfigError, match="^learner.resume: full$"), naming("learner.resume", (ValueError, OSError)):
        raise OSError("full")
    with naming("nothing"):
        pass


@pytest.mark.parametrize(
    ("reason", "passes"),
    [
        (OSError(errno.EADDRINUSE, "Address already in use"), True),
        (ConnectionRefusedError(), True),
        (TimeoutError(), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (FileNotFoundError(), False),
        (KeyError("seed"), False),
    ],
)
def test_what_may_pass_is_known_by_what_it_comes_from(reason: Exception, passes: bool) -> None:
    try:
        with naming("wire.weights", Exception):
            raise reason
    except ConfigError as error:
        assert may_pass(error) is passes


def test_a_hub_that_is_out_of_reach_may_pass() -> None:
    with pytest.raises(ModelError) as caught:
        load_target("nobody/no-model", dtype=torch.float32, device="cpu")
    assert may_pass(caught.value)
