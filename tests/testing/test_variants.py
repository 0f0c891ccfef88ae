"""Other forms of a trajectory: the target's likeliest tokens, and siblings reversed."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tiny_drafters import drafter_for

from aurora_rl.policies import MedusaDrafter, TargetParts, TreeShape
from aurora_rl.testing import tiny_target, tiny_trajectory, topk_form
from aurora_rl.testing.variants import siblings_reversed
from aurora_rl.trajectories import validate


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_topk_form_is_the_softmax_of_the_hidden_states(dtype: torch.dtype) -> None:
    target = tiny_target(dtype=dtype)
    trajectory = tiny_trajectory(drafter_for(MedusaDrafter, target), prompt_length=3, max_new_tokens=6)
    before, head = trajectory.clone(), TargetParts.of(target).head.to(torch.promote_types(dtype, torch.float32))
    got = topk_form(trajectory, head, 3)
    assert all(torch.equal(trajectory[key], before[key]) for key in before.keys(True, True))
    validate(got, vocab_size=32, feature_size=16, hidden_size=16)
    for part in ("sequence", "nodes"):
        p = (trajectory[part, "hidden"].to(head.weight.dtype) @ head.weight.T).softmax(-1)
        best = p.topk(3, dim=-1)
        assert torch.equal(got[part, "topk_ids"], best.indices)
        assert got[part, "topk_log_probs"].dtype == head.weight.dtype
        torch.testing.assert_close(got[part, "topk_log_probs"].exp(), best.values)
        torch.testing.assert_close(got[part, "tail_log_prob"].exp(), 1 - best.values.sum(-1), atol=1e-5, rtol=0)


def test_reversed_siblings_are_the_same_trees() -> None:
    drafter = drafter_for(MedusaDrafter, tiny_target())
    trajectory = tiny_trajectory(drafter, shape=TreeShape(3, 3, 9))

    def paths(tree: TensorDict) -> list[list[list[float]]]:
        """Of each round, every node as its path's tokens, then its own values."""
        offset, rounds = tree["rounds", "offset"].tolist(), []
        for start, end in zip(offset, offset[1:], strict=False):
            parents, tokens = tree["nodes", "parents"][start:end].tolist(), tree["nodes", "tokens"][start:end].tolist()
            nodes: list[list[float]] = []
            for node in range(end - start):
                path, above = [tokens[node]], parents[node]
                while above >= 0:
                    path, above = [tokens[above], *path], parents[above]
                values = [float(tree["nodes", key][start + node]) for key in ("log_probs", "accepted")]
                nodes.append([*path, *values, float(tree["nodes", "hidden"][start + node].sum())])
            rounds.append(nodes)
        return rounds

    turned = siblings_reversed(trajectory)
    validate(turned, vocab_size=32, feature_size=16, hidden_size=16)
    before, after = paths(trajectory), paths(turned)
    assert [sorted(nodes) for nodes in after] == [sorted(nodes) for nodes in before] and after != before
    roots = lambda tree: tree["nodes", "tokens"][tree["nodes", "parents"] < 0].split(3)  # noqa: E731
    assert all(torch.equal(old.flip(0), new) for old, new in zip(roots(trajectory), roots(turned), strict=True))
    again = siblings_reversed(turned)
    assert all(torch.equal(again[key], trajectory[key]) for key in trajectory.keys(True, True))
