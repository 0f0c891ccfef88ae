"""Rows of the target's outputs in a batch: the input of its head, or its likeliest tokens, and the logits of either.

Legend: ``X`` rows, ``V`` vocabulary, ``H`` hidden size, ``K`` likeliest tokens.

*Rows* are a TensorDict of batch size ``[X]`` with one of two sets of entries, as trajectories have them:

- "hidden" ``[X, H]``, which the frozen head turns into the full distribution;
- "topk_ids" ``[X, K]``, "topk_log_probs" ``[X, K]`` and "tail_log_prob" ``[X]``: exact at ``K`` tokens. The mass of
  the others is known and how it is shared is not; it is spread evenly. That is a stand-in of lower information.
"""

from __future__ import annotations

import math

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from aurora_kernels import HeadTarget, Target, TopKTarget
from aurora_kernels.rows import chunk_rows, log_softmax
from aurora_rl.models.target_head import TargetHead
from aurora_rl.policies.drafter import draft_rows
from aurora_rl.trajectories import TOPK_ENTRIES
from aurora_rl.tree_index import TreeIndex

# A tail of no mass is one that float32 cannot tell from 0. As its smallest number the tokens in it keep a finite logit,
# so that a draft vocabulary without any of the K likeliest can still be renormalised over.
_LEAST = math.log(torch.finfo(torch.float32).tiny)


def sibling_key(key: NestedKey, name: str) -> NestedKey:
    """Return the key of an entry of the same group.

    Example:
        >>> sibling_key(("nodes", "hidden"), "topk_ids"), sibling_key("hidden", "topk_ids")
        (('nodes', 'topk_ids'), 'topk_ids')
    """
    return (*key[:-1], name) if isinstance(key, tuple) else name


def target_keys(batch: TensorDictBase, hidden: NestedKey) -> list[NestedKey]:
    """Return the entries with the target's outputs: ``[hidden]``, the three of the top-k form next to it, or none."""
    there = batch.keys(include_nested=True)
    forms: list[list[NestedKey]] = [[hidden], [sibling_key(hidden, name) for name in TOPK_ENTRIES]]
    return next((form for form in forms if all(key in there for key in form)), [])


def target_rows(batch: TensorDictBase, hidden: NestedKey = ("sequence", "hidden")) -> TensorDict:
    """Return the target's outputs at the rows of "sequence" or of "nodes", whichever ``hidden`` is a key of.

    Raises:
        KeyError: The batch has neither form there.

    Example:
        >>> batch = TensorDict({"nodes": {"hidden": torch.zeros(5, 16)}})
        >>> target_rows(batch, ("nodes", "hidden"))[torch.tensor([0, 2])]["hidden"].shape
        torch.Size([2, 16])
    """
    if not (keys := target_keys(batch, hidden)):
        raise KeyError(
            f"the batch has neither {hidden} nor {', '.join(TOPK_ENTRIES)} next to it; record with an engine that "
            "gives the target's hidden states, or its likeliest tokens"
        )
    names = ("hidden",) if len(keys) == 1 else TOPK_ENTRIES
    return TensorDict(
        {name: batch[key] for name, key in zip(names, keys, strict=True)}, batch_size=batch[keys[0]].shape[:1]
    )


def context_rows(
    batch: TensorDictBase, trees: TreeIndex, wanted: Tensor, hidden: NestedKey, node_hidden: NestedKey
) -> TensorDict:
    """Return the target's outputs at contexts of recorded trees, a row for each that is wanted, in their order.

    Args:
        batch: Packed trajectories.
        trees: Index of the batch.
        wanted: Contexts to return, ``[R + M]`` bool.
        hidden: Key of the sequence's hidden states, ``[C, H]``, see :func:`target_rows`.
        node_hidden: Key of the nodes' hidden states, ``[M, H]``.

    Raises:
        KeyError: The batch lacks the target's outputs of the sequence or of the nodes, see :func:`target_rows`.

    Example:
        >>> from aurora_rl.testing import tiny_batch
        >>> _, _, batch = tiny_batch()
        >>> trees = TreeIndex.of(batch)
        >>> roots = torch.arange(len(trees.depth)) < trees.num_rounds
        >>> rows = context_rows(batch, trees, roots, ("sequence", "hidden"), ("nodes", "hidden"))
        >>> len(rows) == trees.num_rounds
        True
    """
    prompt = batch["sequence", "prompt_length"]
    count = batch["sequence", "offset"].diff() - prompt
    rounds, nodes = slice(trees.num_rounds), slice(trees.num_rounds, None)
    request = trees.request[rounds]
    # The first row of a request belongs to its last prompt token; a root's pair is the token before it.
    row = (count.cumsum(0) - count)[request] + trees.root[rounds] + 1 - (prompt[request] - 1)
    return torch.cat(
        [target_rows(batch, hidden)[row[wanted[rounds]]], target_rows(batch, node_hidden)[wanted[nodes]]], dim=0
    )


