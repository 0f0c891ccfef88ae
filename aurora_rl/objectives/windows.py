"""Windows of the committed text: the completion tokens of a batch, and the drafts from every position of it.

Legend: ``C`` completion tokens of a batch, ``J`` unroll steps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tensordict import TensorDictBase
from torch import Tensor


def completion_tokens(batch: TensorDictBase) -> Tensor:
    """The tokens of all completions, ``[C]`` int64, those that the rows of ("sequence", "hidden") predict.

    Example:
        >>> from tensordict import TensorDict
        >>> sequence = {"tokens": [5, 6, 7, 8, 9], "offset": [0, 3, 5], "prompt_length": [1, 1]}
        >>> completion_tokens(TensorDict({"sequence": {k: torch.tensor(v) for k, v in sequence.items()}}))
        tensor([6, 7, 9])
    """
    offset, prompt = batch["sequence", "offset"], batch["sequence", "prompt_length"]
    place = torch.arange(int(offset[-1]), device=offset.device)
    return batch["sequence", "tokens"][place >= torch.repeat_interleave(offset[:-1] + prompt, offset.diff())]


def completion_requests(batch: TensorDictBase) -> Tensor:
    """The request of every completion token, ``[C]`` int64.

    Example:
        >>> from tensordict import TensorDict
        >>> sequence = {"offset": torch.tensor([0, 3, 5]), "prompt_length": torch.tensor([1, 1])}
        >>> completion_requests(TensorDict({"sequence": sequence}))
        tensor([0, 0, 1])
    """
    return torch.repeat_interleave(batch["sequence", "offset"].diff() - batch["sequence", "prompt_length"])


def by_window(steps: Tensor) -> Tensor:
    """Values of an unroll, by the window that they belong to.

    Args:
        steps: ``[J, C]``, of completion token ``c`` at depth ``j + 1``, see ``Unroll``.

    Returns:
        ``[J, C]``: row ``j`` of column ``c`` is the value of the ``j``-th token of the window that starts at completion
        token ``c``, 0 beyond the last column. Of another request's token it is whatever stands there: invalid values
        have to be 0.

    Example:
        >>> by_window(torch.tensor([[1, 2, 3], [0, 5, 6]]))
        tensor([[1, 2, 3],
                [5, 6, 0]])
    """
    count = steps.shape[1]
    return torch.stack([F.pad(step[j:], (0, min(j, count))) for j, step in enumerate(steps)])
