"""Which nodes are verified of what was drafted and of what was looked up."""

from __future__ import annotations

import torch
from torch import Tensor

from aurora_rl.context import ContextStore
from aurora_rl.policies.chances import Chances
from aurora_rl.policies.lookup import EarlierAnswers, Tree, merged, ngram_tree, padded
from aurora_rl.policies.tree_shape import TreeShape


class NodeChoice:
    """Merges what is looked up into drafted trees, keeps the likeliest nodes, and learns what stated chances are worth.

    Args:
        store: Context store of the engine.
        num_nodes: Number of padded nodes ``N`` of the trees.

    Attributes:
        drafted: What the drafter's chances are worth.
        looked_up: What those of lookup are worth.
    """

    def __init__(self, store: ContextStore, num_nodes: int) -> None:
        self._store, self._num_nodes = store, num_nodes
        self.drafted, self.looked_up = Chances(), Chances()
        # The trees of both for each slot, and the tokens that it had then.
        self._stated: dict[int, tuple[int, Tree, Tree]] = {}

    def learn(self, fresh: Tensor) -> None:
        """See what became of the nodes of the last trees, verified or not; ``fresh`` ``[B]`` has other requests."""
        for slot, (before, drafted, found) in self._stated.items():
            # What ended, or left its slot, is judged no more.
            if (length := int(self._store.lengths[slot])) > before and not fresh[slot]:
                new = self._store.tokens[slot, before:length].tolist()
                _judge(drafted, new, self.drafted)
                _judge(found, new, self.looked_up)
        self._stated.clear()

    def __call__(
        self, draft: dict[str, Tensor], slots: list[int], shape: TreeShape, least: float, earlier: EarlierAnswers | None
    ) -> None:
        """Write the trees of slots into ``draft``, which holds what the drafter drafted for them, if only empty trees.

        Args:
            draft: "tokens", "parents", "log_probs" and "mask", each ``[B, N]``.
            slots: The slots.
            shape: Shape of the trees.
            least: Chance of a path below which its last node is left out.
            earlier: Answers in which lookup searches next to the request's own text; None searches in none.
        """
        if not slots:
            return
        names, rows = ("tokens", "parents", "log_probs", "mask"), torch.tensor(slots, device=draft["tokens"].device)
        found = self._look_up(slots, shape, least, earlier)
        held = zip(*(draft[name][rows].tolist() for name in names), strict=True)
        trees = []
        for slot, (tokens, parents, log_probs, mask) in zip(slots, held, strict=True):
            drafted = Tree(tokens, parents, log_probs).kept([node for node, there in enumerate(mask) if there])
            self._stated[slot] = int(self._store.lengths[slot]), drafted, found[slot]
            trees.append(merged(drafted, found[slot], shape.num_nodes, least, (self.drafted, self.looked_up)))
        both = padded(trees, self._num_nodes, rows.device)
        for name in names:
            draft[name][rows] = getattr(both, name)

    def _look_up(
        self, slots: list[int], shape: TreeShape, least: float, earlier: EarlierAnswers | None
    ) -> dict[int, Tree]:
        if not shape.lookup:
            return dict.fromkeys(slots, Tree([], [], []))
        store, texts = self._store, self._store.tokens.cpu().numpy()
        wanted = shape if shape.lookup_only else shape.without_drafter(min(shape.lookup, shape.num_nodes))
        found = {}
        for slot in slots:
            answers = None if earlier is None else earlier.tokens(store.cache_salts[slot])
            found[slot] = ngram_tree(texts[slot, : store.lengths[slot]], wanted, answers, least, self.looked_up)
        return found


def _judge(tree: Tree, text: list[int], chances: Chances) -> None:
    """Count each node of a tree whose parent is on a text that followed its root, and whether it is, too."""
    depth: list[int] = []  # 0 where a node is not on the text
    for token, parent, stated in zip(tree.tokens, tree.parents, tree.stated, strict=True):
        above = depth[parent] if parent >= 0 else 0
        on_path = parent < 0 or above > 0
        if not on_path or above == len(text):
            depth.append(0)
            continue
        accepted = token == text[above]
        chances.observe(stated, above + 1, accepted)
        depth.append(above + 1 if accepted else 0)
