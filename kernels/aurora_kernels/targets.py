"""The target's side of a drafter's loss: its log-probabilities, read a chunk of rows at a time.

Legend: ``n`` rows, ``r`` of a chunk, ``V`` vocabulary, ``Vd`` draft vocabulary, ``H`` hidden size, ``K`` likeliest
tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from aurora_kernels.rows import Rows, blocks, chunk_rows, log_softmax, product_dtype, row_dtype

Reader = Callable[[Rows], Tensor]
"""``read(rows)`` returns the target's log-probabilities ``[r, Vd]`` of some rows."""

# Logarithm of a tail that float32 cannot tell from 0, so that the tokens in it keep a finite logit.
_LEAST = math.log(torch.finfo(torch.float32).tiny)


class Target(Protocol):
    """Target of :func:`two_head_loss`: ``n`` rows of a distribution."""

    def __len__(self) -> int:
        """Return the number of rows, ``n``."""

    def reader(self, draft_vocab: Tensor | None, *, renormalize: bool, temperature: float) -> Reader:
        """Return a function that reads the log-probabilities of some rows.

        Args:
            draft_vocab: Tokens of the columns to return, ``[Vd]`` int64, each once; None for all of the vocabulary.
            renormalize: Whether the columns' probabilities sum to 1; otherwise they keep their share of the whole
                vocabulary.
            temperature: Temperature of the distribution.

        Raises:
            ValueError: ``draft_vocab`` has a token twice, or one that the target does not have.
        """


