"""Objectives from functions by chunks of windows: what they are with whole logits, without making them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensor_sizes import largest_tensor
from tensordict import TensorDict
from tiny_drafters import noisy_drafter_and_head
from tiny_recordings import trajectory_of
from torch import Tensor

from aurora_kernels import rows as kernel_rows
from aurora_kernels.rows import log_softmax
from aurora_rl.envs import SamplingParams
from aurora_rl.models.target_head import TargetHead
from aurora_rl.objectives import Windows, forward_kl, get_objective, overlap, register_objective
from aurora_rl.objectives.function_objective import FunctionObjective
from aurora_rl.objectives.target_rows import target_rows
from aurora_rl.objectives.windows import by_window, completion_tokens
from aurora_rl.policies import DFlashDrafter, Eagle3Drafter, EagleDrafter, MedusaDrafter
from aurora_rl.policies.drafter import Drafter, draft_rows
from aurora_rl.testing.variants import topk_form
from aurora_rl.trajectories import pack
from aurora_rl.tree_index import completion_columns


def reached_kl(log_p: Tensor, log_q: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    """Every draft's KL, by the chance that all before it are accepted, which learns too."""
    accepted = torch.where(windows.valid, overlap(log_p, log_q), 0.0)
    reached = torch.cat([torch.ones_like(accepted[:1]), accepted[:-1]]).cumprod(0)
    return reached * torch.where(windows.valid, forward_kl(log_p, log_q), 0.0), windows.valid


