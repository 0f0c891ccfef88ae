"""The distribution that was served at rows of a batch, read a few rows at a time.

Legend: ``X`` rows, ``V`` vocabulary, ``Vd`` draft vocabulary.
"""

from __future__ import annotations

import math

import torch
from tensordict import TensorDictBase
from torch import Tensor

from aurora_kernels.rows import Rows, blocks, chunk_rows, log_softmax, row_dtype
from aurora_kernels.targets import Reader
from aurora_rl.envs.verification.sampling import served_log_probs
from aurora_rl.models.target_head import TargetHead
from aurora_rl.objectives.target_rows import target_logits

# Below this temperature float32 may have no probability for any but the likeliest token, and at 0 there is none.
_SHARP = 1e-30
_KEPT = 64  # tokens of a limited row that are kept for the next time that it is read


class ServedTarget:
    """The target's distribution after each request's sampling parameters; a point mass at temperature 0.

    It is a target as ``aurora_kernels.Target`` has it, of the draft vocabulary alone: ``draft_vocab`` is None and
    ``temperature`` 1. A row is multiplied with the whole head when it is first read. Of a greedy row, and of one with a
    min-p, top-k or top-p, the 64 likeliest tokens are kept. If no others can be drawn, they are the row from then on.
    Any other row is multiplied with the draft vocabulary's part of the head from then on, and at once if it is
    renormalised.

    Args:
        outputs: The target's outputs, rows of ``aurora_rl.objectives.target_rows``, ``[X]``.
        head: Output head of the target.
        tokens: Draft vocabulary, ``[Vd]`` int64, each token once.
        temperature: Temperature at each row, ``[X]``.
        top_k: Number of tokens that are kept at each row, ``[X]`` int64; 0 keeps all.
        top_p: Mass of the nucleus at each row, ``[X]``; 1.0 keeps all.
        min_p: Least probability at each row, as a share of the largest, ``[X]``; 0.0 keeps all.
        fill: Whether a row is uniform if the draft vocabulary has none of its mass. Otherwise it is −inf.

    Example:
        >>> from tensordict import TensorDict
        >>> outputs = TensorDict({"hidden": torch.eye(2)}, batch_size=[2])
        >>> head = TargetHead(torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, -9.0]]))
        >>> sampling = torch.tensor([0.0, 1.0]), torch.tensor([0, 2]), torch.ones(2), torch.zeros(2)
        >>> target = ServedTarget(outputs, head, torch.tensor([1, 2]), *sampling)
        >>> target.reader(None, renormalize=False, temperature=1.0)(slice(0, 2)).exp()
        tensor([[0.0000, 0.0000],
                [0.5000, 0.0000]])
        >>> target.covered()
        tensor([False,  True])
    """

    def __init__(
        self,
        outputs: TensorDictBase,
        head: TargetHead,
        tokens: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        min_p: Tensor,
        *,
        fill: bool = False,
    ) -> None:
        self.outputs, self.head, self.tokens, self.fill = outputs, head, tokens, fill
        self.temperature, self.top_k, self.top_p, self.min_p = temperature, top_k, top_p, min_p
        self._limited = (temperature < _SHARP) | (top_k > 0) | (top_p < 1) | (min_p > 0)
        self._rows = torch.arange(len(temperature), device=temperature.device)
        # Likeliest columns of rows that were read, and whether a row can be told from them.
        self._known = torch.zeros_like(self._limited)
        self._columns = self._rows.new_zeros(len(temperature), min(_KEPT, len(tokens)))
        self._values = torch.zeros_like(self._columns, dtype=row_dtype(head.weight.dtype))

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.temperature)

    def reader(self, draft_vocab: Tensor | None, *, renormalize: bool, temperature: float) -> Reader:
        """Return a function that reads rows, see ``aurora_kernels.Target``.

        Raises:
            ValueError: ``draft_vocab`` is not None, or ``temperature`` not 1: the target has its own.
        """
        if draft_vocab is not None or temperature != 1.0:
            raise ValueError(
                "a served distribution has its own draft vocabulary and its requests' temperatures; set "
                f"draft_vocab=None, temperature=1, not temperature={temperature}"
            )
        device = self.temperature.device.type
        dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)

        @torch.no_grad()
        def read(rows: Rows) -> Tensor:
            with torch.autocast(device, dtype=dtype, enabled=enabled):
                log_p = self._log_probs(rows, renormalize)
            if self.fill:
                log_p.masked_fill_((log_p.amax(-1) == -torch.inf)[:, None], -math.log(log_p.shape[-1]))
            return log_softmax(log_p) if renormalize else log_p

        return read

    @torch.no_grad()
    def covered(self) -> Tensor:
        """Return whether the draft vocabulary has any of the mass of each row, ``[X]`` bool.

        A row that is not a number counts: it is to show in the loss.
        """
        found = torch.ones_like(self._limited)
        if len(self.tokens) < len(self.head):
            limited = self._rows[self._limited]
            for rows in limited.split(chunk_rows(limited.device, len(self.tokens), len(limited))):
                found[rows] = self._log_probs(rows).amax(-1) != -torch.inf
        return found

    def _log_probs(self, rows: Rows, renormalize: bool = False) -> Tensor:
        """Return the log-probabilities of some rows, ``[r, Vd]``, up to a constant of each if it is to renormalize."""
        rows = self._rows[rows]
        plain = ~self._limited[rows]
        known = self._known[rows] | plain & renormalize
        log_p = self._values.new_empty(len(rows), len(self.tokens))
        for part, read in ((~known, self._multiplied), (known & plain, self._scaled), (known & ~plain, self._recalled)):
            if len(here := part.nonzero()[:, 0]):
                log_p[here] = read(rows[here])
        return log_p

    def _multiplied(self, rows: Tensor) -> Tensor:
        """Read rows by the whole head, and keep what tells them the next time."""
        parts = []
        for few in rows.split(chunk_rows(rows.device, len(self.head), len(rows))):
            logits = target_logits(self.outputs[few], self.head)
            for part in blocks(logits):
                here = few[part]
                served = self.temperature[here], self.top_k[here], self.top_p[here], self.min_p[here]
                parts.append(served_log_probs(logits[part], *served, self.tokens))
        log_p = torch.cat(parts)
        best = log_p.max(-1)
        self._values[rows, 0], self._columns[rows, 0], self._known[rows] = best.values, best.indices, True
        if len(limited := self._limited[rows].nonzero()[:, 0]):
            some, here, count = log_p[limited], rows[limited], self._columns.shape[1]
            self._values[here], self._columns[here] = some.topk(count)
            self._known[here] = (some != -torch.inf).sum(-1) <= count
        return log_p

    def _scaled(self, rows: Tensor) -> Tensor:
        """Read rows without min-p, top-k and top-p: logits by temperature, and what one token is known to have."""
        logits = target_logits(self.outputs[rows], self.head, self.tokens).to(self._values.dtype)
        scores = (logits - logits.amax(-1, keepdim=True)).div_(self.temperature[rows, None])
        # 0 if the row was not read yet: it will be renormalised.
        return scores.add_(self._values[rows, :1] - scores.gather(1, self._columns[rows, :1]))

    def _recalled(self, rows: Tensor) -> Tensor:
        """Read rows of few tokens."""
        log_p = self._values.new_full((len(rows), len(self.tokens)), -torch.inf)
        return log_p.scatter_(1, self._columns[rows], self._values[rows])
