"""Objectives from functions: settings, the layout of windows, what is refused, and the promises of the seam."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from tiny_drafters import eagle3_and_head
from tiny_recordings import trajectory_of
from torch import Tensor

from aurora_kernels.rows import log_softmax
from aurora_rl.objectives import (
    ImitationLoss,
    Windows,
    check_settings,
    get_objective,
    make_objectives,
    register_objective,
)
from aurora_rl.objectives.divergences import forward_kl, overlap
from aurora_rl.policies import MedusaDrafter, TargetParts
from aurora_rl.testing import check_objective, tiny_target
from aurora_rl.trajectories import pack


def kl(log_p: Tensor, log_q: Tensor, windows: Windows, *, power: float = 1.0) -> tuple[Tensor, Tensor]:
    if power <= 0:
        raise ValueError(f"power must be positive, got {power}")
    return power * forward_kl(log_p, log_q), windows.valid


def reached(log_p: Tensor, log_q: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    """Minus the expected accepted length of each window, by depth."""
    return -torch.where(windows.valid, overlap(log_p, log_q), 0.0).cumprod(0), windows.valid


def text(log_p: Tensor, log_q: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    """Cross entropy of the text's own tokens, where they have a row."""
    return -log_q.gather(-1, windows.rows.clamp(min=0)[..., None])[..., 0], windows.rows >= 0


@pytest.fixture(autouse=True)
def registered() -> None:
    for function in (kl, reached, text):
        assert register_objective(function.__name__)(function) is function


@pytest.mark.parametrize("settings", [{}, {"renormalize": False}, {"target": "served", "steps": 2}], ids=str)
@pytest.mark.parametrize("name", ["kl", "reached"])
def test_the_promises_of_the_seam(name: str, settings: dict[str, Any]) -> None:
    check_objective(partial(get_objective(name), **settings))


def test_the_kl_of_every_window_is_imitation() -> None:
    drafter, head = eagle3_and_head()
    batch = pack([trajectory_of(drafter, request=i) for i in range(2)])
    loss = get_objective("kl")(drafter, head, power=2.0)
    found, known = loss(batch), ImitationLoss(drafter, head, decay=1.0)(batch)
    torch.testing.assert_close(found["loss_kl"], 2 * known["loss_imitation"])
    torch.testing.assert_close(found["agreement"], known["agreement"])
    assert set(loss.out_keys) == {"loss_kl", "agreement"}


def test_windows_are_as_deep_as_the_drafter() -> None:
    parts = TargetParts.of(tiny_target())
    drafter = MedusaDrafter.from_target(parts, draft_vocab=torch.arange(0, 32, 2), num_heads=2).double()
    batch = pack([trajectory_of(drafter, request=i) for i in range(2)])
    for settings in ({}, {"steps": 5}):
        assert get_objective("kl")(drafter, parts.head, **settings)(batch)["agreement"].shape == (2,)


def test_windows_are_the_drafts_after_each_token_of_the_text() -> None:
    drafter, head = eagle3_and_head()
    batch = pack([trajectory_of(drafter, request=i) for i in range(2)])
    offset, prompt = batch["sequence", "offset"].tolist(), batch["sequence", "prompt_length"].tolist()
    unroll, rows = drafter.unroll(batch, 2), {token: row for row, token in enumerate(range(0, 32, 2))}
    expected, place = [], 0
    for start, end, first in zip(offset, offset[1:], prompt, strict=False):
        completion = batch["sequence", "tokens"][start + first : end].tolist()
        for begin in range(len(completion)):
            for step, token in enumerate(completion[begin : begin + 2]):
                at = place + begin + step
                if bool(unroll.valid[step, at]) and token in rows:
                    expected.append(-log_softmax(unroll.logits[step])[at, rows[token]])
        place += len(completion)
    loss = get_objective("text")(drafter, head, steps=2, reduction="sum")
    torch.testing.assert_close(loss(batch)["loss_text"], torch.stack(expected).sum())
    assert 0 < len(expected) < place * 2  # some tokens have no row


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"powr": 2.0}, "objective 'kl' has no setting 'powr'; did you mean 'power'"),
        ({"power": "high"}, "objective 'kl': power must be a number, got 'high'"),
        ({"power": -1.0}, "objective 'kl': power must be positive, got -1"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"target": "mine"}, "target must be 'model' or 'served', got 'mine'"),
        ({"log_p": 1}, "has no setting 'log_p'"),
    ],
)
def test_keywords_are_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_settings({"name": "kl", **settings})


def test_settings_and_an_import_path() -> None:
    drafter, head = eagle3_and_head()
    path = {"name": f"{__name__}:kl", "power": 3, "steps": 2, "weight": 0.5}
    (loss,) = make_objectives([path], drafter, head)
    assert check_settings(path).name == loss.name == "kl" and get_objective("kl").__doc__ == kl.__doc__
    assert loss.steps == 2 and loss.weight == 0.5


def test_functions_that_return_something_else() -> None:
    cases = {
        "alone": (lambda log_p, log_q, windows: forward_kl(log_p, log_q), r"must return \(values, mask\), got tensor"),
        "one": (lambda log_p, log_q, windows: (log_q.sum(), windows.valid), r"both \[J, C\] = \[3, 5\], got \[\] and"),
        "soft": (lambda log_p, log_q, windows: (log_q[..., 0], log_q[..., 0]), "a bool mask.*got .* torch.float32"),
        "fails": (lambda log_p, log_q, windows: log_q @ log_q[0], "(?:fails on a text of five tokens|must return)"),
        "typo": (lambda log_p, log_q, windows: windows.row, "fails on a text of five tokens: AttributeError: .*'row'"),
    }
    for name, (function, message) in cases.items():
        register_objective(name)(function)
        with pytest.raises(ValueError, match=f"objective '{name}': .*{message}"):
            check_settings({"name": name})


def test_functions_of_other_arguments() -> None:
    def two(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def own_steps(log_p: Tensor, log_q: Tensor, windows: Windows, *, steps: int) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    with pytest.raises(ValueError, match=r"must take \(log_p, log_q, windows, \*, settings\), got two\(log_p"):
        register_objective("two")(two)
    with pytest.raises(ValueError, match="every objective has a setting 'steps'; rename the function's"):
        register_objective("own_steps")(own_steps)