def text(log_p: Tensor, log_q: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    """Cross entropy of the text's own tokens, where they have a row, with a factor of each request."""
    value = -log_q.gather(-1, windows.rows.clamp(min=0)[..., None])[..., 0]
    return value * (1.0 + windows.request), windows.valid & (windows.rows >= 0)


def constant(log_p: Tensor, log_q: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    """Nothing learns at positions where the target is sure, of which a chunk may have no others."""
    sure = log_p.amax(-1) > -0.3
    return torch.where(sure, 0.0, forward_kl(log_p, log_q)), windows.valid & ~sure


FUNCTIONS = [reached_kl, text, constant]


@pytest.fixture(autouse=True)
def registered() -> None:
    for function in FUNCTIONS:
        register_objective(function.__name__)(function)


def rows_of_a_chunk(monkeypatch: pytest.MonkeyPatch, fewest: int) -> None:
    monkeypatch.setattr(kernel_rows, "_FEWEST", fewest)
    monkeypatch.setitem(kernel_rows._CHUNK, "cpu", 1)


def whole(loss: FunctionObjective, batch: TensorDict) -> tuple[Tensor, Tensor]:
    """The loss and its agreement, from whole log-probabilities."""
    unroll = loss.drafter.unroll(batch, loss.steps)
    law, covered = loss.target_law(batch, target_rows(batch), completion_columns(batch)[0])
    row = draft_rows(loss.drafter.draft_vocab, completion_tokens(batch))
    log_q = by_window([log_softmax(logits + 0) for logits in unroll.logits])
    log_p = by_window([loss.log_probs(law)] * len(log_q))
    windows = Windows(by_window([row] * len(log_q)), completion_columns(batch)[0], by_window(unroll.valid & covered))
    value, mask = loss.function(log_p, log_q, windows)
    valid = windows.valid & mask
    value = torch.where(valid, value, 0.0).sum(1) / valid.sum(1).clamp(min=1)
    agrees = (log_q.argmax(-1) == log_p.argmax(-1)) & valid
    return loss.weight * value.sum(), agrees.sum(1) / valid.sum(1).clamp(min=1)


def batch_of(drafter: Drafter) -> TensorDict:
    """Requests of several lengths, one with a single token, served at different temperatures."""
    samplings = [SamplingParams(temperature=0.7, top_p=0.6), SamplingParams(temperature=1.3), SamplingParams()]
    sizes = [(5, 7), (1, 9), (2, 1)]
    return pack([
        trajectory_of(drafter, prompt_length=p, max_new_tokens=n, request=i, sampling_params=how)
        for i, ((p, n), how) in enumerate(zip(sizes, samplings, strict=True))
    ])  # fmt: skip


SETTINGS: list[dict[str, Any]] = [
    {"weight": 0.3},
    {"renormalize": False},
    {"target": "served", "steps": 2},
    {"target": "served", "renormalize": False, "steps": 5},
]


@pytest.mark.parametrize("fewest", [1, 8])
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("kind", "settings"),
    [(Eagle3Drafter, each) for each in SETTINGS]
    + [(kind, {}) for kind in (EagleDrafter, MedusaDrafter, DFlashDrafter)],
    ids=str,
)
def test_values_and_gradients_are_those_of_whole_logits(
    kind: type[Drafter],
    settings: dict[str, Any],
    function: Callable[..., Any],
    fewest: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drafter, head = noisy_drafter_and_head(kind)
    batch, loss = batch_of(drafter), get_objective(function.__name__)(drafter, head, **settings)
    rows_of_a_chunk(monkeypatch, fewest)
    found, (expected, agreement) = loss(batch), whole(loss, batch)
    torch.testing.assert_close(found[f"loss_{function.__name__}"], expected)
    torch.testing.assert_close(found["agreement"], agreement)
    gradients = [
        torch.autograd.grad(each, list(drafter.parameters()), allow_unused=True, materialize_grads=True)
        for each in (found[f"loss_{function.__name__}"], expected)
    ]
    torch.testing.assert_close(*gradients)
    assert sum(float(each.abs().sum()) for each in gradients[0]) > 1e-3


@pytest.mark.parametrize("form", ["likeliest tokens", "plain logits", "float32"])
def test_other_forms_of_target_and_drafter(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drafter, head = noisy_drafter_and_head(Eagle3Drafter)
    batch = batch_of(drafter)
    rows_of_a_chunk(monkeypatch, 8)
    if form == "likeliest tokens":
        batch = pack([topk_form(trajectory_of(drafter), head, 5)])
    elif form == "plain logits":  # at some of the steps
        unroll = drafter.unroll

        def partly_plain(batch: TensorDict, steps: int) -> Any:
            found = unroll(batch, steps)
            return found._replace(logits=[found.logits[0], *(each + 0 for each in found.logits[1:])])

        monkeypatch.setattr(drafter, "unroll", partly_plain)
    else:
        drafter, head = drafter.float(), TargetHead(head.weight.float())
        batch = batch.apply(lambda x: x.float() if x.is_floating_point() else x)
    loss = get_objective("reached_kl")(drafter, head)
    found, (expected, _) = loss(batch)["loss_reached_kl"], whole(loss, batch)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(each, list(drafter.parameters()), allow_unused=True) for each in (found, expected)]
    for got, each in zip(*gradients, strict=True):
        torch.testing.assert_close(got, each)


@pytest.mark.parametrize("settings", [{}, {"renormalize": False}, {"target": "served"}], ids=str)
def test_it_makes_no_tensor_of_all_positions_and_tokens(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter, head = noisy_drafter_and_head(Eagle3Drafter)
    batch = batch_of(drafter)
    rows_of_a_chunk(monkeypatch, 6)
    # So many draft rows that logits would be the largest tensors.
    drafter.lm_head = torch.nn.Linear(16, 4096, bias=False, dtype=torch.float64)
    drafter.draft_vocab = torch.arange(4096)
    loss = get_objective("reached_kl")(drafter, TargetHead(torch.randn(4096, 16, dtype=torch.float64)), **settings)
    count = len(batch["sequence", "hidden"])
    assert count > 16
    size = largest_tensor(lambda: loss(batch)["loss_reached_kl"].backward())
    assert size == 4096 * 16  # of a head, or its gradient
    assert drafter.lm_head.weight.grad is not None and bool(drafter.lm_head.weight.grad.any())


@pytest.mark.parametrize("fewest", [8, 4096])
def test_a_random_function_has_the_gradient_of_its_draws(fewest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draws: list[Tensor] = []
    replayed: list[Tensor] = []

    def some(log_p: Tensor, log_q: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
        if replayed:
            weight = replayed[0]
        else:
            draws.append(weight := torch.rand(log_q.shape[:2]) >= 0.05)
        return reached_kl(log_p, log_q, windows)[0] * weight, windows.valid

    register_objective("some")(some)
    drafter, head = noisy_drafter_and_head(Eagle3Drafter)
    state = torch.get_rng_state()
    loss, batch = get_objective("some")(drafter, head), batch_of(drafter)
    torch.set_rng_state(state)
    rows_of_a_chunk(monkeypatch, fewest)
    draws.clear()
    found = loss(batch)["loss_some"]
    chunks = len(draws)
    assert (chunks > 1) == (fewest == 8)
    torch.rand(3)  # as whatever else runs before the backward pass
    gradient = torch.autograd.grad(found, list(drafter.parameters()), allow_unused=True)
    replayed.append(torch.cat(draws[:chunks], 1))
    assert 0 < int((~replayed[0]).sum()) < replayed[0].numel() / 2
    expected, _ = whole(loss, batch)
    torch.testing.assert_close(found, expected)
    right = torch.autograd.grad(expected, list(drafter.parameters()), allow_unused=True)
    torch.testing.assert_close([x for x in gradient if x is not None], [x for x in right if x is not None])
