"""Whether an engine drafts with the weights that it says it does: silent failure to load is the classic one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDictBase

from aurora_rl.policies.drafter import Drafter, draft_rows
from aurora_rl.trajectories import pack
from aurora_rl.tree_index import TreeIndex


@torch.inference_mode()
def drafts_agreed(drafter: Drafter, trajectories: Sequence[TensorDictBase], version: int) -> tuple[int, int]:
    """Compare recorded first drafts with those that a drafter would have made.

    The tokens proposed at the root of a round are the likeliest there by the weights that drafted it. Those that prompt
    lookup added are left out. Where the engine's drafter cache holds rows of older weights, or in bfloat16, some drafts
    differ: compare with another version's weights, which agree less often.

    Args:
        drafter: holds the weights of the version.
        trajectories: as they arrived, drafted by likelihood ("topk").
        version: to look at.

    Returns:
        First drafts of such rounds, and how many of them the drafter would have made.

    Example:
        >>> from aurora_rl.policies import Eagle3Drafter, TargetParts
        >>> from aurora_rl.testing import tiny_target, tiny_trajectory
        >>> drafter = Eagle3Drafter.from_target(TargetParts.of(tiny_target()), draft_vocab=torch.arange(16)).double()
        >>> drafted, agreed = drafts_agreed(drafter, [tiny_trajectory(drafter)], version=0)
        >>> drafted > 5, drafted == agreed
        (True, True)
    """
    device = drafter.draft_vocab.device
    batch = pack(trajectories).to(device)
    trees, rounds = TreeIndex.of(batch), batch["rounds"]
    drafted_by = (rounds["policy_version"] == version) & (trees.root[: trees.num_rounds] >= 0)
    row = draft_rows(drafter.draft_vocab, batch["nodes", "tokens"])
    first = (trees.parent < trees.num_rounds) & (row >= 0)
    if (log_probs := batch.get(("nodes", "log_probs"), None)) is not None:
        first &= torch.isfinite(log_probs)
    first &= drafted_by[trees.parent.clamp(max=trees.num_rounds - 1)] if trees.num_rounds else first
    if not bool(first.any()):
        return 0, 0
    of_round = trees.parent[first]
    wanted = torch.zeros(len(trees.depth), dtype=torch.bool, device=device)
    wanted[of_round] = True
    logits = drafter.context_logits(batch, trees, wanted)[(wanted.cumsum(0) - 1)[of_round]]
    better = (logits > logits.gather(1, row[first][:, None])).sum(1)
    siblings = torch.bincount(of_round, minlength=trees.num_rounds)[of_round]
    return len(of_round), int((better < siblings).sum())
