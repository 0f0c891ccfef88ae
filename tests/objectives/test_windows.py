"""Windows of the committed text, against loops over completions."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tiny_drafters import noisy_drafter_and_head
from tiny_recordings import trajectory_of
from torch import Tensor

from aurora_rl.objectives import (
    Windows,
    expected_length,
    function_objective,
    imitation,
    make_objectives,
    register_objective,
)
from aurora_rl.objectives.divergences import forward_kl
from aurora_rl.objectives.windows import by_window, completion_tokens
from aurora_rl.policies import Drafter, MedusaDrafter
from aurora_rl.policies.drafter import Unroll
from aurora_rl.trajectories import pack
from aurora_rl.tree_index import completion_columns

TOKENS = [[7, 8, 1, 2, 3], [9, 4], [5, 6, 0]]  # of three requests, the second without a completion
PROMPTS = [2, 2, 1]


def batch() -> TensorDict:
    lengths = torch.tensor([0, *map(len, TOKENS)])
    sequence = {
        "tokens": torch.tensor(sum(TOKENS, [])),
        "offset": lengths.cumsum(0),
        "prompt_length": torch.tensor(PROMPTS),
    }
    return TensorDict({"sequence": sequence})


def test_completions_are_what_follows_each_prompt() -> None:
    assert completion_tokens(batch()).tolist() == [1, 2, 3, 6, 0]
    assert completion_columns(batch())[0].tolist() == [0, 0, 0, 2, 2]


def test_a_window_holds_the_drafts_of_consecutive_tokens() -> None:
    steps = torch.arange(24.0).reshape(3, 4, 2)  # three steps, four tokens, two values each
    windows = by_window(list(steps))
    for step in range(3):
        for start in range(4):
            expected = steps[step, start + step] if start + step < 4 else torch.zeros(2)
            assert torch.equal(windows[step, start], expected)
    assert torch.equal(by_window(steps), windows)


def test_windows_keep_dtypes_and_gradients() -> None:
    assert by_window(torch.tensor([[True, True], [True, True]])).tolist() == [[True, True], [True, False]]
    steps = torch.ones(2, 3, requires_grad=True)
    by_window(steps).sum().backward()
    assert steps.grad is not None and steps.grad.tolist() == [[1, 1, 1], [0, 1, 1]]


@pytest.mark.parametrize("kind", [None, MedusaDrafter], ids=["recurrent", "parallel"])
@pytest.mark.parametrize(
    "settings",
    [
        {"name": "imitation"},
        {"name": "imitation", "weighting": "expected_length", "regression": 0.1},
        {"name": "expected_length", "rule": "rejection"},
        {"name": "windows_kl"},
    ],
    ids=str,
)
def test_depths_past_the_longest_text_are_not_unrolled_and_change_nothing(
    settings: dict[str, Any], kind: type[Drafter] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    @register_objective("windows_kl")
    def windows_kl(log_p: Tensor, log_q: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
        return forward_kl(log_p, log_q), windows.valid

    drafter, head = noisy_drafter_and_head(*([] if kind is None else [kind]))
    if kind is not None:
        settings = {**settings, **({"regression": 0.0} if "regression" in settings else {})}
    texts = pack([trajectory_of(drafter, prompt_length=4, max_new_tokens=n, request=n) for n in (5, 3)])
    asked: list[int] = []

    def counted(drafter: Drafter, batch: TensorDict, steps: int) -> Unroll:
        asked.append(steps)
        return type(drafter).unroll(drafter, batch, steps)

    def learned() -> tuple[list[Tensor], list[Tensor]]:
        (objective,) = make_objectives([{**settings, "steps": 9}], drafter, head)
        out = objective(texts)
        drafter.zero_grad()
        out[objective.out_keys[0]].backward()
        gradients = [p.grad.clone() for p in drafter.parameters() if p.grad is not None]
        return [out[key].detach() for key in objective.out_keys], gradients

    monkeypatch.setattr(drafter, "unroll", lambda batch, steps: counted(drafter, batch, steps), raising=False)
    found = learned()
    assert asked == [5]
    for module in (imitation, function_objective, expected_length):
        monkeypatch.setattr(module, "unroll_text", lambda drafter, batch, steps: (drafter.unroll(batch, steps), 0))
    assert found[1]
    torch.testing.assert_close(found, learned())
    assert asked == [5, 9]


@pytest.mark.parametrize("name", ["imitation", "expected_length", "windows_kl"])
def test_processes_whose_texts_have_other_lengths_count_as_many_depths(name: str) -> None:
    @register_objective("windows_kl")
    def windows_kl(log_p: Tensor, log_q: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
        return forward_kl(log_p, log_q), windows.valid

    drafter, head = noisy_drafter_and_head()
    texts = [trajectory_of(drafter, prompt_length=4, max_new_tokens=n, request=n) for n in (5, 2)]
    met, figures = threading.Barrier(2, timeout=30), {}

    def learned(batch: TensorDict, rank: int | None = None) -> list[Tensor]:
        def gather(figure: Tensor) -> Tensor:
            figures[rank] = figure.detach()
            met.wait()
            found = torch.stack([figures[0], figures[1]])
            met.wait()
            return found

        (objective,) = make_objectives([{"name": name, "steps": 9}], drafter, head)
        if rank is not None:
            objective.gather = gather
        loss, *metrics = (objective(batch)[key] for key in objective.out_keys)
        gradients = torch.autograd.grad(loss, list(drafter.parameters()), materialize_grads=True)
        return [*metrics, loss.detach(), *gradients]

    whole = learned(pack(texts))
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(learned, [pack([text]) for text in texts], (0, 1))
    metrics = 2 if name == "expected_length" else 1
    torch.testing.assert_close(first[:metrics], whole[:metrics])
    torch.testing.assert_close(second[:metrics], whole[:metrics])
    torch.testing.assert_close([a + b for a, b in zip(first[metrics:], second[metrics:], strict=True)], whole[metrics:])
