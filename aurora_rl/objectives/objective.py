"""The objective seam: a TorchRL loss on packed trajectories, made of per-position values and reduced in one place."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.objectives import LossModule

from aurora_rl.models.target_head import TargetHead
from aurora_rl.objectives.served_target import ServedTarget
from aurora_rl.objectives.target_rows import target_keys
from aurora_rl.policies.drafter import Drafter
from aurora_rl.policies.tree_shape import TreeShape
from aurora_rl.settings import settings_of
from aurora_rl.trajectories import TOPK_ENTRIES, check_features

# What a batch's groups come from, as the end of a sentence.
_TREES = (
    "an engine that drafts trees records it: serve with speculation (drafter.depth above 0, baseline.share below 1)"
)
_SOURCES = {
    "sequence": "it is recorded with every request",
    "rounds": _TREES,
    "nodes": _TREES,
    "sampling": "it is recorded with every request, as the engine was told to sample (SamplingParams)",
}
SAMPLING_KEYS: list[NestedKey] = [("sampling", key) for key in ("temperature", "top_k", "top_p", "min_p")]
"""Entries of a batch that :meth:`Objective.served_target` reads."""

# Batches in a row without a single drafted node before that is an error.
_NO_NODES = 20


def _alone(figure: Tensor) -> Tensor:
    """Return a figure as that of the only process, ``[1, ...]``."""
    return figure.detach()[None]


class Values(NamedTuple):
    """Per-position values of an objective, in ``G`` groups (such as unroll steps) of ``X`` positions.

    Attributes:
        value: Values to minimise, ``[G, X]``; entries at invalid positions do not matter.
        weight: Weights, which broadcast to ``[G, X]``.
        valid: Positions that count, ``[G, X]`` bool.
        metrics: Figures for the log; detached by the caller.
    """

    value: Tensor
    weight: Tensor
    valid: Tensor
    metrics: dict[str, Tensor]


class Objective(LossModule):
    """A loss on packed trajectories (``aurora_rl.trajectories.pack``) that teaches a drafter.

    A subclass gives :meth:`values`; registered by :func:`register_objective` it is known to configurations by its name.
    Forward returns "loss_<name>" and its metrics, and leaves its input as it is.

    A batch has the target's outputs as hidden states or as its likeliest tokens (``aurora_rl.objectives.target_rows``).
    :attr:`reads` names the first form. The second may replace it, in the same groups. A ``values`` that reads them
    through ``target_rows`` or ``context_rows`` takes both.

    A constructor checks its settings and asks nothing of the drafter: configurations are checked by making the
    objective on a stand-in, before a model is loaded.

    Args:
        drafter: Drafter whose parameters learn.
        head: The target's output head, frozen; a weight ``[V, H]`` stands for a plain one.
        weight: Factor on the loss, for sums of objectives.
        reduction: "mean" averages each group over its valid positions and adds the groups; "sum"; "none" gives
            ``[G, X]``, zero where invalid.

    Attributes:
        name: Name by which it is configured.
        sampled: Whether it needs nodes that the drafter drew at random.
        gather: Function that returns a figure ``[...]`` of every process that learns from a part of the batch,
            ``[P, ...]``, without gradients. By default there is one process, which has the whole batch.

    Raises:
        ValueError: An unknown reduction, a weight that is not finite, or a class without a name.

    Example:
        >>> from aurora_rl.objectives import ImitationLoss
        >>> from aurora_rl.testing import tiny_batch
        >>> drafter, head, batch = tiny_batch()
        >>> "loss_imitation" in ImitationLoss(drafter, head)(batch)
        True
    """

    @dataclass
    class _AcceptedKeys:
        """Keys that can be renamed by ``set_keys``."""

        hidden: NestedKey = ("sequence", "hidden")
        node_hidden: NestedKey = ("nodes", "hidden")
        accepted: NestedKey = ("nodes", "accepted")
        log_probs: NestedKey = ("nodes", "log_probs")

    name: ClassVar[str]
    sampled: ClassVar[bool] = False
    gather: Callable[[Tensor], Tensor]
    default_keys = _AcceptedKeys
    tensor_keys: _AcceptedKeys
    drafter: Drafter
    head: TargetHead

    def __init__(
        self, drafter: Drafter, head: TargetHead | Tensor, *, weight: float = 1.0, reduction: str = "mean"
    ) -> None:
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
        if not 0 <= weight < math.inf:  # below 0 the drafter would unlearn
            raise ValueError(f"weight must be finite and not negative, got {weight}")
        if getattr(self, "name", None) is None:
            raise ValueError(f"{type(self).__name__} has no name; give it one by @register_objective(...)")
        super().__init__()
        self.drafter, self.weight, self.reduction = drafter, weight, reduction
        self.head, self.gather = TargetHead.like(head), _alone
        self._without_nodes: int | None = 0  # batches so far; None once there were nodes

    @classmethod
    def settings(cls) -> dict[str, Any]:
        """Return the settings that a configuration may give, each with its type."""
        return {name: kind for name, kind in settings_of(cls).items() if name not in ("drafter", "head", "reduction")}

    @classmethod
    def check_served(cls, settings: Mapping[str, Any], shape: TreeShape) -> None:
        """Raise ValueError if trees of this shape never hold what an objective of these settings needs."""
        if cls.sampled and shape.mode == "topk":
            raise ValueError(
                f"objective {cls.name!r} learns from nodes drawn at random, and drafter.mode is 'topk'; "
                "set drafter.mode=sampled"
            )

    @property
    @abstractmethod
    def reads(self) -> list[NestedKey]:
        """Entries of a batch that :meth:`values` reads."""

    @property
    def optional_reads(self) -> list[NestedKey]:
        """Those of :attr:`reads` that a batch may lack."""
        return []

    @abstractmethod
    def values(self, batch: TensorDictBase) -> Values:
        """Compute the per-position values of a packed batch."""

    @property
    def metrics(self) -> Sequence[str]:
        """Names of the metrics that :meth:`values` gives; a class attribute will do."""
        return ()

    @property
    def in_keys(self) -> list[NestedKey]:
        """Entries that forward reads; of a batch in another form see :meth:`keys_of`."""
        return self.reads

    @property
    def out_keys(self) -> list[NestedKey]:
        """Entries that forward returns."""
        return [f"loss_{self.name}", *self.metrics]

    def keys_of(self, batch: TensorDictBase) -> list[NestedKey]:
        """Return the entries that forward reads of this batch: :attr:`reads` in the form that the batch has.

        Raises:
            ValueError: It is no batch, or an entry is missing; the message names it and what would supply it.
        """
        prompt_length = batch.get(("sequence", "prompt_length"), None)
        if prompt_length is not None and not prompt_length.ndim:
            raise ValueError(f"objective {self.name!r} takes a batch, and this is one trajectory; give it pack([...])")
        if prompt_length is None and "draft" in batch.keys():
            raise ValueError(
                f"objective {self.name!r} takes packed trajectories, and this is a batch of rounds; iterate over "
                "aurora_rl.collectors.TrajectoryCollector(env, policy, ...) in the place of TorchRL's Collector, or "
                "give it pack([...]) of the trajectories of completions"
            )
        there, outputs = batch.keys(include_nested=True), (self.tensor_keys.hidden, self.tensor_keys.node_hidden)
        found: list[NestedKey] = []
        for key in self.reads:
            if key in there:
                found.append(key)
            elif key in outputs and (topk_keys := target_keys(batch, key)):
                found += topk_keys
            elif key not in self.optional_reads:
                raise ValueError(
                    f"objective {self.name!r} needs {key} in the batch, which has no such entry{self._supplier(key)}"
                )
        return found

    def _supplier(self, key: NestedKey) -> str:
        """Return the end of an error message: where an entry would come from."""
        keys = self.tensor_keys
        if key == keys.log_probs:
            return (
                "; an engine that keeps the drafter's log-probabilities supplies it, such as the embedded one with "
                "drafter.mode=sampled or TreeShape(..., mode='sampled') (one that drafts by argmax has none)"
            )
        if key in (keys.hidden, keys.node_hidden):
            return f"; an engine supplies it, or {', '.join(TOPK_ENTRIES)} in its place"
        group = "nodes" if key == keys.accepted else key[0]
        return f"; {_SOURCES[group]}" if group in _SOURCES else ""

    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """Compute loss and metrics of a packed batch.

        Raises:
            ValueError: The batch lacks an entry; the message names it and its source. Or the features are not those
                that the drafter reads; value and valid are not both ``[G, X]``; weight does not fit or has a gradient.
        """
        if ("sequence", "features") in self.keys_of(tensordict):
            try:
                check_features(tensordict, self.drafter.feature_layers, self.head.weight.shape[1])
            except ValueError as error:
                raise ValueError(f"objective {self.name!r}: {error}") from error
        value, weight, valid, metrics = self.values(tensordict)
        if value.ndim != 2 or valid.shape != value.shape:
            raise ValueError(
                f"objective {self.name!r}: value and valid must both be [G, X], groups of positions, got "
                f"{list(value.shape)} and {list(valid.shape)}; value[None] is one group"
            )
        self._check_weight(weight, value)
        # Where a position is invalid either may be infinite, and zero times that is not zero, in a gradient neither.
        weighted = torch.where(valid, value, 0.0) * torch.where(valid, weight, 0.0)
        if self.reduction == "mean":
            # Groups keep their own mean, so that a batch of short completions is not dominated by the first step.
            loss = (weighted.sum(1) / self.count(valid).clamp(min=1)).sum()
        else:
            loss = weighted.sum() if self.reduction == "sum" else weighted
        if not loss.requires_grad:
            # A batch without such positions: zero, of which a learner can still ask the gradient.
            loss = loss + next(self.drafter.parameters()).flatten()[:0].sum()
        out = {name: metric.detach() for name, metric in metrics.items()}
        return TensorDict({f"loss_{self.name}": self.weight * loss, **out}, batch_size=[])

    def count(self, valid: Tensor) -> Tensor:
        """Count the valid positions of the whole batch, ``[G]``; ``valid`` ``[G, X]`` is of this process's part."""
        return self.gather(valid.sum(1)).sum(0)

    def mean(self, values: Tensor, where: Tensor) -> Tensor:
        """Average values over the positions of the whole batch that count, for a metric.

        Args:
            values: Values of this process's part of the batch, ``[..., X]``.
            where: Whether each counts, ``[..., X]`` bool.

        Returns:
            The means, ``[...]``, without gradients; 0 where nothing counts.
        """
        values = values if values.is_floating_point() else values.float()
        total = torch.where(where, values, 0.0).sum(-1)
        total, count = self.gather(torch.stack([total, where.sum(-1).to(total.dtype)])).sum(0)
        return total / count.clamp(min=1)

    def _forward_value_estimator_keys(self, **kwargs: object) -> None:
        """Do nothing for ``set_keys``: there is no value estimator."""

    def _check_weight(self, weight: Tensor, value: Tensor) -> None:
        """Raise ValueError where the weights do not fit the values, or learn."""
        sizes = zip(reversed(weight.shape), reversed(value.shape), strict=False)
        if weight.ndim > value.ndim or any(size not in (1, wanted) for size, wanted in sizes):
            raise ValueError(
                f"objective {self.name!r}: weight must broadcast to value, {list(value.shape)}, got "
                f"{list(weight.shape)}; a weight of each position is [X] or [1, X], one of each group [G, 1]"
            )
        if weight.requires_grad:
            raise ValueError(
                f"objective {self.name!r}: weight has a gradient, by which the drafter would learn to make it small; "
                "detach it, and put what is to be learned into value"
            )

    def expect_nodes(self, batch: TensorDictBase) -> None:
        """Check that an objective that learns from trees gets some.

        Batches of plain decoding are allowed, as long as some batches have drafts.

        Raises:
            ValueError: None of the first twenty-one batches has a node.
        """
        if self._without_nodes is None:
            return
        if bool(self.gather(torch.tensor(len(batch["nodes", "tokens"]))).any()):
            self._without_nodes = None
            return
        self._without_nodes += 1
        if self._without_nodes > _NO_NODES:
            self.check_nodes()

    def check_nodes(self) -> None:
        """Raise ValueError if the objective learns from trees and no batch so far had a node.

        Called at the end of a recording, which may come before :meth:`expect_nodes` raises.
        """
        if self._without_nodes:
            raise ValueError(
                f"objective {self.name!r} learns from drafted nodes, and the first {self._without_nodes} batches have "
                "none; serve with speculation (drafter.depth above 0, baseline.share below 1), and with "
                "drafter.adaptive=false if drafts do not pay there yet"
            )

    def served_target(
        self,
        batch: TensorDictBase,
        rows: TensorDictBase,
        request: Tensor,
        *,
        greedy: bool = False,
        fill: bool = False,
    ) -> ServedTarget:
        """Return the distribution that was served, after temperature, min-p, top-k and top-p, to be read by chunks.

        It is that of the draft vocabulary, not renormalised.

        Args:
            batch: Packed trajectories.
            rows: The target's outputs, ``[X]``, see ``target_rows``.
            request: Request of each row, ``[X]`` int64.
            greedy: Whether to take every request as decoded greedily, and read nothing of "sampling".
            fill: Whether rows without any mass in the draft vocabulary are uniform, see :class:`ServedTarget`.
        """
        if greedy:
            none = torch.zeros(len(request), device=request.device)
            sampling = [none, torch.zeros_like(request), torch.ones_like(none), none]
        else:
            sampling = [batch[key][request] for key in SAMPLING_KEYS]
        return ServedTarget(rows, self.head, self.drafter.draft_vocab, *sampling, fill=fill)
