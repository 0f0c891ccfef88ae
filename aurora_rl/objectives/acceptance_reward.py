"""Acceptance-reward policy gradient: the drafter is a policy whose return is the number of accepted nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor
from typing_extensions import override

from aurora_kernels.trees import sibling_ranks
from aurora_rl.envs.verification.rules import require_token_wise, rule_of_code
from aurora_rl.models.target_head import TargetHead
from aurora_rl.objectives.objective import SAMPLING_KEYS, Objective, Values
from aurora_rl.objectives.registry import register_objective
from aurora_rl.objectives.target_rows import context_rows
from aurora_rl.objectives.tree_law import TreeLaw, before
from aurora_rl.policies.drafter import Drafter, draft_rows
from aurora_rl.policies.tree_shape import TreeShape
from aurora_rl.trajectories import DRAFT_MODES
from aurora_rl.tree_index import TREE_KEYS, TreeIndex

# Batches in a row without a fresh round before that is an error.
_NOTHING_FRESH = 20
_WITHOUT_REPLACEMENT = DRAFT_MODES.index("sampled_without_replacement")


def clipped_gain(log_q: Tensor, behaviour: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """Compute PPO's surrogate to maximise: min(r A, clamp(r, 1 − clip, 1 + clip) A) with r = exp(log_q − behaviour).

    Schulman et al. 2017 (arXiv 1707.06347). All are of one shape.

    Example:
        >>> clipped_gain(torch.tensor([2.0]).log(), torch.zeros(1), torch.ones(1), clip=0.2)
        tensor([1.2000])
    """
    ratio = (log_q - behaviour).exp()
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


@register_objective("acceptance_reward")
class AcceptanceRewardLoss(Objective):
    """Policy gradient on the number of accepted nodes of a tree, right for the rule that was served.

    Let ``R`` be the expected number given the tree, and ``q`` the law of the tree. The derivative of the expectation
    is ``E[R grad log q + grad R]`` for every rule (``VerificationRule``). A node's score is weighted by what
    depends on its draw: the nodes below it, and its later siblings with those below them. Trees that older weights drew
    count with importance ratios. docs/objectives.md says which reward and which baseline are right for which rule.

    Args:
        drafter: Drafter whose parameters learn.
        head: The target's output head, frozen; a weight ``[V, H]`` stands for a plain one.
        reward: Source of ``R``: "expected" takes both distributions, "recorded" the accept bits.
        baseline: Baseline: "none"; "leave_one_out", what independently drawn siblings would have had accepted, each as
            if it stood first; or "group". That standardises the reward over the branches of one root, and is biased.
        clip: PPO's clip: each draw counts with its own ratio alone, clipped to ``1 ± clip``. Use it with a baseline.
            None clips nothing.
        max_staleness: Most versions that a round may be older than the newest version seen; None keeps all rounds.
        weight: Factor on the loss, see :class:`Objective`.
        reduction: See :class:`Objective`; positions are the trees, in one group.

    The metrics are "expected_accepted", the mean of ``R``; "accepted", that of the bits; "ratio", the mean importance
    ratio; and "stale", the share of trees that were left out.

    Raises:
        ValueError: The reward or baseline is unknown, or a clip or limit is out of range. A batch's trees were not
            sampled, lack a log-probability, or have a node that the drafter cannot have drawn. The reward or baseline
            does not hold for the rule or draft mode, the rule accepts no single nodes, or a baseline lacks siblings. Or
            more than twenty batches in a row had no fresh round.

    Example:
        >>> from aurora_rl.testing import tiny_batch
        >>> drafter, head, batch = tiny_batch(shape=TreeShape(3, mode="sampled"))
        >>> sorted(AcceptanceRewardLoss(drafter, head)(batch).keys())
        ['accepted', 'expected_accepted', 'loss_acceptance_reward', 'ratio', 'stale']
    """

    sampled = True
    metrics: Sequence[str] = ("expected_accepted", "accepted", "ratio", "stale")
    newest: Tensor

    def __init__(
        self,
        drafter: Drafter,
        head: TargetHead | Tensor,
        *,
        reward: str = "expected",
        baseline: str = "none",
        clip: float | None = None,
        max_staleness: int | None = None,
        weight: float = 1.0,
        reduction: str = "mean",
    ) -> None:
        if reward not in ("expected", "recorded"):
            raise ValueError(f"reward must be 'expected' or 'recorded', got {reward!r}")
        if baseline not in ("none", "leave_one_out", "group"):
            raise ValueError(f"baseline must be 'none', 'leave_one_out' or 'group', got {baseline!r}")
        if clip is not None and not clip > 0:
            raise ValueError(f"clip must be positive or null, got {clip}")
        if max_staleness is not None and max_staleness < 0:
            raise ValueError(f"max_staleness must not be negative, got {max_staleness}")
        super().__init__(drafter, head, weight=weight, reduction=reduction)
        self.reward, self.baseline, self.clip, self.max_staleness = reward, baseline, clip, max_staleness
        self.register_buffer("newest", torch.tensor(-1))
        self._nothing_fresh = 0

    @classmethod
    @override
    def check_served(cls, settings: Mapping[str, Any], shape: TreeShape) -> None:
        super().check_served(settings, shape)
        baseline = settings.get("baseline", "none")
        if baseline != "none" and shape.num_chains < 2:
            raise ValueError(
                f"objective {cls.name!r}: baseline={baseline!r} compares siblings, and trees of drafter.depth="
                f"{shape.depth}, drafter.width={shape.width} and drafter.num_nodes={shape.num_nodes} hold one chain; "
                f"set drafter.width=2 or more and drafter.num_nodes={2 * shape.depth} or more"
            )
        if baseline != "none" and shape.mode == "sampled_without_replacement":
            raise ValueError(
                f"objective {cls.name!r}: baseline={baseline!r} needs independent siblings; set drafter.mode=sampled"
            )

    @property
    @override
    def reads(self) -> list[NestedKey]:
        keys = self.tensor_keys
        served = [*SAMPLING_KEYS, ("sampling", "rule"), ("sampling", "draft_mode"), ("rounds", "policy_version")]
        return [*TREE_KEYS, *served, keys.hidden, keys.node_hidden, keys.accepted, keys.log_probs]

    @override
    def values(self, batch: TensorDictBase) -> Values:
        self.expect_nodes(batch)
        law = self._law(batch)
        trees, rounds = law.trees, slice(law.trees.num_rounds)
        reach = trees.path_products(law.acceptance)
        accepted = batch[self.tensor_keys.accepted].to(reach.dtype)

        # For the weights' own draws every ratio is 1 and its gradient the score: REINFORCE.
        behaviour = law.condition_on_siblings(batch[self.tensor_keys.log_probs].to(reach.dtype))
        ratio = (law.log_q.detach() - behaviour).exp()
        joint = law.joint(ratio)
        credit = self._credit(law, reach.detach(), accepted, ratio, joint)
        clip = torch.inf if self.clip is None else self.clip
        gain = clipped_gain(law.log_q, behaviour, credit, clip)
        if self.reward == "expected":
            # grad R, if there is any, is averaged over the behaviour's draws too; if clipped, on both sides.
            held = joint if self.clip is None else ratio.clamp(1 - clip, 1 + clip)
            gain = gain + held * (reach - reach.detach())

        drafted = batch["rounds", "offset"].diff() > 0
        fresh = self._fresh(batch["rounds", "policy_version"], drafted)
        valid = drafted & fresh
        metrics = {
            "expected_accepted": self.mean(trees.subtree_sums(reach.detach())[rounds], valid),
            "accepted": self.mean(trees.subtree_sums(accepted)[rounds], valid),
            "ratio": self.mean(ratio, fresh[torch.repeat_interleave(batch["rounds", "offset"].diff())]),
            "stale": self.mean((~fresh).to(reach.dtype), drafted),
        }
        return Values(-trees.subtree_sums(gain)[rounds][None], gain.new_ones(()), valid[None], metrics)

    def _law(self, batch: TensorDictBase) -> TreeLaw:
        """Return what was drawn, and the distributions that judge it, with gradients in the drafter."""
        keys, trees = self.tensor_keys, TreeIndex.of(batch)
        request = trees.request[trees.num_rounds :]
        rule, mode = batch["sampling", "rule"][request], batch["sampling", "draft_mode"][request]
        for code in rule.unique().tolist():
            require_token_wise(rule_of_code(code), f"objective {self.name!r}")
        if bool((mode == 0).any()):
            raise ValueError(
                f"objective {self.name!r}: ('sampling', 'draft_mode') is 'topk', and a drafter's likeliest nodes hold "
                "no exploration; serve with drafter.mode=sampled, or TreeShape(..., mode='sampled')"
            )
        row = draft_rows(self.drafter.draft_vocab, batch["nodes", "tokens"])
        if bool((row < 0).any()) or not bool(torch.isfinite(batch[keys.log_probs]).all()):
            raise ValueError(
                f"objective {self.name!r}: a node of the batch was not drawn from the drafter ({keys.log_probs} is not "
                "finite, or its token has no row); serve with drafter.mode=sampled, or TreeShape(..., mode='sampled'), "
                "and start from the drafter that drew the recording (drafter.path)"
            )
        drawn_from = trees.drawn_from
        rows = context_rows(batch, trees, drawn_from, keys.hidden, keys.node_hidden)
        served = self.served_target(batch, rows, trees.request[drawn_from]).reader(
            None, renormalize=False, temperature=1.0
        )
        return TreeLaw(
            trees,
            row,
            rule,
            logits=self.drafter.context_logits(batch, trees, drawn_from),
            served=lambda part: served(part).exp(),
            without=mode == _WITHOUT_REPLACEMENT,
            alone=self.baseline != "none",
        )

    @torch.no_grad()
    def _credit(self, law: TreeLaw, reach: Tensor, accepted: Tensor, ratio: Tensor, joint: Tensor) -> Tensor:
        """Return the weight of each node's score apart from its own ratio, ``[M]``."""
        trees, context = law.trees, law.context
        # PPO's clip looks at each draw alone; unclipped, the other draws that an acceptance hangs on have their ratios.
        share, own = (joint, ratio) if self.clip is None else (1.0, 1.0)
        if self.reward == "expected":
            credit = _hanging(trees, context, share * reach) / own
        else:
            self._check_recorded(law)
            # Under rejection a token with q < p is accepted for sure, and the others' chance does not grow with q.
            counts = law.below.to(accepted.dtype)
            credit = torch.where(law.needs_q, counts, 1.0) * _hanging(trees, context, share * accepted) / own
        if law.alone is None:
            return credit
        self._check_baseline(law)
        if not len(context):
            return credit
        # What every node would do as the first of its siblings: a function of its own branch alone.
        below = trees.subtree_sums(trees.path_products(law.alone))[trees.num_rounds :]
        if self.baseline == "group":
            return _standardised(trees, below)
        return credit - _leave_one_out(context, below, law.needs_q)

    # ---- what a batch must be ---------------------------------------------------------------------------------------

    def _check_recorded(self, law: TreeLaw) -> None:
        if bool((sibling_ranks(law.context) > 0)[law.needs_q].any()):
            raise ValueError(
                f"objective {self.name!r}: reward='recorded' does not hold for rejection on trees, where a node's "
                "acceptance depends on its siblings; set reward='expected', or serve chains (drafter.width=1)"
            )
        if self.clip is not None and bool(law.needs_q.any()):
            raise ValueError(
                f"objective {self.name!r}: reward='recorded' with clip={self.clip} does not hold for rejection, whose "
                "accept bits depend on the weights that drew them; set reward='expected', or clip=null where the "
                "current weights did"
            )

    def _check_baseline(self, law: TreeLaw) -> None:
        found = torch.tensor([len(law.context), bool((sibling_ranks(law.context) > 0).any())])
        nodes, with_siblings = self.gather(found).any(0).tolist()
        if nodes and not with_siblings:
            raise ValueError(
                f"objective {self.name!r}: baseline={self.baseline!r} compares siblings, and no node of the batch has "
                "any; serve with drafter.width > 1 and enough drafter.num_nodes, or set baseline='none'"
            )
        if bool(law.without.any()):
            raise ValueError(
                f"objective {self.name!r}: baseline={self.baseline!r} needs independent siblings, and "
                "('sampling', 'draft_mode') is 'sampled_without_replacement'; serve with drafter.mode=sampled"
            )
        if self.baseline == "group" and bool(law.needs_q.any()):
            raise ValueError(
                f"objective {self.name!r}: baseline='group' scales the score but not the gradient of the reward, which "
                "rejection rules have; use leave_one_out"
            )

    def _fresh(self, version: Tensor, drafted: Tensor) -> Tensor:
        """Return which rounds are within the limit."""
        newest_here = self.gather(version.amax() if len(version) else self.newest.new_tensor(-1)).amax()
        self.newest.copy_(torch.maximum(self.newest, newest_here))
        if self.max_staleness is None:
            return torch.ones_like(version, dtype=torch.bool)
        fresh = version >= self.newest - self.max_staleness
        # One such batch is nothing: replay and the gate's held-back requests bring them.
        found = torch.stack([drafted.any(), fresh[drafted].any()]).long()
        some_drafted, some_fresh = self.gather(found).any(0).tolist()
        self._nothing_fresh = 0 if some_fresh else self._nothing_fresh + some_drafted
        if self._nothing_fresh > _NOTHING_FRESH:
            raise ValueError(
                f"objective {self.name!r}: every round of {self._nothing_fresh} batches in a row is older than "
                f"max_staleness={self.max_staleness} versions (newest {int(self.newest)}, this batch up to "
                f"{int(newest_here)}); raise it, or replay less (learner.replay)"
            )
        return fresh


