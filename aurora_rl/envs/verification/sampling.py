"""Sampling of a request's tokens: the distribution that is served."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Sorting a vocabulary of 49k costs about 5 ms a row on a CPU core, its likeliest thousand about 0.3 ms, and they
# nearly always hold the nucleus.
_NUCLEUS_WIDTH = 1024


def _top_p(scores: Tensor, top_p: Tensor, width: int) -> Tensor:
    """Keep the nucleus of each row ``[R, V]``, looking for it among the ``width`` likeliest. ``top_p`` is ``[R]``."""
    head = scores.topk(width, dim=-1).values.double()
    # In float64, so that the order in which a device adds never decides over a token at the edge.
    chance = (head - scores.double().logsumexp(-1, keepdim=True)).exp()
    # At least one, also of rows that are not numbers, which stay so.
    size = (chance.cumsum(-1) - chance < top_p[:, None]).sum(-1, keepdim=True).clamp(min=1)
    edge = head.gather(1, size - 1).to(scores.dtype)
    above, tied = scores > edge, scores == edge
    spare = size - above.sum(-1, keepdim=True)
    kept = scores.masked_fill(~(above | tied & (tied.cumsum(-1) <= spare)), -math.inf)
    overflow = size[:, 0] == width
    if width < scores.shape[1] and bool(overflow.any()):
        kept[overflow] = _top_p(scores[overflow], top_p[overflow], scores.shape[1])
    return kept


def warp(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Return the served scores, log-probabilities up to a constant: temperature, then min-p, then top-k, then top-p.

    The order is vLLM's, so top-p is a share of the mass that min-p and top-k leave. Min-p keeps every token whose
    probability is at least ``min_p`` times the largest. Top-k keeps every token that ties with the k-th, as Hugging
    Face and vLLM do. Top-p keeps the fewest tokens whose mass reaches ``top_p``, at least one; of equal scores at its
    edge the lowest ids stay.

    Args:
        logits: Logits, ``[R, V]`` floating.
        temperature: Temperature of each row, ``[R]``, > 0.
        top_k: Number of tokens to keep in each row, ``[R]`` int64; 0 keeps all.
        top_p: Mass of the nucleus of each row, ``[R]``; 1.0 keeps all.
        min_p: Least probability of each row's tokens, as a share of the largest, ``[R]``; 0.0 keeps all.

    Returns:
        ``[R, V]``, float64 for float64 logits and float32 otherwise; -inf outside the support.

    >>> logits, temperature = torch.tensor([[3.0, 2.0, 1.0]]).expand(3, 3), torch.tensor([1.0, 0.5, 1.0])
    >>> top_k, top_p, min_p = torch.tensor([2, 0, 0]), torch.tensor([1.0, 0.9, 1.0]), torch.tensor([0.0, 0.0, 0.4])
    >>> warp(logits, temperature, top_k, top_p, min_p).softmax(-1)
    tensor([[0.7311, 0.2689, 0.0000],
            [0.8808, 0.1192, 0.0000],
            [1.0000, 0.0000, 0.0000]])
    """
    vocab_size = logits.shape[1]
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # Shift before dividing: at a low temperature large scores would lose the digits that order the best tokens.
    scores = (scores - scores.amax(-1, keepdim=True)).div_(temperature[:, None])
    rows = (min_p > 0).nonzero()[:, 0]
    if len(rows):
        limited = scores[rows]  # relative to the largest, which is 0
        scores[rows] = limited.masked_fill(limited < min_p[rows, None].to(scores.dtype).log(), -math.inf)
    rows = ((top_k > 0) & (top_k < vocab_size)).nonzero()[:, 0]
    if len(rows):
        limited = scores[rows]
        edge = limited.topk(int(top_k[rows].max())).values.gather(1, top_k[rows, None] - 1)
        scores[rows] = limited.masked_fill(limited < edge, -math.inf)  # ties with the k-th stay
    rows = (top_p < 1).nonzero()[:, 0]
    if len(rows):
        scores[rows] = _top_p(scores[rows], top_p[rows], min(vocab_size, _NUCLEUS_WIDTH))
    return scores


def served_log_probs(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    tokens: Tensor | None = None,
) -> Tensor:
    """Return the log-probabilities of ``warp``, and the point mass on the argmax where the temperature is 0.

    The arguments are those of ``warp``, except that a temperature may be 0, and ``tokens`` ``[T]`` int64, the only
    tokens asked for; None is all.

    Returns:
        ``[R, T]``, not renormalised, or ``[R, V]``; float64 for float64 logits and float32 otherwise; -inf outside the
        support. A row of logits that has no finite largest is not a number throughout.

    >>> logits, temperature, none = torch.tensor([[0.0, 2.0], [0.0, 0.0]]), torch.tensor([0.0, 1.0]), torch.zeros(2)
    >>> served_log_probs(logits, temperature, none.long(), torch.ones(2), none).exp()
    tensor([[0.0000, 1.0000],
            [0.5000, 0.5000]])
    """
    columns = torch.arange(logits.shape[-1], device=logits.device) if tokens is None else tokens
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_p = torch.full((len(logits), len(columns)), -math.inf, dtype=dtype, device=logits.device)
    best = logits.max(-1)
    log_p.masked_fill_(columns == best.indices[:, None], 0.0).masked_fill_(~best.values.isfinite()[:, None], math.nan)
    drawn = temperature > 0
    if bool(drawn.any()):
        scores = warp(logits[drawn], *(each[drawn] for each in (temperature, top_k, top_p, min_p))).log_softmax(-1)
        log_p[drawn] = scores if tokens is None else scores[:, tokens]
    return log_p
