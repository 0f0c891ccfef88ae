"""Discard sampling: the drafter also learns at contexts that it visited and verification rejected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor
from typing_extensions import override

from aurora_kernels import Target
from aurora_kernels.rows import Rows, log_softmax
from aurora_kernels.targets import Reader
from aurora_rl.models.target_head import TargetHead
from aurora_rl.objectives.distillation import DistillationObjective
from aurora_rl.objectives.divergences import Divergence, get_divergence, reverse_kl, wants_renormalized
from aurora_rl.objectives.objective import SAMPLING_KEYS, Values
from aurora_rl.objectives.registry import register_objective
from aurora_rl.objectives.target_rows import context_rows, target_rows, token_log_probs
from aurora_rl.policies.drafter import Drafter
from aurora_rl.tree_index import TREE_KEYS, TreeIndex


@register_objective("discard")
class DiscardSamplingLoss(DistillationObjective):
    """A divergence to the target at rejected nodes.

    Every node of a tree went through the target, so the target's distribution is known at the contexts that serving
    discards. The loss does not penalise the rejected tokens: at their parents the drafter learns by imitation. Nodes
    that others proposed (a recorded log-probability of −inf) do not count. Source: "discard sampling" of arXiv
    2602.06932, whose λ is ``weight``.

    Args:
        drafter: Drafter whose parameters learn.
        head: The target's output head, frozen; a weight ``[V, H]`` stands for a plain one.
        divergence: Divergence, see :func:`get_divergence`.
        renormalize: See ``ImitationLoss``.
        target: See ``ImitationLoss``.
        top_k: Number of the target's likeliest tokens to compare over (renormalised where ``renormalize`` says so);
            None over all. Not with the reverse KL, to which every token that the drafter gives a chance counts.
        weighting: Weights of nodes: "uniform"; "reach", the target's probability of the drafted path to the node; or
            "decay", ``decay ** depth``.
        decay: Factor of each further depth, see ``weighting``.
        weight: Factor λ on the loss, see :class:`Objective`.
        reduction: See :class:`Objective`; positions are the rejected nodes, in one group.

    The metrics are "discarded", the number of contexts, and "discard_agreement", the share of them where the likeliest
    tokens agree.

    Raises:
        ValueError: ``top_k`` < 1, ``decay`` outside (0, 1], an unknown divergence, weighting or reduction.

    Example:
        >>> from aurora_rl.testing import tiny_batch
        >>> drafter, head, batch = tiny_batch()
        >>> sorted(DiscardSamplingLoss(drafter, head, weighting="reach")(batch).keys())
        ['discard_agreement', 'discarded', 'loss_discard']
    """

    metrics: Sequence[str] = ("discarded", "discard_agreement")

    def __init__(
        self,
        drafter: Drafter,
        head: TargetHead | Tensor,
        *,
        divergence: str | Mapping[str, Any] | Divergence = "forward_kl",
        renormalize: bool | None = None,
        target: str = "model",
        top_k: int | None = None,
        weighting: str = "uniform",
        decay: float = 0.8,
        weight: float = 1.0,
        reduction: str = "mean",
    ) -> None:
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1 or null, got {top_k}")
        if not 0 < decay <= 1:
            raise ValueError(f"decay must lie in (0, 1], got {decay}")
        if weighting not in ("uniform", "reach", "decay"):
            raise ValueError(f"weighting must be 'uniform', 'reach' or 'decay', got {weighting!r}")
        divergence = get_divergence(divergence)
        if top_k is not None and divergence is reverse_kl:
            raise ValueError(
                f"top_k={top_k} leaves out tokens that the reverse KL charges to the drafter; set top_k=null, or "
                "divergence=forward_kl"
            )
        if renormalize is None:
            renormalize = wants_renormalized(divergence)
        super().__init__(drafter, head, renormalize=renormalize, target=target, weight=weight, reduction=reduction)
        self.divergence, self.top_k, self.weighting, self.decay = divergence, top_k, weighting, decay

    @property
    @override
    def reads(self) -> list[NestedKey]:
        keys = self.tensor_keys
        along_paths = [keys.hidden] if self.weighting == "reach" else []
        served = SAMPLING_KEYS if self.served else []
        return [*TREE_KEYS, keys.accepted, keys.log_probs, keys.node_hidden, *along_paths, *served]

    @property
    @override
    def optional_reads(self) -> list[NestedKey]:
        return [self.tensor_keys.log_probs]

    @override
    def values(self, batch: TensorDictBase) -> Values:
        self.expect_nodes(batch)
        keys, trees = self.tensor_keys, TreeIndex.of(batch)
        nodes = slice(trees.num_rounds, None)
        predicted = (trees.root[nodes] >= 0) & (trees.depth[nodes] < self.drafter.max_depth)
        discarded = ~batch[keys.accepted] & predicted
        if keys.log_probs in batch.keys(include_nested=True):
            # Nodes of log-probability -inf are others' (n-grams'): the drafter did not visit them.
            discarded &= batch[keys.log_probs] != -torch.inf
        wanted = torch.zeros_like(trees.depth, dtype=torch.bool)
        wanted[nodes] = discarded
        logits = self.drafter.context_logits(batch, trees, wanted)
        rows = target_rows(batch, keys.node_hidden)[discarded]
        law, covered = self.target_law(batch, rows, trees.request[wanted])
        if self.top_k is not None and self.top_k < len(self.drafter.draft_vocab):
            law = _Likeliest(law, self.top_k)
        weight = self._weights(batch, trees)[discarded]
        value, agrees = self.compare([logits], law, torch.where(covered, weight, 0.0)[None])
        metrics = {
            "discarded": self.gather(discarded.sum().to(value.dtype)).sum(0),
            "discard_agreement": self.mean((agrees & covered)[0], torch.ones_like(covered)),
        }
        return Values(value, weight, covered[None], metrics)

    @torch.no_grad()
    def _weights(self, batch: TensorDictBase, trees: TreeIndex) -> Tensor:
        """Return the weight of each node, ``[M]``."""
        if self.weighting != "reach":
            depth = trees.depth[trees.num_rounds :].to(torch.promote_types(self.head.weight.dtype, torch.float32))
            return (self.decay if self.weighting == "decay" else 1.0) ** depth
        rows = context_rows(batch, trees, trees.drawn_from, self.tensor_keys.hidden, self.tensor_keys.node_hidden)
        return trees.path_products(token_log_probs(rows, self.head, trees.context, batch["nodes", "tokens"]).exp())


@dataclass(frozen=True)
class _Likeliest:
    """The ``k`` likeliest tokens, among those that are asked for, of another target."""

    target: Target
    k: int

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.target)

    def reader(self, draft_vocab: Tensor | None, *, renormalize: bool, temperature: float) -> Reader:
        """Return a function that reads rows, see ``aurora_kernels.Target``."""
        read = self.target.reader(draft_vocab, renormalize=renormalize, temperature=temperature)

        def read_likeliest(rows: Rows) -> Tensor:
            log_p = read(rows)
            least = log_p.topk(self.k, dim=-1).values[:, -1:]
            log_p = log_p.masked_fill(log_p < least, -torch.inf)
            return log_softmax(log_p) if renormalize else log_p

        return read_likeliest
