"""Every registered drafter (all of policies) passes `check_drafter`; a registered name without a case fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from aurora_rl.policies import DRAFTERS, TargetParts, get_drafter
from aurora_rl.testing import check_drafter, tiny_target

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "dflash": [{}],
    "eagle": [{}],
    "eagle3": [{}, {"fc_norm": True, "norm_output": True}],
    "medusa": [{}],
    "ngram": [{}],
    "standalone": [{}],
}


def test_every_registered_drafter_has_a_case() -> None:
    here = {name for name in DRAFTERS if get_drafter(name).__module__.startswith("aurora_rl.")}
    assert here == set(OPTIONS)


@pytest.mark.parametrize(("name", "options"), [(name, o) for name, several in OPTIONS.items() for o in several])
def test_every_drafter_passes_the_checks(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    target = tiny_target()
    drafter = get_drafter(name).from_target(TargetParts.of(target), draft_vocab=torch.arange(0, 32, 2), **options)
    drafter = drafter.double()
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    check_drafter(drafter, target)
