"""The drafter seam: a module that proposes trees at serving and scores them in training.

Legend: ``B`` slots, ``b`` of them in a call, ``N`` nodes without the root, ``Vd`` draft vocabulary, ``F`` features,
``C`` completion tokens of a batch, ``J`` unroll steps, ``R`` rounds and ``M`` nodes of a batch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, Self, TypeVar

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from aurora_rl.inference_modules import stage
from aurora_rl.policies.target import TargetParts
from aurora_rl.trajectories import DRAFT_MODES
from aurora_rl.trees import depths


@dataclass(frozen=True, slots=True)
class TreeShape:
    """The tree that is drafted in a round: a drafter's, and a chain of prompt lookup merged into it.

    Attributes:
        depth: longest path of the drafter's tree; 0 proposes nothing.
        width: nodes expanded at each depth and children tried of each; 1 is a chain.
        num_nodes: node budget; the likeliest of the drafter's nodes by joint probability are kept.
        lookup: most tokens of prompt lookup (``aurora_rl.policies.lookup``), which go before the drafter's nodes where
            the budget does not hold both; 0 for none.
        mode: "topk" takes the drafter's likeliest nodes. "sampled" draws ``width`` chains that part at the root, as
            many as the budget holds whole, their first tokens independently; "sampled_without_replacement" draws first
            tokens that differ.

    Raises:
        ValueError: depth, width, lookup or mode out of range, a budget that cannot hold one path, or lookup in a mode
            that samples: its nodes would not be the drafter's draws.
    """

    depth: int
    width: int = 1
    num_nodes: int | None = None
    lookup: int = 0
    mode: str = "topk"

    def __post_init__(self) -> None:
        if self.mode not in DRAFT_MODES:
            raise ValueError(f"mode must be one of {', '.join(DRAFT_MODES)}, got {self.mode!r}")
        if self.mode != "topk" and self.lookup:
            raise ValueError(f"mode {self.mode!r} draws every node from the drafter; set lookup=0 (got {self.lookup})")
        if self.depth < 0 or self.width < 1:
            raise ValueError(f"a tree has depth >= 0 and width >= 1, got depth {self.depth}, width {self.width}")
        if self.lookup < 0:
            raise ValueError(f"lookup must not be negative, got {self.lookup}")
        if self.num_nodes is not None and self.num_nodes < max(self.depth, self.lookup):
            raise ValueError(
                f"num_nodes={self.num_nodes} cannot hold one path of depth {self.depth}, or lookup={self.lookup} tokens"
            )

    @property
    def chains(self) -> int:
        """Chains of a sampled tree."""
        return self.width if self.num_nodes is None else min(self.width, self.num_nodes // max(self.depth, 1))

    @property
    def budget(self) -> int:
        """Most nodes that the drafter proposes."""
        if self.mode != "topk":
            return self.depth * self.chains
        full = self.width + max(self.depth - 1, 0) * self.width**2 if self.depth else 0
        return full if self.num_nodes is None else min(self.num_nodes, full)

    @property
    def most_nodes(self) -> int:
        """Most nodes of this tree or a shallower one, those of prompt lookup included.

        A shallower sampled tree may have more: its budget holds more chains whole.
        """
        both = max(replace(self, depth=depth).budget for depth in range(self.depth + 1)) + self.lookup
        return both if self.num_nodes is None else min(self.num_nodes, both)


class Proposal(NamedTuple):
    """Trees of ``b`` slots with ``n`` nodes each, in topological order, parent −1 = root.

    Attributes:
        tokens: ``[b, n]`` int64, target token ids.
        parents: ``[b, n]`` int64.
        log_probs: ``[b, n]`` float32, log q(token given its path) of the drafter.
        q: ``[b, n, Vd]``, the distribution at each node's parent, where nodes were sampled.
    """

    tokens: Tensor
    parents: Tensor
    log_probs: Tensor
    q: Tensor | None = None


class Unroll(NamedTuple):
    """Predictions of every completion token from anchors at growing distance.

    Attributes:
        logits: ``J`` tensors ``[C, Vd]``; row ``c`` of step ``j`` predicts completion token ``c`` at depth ``j + 1``
            of a chain of the true tokens, hence belongs to row ``c`` of ("spine", "hidden").
        valid: ``[J, C]`` bool; false where the anchor would lie before the last prompt token or has no feature.
        states: ``J`` tensors ``[C, H]``, what the draft head read, where it is of the target's hidden size.
    """

    logits: list[Tensor]
    valid: Tensor
    states: list[Tensor] | None = None


class Drafter(nn.Module, ABC):
    """A drafter with two faces that must agree: serving (with a cache) and training (on packed trajectories).

    A *pair* ``t`` is the feature of position ``t`` with token ``t + 1``; a slot of length ``n`` has ``n - 1`` pairs,
    and drafting for it needs all of them.

    Attributes:
        feature_layers: the target's layer ids that make the features, see ``TransformersEngine``.
        draft_vocab: ``[Vd]`` int64, the target token of each row of the draft head.
        cached: ``[B]`` int64 on the CPU, pairs held for each slot.
        max_depth: deepest node that the drafter can propose.
    """

    max_depth: float = math.inf
    feature_layers: tuple[int, ...]
    draft_vocab: Tensor
    cached: Tensor

    @classmethod
    @abstractmethod
    def from_target(
        cls, parts: TargetParts, *, draft_vocab: Tensor, feature_layers: tuple[int, ...] | None = None
    ) -> Self:
        """A day-0 drafter in float32 for a target.

        Args:
            parts: the target's.
            draft_vocab: ``[Vd]`` int64.
            feature_layers: layer ids to read; None takes the architecture's own.
        """

    @abstractmethod
    def allocate(self, num_slots: int, max_length: int) -> None:
        """Make room to serve ``num_slots`` requests of at most ``max_length`` tokens; empties every slot."""

    def forget(self, slots: Tensor) -> None:
        """Drop what is held for the slots (``[b]`` int64)."""
        self.cached[slots] = 0

    @abstractmethod
    def extend(self, slots: Tensor, tokens: Tensor, features: Tensor, num_new: Tensor) -> None:
        """Append pairs to the slots.

        Args:
            slots: ``[b]`` int64.
            tokens: ``[b, T]`` int64, the token of each pair; columns from ``num_new`` on are padding.
            features: ``[b, T, F]``, the feature of each pair.
            num_new: ``[b]`` int64 on the CPU, at least 1.
        """

    @abstractmethod
    def propose(self, slots: Tensor, shape: TreeShape, generator: torch.Generator | None = None) -> Proposal:
        """Draft a tree behind the last pair of each slot, of log-probabilities by ``policies.growth.grow``.

        Args:
            slots: ``[b]`` int64, each with at least one pair.
            shape: the tree.
            generator: of the draws where the shape's mode samples; None takes PyTorch's own.
        """

    @abstractmethod
    def unroll(self, batch: TensorDictBase, steps: int) -> Unroll:
        """Training-time test: predict completion tokens as serving would, had the first drafts been right.

        Args:
            batch: packed trajectories, see ``aurora_rl.trajectories.pack``.
            steps: ``J``, depths to unroll; a parallel drafter stops at its number of heads.
        """

    @abstractmethod
    def context_logits(self, batch: TensorDictBase, wanted: Tensor) -> Tensor:
        """What the drafter predicts at contexts of the recorded trees, on its own states as in serving.

        Args:
            batch: packed trajectories, see ``aurora_rl.trajectories.pack``.
            wanted: ``[R + M]`` bool, the contexts asked for, in the order of :class:`RecordedTrees`. Those without a
                prediction (:attr:`RecordedTrees.root` of −1, a depth of ``max_depth`` or more) get meaningless rows.

        Returns:
            ``[number wanted, Vd]``, with gradients.
        """

    def score(self, batch: TensorDictBase) -> Tensor:
        """Log-probability of every recorded node given its path, ``[M]`` float, with gradients.

        Equals what serving recorded, where the weights are those that drafted and the cache had no older rows; −inf
        for what the drafter cannot have drafted: a token outside the draft vocabulary, a node that is too deep.
        """
        trees = RecordedTrees.of(batch)
        wanted = torch.zeros(len(trees.depth), dtype=torch.bool, device=trees.depth.device)
        wanted[trees.parent] = True
        log_q = log_softmax(self.context_logits(batch, wanted))
        row, nodes = draft_rows(self.draft_vocab, batch["nodes", "tokens"]), slice(trees.num_rounds, None)
        possible = (row >= 0) & (trees.root[nodes] >= 0) & (trees.depth[nodes] <= self.max_depth)
        picked = log_q[(wanted.cumsum(0) - 1)[trees.parent], row.clamp(min=0)]
        return torch.where(possible, picked, -torch.inf)

    @abstractmethod
    def published(self) -> dict[str, Tensor]:
        """The tensors that a swap replaces, by their checkpoint names; frozen parts of the target are left out."""

    @abstractmethod
    def stage(self, weights: dict[str, Tensor]) -> Callable[[], None]:
        """Copy replacements of the :meth:`published` tensors, in the form that serving needs, while the old ones serve.

        Returns:
            Puts the copies in place, by reference. To be called between two rounds; staging may run beside them.

        Raises:
            ValueError: names the first tensor that is missing, unknown or of another shape; nothing is changed then.
        """

    def install(self, weights: dict[str, Tensor]) -> None:
        """Replace the :meth:`published` tensors; errors as of :meth:`stage`."""
        self.stage(weights)()


D = TypeVar("D", bound=type[Drafter])
DRAFTERS: dict[str, type[Drafter]] = {}


def register_drafter(name: str) -> Callable[[D], D]:
    """Class decorator: make a drafter available by name in configurations."""

    def register(cls: D) -> D:
        DRAFTERS[name] = cls
        return cls

    return register


def check_weights(expected: dict[str, Tensor], given: dict[str, Tensor]) -> None:
    """Raise ValueError naming the first tensor by which ``given`` differs from ``expected`` in name or shape."""
    for name, tensor in expected.items():
        if name not in given:
            raise ValueError(f"tensor {name!r} {tuple(tensor.shape)} is missing; was it written for another drafter?")
        if given[name].shape != tensor.shape:
            raise ValueError(
                f"tensor {name!r} has shape {tuple(given[name].shape)}, this drafter needs {tuple(tensor.shape)}; "
                "was it written for another target or draft vocabulary?"
            )
    unknown = next((name for name in given if name not in expected), None)
    if unknown is not None:
        raise ValueError(f"tensor {unknown!r} is unknown to this drafter; it has {sorted(expected)}")


class RecordedTrees(NamedTuple):
    """Where the contexts of packed trajectories stand: first the roots of all ``R`` rounds, then all ``M`` nodes.

    Attributes:
        num_rounds: ``R``.
        request: ``[R + M]`` int64, the request of each context.
        root: ``[R + M]`` int64, the pair of its tree's root; −1 where the root is the first token of all, which has
            none, so that nothing can have been drafted from it.
        depth: ``[R + M]`` int64, 0 at a root.
        parent: ``[M]`` int64, the context that each node was drawn from.
    """

    num_rounds: int
    request: Tensor
    root: Tensor
    depth: Tensor
    parent: Tensor

    @classmethod
    def of(cls, batch: TensorDictBase) -> RecordedTrees:
        """Read a packed batch."""
        offset, parents, anchor = batch["rounds", "offset"], batch["nodes", "parents"], batch["rounds", "anchor"]
        rounds = torch.arange(len(anchor), device=anchor.device)
        drafted_in = torch.repeat_interleave(rounds, offset.diff())
        above = parents + offset[drafted_in]  # a node's place among all nodes, where it has a parent
        depth = depths(torch.where(parents < 0, -1, above)[None])[0]
        request = torch.repeat_interleave(batch["rounds", "request_offset"].diff())
        return cls(
            num_rounds=len(rounds),
            request=torch.cat([request, request[drafted_in]]),
            root=torch.cat([anchor, anchor[drafted_in]]) - 1,
            depth=torch.cat([torch.zeros_like(rounds), depth]),
            parent=torch.where(parents < 0, drafted_in, len(rounds) + above),
        )


def log_softmax(logits: Tensor) -> Tensor:
    """Log-softmax over the last dimension in float32, or in float64 where that is what comes in."""
    return logits.log_softmax(-1, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)


def draft_rows(draft_vocab: Tensor, tokens: Tensor) -> Tensor:
    """Row of the draft head of each target token, −1 where it has none; any shape."""
    order = draft_vocab.argsort()
    place = torch.searchsorted(draft_vocab[order], tokens).clamp(max=len(draft_vocab) - 1)
    row = order[place]
    return torch.where(draft_vocab[row] == tokens, row, -1)


def published_tensors(module: nn.Module, draft_vocab: Tensor) -> dict[str, Tensor]:
    """A module's parameters and ``d2t``, the offsets from draft rows to target ids, by the names that engines read."""
    rows = torch.arange(len(draft_vocab), device=draft_vocab.device)
    return {**{name: value.detach() for name, value in module.state_dict().items()}, "d2t": draft_vocab - rows}


def stage_tensors(drafter: Drafter, vocab_size: int, weights: dict[str, Tensor]) -> Callable[[], None]:
    """Stage what :func:`published_tensors` gave, draft vocabulary included.

    Args:
        drafter: the module.
        vocab_size: of the target.
        weights: the new tensors.

    Raises:
        ValueError: see :meth:`Drafter.stage`; also where ``d2t`` leaves the target's vocabulary.
    """
    old = drafter.draft_vocab
    check_weights(published_tensors(drafter, old), weights)
    vocab = weights["d2t"].to(old) + torch.arange(len(old)).to(old)
    if not bool(((vocab >= 0) & (vocab < vocab_size)).all()):
        raise ValueError(f"tensor 'd2t' points outside the target's vocabulary of {vocab_size}")
    put = stage(drafter, {name: weights[name] for name in drafter.state_dict()})

    def install() -> None:
        put()
        drafter.draft_vocab = vocab

    return install
