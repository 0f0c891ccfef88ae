"""Drafter and target as tables of logits by text: worlds in which every tree and every outcome can be enumerated.

Here an estimator's expectation is a finite sum, and the gradient that it should have is known. The tests of the policy
gradient are built on it, and so can be those of a new objective.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from typing_extensions import override

from aurora_rl.policies import Drafter
from aurora_rl.sampling_params import SamplingParams
from aurora_rl.trajectories import make_trajectory, pack
from aurora_rl.tree_index import TreeIndex

VOCAB = 3
Text = tuple[int, ...]
TEXTS: list[Text] = [text for length in range(4) for text in product(range(VOCAB), repeat=length)]


class EnumerableDrafter(Drafter):
    """Logits by the text since the root. It scores trees and does not serve.

    Args:
        seed: Seed of the table.
        draft_vocab: Draft vocabulary, ``[Vd]`` int64; None has all tokens.
        start: Table ``[texts, Vd]`` to start from instead, float64, in the order of :data:`TEXTS`.
    """

    def __init__(self, seed: int, draft_vocab: Tensor | None = None, start: Tensor | None = None) -> None:
        super().__init__()
        self.feature_layers = ()
        self.draft_vocab = torch.arange(VOCAB) if draft_vocab is None else draft_vocab
        generator = torch.Generator().manual_seed(seed)
        table = torch.randn(len(TEXTS), len(self.draft_vocab), generator=generator, dtype=torch.float64)
        self.table = nn.Parameter(table if start is None else start.clone())

    def log_q(self, text: Text) -> Tensor:
        """Return the log-probabilities after a text, ``[Vd]``."""
        return self.table[TEXTS.index(text)].log_softmax(-1)

    @override
    def context_logits(self, batch: TensorDictBase, trees: TreeIndex, wanted: Tensor) -> Tensor:
        texts: list[Text] = [()] * trees.num_rounds
        for parent, token in zip(trees.parent.tolist(), batch["nodes", "tokens"].tolist(), strict=True):
            texts.append((*texts[parent], token))
        index = torch.tensor([TEXTS.index(t) for t, w in zip(texts, wanted.tolist(), strict=True) if w])
        return self.table[index.long()]

    def _not_of_a_table(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: a table starts from no target, has no text to unroll over, and does not serve."""
        raise NotImplementedError

    from_target = allocate = extend = propose = unroll = published = stage = _not_of_a_table


