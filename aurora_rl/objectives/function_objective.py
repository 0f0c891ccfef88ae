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

from aurora_kernels.rows import chunk_rows, log_softmax
from aurora_rl.models.target_head import TargetHead
from aurora_rl.objectives.chunks import by_chunks, rows_and_head
from aurora_rl.objectives.distillation import DistillationObjective
from aurora_rl.objectives.objective import Values
from aurora_rl.objectives.target_rows import target_rows
from aurora_rl.objectives.windows import Windows, by_window, completion_tokens
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

    The function treats every window alone, whole: it is called with some windows of a batch at a time, and called again
    in the backward pass, so that no tensor of all positions times the vocabulary is made. An objective that looks
    across windows subclasses :class:`Objective`. A function may draw random numbers from PyTorch's default generators:
    the backward pass draws the same ones. A generator of its own would draw others.

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
        ValueError: ``steps`` < 1, an unknown target, or the function fails on a text of two tokens, returns other
            values of a window next to another, or other values of the same windows with the same random state.
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
            self._call_on_two_tokens()
        except Exception as error:  # whatever a function does
            if isinstance(error, ValueError):
                raise
            raise ValueError(f"its function fails on two tokens: {type(error).__name__}: {error}") from error

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
        unroll = self.drafter.unroll(batch, self.steps)
        steps, vocab = len(unroll.logits), self.drafter.draft_vocab
        row = draft_rows(vocab, completion_tokens(batch))
        windows = Windows(by_window([row] * steps), request, by_window(unroll.valid & covered))
        with torch.no_grad():
            read = law.reader(vocab, renormalize=self.renormalize, temperature=1.0)
        states, heads = zip(*(rows_and_head(logits) for logits in unroll.logits), strict=True)
        size = max(chunk_rows(row.device, len(vocab), steps * len(row)) // steps, 1)

        def judge(start: int, *states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """Return value, mask and agreement of a chunk of windows, ``[J, c]``."""
            part = slice(start, start + len(states[0]))
            log_q = torch.stack([log_softmax(head(each)) for head, each in zip(heads, states, strict=True)])
            with torch.no_grad():
                log_p = read(slice(start, part.stop + steps - 1)).to(log_q.dtype)
                log_p = by_window([log_p] * steps)[:, : part.stop - start]
                agrees = log_q.gather(-1, log_p.argmax(-1, keepdim=True))[..., 0] >= log_q.amax(-1)
            return *self._call(log_p, log_q, _some(windows, part)), agrees

        laid_out = [torch.cat([each[j:], torch.zeros_like(each[:j])]).split(size) for j, each in enumerate(states)]
        value, mask, agrees = by_chunks(judge, zip(range(0, len(row), size), *laid_out, strict=True))
        valid = windows.valid & mask
        agreement = (agrees & valid).sum(1) / valid.sum(1).clamp(min=1)
        return Values(value, value.new_ones(()), valid, {"agreement": agreement})

    def _call_on_two_tokens(self) -> None:
        """Raise ValueError if a window matters to another, or a second call differs; what else it raises passes."""
        shape = (self._steps or Drafter.unroll_depth, 2)
        log_p, log_q = torch.randn(2, *shape, 2, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
        rows, request = torch.zeros(shape, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
        windows = Windows(rows, request, torch.ones(shape, dtype=torch.bool))

        def call(*place: int) -> tuple[list[Tensor], bool]:
            """Return values and mask of windows at these places, and whether they need random numbers."""
            torch.default_generator.manual_seed(0)
            before, part = torch.get_rng_state(), list(place)
            found = self._call(log_p[:, part], log_q[:, part], _some(windows, part))
            return [each.detach().double() for each in found], not torch.equal(before, torch.get_rng_state())

        with torch.random.fork_rng(devices=[]):
            both, draws = call(0, 1)
            again, _ = call(0, 1)
            # Fewer windows draw other numbers, so a random function is called on as many: on two copies of one.
            copies = [call(i, i) if draws else call(i) for i in range(2)]
        if not _same(both, again):
            raise ValueError(
                "its function must return the same when it is called again with the same random state, as the backward "
                f"pass does, and returns {both[0].flatten().tolist()} and then {again[0].flatten().tolist()}; draw "
                "random numbers from PyTorch's default generator, and keep no state"
            )
        for i, (copy, _) in enumerate(copies):
            found, expected = ([each[:, min(i, each.shape[1] - 1)] for each in of] for of in (copy, both))
            if not _same(found, expected):
                differing = 0 if not _same(found[:1], expected[:1]) else 1
                raise ValueError(
                    f"its function must treat each window alone, and returns {found[differing].tolist()} of a window "
                    f"{'next to a copy' if draws else 'by itself'} and {expected[differing].tolist()} of it next to "
                    "another; subclass Objective to look across windows"
                )

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


def _some(windows: Windows, part: slice | list[int]) -> Windows:
    """Return some of the windows."""
    return Windows(windows.rows[:, part], windows.request[part], windows.valid[:, part])


def _same(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Return whether two calls of a function returned the same, up to rounding."""
    pairs = zip(found, expected, strict=True)
    return all(torch.allclose(*pair, rtol=1e-4, atol=1e-6, equal_nan=True) for pair in pairs)


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
        raise ValueError(
            f"objective {name!r}: its function must take (log_p, log_q, windows, *, settings), got "
            f"{function.__name__}{signature}"
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
