"""Trees of which a drafter and lookup say parts, by chances that are learned from what came true."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from aurora_rl.policies.lookup import Tree
from aurora_rl.tenants import tenant_of_salt

# The chance of a token is a logistic function of what is stated of it: by the drafter alone (constant, log-odds), by
# lookup alone (the same), or by both (constant, log-odds of each). These weights are its start: both are thought too
# sure, and a token that both name likelier than either says.
_START = np.array([-0.6, 0.8, -0.6, 0.6, 0.9, 0.6, 0.6])
# Precision of the weights at the start, below which it never falls, and what is left of it after an observation.
_PRECISION = np.diag([20.0, 10.0, 20.0, 10.0, 20.0, 10.0, 10.0])
_KEPT = 0.9995
_SURE = 1e-3  # stated chances are cut to this distance from 0 and 1
_MOST_SALTS = 1024
_LEAST_VARIANCE = 0.02  # of an outcome: one that was thought sure counts, too


class Candidates(NamedTuple):
    """Nodes in topological order that may be verified.

    Attributes:
        tree: The nodes, with the drafter's log-probabilities; −inf where only lookup has the node.
        drafted: Chance that the drafter states of each given its path, ``[n]``; NaN where it states none.
        looked_up: Chance that lookup states, ``[n]``; NaN where it states none.
    """

    tree: Tree
    drafted: np.ndarray
    looked_up: np.ndarray

    @classmethod
    def of(cls, tree: Tree, found: Tree) -> Candidates:
        """Return the nodes of a drafter's tree, which come first, and of one that was looked up.

        Example:
            >>> found = Tree([7, 8], [-1, 0], [-0.1, -0.2])
            >>> candidates = Candidates.of(Tree([5, 7], [-1, -1], [-0.9, -0.5]), found)
            >>> candidates.tree
            Tree(tokens=[5, 7, 8], parents=[-1, -1, 1], log_probs=[-0.9, -0.5, -inf])
            >>> candidates.looked_up.round(2)
            array([ nan, 0.9 , 0.82])
        """
        both = Tree(tree.tokens.copy(), tree.parents.copy(), tree.log_probs.copy())
        index = {pair: node for node, pair in enumerate(zip(both.parents, both.tokens, strict=True))}
        place, stated = {-1: -1}, dict[int, float]()  # looked-up node -> its index in the result; its chance
        for node, (token, parent, log_prob) in enumerate(zip(*found, strict=True)):
            pair = place[parent], token
            place[node] = index.setdefault(pair, len(both.tokens))
            if place[node] == len(both.tokens):
                both.tokens.append(token)
                both.parents.append(pair[0])
                both.log_probs.append(-math.inf)
            stated[place[node]] = log_prob
        looked_up = [stated.get(node, math.nan) for node in range(len(both.tokens))]
        drafted = [*tree.log_probs, *[math.nan] * (len(both.tokens) - len(tree.tokens))]
        return cls(both, np.exp(drafted), np.exp(looked_up))


class Chances:
    """How likely the target is to say a token, given what the drafter and lookup state of it.

    A logistic regression that is learned as requests are served. Both sources err in ways of their own: an untrained
    drafter is too sure, and where both name a token it is likelier than either says. After each outcome the weights
    take a Newton step, under a precision that forgets (an extended Kalman filter, as West, Harrison and Migon 1985
    have it for dynamic generalised linear models).

    Example:
        >>> chances, drafted, looked_up = Chances(), np.array([0.9, np.nan]), np.array([np.nan, 0.9])
        >>> for _ in range(100):  # the drafter's tokens never come, those that were looked up always do
        ...     chances.learn(drafted, looked_up, np.array([False, True]))
        >>> chances.of(drafted, looked_up).round(1)
        array([0.1, 0.9])
    """

    def __init__(self) -> None:
        self._weights, self._precision = _START.copy(), _PRECISION.copy()

    def of(self, drafted: np.ndarray, looked_up: np.ndarray) -> np.ndarray:
        """Return the chance of each token given that its parent is accepted, ``[n]``.

        Args:
            drafted: Chance that the drafter states, ``[n]``; NaN where it states none.
            looked_up: Chance that lookup states, ``[n]``; NaN where it states none.
        """
        return 1 / (1 + np.exp(-self._inputs(drafted, looked_up) @ self._weights))

    def learn(self, drafted: np.ndarray, looked_up: np.ndarray, came_true: np.ndarray) -> None:
        """Learn from tokens after a text that was accepted, ``[n]``, and whether the target said them."""
        if not len(came_true):
            return
        inputs, chances = self._inputs(drafted, looked_up), self.of(drafted, looked_up)
        variance = np.maximum(chances * (1 - chances), _LEAST_VARIANCE)
        kept = _KEPT ** len(came_true)
        self._precision = kept * self._precision + (1 - kept) * _PRECISION + (inputs.T * variance) @ inputs
        self._weights += np.linalg.solve(self._precision, inputs.T @ (came_true - chances))

    @staticmethod
    def _inputs(drafted: np.ndarray, looked_up: np.ndarray) -> np.ndarray:
        """Return the regressors of each token, ``[n, 7]``."""
        by_drafter, by_lookup = ~np.isnan(drafted), ~np.isnan(looked_up)
        odds = []
        for stated in (drafted, looked_up):
            cut = np.clip(np.nan_to_num(stated), _SURE, 1 - _SURE)
            odds.append(np.log(cut) - np.log1p(-cut))
        drafter_alone, lookup_alone, both = by_drafter & ~by_lookup, by_lookup & ~by_drafter, by_drafter & by_lookup
        cases = ((drafter_alone, (0,)), (lookup_alone, (1,)), (both, (0, 1)))
        columns = [case * value for case, sources in cases for value in (1.0, *(odds[source] for source in sources))]
        return np.stack(columns, axis=1)

    def state_dict(self) -> dict[str, Any]:
        """Return what was learned, as JSON values."""
        return {"weights": self._weights.tolist(), "precision": self._precision.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what :meth:`state_dict` returned."""
        self._weights, self._precision = np.array(state["weights"]), np.array(state["precision"])


