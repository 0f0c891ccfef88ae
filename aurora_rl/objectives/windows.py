"""Windows of the committed text: the completion tokens of a batch, and the drafts from every position of it.

Legend: ``C`` completion tokens of a batch, ``J`` unroll steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tensordict import TensorDictBase
from torch import Tensor

from aurora_rl.policies.drafter import Drafter, Unroll


class Windows(NamedTuple):
    """Windows of the committed text, as an objective that is a function sees them: some of a batch at a time.

    A window starts at each completion token. It is what serving drafts at once. Draft ``j`` of the window that starts
    at token ``c`` predicts token ``c + j`` after the ``j`` tokens of the text before it. Shapes are of ``C`` windows.

    Attributes:
        rows: Row of the draft vocabulary that holds the text's token, ``[J, C]`` int64; −1 if none does.
        request: Request of each window, ``[C]`` int64.
        valid: Positions that count, ``[J, C]`` bool. Positions do not count after the end of a request, where the
            drafter predicts nothing, and where the draft vocabulary has none of the target's mass.
    """

    rows: Tensor
    request: Tensor
    valid: Tensor


def completion_tokens(batch: TensorDictBase) -> Tensor:
    """Return the tokens of all completions, ``[C]`` int64, which the rows of ("sequence", "hidden") predict.

    Example:
        >>> from tensordict import TensorDict
        >>> sequence = {"tokens": [5, 6, 7, 8, 9], "offset": [0, 3, 5], "prompt_length": [1, 1]}
        >>> completion_tokens(TensorDict({"sequence": {k: torch.tensor(v) for k, v in sequence.items()}}))
        tensor([6, 7, 9])
    """
    offset, prompt = batch["sequence", "offset"], batch["sequence", "prompt_length"]
    place = torch.arange(int(offset[-1]), device=offset.device)
    return batch["sequence", "tokens"][place >= torch.repeat_interleave(offset[:-1] + prompt, offset.diff())]


def unroll_text(drafter: Drafter, batch: TensorDictBase, steps: int) -> tuple[Unroll, int]:
    """Unroll a drafter, without the depths past the longest completion: nothing of them is valid.

    Returns:
        The unroll, and the number of depths that it lacks. :func:`with_rows` adds their rows: processes that share a
        batch count the positions of as many depths, whatever texts each has.

    Example:
        >>> from aurora_rl.testing import tiny_batch
        >>> drafter, _, batch = tiny_batch(max_new_tokens=4)
        >>> unroll, lacks = unroll_text(drafter, batch, 512)
        >>> len(unroll.logits), lacks
        (4, 508)
    """
    longest = int((batch["sequence", "offset"].diff() - batch["sequence", "prompt_length"]).max())
    # What a drafter does by itself, see `Drafter.unroll`, is not lacking.
    lacks = int(min(steps, drafter.max_depth) - min(steps, longest, drafter.max_depth))
    return drafter.unroll(batch, min(steps, longest)), lacks


def with_rows(values: Tensor, count: int) -> Tensor:
    """Return values ``[J, C]`` as ``[J + count, C]``, with zeros in the rows of depths that were not unrolled.

    Example:
        >>> with_rows(torch.tensor([[True, True]]), 1)
        tensor([[ True,  True],
                [False, False]])
    """
    return F.pad(values, (0, 0, 0, count))


def by_window(steps: Sequence[Tensor] | Tensor) -> Tensor:
    """Lay the ``J`` steps of an unroll, each ``[C, ...]``, out by window: the drafts of a window stand in one column.

    The result is ``[J, C, ...]``. Row ``j`` of column ``c`` is the value of token ``j`` of the window that starts at
    completion token ``c``, 0 after the last column. A window may run into the next request, where nothing is valid:
    mask the values first, or after.

    Example:
        >>> by_window(torch.tensor([[1, 2, 3], [0, 5, 6]]))
        tensor([[1, 2, 3],
                [5, 6, 0]])
    """
    return torch.stack([torch.cat([step[j:], torch.zeros_like(step[:j])]) for j, step in enumerate(steps)])
