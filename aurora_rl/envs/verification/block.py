"""Block verification: the nodes of a drafted chain are accepted together, by the ratio of the whole prefixes.

Let ``p_i`` and ``q_i`` be the distributions of target and drafter after the first ``i`` nodes ``x_1 .. x_i`` of a chain
of ``n``. ``q_n = 0``, since nothing is drafted after its end. With ``w_0 = 1``,

    w_i = min(1, w_{i-1} p_{i-1}(x_i) / q_{i-1}(x_i)),        r_i = max(w_i p_i - q_i, 0),
    h_i = sum of r_i / (sum of r_i + 1 - w_i),

every node has a coin, which lands with probability ``h_i``, and the chain is accepted up to the last node whose coin
lands. The bonus token is drawn from ``r_i`` there, normalised. The token delivered has the law of the target, and on
average at least as many nodes are accepted as by token-wise rejection (Sun et al. 2024, arXiv 2403.10444). Given
``x_1 .. x_i``, and on average over what is drafted next, node ``i`` is accepted with probability ``w_i``. A node may
stand even if its own token would be rejected, because the prefix before it was likelier to the target than to the
drafter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from aurora_kernels.noise import uniform
from aurora_rl.envs.verification.rejection import ComparingRule
from aurora_rl.envs.verification.rules import Verdict, register_rule

# A stream of their own. A coin belongs to a round and a depth: nodes after the accepted ones have shown theirs, so at
# the same position the next round must have another.
_COINS = 2


def verify_chain(
    p: Tensor,
    q: Tensor,
    tokens: Tensor,
    parents: Tensor,
    valid: Tensor,
    coins: Tensor,
    pick: Callable[[Tensor, Tensor], Tensor],
) -> Verdict:
    """Settle a round of chains by block verification.

    ``p`` ``[B, N + 1, V]`` is the served distribution at the root and at every node. ``coins`` ``[B, N]`` has a uniform
    number in (0, 1) for each node. ``pick`` draws tokens ``[B]`` from distributions ``[B, V]`` at columns ``[B]``. The
    other arguments are those of ``VerificationRule.verify``.

    Raises:
        ValueError: Two valid nodes have the same parent.

    >>> p, q = torch.tensor([[[0.5, 0.5]] * 3]), torch.tensor([[[0.25, 0.75], [0.75, 0.25]]])
    >>> tokens, parents, valid = torch.tensor([[0, 0]]), torch.tensor([[-1, 0]]), torch.ones(1, 2, dtype=torch.bool)
    >>> verify_chain(p, q, tokens, parents, valid, torch.tensor([[0.9, 0.6]]), lambda residual, _: residual.argmax(-1))
    Verdict(accepted=tensor([[True, True]]), bonus_token=tensor([0]))
    """
    _check_chains(parents, valid)
    slots, tiny = torch.arange(len(tokens), device=tokens.device), torch.finfo(p.dtype).tiny
    column, end = torch.zeros_like(slots), torch.zeros_like(slots)  # where the walk stands, and where a coin landed
    weight, coin = p.new_ones(len(tokens)), coins.new_zeros(len(tokens))  # the root has no coin: it always stands
    residual, chain = p[:, 0], torch.zeros_like(valid)
    for node in range(tokens.shape[1] + 1):
        here = p[slots, column]
        if node < tokens.shape[1]:
            token, own = torch.where(valid[:, node], tokens[:, node], 0), q[:, node]
            mass = own[slots, token]
            # A node that q excludes was not drawn from it, and is no part of the chain.
            follows = valid[:, node] & (parents[:, node] + 1 == column) & (mass > 0)
        else:  # after the end nothing is drafted
            own, follows = torch.zeros_like(here), torch.ones_like(slots, dtype=torch.bool)
        left = (weight[:, None] * here - own).clamp(min=0)
        total = left.sum(-1)
        # Where nothing is left the coin cannot land, and then a later one does. Rounding may let none land.
        lands = follows & (total > 0) & (coin * (total + 1 - weight) < total)
        residual = torch.where(lands[:, None], left / total.clamp(min=tiny)[:, None], residual)
        end = torch.where(lands, column, end)
        if node < tokens.shape[1]:
            ratio = weight * here[slots, token] / mass.clamp(min=tiny)
            weight = torch.where(follows, ratio.clamp(max=1), weight)
            coin = torch.where(follows, coins[:, node], coin)
            column = torch.where(follows, node + 1, column)
            chain[:, node] = follows
    place = torch.arange(tokens.shape[1], device=tokens.device)
    return Verdict(chain & (place < end[:, None]), pick(residual, end))


def _check_chains(parents: Tensor, valid: Tensor) -> None:
    siblings = (parents[:, :, None] == parents[:, None, :]) & valid[:, :, None] & valid[:, None, :]
    if len(found := siblings.tril(-1).nonzero()):
        slot, later, earlier = found[0].tolist()
        parent = int(parents[slot, later])
        raise ValueError(
            f"the rule 'block' verifies chains, and in slot {slot} nodes {earlier} and {later} are both below "
            f"{'the root' if parent < 0 else f'node {parent}'}; draft chains, such as "
            "TreeShape(depth, width=1, mode='sampled'), or verify trees by rule='rejection'"
        )


@final
@register_rule("block")
class Block(ComparingRule):
    """Block verification of a chain that was drawn from the drafter.

    >>> from aurora_rl.sampling_params import SamplingBatch, SamplingParams
    >>> logits, q = torch.tensor([[[9.0, -9.0], [-9.0, 9.0]]]), torch.tensor([[[0.5, 0.5]]])
    >>> tokens, parents, valid = torch.tensor([[0]]), torch.tensor([[-1]]), torch.tensor([[True]])
    >>> sampling = SamplingBatch.from_params([SamplingParams(1.0, seed=0)])
    >>> Block().verify(logits, tokens, parents, valid, torch.tensor([7]), sampling, q)
    Verdict(accepted=tensor([[True]]), bonus_token=tensor([1]))
    """

    draft_modes, token_wise = ("sampled",), False
    _settle = staticmethod(verify_chain)

    @override
    def _coins(self, seed: Tensor, positions: Tensor, depth: Tensor, tokens: Tensor) -> Tensor:
        return uniform(seed, positions, depth, _COINS)

    @override
    def acceptance(self, p: Tensor, q: Tensor | None, tokens: Tensor, context: Tensor) -> Tensor:
        raise ValueError(
            f"the rule {self.name!r} accepts prefixes: a node's chance depends on the whole path to it, and acceptance "
            "is given single contexts"
        )