class EnumerableTarget:
    """Logits by text; its output head is the identity, so a hidden state is the logits themselves.

    Args:
        seed: Seed of the table.
        temperature: Temperature of requests; 0 is greedy.
    """

    def __init__(self, seed: int, temperature: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(1000 + seed)
        self.table = torch.randn(len(TEXTS), VOCAB, generator=generator, dtype=torch.float64)
        self.temperature = temperature

    head = torch.eye(VOCAB, dtype=torch.float64)

    def p(self, text: Text) -> Tensor:
        """Return the distribution that is served after a text."""
        logits = self.table[TEXTS.index(text)]
        if self.temperature == 0:
            return nn.functional.one_hot(logits.argmax(), VOCAB).double()
        return (logits / self.temperature).softmax(-1)


class DrawnTree:
    """Nodes of a tree, in topological order: parents (−1 is the root), tokens, and the texts from the root to each."""

    def __init__(self, parents: Sequence[int], tokens: Sequence[int]) -> None:
        self.parents, self.tokens = tuple(parents), tuple(tokens)
        self.texts: list[Text] = []
        for parent, token in zip(parents, tokens, strict=True):
            self.texts.append((*self.before(parent), token))

    def before(self, parent: int) -> Text:
        """Return the text of a node, or of the root (−1)."""
        return () if parent < 0 else self.texts[parent]

    def children(self, parent: int) -> list[int]:
        """Return the nodes below a node or the root, in their order."""
        return [i for i, above in enumerate(self.parents) if above == parent]


def drawn_trees(parents: Sequence[int], distinct: bool = False) -> Iterator[DrawnTree]:
    """Yield every tree of these parents; if ``distinct``, only those whose siblings differ."""
    for tokens in product(range(VOCAB), repeat=len(parents)):
        tree = DrawnTree(parents, tokens)
        pairs = list(zip(parents, tokens, strict=True))
        if not distinct or len(set(pairs)) == len(pairs):
            yield tree


def chance_of(drafter: EnumerableDrafter, tree: DrawnTree, distinct: bool) -> Tensor:
    """Return the probability that the drafter draws the tree, with its gradient."""
    total = torch.ones((), dtype=torch.float64)
    for parent in {-1, *tree.parents}:
        left = drafter.log_q(tree.before(parent)).exp()
        for child in tree.children(parent):
            token = tree.tokens[child]
            total = total * left[token] / left.sum()
            if distinct:
                left = left * (torch.arange(VOCAB) != token)
    return total


def log_probs_of(drafter: EnumerableDrafter, tree: DrawnTree) -> list[float]:
    """Return the log-probability of each node given its path, as a recording has it."""
    return [float(drafter.log_q(text[:-1])[text[-1]].detach()) for text in tree.texts]


def reach_of(drafter: EnumerableDrafter, target: EnumerableTarget, tree: DrawnTree, rule: str) -> list[Tensor]:
    """Return the probability that each node is accepted, by the rule's definition, with its gradient."""
    out: list[Tensor] = [torch.zeros((), dtype=torch.float64)] * len(tree.tokens)

    def descend(parent: int, arrived: Tensor) -> None:
        p, q = target.p(tree.before(parent)), drafter.log_q(tree.before(parent)).exp()
        seen: set[int] = set()
        for child in tree.children(parent):
            token = tree.tokens[child]
            if rule in ("greedy", "sample_and_match"):
                take = p[token] * (token not in seen)
                out[child] = arrived * take
            elif rule == "rejection" or token not in seen:
                take = torch.clamp(p[token] / q[token], max=1)
                out[child] = arrived * take
                arrived = arrived * (1 - take)
                left = (p - q).clamp(min=0)
                p = left / left.sum().clamp(min=1e-300)
                if rule != "rejection":
                    q = q * (torch.arange(VOCAB) != token)
                    q = q / q.sum().clamp(min=1e-300)
            seen.add(token)
            descend(child, out[child])

    descend(-1, torch.ones((), dtype=torch.float64))
    return out


def outcomes_of(tree: DrawnTree, reached: Sequence[Tensor]) -> Iterator[tuple[list[bool], Tensor]]:
    """Yield every set of accepted nodes, and its probability."""
    for node in range(-1, len(tree.tokens)):
        stays = (reached[node] if node >= 0 else torch.ones(())) - sum(reached[c] for c in tree.children(node))
        accepted, at = [False] * len(tree.tokens), node
        while at >= 0:
            accepted[at], at = True, tree.parents[at]
        yield accepted, stays.detach()


def tree_trajectory(
    tree: DrawnTree,
    target: EnumerableTarget,
    *,
    rule: str,
    mode: str = "sampled",
    accepted: Sequence[bool] | None = None,
    log_probs: Sequence[float] | None = None,
    version: int = 0,
) -> TensorDict:
    """Return the trajectory of a request of one round that drafted this tree.

    No node is accepted if ``accepted`` is None; recorded log-probabilities, see :func:`log_probs_of`, are −1 if None.
    """
    count = len(tree.tokens)
    hidden = [target.table[TEXTS.index(text)] for text in tree.texts]
    nodes = {
        "tokens": torch.tensor(tree.tokens, dtype=torch.int64),
        "parents": torch.tensor(tree.parents, dtype=torch.int64),
        "log_probs": torch.tensor(log_probs if log_probs is not None else [-1.0] * count, dtype=torch.float64),
        "accepted": torch.tensor(accepted if accepted is not None else [False] * count, dtype=torch.bool),
        "hidden": torch.stack(hidden) if hidden else torch.zeros(0, VOCAB, dtype=torch.float64),
    }
    return make_trajectory(
        request=0,
        tokens=torch.tensor([0, 0, 0]),
        prompt_length=2,
        features=torch.zeros(2, 1, dtype=torch.float64),
        target={"hidden": target.table[TEXTS.index(())][None]},
        anchors=[1],
        trees=[nodes],
        policy_versions=[version],
        cache_versions=[version],
        sampling_params=SamplingParams(target.temperature, seed=0),
        rule=rule,
        draft_mode=mode,
    )


def table_gradient(drafter: EnumerableDrafter, value: Tensor) -> Tensor:
    """Return the gradient of a scalar in the drafter's table."""
    (grad,) = torch.autograd.grad(value, drafter.table, retain_graph=True)
    return grad


def expectation(items: Sequence[tuple[TensorDict, Tensor]], loss: Callable[[TensorDict], TensorDict]) -> Tensor:
    """Return the mean of a loss with reduction "none" over trajectories with their probabilities."""
    batch, weights = pack([t for t, _ in items]), torch.stack([w.detach() for _, w in items])
    (values,) = [value for key, value in loss(batch).items() if key.startswith("loss_")]
    return (values[0] * weights).sum()


def exact_gradient(
    drafter: EnumerableDrafter, target: EnumerableTarget, parents: Sequence[int], *, rule: str, distinct: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the expected number of accepted nodes over all trees that can be drawn, and its gradient in the table.

    Example:
        >>> drafter, target = EnumerableDrafter(0), EnumerableTarget(0)
        >>> value, gradient = exact_gradient(drafter, target, (-1, 0), rule="sample_and_match")
        >>> bool(0 < value < 2), gradient.shape == drafter.table.shape
        (True, True)
    """
    total = torch.zeros((), dtype=torch.float64)
    for tree in drawn_trees(parents, distinct):
        total = total + chance_of(drafter, tree, distinct) * sum(reach_of(drafter, target, tree, rule))
    return total.detach(), table_gradient(drafter, total)
