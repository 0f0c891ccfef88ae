"""The contexts of recorded trees: the roots of all rounds and then all nodes, as ``TreeIndex`` counts them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from aurora_rl.tree_index import TreeIndex

SEQUENCE_KEYS: list[NestedKey] = [("sequence", key) for key in ("tokens", "offset", "prompt_length", "features")]
"""What ``Drafter.unroll`` reads of a batch."""

TREE_KEYS: list[NestedKey] = [
    *SEQUENCE_KEYS,
    *(("rounds", key) for key in ("offset", "anchor", "request_offset")),
    *(("nodes", key) for key in ("tokens", "parents")),
]
"""What ``TreeIndex`` and ``Drafter.context_logits`` read of a batch."""

SAMPLING_KEYS: list[NestedKey] = [("sampling", key) for key in ("temperature", "top_k", "top_p")]
"""What ``Objective.served_log_probs`` reads of a batch."""


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


def windows(steps: Tensor) -> Tensor:
    """Values of an unroll, by the window that they belong to.

    Args:
        steps: ``[J, C]``, of completion token ``c`` at depth ``j + 1``, see ``Unroll``.

    Returns:
        ``[J, C]``: row ``j`` of column ``c`` is the value of the ``j``-th token of the window that starts at completion
        token ``c``, 0 beyond the last column. Of another request's token it is whatever stands there: invalid values
        have to be 0.

    Example:
        >>> windows(torch.tensor([[1, 2, 3], [0, 5, 6]]))
        tensor([[1, 2, 3],
                [5, 6, 0]])
    """
    count = steps.shape[1]
    return torch.stack([F.pad(step[j:], (0, min(j, count))) for j, step in enumerate(steps)])


def path_products(trees: TreeIndex, factors: Tensor) -> Tensor:
    """Product of a factor of every node along its path from the root, its own included.

    Args:
        trees: of a batch.
        factors: ``[M]``, with or without gradients.

    Returns:
        ``[R + M]``, 1 at the roots.

    Example:
        >>> chain = TreeIndex(1, *(torch.tensor(x) for x in ([0] * 3, [4] * 3, [0, 1, 2], [0, 1])))
        >>> path_products(chain, torch.tensor([0.5, 0.5]))
        tensor([1.0000, 0.5000, 0.2500])
    """
    products = torch.cat([factors.new_ones(trees.num_rounds), factors])
    depth = trees.depth[trees.num_rounds :]
    for level in range(2, int(depth.max()) + 1 if len(depth) else 0):
        here = (depth == level).nonzero().flatten()
        products = products.index_copy(0, here + trees.num_rounds, products[trees.parent[here]] * factors[here])
    return products


def subtree_sums(trees: TreeIndex, values: Tensor) -> Tensor:
    """Sum of a value of every node over the node and all nodes below it.

    Args:
        trees: of a batch.
        values: ``[M]``.

    Returns:
        ``[R + M]``; at a root the sum over its tree.

    Example:
        >>> chain = TreeIndex(1, *(torch.tensor(x) for x in ([0] * 3, [4] * 3, [0, 1, 2], [0, 1])))
        >>> subtree_sums(chain, torch.tensor([1.0, 2.0]))
        tensor([3., 3., 2.])
    """
    sums = torch.cat([values.new_zeros(trees.num_rounds), values])
    depth = trees.depth[trees.num_rounds :]
    for level in range(int(depth.max()) if len(depth) else 0, 0, -1):
        here = (depth == level).nonzero().flatten()
        sums = sums.index_add(0, trees.parent[here], sums[here + trees.num_rounds])
    return sums