@dataclass(frozen=True)
class HeadTarget:
    """Hidden states and a frozen output head: logits are ``softcap(scale * (weight @ hidden + bias))``.

    Attributes:
        hidden: Inputs of the head, ``[n, H]``; cast to the dtype of the product.
        weight: ``[V, H]``.
        bias: ``[V]``, or None.
        scale: Factor on the product.
        softcap: Bound on the absolute value of a logit, ``softcap * tanh(logit / softcap)``; None for no bound.

    Example:
        >>> target = HeadTarget(torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]))
        >>> read = target.reader(torch.tensor([0, 1]), renormalize=True, temperature=1.0)
        >>> read(slice(0, 1)).exp()
        tensor([[0.5000, 0.5000]])
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        """Raise ValueError if hidden states and weight do not fit."""
        if self.hidden.ndim != 2 or self.weight.ndim != 2 or self.hidden.shape[1] != self.weight.shape[1]:
            raise ValueError(
                f"the target's hidden must be [n, H] and its weight [V, H], got {list(self.hidden.shape)} and "
                f"{list(self.weight.shape)}"
            )

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.hidden)

    def reader(self, draft_vocab: Tensor | None, *, renormalize: bool, temperature: float) -> Reader:
        """Return a function that reads rows, see :class:`Target`."""
        check_draft_vocab(draft_vocab, len(self.weight))
        weight, bias, columns = self.weight, self.bias, draft_vocab
        if draft_vocab is not None and renormalize:  # other tokens' logits are not needed
            weight, bias, columns = weight[draft_vocab], None if bias is None else bias[draft_vocab], None
        dtype = product_dtype(weight)
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)

        def read(rows: Rows) -> Tensor:
            hidden = self.hidden[rows].to(dtype)
            width = len(weight) if columns is None else len(columns)
            out = hidden.new_empty(len(hidden), width, dtype=row_dtype(dtype))
            # The vocabulary may be larger than the drafter's, and a chunk of its logits smaller.
            size = chunk_rows(hidden.device, len(weight), len(hidden))
            for few, part in zip(hidden.split(size), out.split(size), strict=True):
                _log_probs(self._finish(F.linear(few, weight, bias)), columns, temperature, part)
            return out

        return read

    def _finish(self, logits: Tensor) -> Tensor:
        """Scale and cap in place."""
        if self.scale != 1.0:
            logits *= self.scale
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)


@dataclass(frozen=True)
class LogProbTarget:
    """Log-probabilities that are there already, of the whole vocabulary, or of the draft vocabulary alone.

    Attributes:
        log_probs: ``[n, V]``; −inf is allowed. Of the draft vocabulary alone, ``[n, Vd]``, they need
            ``draft_vocab=None``, and temperature 1 unless they are renormalised.

    Example:
        >>> target = LogProbTarget(torch.tensor([[0.5, 0.25, 0.25]]).log())
        >>> target.reader(torch.tensor([0, 1]), renormalize=False, temperature=1.0)(slice(0, 1)).exp()
        tensor([[0.5000, 0.2500]])
    """

    log_probs: Tensor

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.log_probs)

    def reader(self, draft_vocab: Tensor | None, *, renormalize: bool, temperature: float) -> Reader:
        """Return a function that reads rows, see :class:`Target`."""
        check_draft_vocab(draft_vocab, self.log_probs.shape[1])

        def read(rows: Rows) -> Tensor:
            log_p = self.log_probs[rows]
            if temperature != 1.0:
                log_p = log_softmax(log_p / temperature)
            if draft_vocab is not None:
                log_p = log_p[:, draft_vocab]
            return log_softmax(log_p) if renormalize else log_p.to(row_dtype(log_p.dtype))

        return read


@dataclass(frozen=True)
class TopKTarget:
    """The likeliest tokens with their log-probabilities, and the mass of all others, which is spread evenly.

    Attributes:
        ids: Tokens, ``[n, K]`` int64, each once in a row.
        log_probs: Their log-probabilities, ``[n, K]``.
        tail_log_prob: Logarithm of the mass of the other tokens, ``[n]``; −inf if there is none.
        vocab_size: Size of the vocabulary, ``V``.

    Example:
        >>> target = TopKTarget(torch.tensor([[2]]), torch.tensor([[0.5]]).log(), torch.tensor([0.5]).log(), 3)
        >>> target.reader(None, renormalize=True, temperature=1.0)(slice(0, 1)).exp()
        tensor([[0.2500, 0.2500, 0.5000]])
    """

    ids: Tensor
    log_probs: Tensor
    tail_log_prob: Tensor
    vocab_size: int

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.ids)

    def reader(self, draft_vocab: Tensor | None, *, renormalize: bool, temperature: float) -> Reader:
        """Return a function that reads rows, see :class:`Target`."""
        check_draft_vocab(draft_vocab, self.vocab_size)
        rest = self.vocab_size - self.ids.shape[1]
        width = self.vocab_size if draft_vocab is None else len(draft_vocab)
        # One column more than is returned, for the tokens that have none.
        column = torch.full((self.vocab_size,), width, device=self.ids.device)
        chosen = slice(None) if draft_vocab is None else draft_vocab
        column[chosen] = torch.arange(width, device=self.ids.device)

        def read(rows: Rows) -> Tensor:
            dtype = row_dtype(self.log_probs.dtype)
            top = self.log_probs[rows].to(dtype) / temperature
            each = (self.tail_log_prob[rows].to(dtype).clamp(min=_LEAST) - math.log(max(rest, 1))) / temperature
            log_p = each[:, None].repeat(1, width + 1).scatter_(1, column[self.ids[rows]], top)[:, :width]
            if renormalize or draft_vocab is None:
                return log_softmax(log_p)
            total = top.logsumexp(-1)
            if rest > 0:
                total = torch.logaddexp(total, each + math.log(rest))
            return log_p - total[:, None]

        return read


def check_draft_vocab(draft_vocab: Tensor | None, vocab_size: int) -> None:
    """Raise ValueError unless every token of ``draft_vocab`` is one of the vocabulary, and there once.

    Example:
        >>> check_draft_vocab(torch.tensor([0, 7]), vocab_size=8)
    """
    if draft_vocab is None or not len(draft_vocab):
        return
    least, most = (int(each) for each in draft_vocab.aminmax())
    if least < 0 or most >= vocab_size:
        raise ValueError(f"draft_vocab must lie in 0..{vocab_size - 1}, got {least if least < 0 else most}")
    counts = torch.bincount(draft_vocab, minlength=vocab_size)
    if int(counts.max()) > 1:
        raise ValueError(f"draft_vocab must have each token once, got {int(counts.argmax())} {int(counts.max())} times")


def _log_probs(logits: Tensor, columns: Tensor | None, temperature: float, out: Tensor) -> None:
    """Write the log-softmax of a chunk ``[r, V]`` at some columns, or all, into ``out``, block by block."""
    for rows in blocks(logits):
        part = logits[rows] if temperature == 1.0 else logits[rows] / temperature
        if columns is None:
            torch.log_softmax(part, -1, out.dtype, out=out[rows])
        else:
            out[rows] = log_softmax(part)[:, columns]
