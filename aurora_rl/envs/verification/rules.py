"""Verification rules: how the target's logits decide which drafted nodes are accepted.

A rule is lossless when the law of the delivered text is the target's own, whatever tree was drafted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, final

import torch
from torch import Tensor
from typing_extensions import override

from aurora_kernels.noise import argmax, gumbel_argmax
from aurora_kernels.trees import last_accepted, repeated_siblings, walk
from aurora_rl.envs.verification.sampling import warp
from aurora_rl.registry import Registry
from aurora_rl.sampling_params import SamplingBatch
from aurora_rl.trajectories import DRAFT_MODES, rule_code


class Verdict(NamedTuple):
    """What one round of verification settles.

    Attributes:
        accepted: Nodes of the accepted path, ``[B, N]`` bool.
        bonus_token: The target's own token after that path, ``[B]`` int64.
    """

    accepted: Tensor
    bonus_token: Tensor


class VerificationRule(ABC):
    """Decides which nodes of a drafted tree the target delivers, and the token after them.

    A rule is stateless. ``verify`` draws the outcome. Of a ``token_wise`` rule, ``acceptance`` is its probability, node
    by node; other rules accept prefixes as a whole, and their ``acceptance`` raises ValueError.

    For token-wise rules, let ``R(tree)`` be the sum over the valid nodes of the product of ``acceptance`` along the
    path from the root. For trees drawn from ``q(tree)``, independently of the randomness of ``verify``, the gradient
    for the drafter is

        grad E[accepted] = E[R * grad log q(tree) + grad R]

    where ``grad R`` flows through ``acceptance``; it is zero for rules whose acceptance does not look at ``q``.

    Attributes:
        name: Name by which it is configured and recorded, which the registry gives it.
        draft_modes: How trees may be drawn for the rule to be lossless, see ``aurora_rl.trajectories.DRAFT_MODES``.
        needs_q: Whether the rule looks at the drafter's distribution.
        replayable: Whether recorded text says which drafts the rule would have accepted. It does if the text does not
            depend on the drafts, and a draft is accepted if it agrees with the text. Only then is the gate's replay
            exact.
        token_wise: Whether a node's acceptance follows from its own context and its earlier siblings, so that the rule
            has an ``acceptance``. Objectives that learn by it refuse other rules.
    """

    name: ClassVar[str]
    draft_modes: ClassVar[tuple[str, ...]] = DRAFT_MODES
    needs_q: ClassVar[bool] = False
    replayable: ClassVar[bool] = False
    token_wise: ClassVar[bool] = True

    @abstractmethod
    def verify(
        self,
        logits: Tensor,
        tokens: Tensor,
        parents: Tensor,
        valid: Tensor,
        positions: Tensor,
        sampling: SamplingBatch,
        q: Tensor | None = None,
    ) -> Verdict:
        """Settle one round.

        Args:
            logits: The target's raw logits at the root and at every node, ``[B, N + 1, V]`` floating.
            tokens: Token of each node, ``[B, N]`` int64.
            parents: Parent of each node, ``[B, N]`` int64.
            valid: Result of ``aurora_kernels.trees.valid_nodes``, ``[B, N]`` bool.
            positions: Absolute position of the root token, ``[B]`` int64. The choice at a node of depth d decides the
                token at position root + d + 1.
            sampling: Parameters of the requests.
            q: The drafter's distribution at each node's parent, ``[B, N, V]``; None if nodes were not sampled.

        Raises:
            ValueError: The shapes do not belong together, or ``q`` is missing and the rule needs it.
        """

    @abstractmethod
    def acceptance(self, p: Tensor, q: Tensor | None, tokens: Tensor, context: Tensor) -> Tensor:
        """Return the probability that each node is accepted, given the drawn tree and that its parent was accepted.

        Contexts are the roots and nodes that nodes were drawn from; nodes of one context are siblings, in their order.

        Args:
            p: The served distribution at each context, ``[C, V]``, or its columns of a draft vocabulary that has all
                ``tokens``, not renormalised.
            q: The drafter's distribution there, ``[C, V]``, or None if the rule ignores it.
            tokens: Column of ``p`` of each node, ``[M]`` int64.
            context: Context of each node, ``[M]`` int64.

        Returns:
            ``[M]`` in the dtype of ``p``, differentiable in ``q``.

        Raises:
            ValueError: The rule is not ``token_wise``.
        """


_BY_CODE: dict[int, type[VerificationRule]] = {}  # rules that this process has looked up or registered


def _named(name: str, rule: Any) -> Any:
    """Give a rule its name, and make it known by its code."""
    if isinstance(rule, type) and issubclass(rule, VerificationRule):
        rule.name = name
        _BY_CODE[rule_code(name)] = rule
    return rule


RULES: Registry[type[VerificationRule]] = Registry(
    "verification rule", "aurora_rl.rules", VerificationRule, prepare=_named
)
"""Verification rules by name. Trajectories record a rule by its name's code."""