def _hanging(trees: TreeIndex, context: Tensor, values: Tensor) -> Tensor:
    """Sum a value over what depends on each node's draw: it, its later siblings, and all below them."""
    below = trees.subtree_sums(values)[trees.num_rounds :]
    of_context = below.new_zeros(int(context.max()) + 1 if len(context) else 0).index_add(0, context, below)
    return of_context[context] - before(context, below)


def _leave_one_out(context: Tensor, below: Tensor, needs_q: Tensor) -> Tensor:
    """Return the leave-one-out baseline: what the siblings of each node would have had accepted, ``[M]``.

    Their mean stands for the node itself. Where siblings do not compete for acceptance the later ones' own share is
    taken off too: it hangs on the node's draw only where they repeat it.
    """
    size = int(context.max()) + 1
    total, count = (below.new_zeros(size).index_add(0, context, part) for part in (below, torch.ones_like(below)))
    sibling_mean = (total[context] - below) / (count[context] - 1).clamp(min=1)
    later = total[context] - below - before(context, below)
    return sibling_mean + torch.where(needs_q, 0.0, later)


def _standardised(trees: TreeIndex, below: Tensor) -> Tensor:
    """Standardise each node's branch value by mean and standard deviation over the branches of its root."""
    depth, parent = trees.depth[trees.num_rounds :], trees.parent
    branch = torch.arange(len(depth), device=depth.device)
    for level in range(2, int(depth.max()) + 1):
        here = (depth == level).nonzero().flatten()
        branch[here] = branch[parent[here] - trees.num_rounds]
    top = (depth == 1).nonzero().flatten()
    root, value = parent[top], below[top]

    def mean(of: Tensor) -> Tensor:
        """Average over the branches of each root, at each branch."""
        count, total = (below.new_zeros(trees.num_rounds).index_add(0, root, x) for x in (torch.ones_like(of), of))
        return (total / count.clamp(min=1))[root]

    # The mean is taken off before squaring: the difference of two mean squares is noise where branches are alike.
    apart = value - mean(value)
    score = torch.zeros_like(below)
    score[top] = apart / (mean(apart**2).sqrt() + 1e-6)
    return score[branch]
