"""A value of the wrong type is one line that names the key, the value and what to write."""

from __future__ import annotations

import pytest

from aurora_rl.cli.config import load_config
from aurora_rl.cli.errors import ConfigError


@pytest.mark.parametrize(
    ("pair", "wrong"),
    [
        (
            "objectives=[imitation]",
            r"^objectives holds 'imitation'; give mappings, such as objectives=\[{name: imitation}\]$",
        ),
        ("objectives=imitation", "^objectives is 'imitation'; give a list, such as"),
        ("engine.slots=two", "^engine.slots is 'two'; give an integer$"),
        ("engine.slots=1.5", "^engine.slots is 1.5; give an integer$"),
        ("engine.slots=null", "^engine.slots is null; give an integer$"),
        ("engine.slots=[1]", r"^engine.slots is \[1\]; give an integer$"),
        ("traffic.limit=few", "^traffic.limit is 'few'; give an integer or null$"),
        ("gate.margin=small", "^gate.margin is 'small'; give a number$"),
        ("learner.spawn=maybe", "^learner.spawn is 'maybe'; give true or false$"),
        ("drafter.adapters=a", r"^drafter.adapters is 'a'; give a list, such as drafter.adapters=\[a\]$"),
        ("drafter.adapters=[null]", "^drafter.adapters holds null; give texts$"),
        ("drafter.feature_layers=[1,a]", "^drafter.feature_layers holds 'a'; give integers$"),
        ("compare=", r"^compare is null; give a list, such as compare=\[eagle3,medusa\]$"),
        ("compare=null", r"^compare is null; give a list, such as compare=\[eagle3,medusa\]$"),
        ("drafter.feature_layers=[{a: 1}]", '^drafter.feature_layers holds {"a": 1}; give integers$'),
        ("http.cors_origins=[[null]]", r"^http.cors_origins holds \[null\]; give texts$"),
        ("http.cors_origins=[{a: 1}]", '^http.cors_origins holds {"a": 1}; give texts$'),
        ("compare=[eagle3,null]", "^compare holds null; give two names or folders$"),
        ("drafter.options=3", "^drafter.options is 3; give a mapping, such as drafter.options={NAME: VALUE}$"),
        ("drafter.options=[1]", r"^drafter.options is \[1\]; give a mapping"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(pair: str, wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong):
        load_config(overrides=[pair])
