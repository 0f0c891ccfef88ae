"""Objectives from functions: a function of log-probabilities becomes an Objective over windows of the text."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar, cast

import torch
from tensordict import TensorDictBase
from torch import Tensor
from typing_extensions import override

from aurora_kernels.noise import argmax
from aurora_kernels.rows import chunk_rows, log_softmax
from aurora_rl.models.target_head import TargetHead
from aurora_rl.objectives.chunks import by_chunks, rows_and_head
from aurora_rl.objectives.distillation import DistillationObjective
from aurora_rl.objectives.function_probe import probe_function
from aurora_rl.objectives.objective import Values
from aurora_rl.objectives.target_rows import target_rows
from aurora_rl.objectives.windows import Windows, by_window, completion_tokens, unroll_text, with_rows
from aurora_rl.policies.drafter import Drafter, draft_rows
from aurora_rl.settings import settings_of
from aurora_rl.tree_index import completion_columns

ObjectiveFunction = Callable[..., tuple[Tensor, Tensor]]
"""``function(log_p, log_q, windows, *, settings) -> (values, mask)``, see :class:`FunctionObjective`."""


class FunctionObjective(DistillationObjective):
    """An objective whose values are a function of the log-probabilities of target and drafter.

    :func:`register_objective` makes a subclass of it from a function
    ``function(log_p, log_q, windows, *, settings) -> (values, mask)``:

    - ``log_p``, the target's distribution (a constant), and ``log_q``, the drafter's, are ``[J, C, Vd]`` over the draft
      vocabulary, at draft ``j`` of each of ``C`` windows;
    - ``windows`` tells what the positions are, see :class:`Windows`;
    - keywords are the objective's settings, checked by their types;
    - ``values`` ``[J, C]`` are minimised where ``mask`` ``[J, C]`` bool is true, which is ``windows.valid`` or less.

    The function treats every window alone, whole. It is called with some windows of a batch at a time, and again in the
    backward pass. So no tensor of all positions times the vocabulary is made. An objective that looks across windows
    subclasses :class:`Objective`. A function may draw random numbers from PyTorch's default generators,
    for each window its own: the backward pass draws the same ones. It leaves its arguments as they are.
    docs/objectives.md says what it may do, what is refused, and what is not noticed.

    Args:
        drafter: Drafter whose parameters learn.
        head: The target's output head, frozen; a weight ``[V, H]`` stands for a plain one.
        steps: Depth ``J`` of the windows, at most the drafter's; None takes the drafter's ``unroll_depth``.
        renormalize: See ``ImitationLoss``; false keeps the share of the whole vocabulary, as overlaps need it.
        target: See ``ImitationLoss``.
        weight: Factor on the loss, see :class:`Objective`.
        reduction: See :class:`Objective`; positions are windows, groups the depths.
        settings: Keywords of the function.

    The metric is "agreement" ``[J]``: the share of positions where the likeliest tokens agree.

    Raises:
        ValueError: ``steps`` < 1, an unknown target, or the function fails on a text of five tokens or is refused
            there, see ``aurora_rl.objectives.function_probe``.
    """

    function: ClassVar[ObjectiveFunction]
    function_settings: ClassVar[dict[str, Any]]

    def __init__(
        self,
        drafter: Drafter,
        head: TargetHead | Tensor,
        *,
        steps: int | None = None,
        renormalize: bool = True,
        target: str = "model",
        weight: float = 1.0,
        reduction: str = "mean",
        **settings: Any,
    ) -> None:
        if steps is not None and steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        super().__init__(drafter, head, renormalize=renormalize, target=target, weight=weight, reduction=reduction)
        self._steps, self._settings = steps, settings
        try:  # better now than at the first batch, when a model is loaded
            probe_function(self._call, self._steps or Drafter.unroll_depth)
        except Exception as error:  # whatever a function does
            if isinstance(error, ValueError):
                raise
            raise ValueError(f"its function fails on a text of five tokens: {type(error).__name__}: {error}") from error

    @property
    def steps(self) -> int:
        """Depths to unroll."""
        return self._steps or self.drafter.unroll_depth

    @classmethod
    @override
    def settings(cls) -> dict[str, Any]:
        return super().settings() | cls.function_settings

    @override
    def values(self, batch: TensorDictBase) -> Values:
        request = completion_columns(batch)[0]
        law, covered = self.target_law(batch, target_rows(batch, self.tensor_keys.hidden), request)
        unroll, lacks = unroll_text(self.drafter, batch, self.steps)
        steps, vocab = len(unroll.logits), self.drafter.draft_vocab
        row = draft_rows(vocab, completion_tokens(batch))
        windows = Windows(by_window([row] * steps), request, by_window(unroll.valid & covered))
        with torch.no_grad():
            read = law.reader(self._columns, renormalize=self.renormalize, temperature=1.0)
        states, heads = zip(*(rows_and_head(logits) for logits in unroll.logits), strict=True)
        size = max(chunk_rows(row.device, len(vocab), steps * len(row)) // steps, 1)

        def judge(start: int, *states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """Return value, mask and agreement of a chunk of windows, ``[J, c]``."""
            part = slice(start, start + len(states[0]))
            log_q = torch.stack([log_softmax(head(each)) for head, each in zip(heads, states, strict=True)])
            with torch.no_grad():
                log_p = read(slice(start, part.stop + steps - 1)).to(log_q.dtype)
                log_p = by_window([log_p] * steps)[:, : part.stop - start]
                agrees = log_q.gather(-1, argmax(log_p)[..., None])[..., 0] >= log_q.amax(-1)
            return *self._call(log_p, log_q, Windows(*(each[..., part] for each in windows))), agrees

        # The layout of `by_window`, step by step: rows of two steps need not have one width.
        shifted = [torch.cat([each[j:], torch.zeros_like(each[:j])]).split(size) for j, each in enumerate(states)]
        value, mask, agrees = by_chunks(judge, zip(range(0, len(row), size), *shifted, strict=True))
        value, valid, agrees = (with_rows(each, lacks) for each in (value, windows.valid & mask, agrees))
        return Values(value, value.new_ones(()), valid, {"agreement": self.mean(agrees, valid)})

    def _call(self, log_p: Tensor, log_q: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
        """Call the function, and check what it returns."""
        result, shape = self.function(log_p, log_q, windows, **self._settings), list(windows.valid.shape)
        if not (isinstance(result, tuple) and len(result) == 2 and all(isinstance(part, Tensor) for part in result)):
            raise ValueError(f"objective {self.name!r}: its function must return (values, mask), got {result!r}")
        value, mask = result
        if list(value.shape) != shape or list(mask.shape) != shape or mask.dtype != torch.bool:
            raise ValueError(
                f"objective {self.name!r}: its function must return values and a bool mask, both [J, C] = {shape}, got "
                f"{list(value.shape)} and {mask.dtype} {list(mask.shape)}"
            )
        return value, mask


@cache
def objective_from_function(name: str, function: ObjectiveFunction) -> type[FunctionObjective]:
    """Make the class of an objective from its function, see :class:`FunctionObjective`.

    Raises:
        ValueError: The function does not take three positional arguments and keywords, or a keyword of it has the name
            of a setting that all such objectives have.
    """
    signature = inspect.signature(function)
    positional = [p for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    keywords = [p.name for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
    if len(positional) != 3 or len(positional) + len(keywords) != len(signature.parameters):
        cure = f"; settings are keyword-only: put * before {positional[3].name!r}" if len(positional) > 3 else ""
        raise ValueError(
            f"objective {name!r}: its function must take (log_p, log_q, windows, *, settings), got "
            f"{function.__name__}{signature}{cure}"
        )
    if taken := sorted(set(keywords) & set(settings_of(FunctionObjective))):
        raise ValueError(f"objective {name!r}: every objective has a setting {taken[0]!r}; rename the function's")
    entries = {
        "name": name,
        "function": staticmethod(function),
        "function_settings": {key: kind for key, kind in settings_of(function).items() if key in keywords},
        "__doc__": function.__doc__,
        "__module__": function.__module__,
        "__qualname__": function.__qualname__,
    }
    return cast(type[FunctionObjective], type(function.__name__, (FunctionObjective,), entries))
