"""The distribution that was served at rows of a batch, read a few rows at a time.

Legend: ``X`` rows, ``V`` vocabulary, ``Vd`` draft vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from tensordict import TensorDictBase
from torch import Tensor

from aurora_kernels.rows import Rows, chunk_rows, log_softmax
from aurora_kernels.targets import Reader
from aurora_rl.envs.verification.sampling import served_log_probs
from aurora_rl.models.target_head import TargetHead
from aurora_rl.objectives.target_rows import target_logits

# Below this temperature float32 may have no probability for any but the likeliest token, and at 0 there is none.
_SHARP = 1e-30


@dataclass(frozen=True, eq=False)
class ServedTarget:
    """The target's distribution after each request's temperature, top-k and top-p; a point mass at temperature 0.

    It is a target as ``aurora_kernels.Target`` has it. Nothing of it is kept: a read multiplies its rows with the whole
    head.

    Attributes:
        outputs: The target's outputs, rows of ``aurora_rl.objectives.target_rows``, ``[X]``.
        head: Output head of the target.
        temperature: Temperature at each row, ``[X]``.
        top_k: Number of tokens that are kept at each row, ``[X]`` int64; 0 keeps all.
        top_p: Mass of the nucleus at each row, ``[X]``; 1.0 keeps all.
        fill: Whether a row is uniform if the columns that are read have none of its mass. Otherwise it is −inf.

    Example:
        >>> from tensordict import TensorDict
        >>> outputs = TensorDict({"hidden": torch.eye(2)}, batch_size=[2])
        >>> sampling = torch.tensor([0.0, 1.0]), torch.tensor([0, 2]), torch.ones(2)
        >>> target = ServedTarget(outputs, TargetHead(torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, -9.0]])), *sampling)
        >>> target.reader(torch.tensor([1, 2]), renormalize=False, temperature=1.0)(slice(0, 2)).exp()
        tensor([[0.0000, 0.0000],
                [0.5000, 0.0000]])
        >>> target.covered(torch.tensor([1, 2]))
        tensor([False,  True])
    """

    outputs: TensorDictBase
    head: TargetHead
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    fill: bool = False

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.temperature)

    def reader(self, draft_vocab: Tensor | None, *, renormalize: bool, temperature: float) -> Reader:
        """Return a function that reads rows, see ``aurora_kernels.Target``.

        Raises:
            ValueError: ``temperature`` is not 1: the distribution has the requests' own.
        """
        if temperature != 1.0:
            raise ValueError(
                f"a served distribution has its requests' temperatures; set temperature=1, not {temperature}"
            )
        device = self.temperature.device.type
        dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)

        @torch.no_grad()
        def read(rows: Rows) -> Tensor:
            with torch.autocast(device, dtype=dtype, enabled=enabled):
                log_p = self._log_probs(rows, draft_vocab)
            if self.fill:
                log_p.masked_fill_((log_p.amax(-1) == -torch.inf)[:, None], -math.log(log_p.shape[-1]))
            return log_softmax(log_p) if renormalize else log_p

        return read

    @torch.no_grad()
    def covered(self, tokens: Tensor) -> Tensor:
        """Return whether some tokens ``[Vd]``, each once, have any of the mass at each row, ``[X]`` bool.

        A row that is not a number counts: it is to show in the loss.
        """
        found = torch.ones_like(self.temperature, dtype=torch.bool)
        if len(tokens) < len(self.head):
            limited = (self.temperature < _SHARP) | (self.top_k > 0) | (self.top_p < 1)
            for rows in limited.nonzero()[:, 0].split(self._size(len(self))):
                found[rows] = self._log_probs(rows, tokens).amax(-1) != -torch.inf
        return found

    def _size(self, count: int) -> int:
        return chunk_rows(self.temperature.device, len(self.head), count)

    def _log_probs(self, rows: Rows, tokens: Tensor | None) -> Tensor:
        """Return the log-probabilities of some tokens at some rows, ``[r, Vd]``, not renormalised."""
        outputs, temperature, top_k, top_p = (
            self.outputs[rows],
            self.temperature[rows],
            self.top_k[rows],
            self.top_p[rows],
        )
        size, log_p = self._size(len(outputs)), []
        for start in range(0, max(len(outputs), 1), size):  # logits of the whole vocabulary for a few rows at a time
            part = slice(start, start + size)
            logits = target_logits(outputs[part], self.head)
            log_p.append(served_log_probs(logits, temperature[part], top_k[part], top_p[part], tokens))
        return torch.cat(log_p)
