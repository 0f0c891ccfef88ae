"""Divergences between target and drafter at rows of a batch, by chunks of rows where draft heads are matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from aurora_kernels import Target, two_head_loss
from aurora_kernels.rows import agreeing, chunk_rows, log_softmax
from aurora_kernels.targets import Reader
from aurora_rl.objectives.chunks import rows_and_head
from aurora_rl.objectives.divergences import Divergence, with_gradient
from aurora_rl.policies.head_logits import HeadLogits, rows_by_head


def compare(
    logits: Sequence[Tensor],
    target: Target,
    divergence: Divergence,
    *,
    draft_vocab: Tensor | None,
    renormalize: bool,
    row_weights: Tensor | None = None,
    choices: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute a divergence to the target at every row of ``J`` predictions.

    Logits that are :class:`~aurora_rl.policies.HeadLogits` throughout are never multiplied out for all rows.

    Args:
        logits: The drafter's logits, ``J`` tensors ``[X, Vd]``.
        target: The target's distribution at the rows, which all ``J`` share.
        divergence: Divergence of log-probabilities, see ``aurora_rl.objectives.divergences``.
        draft_vocab: The target's tokens that the drafter's rows stand for, ``[Vd]`` int64; None for all.
        renormalize: Whether the target's distribution is renormalised over the draft vocabulary.
        row_weights: Gradient that the values will receive, up to a factor, or which of them count (bool), ``[J, X]``.
            Values of rows of weight 0 mean nothing. See ``two_head_loss``.
        choices: Draft rows to look for among the drafter's likeliest, ``[X]`` int64, −1 for none; None for the target's
            likeliest.

    Returns:
        Values ``[J, X]``; and ``[J, X]`` bool, whether the target's likeliest token, or the choice, is the drafter's.

    Example:
        >>> from aurora_kernels import LogProbTarget
        >>> from aurora_rl.objectives import forward_kl
        >>> half, quarter = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
        >>> compare([half, quarter], LogProbTarget(half), forward_kl, draft_vocab=None, renormalize=True)
        (tensor([[0.0000],
                [0.1438]]), tensor([[ True],
                [False]]))
    """
    # A drafter may predict alike at several steps, which are compared once.
    distinct = list({id(each): each for each in logits}.values())
    place = [next(i for i, candidate in enumerate(distinct) if candidate is each) for each in logits]
    heads = [each for each in distinct if isinstance(each, HeadLogits)]
    if len(heads) == len(distinct):
        if row_weights is not None and len(distinct) < len(logits):
            alike = [[step for step, at in enumerate(place) if at == i] for i in range(len(distinct))]
            row_weights = torch.stack([row_weights[steps].sum(0).to(row_weights.dtype) for steps in alike])
        learn = partial(
            two_head_loss, divergence=with_gradient(divergence), draft_vocab=draft_vocab, renormalize=renormalize
        )
        if all(each.head_of is None for each in heads):
            values, agreement = learn(
                [each.states for each in heads],
                [each.weights[0] for each in heads],
                target,
                row_weights=row_weights,
                choices=choices,
            )
        else:
            weights = [None] * len(heads) if row_weights is None else row_weights.unbind(0)
            parts = [_by_head(learn, each, target, w, choices) for each, w in zip(heads, weights, strict=True)]
            values, agreement = (torch.stack(each) for each in zip(*parts, strict=True))
        return values[place], agreement[place]
    log_p = all_log_probs(target, draft_vocab, renormalize=renormalize)
    chosen = log_p.max(-1).indices if choices is None else choices
    with torch.no_grad():
        agreement = torch.stack([agreeing(each, chosen) for each in distinct])
    log_q = [log_softmax(each) for each in distinct]
    values = torch.stack([divergence(log_p.to(each.dtype), each) for each in log_q])
    return values[place], agreement[place]


def _by_head(
    learn: Callable[..., tuple[Tensor, Tensor]],
    logits: HeadLogits,
    target: Target,
    row_weights: Tensor | None,
    choices: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return values and agreement ``[X]`` of logits whose rows have heads of their own, by rows of one head."""
    head_of = logits.states.new_zeros(len(logits.states)) if logits.head_of is None else logits.head_of
    rows, found = rows_by_head(head_of, len(logits.weights)), []
    for here, weight in zip(rows, logits.weights, strict=True):
        some = [None if each is None else each[here] for each in (row_weights, choices)]
        found.append(learn(logits.states[here], weight, _SomeRows(target, here), row_weights=some[0], choices=some[1]))
    place = torch.cat(rows).argsort()
    values, agreement = (torch.cat(each)[place] for each in zip(*found, strict=True))
    return values, agreement


@dataclass(frozen=True)
class _SomeRows:
    """Some rows of another target."""

    target: Target
    index: Tensor

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.index)

    def reader(self, draft_vocab: Tensor | None, *, renormalize: bool, temperature: float) -> Reader:
        """Return a function that reads rows, see ``aurora_kernels.Target``."""
        read = self.target.reader(draft_vocab, renormalize=renormalize, temperature=temperature)
        return lambda rows: read(self.index[rows])


@torch.no_grad()
def all_log_probs(target: Target, draft_vocab: Tensor | None, *, renormalize: bool) -> Tensor:
    """Return the target's log-probabilities at all rows, ``[X, Vd]``; arguments as of :func:`compare`."""
    return target.reader(draft_vocab, renormalize=renormalize, temperature=1.0)(slice(0, len(target)))


@torch.no_grad()
def row_log_probs(logits: Tensor, row: Tensor) -> Tensor:
    """Return the drafter's log-probability of a draft row at every position, ``[X]``; −inf where the row is −1.

    Args:
        logits: The drafter's logits, ``[X, Vd]``; those that are :class:`~aurora_rl.policies.HeadLogits` are multiplied
            out for a few positions at a time.
        row: Draft rows, ``[X]`` int64.

    Example:
        >>> row_log_probs(HeadLogits(torch.zeros(2, 3), torch.ones(4, 3)), torch.tensor([3, -1])).exp()
        tensor([0.2500, 0.0000])
    """
    rows, head = rows_and_head(logits)
    size = chunk_rows(row.device, logits.shape[-1], len(row))
    picked = [
        log_softmax(head(part)).gather(1, few.clamp(min=0)[:, None])[:, 0]
        for part, few in zip(rows.split(size), row.split(size), strict=True)
    ]
    return torch.cat(picked).masked_fill(row < 0, -torch.inf)