def target_logits(rows: TensorDictBase, head: TargetHead, tokens: Tensor | None = None) -> Tensor:
    """Return the target's logits at temperature 1, ``[X, V]``, in the head's dtype.

    Of the top-k form they are log-probabilities, in float32 at least.

    Args:
        rows: Rows of :func:`target_rows` or :func:`context_rows`, ``[X]``.
        head: Output head of the target.
        tokens: Tokens to return, ``[Vd]`` int64, each once, for ``[X, Vd]``; None returns all of the vocabulary.

    Example:
        >>> rows = {"topk_ids": [[2, 0]], "topk_log_probs": [[-0.5, -1.5]], "tail_log_prob": [math.log(0.2)]}
        >>> rows = TensorDict({name: torch.tensor(value) for name, value in rows.items()}, batch_size=[1])
        >>> target_logits(rows, TargetHead(torch.zeros(4, 8))).exp()  # tokens 1 and 3 share the tail
        tensor([[0.2231, 0.1000, 0.6065, 0.1000]])
    """
    if "hidden" in rows.keys():
        return head(rows["hidden"].to(head.weight.dtype), tokens)
    ids, log_probs, tail = (rows[name] for name in TOPK_ENTRIES)
    width, rest = len(head) if tokens is None else len(tokens), max(len(head) - ids.shape[1], 1)
    dtype = torch.promote_types(head.weight.dtype, torch.float32)  # the head may be in bfloat16, for autocast
    each = tail.to(dtype).clamp(min=_LEAST) - math.log(rest)
    # One column more, for the ids that are not asked for.
    place = ids if tokens is None else draft_rows(tokens, ids)
    logits = each[:, None].repeat(1, width + 1)
    return logits.scatter_(1, torch.where(place < 0, width, place), log_probs.to(dtype))[:, :width]


@torch.no_grad()
def token_log_probs(rows: TensorDictBase, head: TargetHead, row: Tensor, tokens: Tensor) -> Tensor:
    """Return the target's log-probability of tokens at temperature 1, ``[M]``, without logits of all rows.

    Args:
        rows: Rows of :func:`target_rows` or :func:`context_rows`, ``[X]``.
        head: Output head of the target.
        row: Row that predicts each token, ``[M]`` int64.
        tokens: Tokens, ``[M]`` int64.

    Example:
        >>> rows = TensorDict({"hidden": torch.zeros(2, 8)}, batch_size=[2])
        >>> token_log_probs(rows, TargetHead(torch.zeros(4, 8)), torch.tensor([0, 1, 1]), torch.tensor([3, 0, 2])).exp()
        tensor([0.2500, 0.2500, 0.2500])
    """
    out = torch.empty(len(tokens), dtype=torch.promote_types(head.weight.dtype, torch.float32), device=tokens.device)
    size = chunk_rows(tokens.device, len(head), len(rows))
    for start in range(0, len(rows), size):
        here = ((row >= start) & (row < start + size)).nonzero()[:, 0]
        log_p = log_softmax(target_logits(rows[start : start + size], head))
        out[here] = log_p[row[here] - start, tokens[here]]
    return out


def row_target(rows: TensorDictBase, head: TargetHead) -> Target:
    """Return the target's distribution at temperature 1, that of :func:`target_logits`, to be read by chunks of rows.

    Args:
        rows: Rows of :func:`target_rows` or :func:`context_rows`, ``[X]``.
        head: Output head of the target.

    Example:
        >>> rows = TensorDict({"hidden": torch.zeros(2, 8)}, batch_size=[2])
        >>> target = row_target(rows, TargetHead(torch.zeros(4, 8)))
        >>> target.reader(None, renormalize=False, temperature=1.0)(slice(1, 2)).exp()
        tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """
    if "hidden" in rows.keys():
        return HeadTarget(rows["hidden"], head.weight, head.bias, head.scale, head.softcap)
    ids, log_probs, tail = (rows[name] for name in TOPK_ENTRIES)
    return TopKTarget(ids, log_probs.to(torch.promote_types(head.weight.dtype, torch.float32)), tail, len(head))