class TreeMerger:
    """Merges the trees of drafter and lookup for the slots of a policy, and learns from what their texts become.

    Requests of the same salt learn together, so that no draft tells of another tenant's texts. The 1,024 salts that
    were served last are remembered.

    Args:
        chances: What was learned so far of requests without a salt; None starts anew.
    """

    def __init__(self, chances: Chances | None = None) -> None:
        self._learned: dict[str | None, Chances] = {} if chances is None else {None: chances}  # by salt, latest last
        # Slot -> length of its text, what might follow it, and who learns from that.
        self._asked: dict[int, tuple[int, Candidates, Chances]] = {}

    def chances(self, salt: str | None = None) -> Chances:
        """Return what requests of a salt have learned."""
        found = self._learned.pop(salt) if salt in self._learned else Chances()
        self._learned[salt] = found
        if len(self._learned) > _MOST_SALTS:
            del self._learned[next(iter(self._learned))]
        return found

    def delete(self, tenant: str) -> None:
        """Drop what a tenant's requests have learned, with what those that run would teach."""
        gone = [salt for salt in self._learned if tenant_of_salt(salt) == tenant]
        dropped = [self._learned.pop(salt) for salt in gone]
        self.forget([slot for slot, (_, _, learner) in self._asked.items() if any(learner is each for each in dropped)])

    def forget(self, slots: Iterable[int]) -> None:
        """Learn no more from slots whose request is another now."""
        for slot in slots:
            self._asked.pop(slot, None)

    def merge(
        self,
        slot: int,
        length: int,
        tree: Tree,
        found: Tree,
        num_nodes: int,
        least: float = 0.0,
        salt: str | None = None,
    ) -> Tree:
        """Return the ``num_nodes`` likeliest paths of both trees, and none with a chance below ``least``.

        Args:
            slot: Slot of the text.
            length: Number of its tokens so far.
            tree: Tree of the drafter.
            found: Tree that was looked up.
            num_nodes: Most nodes that are kept.
            least: Least chance of a path.
            salt: Salt of the request.
        """
        candidates, learned = Candidates.of(tree, found), self.chances(salt)
        self._asked[slot] = length, candidates, learned
        given_parent = learned.of(candidates.drafted, candidates.looked_up).tolist()
        joint: list[float] = []
        for parent, chance in zip(candidates.tree.parents, given_parent, strict=True):
            joint.append(chance * (joint[parent] if parent >= 0 else 1.0))
        # A node is no likelier than its parent and comes after it, so what is kept is a tree.
        best = sorted(range(len(joint)), key=lambda node: -joint[node])[:num_nodes]
        return candidates.tree.kept(sorted(node for node in best if joint[node] >= least))

    def learn(self, slot: int, text: np.ndarray) -> None:
        """Learn from the tokens that came since :meth:`merge` was last called for a slot, whose text this is now."""
        if slot not in self._asked:
            return
        at, candidates, learned = self._asked.pop(slot)
        depth, true, known = {-1: 0}, {-1: True}, []
        for node, (token, parent, _) in enumerate(zip(*candidates.tree, strict=True)):
            depth[node] = depth[parent] + 1
            place = at + depth[node] - 1
            if true[parent] and place < len(text):
                known.append(node)
                true[node] = bool(text[place] == token)
            else:
                true[node] = False
        came_true = np.array([true[node] for node in known])
        learned.learn(candidates.drafted[known], candidates.looked_up[known], came_true)
