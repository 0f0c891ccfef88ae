"""Rejection rules: drafted nodes are accepted by comparing the target's distribution with the one they were drawn from.

At a context with target distribution ``p``, the children ``x_1, x_2, ...`` are tested in their order. With ``r_1 = p``
and ``q_k`` the distribution that ``x_k`` was drawn from,

    x_k is accepted with probability min(1, r_k(x_k) / q_k(x_k)),  else  r_{k+1} = max(r_k - q_k, 0) / its sum,

and when none is left the bonus token is drawn from the last ``r``. Whatever ``q`` is, the token delivered has the law
``p`` (Leviathan et al. 2023, arXiv 2211.17192, for a chain; Miao et al. 2024, arXiv 2305.09781, for several children).
Children are drawn independently, ``q_k = q``, or without replacement, where ``q_k`` is ``q`` without ``x_1 .. x_{k-1}``
(Jeon et al. 2024, arXiv 2402.14160). Which of the two has to be known, or the law breaks.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from aurora_kernels.noise import gumbel_argmax, uniform
from aurora_kernels.trees import depths, sibling_ranks
from aurora_rl.envs.verification.rules import Verdict, VerificationRule, check_shapes, register_rule
from aurora_rl.envs.verification.sampling import served_log_probs
from aurora_rl.sampling_params import SamplingBatch
from aurora_rl.trajectories import DRAFT_MODES

# Coins have a stream of their own; the bonus token is drawn with the noise that plain sampling has at its position.
_COINS = 1


def without(q: Tensor, drawn: Tensor) -> Tensor:
    """Return ``q`` renormalised over the tokens that were not drawn yet; both are ``[..., V]``, ``drawn`` is bool."""
    left = q.masked_fill(drawn, 0.0)
    return left / left.sum(-1, keepdim=True).clamp(min=torch.finfo(q.dtype).tiny)


def reject(
    p: Tensor,
    q: Tensor,
    tokens: Tensor,
    parents: Tensor,
    valid: Tensor,
    coins: Tensor,
    pick: Callable[[Tensor, Tensor], Tensor],
    *,
    replacement: bool,
) -> Verdict:
    """Settle a round by rejection.

    ``p`` ``[B, N + 1, V]`` is the served distribution at the root and at every node. ``coins`` ``[B, N]`` has a uniform
    number in (0, 1) for the test of each node. ``pick`` draws tokens ``[B]`` from distributions ``[B, V]`` at columns
    ``[B]``. ``replacement`` tells how siblings were drawn. The other arguments are those of
    ``VerificationRule.verify``.

    >>> p, q = torch.tensor([[[0.5, 0.5]] * 2]), torch.tensor([[[1.0, 0.0]]])  # the node's chance is 0.5
    >>> tree = torch.tensor([[0]]), torch.tensor([[-1]]), torch.tensor([[True]])
    >>> pick = lambda residual, column: residual.argmax(-1)
    >>> reject(p, q, *tree, torch.tensor([[0.6]]), pick, replacement=True)
    Verdict(accepted=tensor([[False]]), bonus_token=tensor([1]))
    >>> reject(p, q, *tree, torch.tensor([[0.4]]), pick, replacement=True).accepted
    tensor([[True]])
    """
    slots = torch.arange(len(tokens), device=tokens.device)
    column = torch.zeros_like(slots)  # where the walk stands
    accepted = torch.zeros_like(valid)
    residual, drawn = p[:, 0], torch.zeros_like(p[:, 0], dtype=torch.bool)
    # Parents come before children and siblings are tested in their order, so one pass over the nodes is the walk.
    for node in range(tokens.shape[1]):
        token = torch.where(valid[:, node], tokens[:, node], 0)
        own = q[:, node] if replacement else without(q[:, node], drawn)
        mass = own[slots, token]
        # A node that q excludes was not drawn from it, and is no part of the tree.
        tested = valid[:, node] & (parents[:, node] + 1 == column) & (mass > 0)
        taken = tested & (coins[:, node] * mass < residual[slots, token])
        left = (residual - own).clamp(min=0)
        total = left.sum(-1, keepdim=True)
        # A rejection has probability 0 where nothing is left; rounding may still bring one about.
        refused = tested & ~taken & (total[:, 0] > 0)
        residual = torch.where(refused[:, None], left / total.clamp(min=torch.finfo(p.dtype).tiny), residual)
        residual = torch.where(taken[:, None], p[:, node + 1], residual)
        drawn = drawn.scatter(1, token[:, None], drawn[slots, token][:, None] | tested[:, None])
        drawn = drawn & ~taken[:, None]
        accepted[:, node] = taken
        column = torch.where(taken, node + 1, column)
    return Verdict(accepted, pick(residual, column))


class ComparingRule(VerificationRule):
    """Base of rules that compare the target's distribution with the one that nodes were drawn from."""

    needs_q = True
    _settle: ClassVar[Callable[..., Verdict]]  # takes the first seven arguments of `reject`

    @abstractmethod
    def _coins(self, seed: Tensor, positions: Tensor, depth: Tensor, tokens: Tensor) -> Tensor:
        """Return the coin of each node ``[B, N]``; seed and position of the roots are ``[B, 1]``."""

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
        if q is None or q.shape[:2] != tokens.shape:
            raise ValueError(f"the rule {self.name!r} needs q [B, N, V], got {None if q is None else list(q.shape)}")
        parts = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
        params = (part.repeat_interleave(logits.shape[1]) for part in parts)
        p = served_log_probs(logits.flatten(0, 1), *params).view(logits.shape).exp()
        depth = depths(parents)

        def pick(residual: Tensor, column: Tensor) -> Tensor:
            below = F.pad(depth, (1, 0)).gather(1, column[:, None])[:, 0]
            return gumbel_argmax(residual.log(), sampling.seed, positions + below + 1)

        coins = self._coins(sampling.seed[:, None], positions[:, None], depth, tokens)
        return self._settle(p, q.to(p.dtype), tokens, parents, valid, coins, pick)


