"""A learned drafter and n-grams of the request in one tree: each proposes what the other cannot know."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from tensordict import TensorDictBase
from torch import Tensor
from typing_extensions import override

from aurora_rl.models.parts import TargetParts
from aurora_rl.policies.drafter import Checkpoint, Drafter, Proposal, TreeShape, Unroll
from aurora_rl.policies.lookup import NgramDrafter, Tree, ngram_tree, padded
from aurora_rl.policies.registry import get_drafter, recognized, register_drafter


def merge_chain(tree: Tree, chain: list[int], budget: int) -> Tree:
    """Add a chain behind the root of a tree, sharing the nodes that are there already.

    Args:
        tree: of a drafter.
        chain: tokens of a path from the root, at most ``budget``.
        budget: most nodes of the result. What the chain needs, the drafter's least likely nodes make room for: a
            repetition in the text is a better guess than they are.

    Returns:
        The new tree.

    Example:
        >>> merge_chain(Tree([5, 7, 6], [-1, -1, 0], [-0.9, -0.5, -2.0]), [7, 8], budget=3)
        Tree(tokens=[5, 7, 8], parents=[-1, -1, 1], log_probs=[-0.9, -0.5, -inf])
    """
    tokens, parents, log_probs = tree.tokens.copy(), tree.parents.copy(), tree.log_probs.copy()
    parent, path = -1, set[int]()
    for token in chain:
        known = (i for i in range(len(tokens)) if parents[i] == parent and tokens[i] == token)
        node = next(known, len(tokens))
        if node == len(tokens):
            tokens.append(token)
            parents.append(parent)
            log_probs.append(-math.inf)
        path.add(node)
        parent = node
    joint: list[float] = []
    for parent, log_prob in zip(parents, log_probs, strict=True):
        joint.append(log_prob + (joint[parent] if parent >= 0 else 0.0))
    # A node is no likelier than its parent and comes behind it, so what is kept is a tree.
    others = sorted((i for i in range(len(tokens)) if i not in path), key=lambda i: -joint[i])
    keep = sorted(path.union(others[: budget - len(path)]))
    place = {-1: -1, **{old: new for new, old in enumerate(keep)}}
    return Tree([tokens[i] for i in keep], [place[parents[i]] for i in keep], [log_probs[i] for i in keep])


@register_drafter("hybrid")
class HybridDrafter(Drafter):
    """A learned drafter's tree with a chain of n-grams merged into it, under the one node budget of the shape.

    Only the learned drafter learns, and it is what is saved and exported. Nodes that n-grams alone propose carry a
    log-probability of −inf: the learned drafter did not draw them.

    Args:
        learned: the drafter that learns.
        lookup: most tokens of the chain, however deep the learned drafter's tree is.

    Raises:
        ValueError: ``lookup`` < 1.

    Example:
        >>> from aurora_rl.testing import tiny_target
        >>> parts = TargetParts.of(tiny_target())
        >>> drafter = HybridDrafter.from_target(parts, draft_vocab=torch.arange(16), learned="eagle3")
        >>> type(drafter.learned).__name__, drafter.lookup
        ('Eagle3Drafter', 2)
    """

    draft_modes: ClassVar[tuple[str, ...]] = ("topk",)
    formats: ClassVar[tuple[str, ...]] = ()  # those of the learned drafter, once there is one

    def __init__(self, learned: Drafter, lookup: int = 2) -> None:
        if lookup < 1:
            raise ValueError(f"lookup must be at least 1, got {lookup}; without it take the learned drafter alone")
        super().__init__()
        self.learned, self.lookup = learned, lookup
        self.ngram = NgramDrafter(learned.vocab_size)
        self.feature_layers, self.vocab_size = learned.feature_layers, learned.vocab_size
        self.max_depth, self.min_depth, self.formats = learned.max_depth, lookup, learned.formats  # type: ignore[misc]
        self.options = {"lookup": lookup, "learned_options": dict(learned.options)}

    @classmethod
    def from_target(
        cls,
        parts: TargetParts,
        *,
        draft_vocab: Tensor,
        feature_layers: tuple[int, ...] | None = None,
        learned: str = "medusa",
        lookup: int = 2,
        learned_options: Mapping[str, Any] | None = None,
    ) -> Self:
        """A day-0 drafter of the architecture that ``learned`` names, with options of its own, and n-grams."""
        kind, settings = get_drafter(learned), learned_options or {}
        if not kind.formats or issubclass(kind, HybridDrafter):
            raise ValueError(f"learned={learned} names a drafter that does not learn by itself")
        kind.check_options(settings)
        return cls(kind.from_target(parts, draft_vocab=draft_vocab, feature_layers=feature_layers, **settings), lookup)

    @property
    def draft_vocab(self) -> Tensor:  # type: ignore[override]
        """See :class:`Drafter`: the learned drafter's."""
        return self.learned.draft_vocab

    # ---- serving ----------------------------------------------------------------------------------------------------

    @override
    def allocate(self, num_slots: int, max_length: int) -> None:
        self.learned.allocate(num_slots, max_length)
        self.ngram.allocate(num_slots, max_length)
        self.cached = self.ngram.cached = self.learned.cached

    @override
    def extend(self, slots: Tensor, tokens: Tensor, features: Tensor, num_new: Tensor) -> None:
        self.ngram.hold(slots, tokens, num_new)
        self.learned.extend(slots, tokens, features, num_new)

    @override
    def propose(self, slots: Tensor, shape: TreeShape, generator: torch.Generator | None = None) -> Proposal:
        if shape.mode not in self.draft_modes:
            raise ValueError(f"n-grams are no draws of the learned drafter; mode {shape.mode!r} needs it alone")
        drafted = self.learned.propose(slots, shape, generator)
        if not shape.depth:
            return drafted
        chain_shape = TreeShape(min(self.lookup, shape.most_nodes))
        rows = zip(*(part.tolist() for part in drafted[:3]), strict=True)
        trees = []
        for slot, row in zip(slots.tolist(), rows, strict=True):
            chain = ngram_tree(self.ngram.text(slot), chain_shape).tokens
            tree = Tree(*row)
            trees.append(merge_chain(tree, chain, shape.most_nodes) if chain else tree)
        return padded(trees, drafted.tokens.device)

    def from_text(self, text: Sequence[int], shape: TreeShape) -> Proposal:
        """See :meth:`Drafter.from_text`: a tree of n-grams, with log-probabilities of −inf as in merged trees."""
        proposal = padded([ngram_tree(text, shape)], self.draft_vocab.device)
        return proposal._replace(log_probs=torch.full_like(proposal.log_probs, -math.inf))

    # ---- training ---------------------------------------------------------------------------------------------------

    def unroll(self, batch: TensorDictBase, steps: int) -> Unroll:
        """See :meth:`Drafter.unroll`: the learned drafter's."""
        return self.learned.unroll(batch, steps)

    def context_logits(self, batch: TensorDictBase, wanted: Tensor) -> Tensor:
        """See :meth:`Drafter.context_logits`: the learned drafter's."""
        return self.learned.context_logits(batch, wanted)

    # ---- weights ----------------------------------------------------------------------------------------------------

    def published(self) -> dict[str, Tensor]:
        """See :meth:`Drafter.published`: the learned drafter's."""
        return self.learned.published()

    def stage(self, weights: dict[str, Tensor]) -> Callable[[], None]:
        """See :meth:`Drafter.stage`: the learned drafter's."""
        return self.learned.stage(weights)

    def write(self, layout: str) -> Checkpoint:
        """See :meth:`Drafter.write`: the learned drafter's, which engines load alone."""
        return self.learned.write(layout)

    @classmethod
    def recognizes(cls, config: Mapping[str, Any]) -> bool:
        """See :meth:`Drafter.recognizes`: any learned drafter's will do."""
        return True

    @classmethod
    def saved_as(cls, options: Mapping[str, Any]) -> type[Drafter] | None:
        """See :meth:`Drafter.saved_as`: the learned drafter's class, where it is named."""
        name = options.get("learned")
        return None if name is None else get_drafter(name)

    @classmethod
    def read(cls, checkpoint: Checkpoint, parts: TargetParts, layout: str | None, **options: Any) -> Self:
        """See :meth:`Drafter.read`: a learned drafter, of whichever architecture, with n-grams added."""
        kind = cls.saved_as(options)
        if kind is None or not kind.recognizes(checkpoint.config):
            found = recognized(checkpoint.config)
            if kind is not None:
                raise ValueError(f"config.json is of {found.__name__}, and learned={options['learned']} is asked for")
            kind = found
        learned = kind.read(checkpoint, parts, layout or kind.formats[0], **options.get("learned_options") or {})
        return cls(learned, options.get("lookup", 2))