register_rule = RULES.register
"""Decorator that makes a rule's class available by a name, as in ``rule=name``: :meth:`Registry.register`."""

get_rule = RULES.get
"""Return a rule's class by its name, an entry point, or ``package.module:Class``: :meth:`Registry.get`."""


def rule_of_code(code: int) -> type[VerificationRule]:
    """Return the rule that a trajectory was served with.

    ``code`` is the entry ("sampling", "rule"), see ``aurora_rl.trajectories.rule_code``. Nothing is imported because a
    trajectory names it: ValueError says that nobody registered, looked up or declared the rule here.

    >>> rule_of_code(0).name
    'greedy'
    """
    if code not in _BY_CODE:
        for name in RULES:
            if rule_code(name) == code:
                return get_rule(name)
        raise ValueError(
            f"the verification rule of code {code} is not known here; set rule to that of the engine, or import the "
            "module that registers it"
        )
    return _BY_CODE[code]


def require_replayable(rule: type[VerificationRule]) -> None:
    """Raise ValueError if recorded text does not say which drafts a rule would have accepted."""
    if not rule.replayable:
        raise ValueError(
            f"the rule {rule.name!r} is not replayable: its text depends on what was drafted, so recorded "
            "text does not tell what another drafter would have had accepted; set rule=null where requests are served"
        )


def require_token_wise(rule: type[VerificationRule], what: str) -> None:
    """Raise ValueError if a rule has no acceptance of single nodes; ``what`` is the objective that needs one."""
    if not rule.token_wise:
        raise ValueError(
            f"{what} learns by the chance that single nodes are accepted, and the rule {rule.name!r} accepts prefixes "
            "as a whole; verify by rule='rejection', or learn by imitation"
        )


def check_shapes(logits: Tensor, tokens: Tensor, parents: Tensor, valid: Tensor) -> None:
    """Raise ValueError unless ``logits`` is ``[B, N + 1, V]`` and the others are ``[B, N]``."""
    batch_size, num_nodes = tokens.shape
    if logits.shape[:2] != (batch_size, num_nodes + 1) or not tokens.shape == parents.shape == valid.shape:
        raise ValueError(
            "expected logits [B, N + 1, V] and tokens, parents, valid [B, N], got "
            f"{list(logits.shape)}, {list(tokens.shape)}, {list(parents.shape)}, {list(valid.shape)}"
        )


def settle(choices: Tensor, tokens: Tensor, parents: Tensor, valid: Tensor) -> Verdict:
    """Settle a round by the target's choices; arguments as of ``aurora_kernels.trees.walk``.

    >>> tokens, parents = torch.tensor([[4, 6]]), torch.tensor([[-1, 0]])
    >>> settle(torch.tensor([[4, 7, 9]]), tokens, parents, torch.ones(1, 2, dtype=torch.bool))
    Verdict(accepted=tensor([[ True, False]]), bonus_token=tensor([7]))
    """
    accepted = walk(tokens, parents, valid, choices)
    return Verdict(accepted, choices.gather(1, last_accepted(accepted)[:, None])[:, 0])


def descend(
    choose: Callable[[Tensor, Tensor, Tensor], Tensor],
    tokens: Tensor,
    parents: Tensor,
    valid: Tensor,
    positions: Tensor,
) -> Verdict:
    """Settle a round by choosing only at the nodes that the walk visits.

    ``choose`` is called with slots, columns and absolute positions, each ``[S]`` int64, ``S <= B``, and returns the
    target's token at each position, ``[S]`` int64. What it draws at a position of a slot must depend on the column only
    through the distribution there. The other arguments are those of ``VerificationRule.verify``.

    >>> text = torch.tensor([0, 4, 8, 9])  # the target's token at each position
    >>> tokens, parents, valid = torch.tensor([[4, 7]]), torch.tensor([[-1, 0]]), torch.ones(1, 2, dtype=torch.bool)
    >>> descend(lambda slots, columns, positions: text[positions], tokens, parents, valid, torch.tensor([0]))
    Verdict(accepted=tensor([[ True, False]]), bonus_token=tensor([8]))
    """
    batch_size, num_nodes = tokens.shape
    choices = tokens.new_full((batch_size, num_nodes + 1), -1)
    slots = torch.arange(batch_size, device=tokens.device)
    column = torch.zeros_like(slots)
    # Every turn takes each remaining slot one node deeper. The bonus of a path of all nodes needs the last turn.
    for depth in range(num_nodes + 1):
        visited = column[slots]
        choices[slots, visited] = choose(slots, visited, positions[slots] + depth + 1)
        reached = last_accepted(walk(tokens, parents, valid, choices))
        slots = (reached != column).nonzero()[:, 0]
        column = reached
        if not len(slots):
            break
    return settle(choices, tokens, parents, valid)