class _Rejection(ComparingRule):
    replacement: ClassVar[bool]

    def _settle(self, *round_: Any) -> Verdict:
        return reject(*round_, replacement=self.replacement)

    @override
    def _coins(self, seed: Tensor, positions: Tensor, depth: Tensor, tokens: Tensor) -> Tensor:
        return uniform(seed, positions + depth, tokens.clamp(min=0), _COINS)  # where the node's token would stand

    @override
    def acceptance(self, p: Tensor, q: Tensor | None, tokens: Tensor, context: Tensor) -> Tensor:
        # The probability that all siblings before a node are rejected and the node is not.
        if q is None:
            raise ValueError(f"the acceptance of the rule {self.name!r} depends on q, which is missing")
        rank, tiny = sibling_ranks(context), torch.finfo(p.dtype).tiny
        out = p.new_zeros(len(tokens))
        residual, own, rest = p, q, 1 - p.sum(-1, keepdim=True)  # the rest has tokens that the drafter never proposes
        survival = p.new_ones(len(p))
        place = torch.arange(len(p), device=p.device)  # place of a context among those with siblings to test
        for turn in range(int(rank.max()) + 1 if len(rank) else 0):
            nodes = (rank == turn).nonzero().flatten()
            here = place[context[nodes]]
            place[context[nodes]] = torch.arange(len(nodes), device=p.device)
            residual, own, rest, survival = residual[here], own[here], rest[here], survival[here]
            token = tokens[nodes][:, None]
            mass, wanted = own.gather(1, token)[:, 0], residual.gather(1, token)[:, 0]
            chance = torch.where(mass > 0, (wanted / mass.clamp(min=tiny)).clamp(max=1), 0.0)
            out = out.index_copy(0, nodes, survival * chance)
            survival = survival * (1 - chance)
            left = torch.where(mass[:, None] > 0, (residual - own).clamp(min=0), residual)
            total = (left.sum(-1, keepdim=True) + rest).clamp(min=tiny)
            residual, rest = left / total, rest / total
            if not self.replacement:
                own = without(own, torch.zeros_like(own, dtype=torch.bool).scatter(1, token, True))
        return out


@final
@register_rule("rejection")
class Rejection(_Rejection):
    """Rejection of independently drawn nodes: Leviathan's rule on a chain, multi-step rejection on a tree.

    >>> logits, q = torch.tensor([[[0.0, 0.0], [0.0, 0.0]]]), torch.tensor([[[1.0, 0.0]]])
    >>> tokens, parents, valid = torch.tensor([[0]]), torch.tensor([[-1]]), torch.tensor([[True]])
    >>> Rejection().acceptance(logits[0, :1].softmax(-1), q[0], tokens[0], torch.tensor([0]))
    tensor([0.5000])
    """

    replacement, draft_modes = True, ("sampled",)


@final
@register_rule("rejection_without_replacement")
class RejectionWithoutReplacement(_Rejection):
    """Multi-step rejection of siblings drawn without replacement, and of independent ones: it passes over repetitions.

    >>> half = torch.tensor([[0.5, 0.5]])
    >>> RejectionWithoutReplacement().acceptance(half, half, torch.tensor([0, 1]), torch.tensor([0, 0]))
    tensor([1., 0.])
    """

    replacement, draft_modes = False, DRAFT_MODES[1:]
