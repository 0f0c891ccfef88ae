"""Errors of a block get the name of what they are of."""

from __future__ import annotations

import pytest

from aurora_rl.cli.errors import ConfigError, naming


def test_an_error_is_named_and_other_kinds_pass() -> None:
    with pytest.raises(ConfigError, match="^drafter.options: no such thing$"), naming("drafter.options"):
        raise ValueError("no such thing")
    with pytest.raises(KeyError), naming("drafter.options"):
        raise KeyError("other")
    with pytest.raises(ConfigError, match="^learner.record: full$"), naming("learner.record", (ValueError, OSError)):
        raise OSError("full")
    with naming("nothing"):
        pass