@final
@register_rule("greedy")
class Greedy(VerificationRule):
    """The target's argmax at every node; of equal logits the lowest id.

    >>> logits = torch.tensor([[[0.0, 2.0, 1.0], [3.0, 0.0, 3.0]]])
    >>> tokens, parents, valid = torch.tensor([[1]]), torch.tensor([[-1]]), torch.tensor([[True]])
    >>> Greedy().verify(logits, tokens, parents, valid, torch.tensor([7]), SamplingBatch.from_params([None]))
    Verdict(accepted=tensor([[True]]), bonus_token=tensor([0]))
    """

    replayable = True

    @override
    def verify(
        self,
        logits: Tensor,
        tokens: Tensor,
        parents: Tensor,
        valid: Tensor,
        positions: Tensor,
        sampling: SamplingBatch,
        q: Tensor | None = None,
    ) -> Verdict:
        check_shapes(logits, tokens, parents, valid)
        return settle(argmax(logits), tokens, parents, valid)

    @override
    def acceptance(self, p: Tensor, q: Tensor | None, tokens: Tensor, context: Tensor) -> Tensor:
        # 1 if the node carries the likeliest token, else 0. Over a draft vocabulary `p` stands for the point mass that
        # greedy decoding serves; a row of zeros is of a target whose choice lies outside the vocabulary.
        right = (tokens == argmax(p)[context]) & (p[context, tokens] > 0)
        first = (right & ~repeated_siblings(context, tokens)).to(p.dtype)
        return torch.where(p[context, tokens].isnan(), torch.nan, first)


@final
@register_rule("sample_and_match")
class SampleAndMatch(VerificationRule):
    """Sample the target at the nodes that the walk visits; go to the child that carries the sample.

    All nodes at one absolute position share its noise, ``gumbel(seed, position)``. So the token there depends on the
    text before it and on the seed alone, and the text equals that of plain sampling, token by token. At temperature 0
    it is greedy, and ``p`` in ``acceptance`` is the point mass on the argmax.

    >>> from aurora_rl.envs import SamplingParams
    >>> logits = torch.zeros(1, 2, 4)
    >>> tokens, parents, valid = torch.tensor([[3]]), torch.tensor([[-1]]), torch.tensor([[True]])
    >>> sampling = SamplingBatch.from_params([SamplingParams(temperature=1.0, seed=5)])
    >>> SampleAndMatch().verify(logits, tokens, parents, valid, torch.tensor([7]), sampling)
    Verdict(accepted=tensor([[True]]), bonus_token=tensor([2]))
    """

    replayable = True

    @override
    def verify(
        self,
        logits: Tensor,
        tokens: Tensor,
        parents: Tensor,
        valid: Tensor,
        positions: Tensor,
        sampling: SamplingBatch,
        q: Tensor | None = None,
    ) -> Verdict:
        check_shapes(logits, tokens, parents, valid)

        def choose(slots: Tensor, columns: Tensor, at: Tensor) -> Tensor:
            rows = logits[slots, columns]
            choice = argmax(rows)
            drawn = (sampling.temperature[slots] > 0).nonzero()[:, 0]
            if len(drawn):
                how = sampling[slots[drawn]]
                scores = warp(rows[drawn], how.temperature, how.top_k, how.top_p, how.min_p)
                choice[drawn] = gumbel_argmax(scores, how.seed, at[drawn])
            return choice

        return descend(choose, tokens, parents, valid, positions)

    @override
    def acceptance(self, p: Tensor, q: Tensor | None, tokens: Tensor, context: Tensor) -> Tensor:
        return torch.where(repeated_siblings(context, tokens), 0.0, p[context, tokens])
