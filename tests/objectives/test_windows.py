"""Windows of the committed text, against loops over completions."""

from __future__ import annotations

import torch
from tensordict import TensorDict

from aurora_rl.objectives.windows import by_window, completion_tokens
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
