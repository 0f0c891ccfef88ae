"""Recorded trees as draws from the drafter: sums and masses over earlier siblings, against plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict

from aurora_rl.envs.verification.rules import get_rule
from aurora_rl.objectives.tree_law import TreeLaw, before, log_left
from aurora_rl.trajectories import rule_code
from aurora_rl.tree_index import TreeIndex

# Of the two roots, and of the first root's first child.
Q = torch.tensor([[0.5, 0.2, 0.3], [0.25, 0.7, 0.05], [0.1, 0.6, 0.3]], dtype=torch.float64)
P = torch.tensor([[0.1, 0.6, 0.3], [0.3, 0.3, 0.4], [0.2, 0.6, 0.2]], dtype=torch.float64)
ROW = torch.tensor([0, 1, 2, 1, 0])


def test_sums_over_earlier_siblings() -> None:
    context, values = torch.tensor([2, 0, 2, 2, 1, 0]), torch.arange(1.0, 7.0)
    expected = [sum(float(values[j]) for j in range(i) if context[j] == context[i]) for i in range(6)]
    assert before(context, values).tolist() == expected
    assert before(context[:0], values[:0]).tolist() == []


def law(without: list[bool] | None = None, rules: list[str] | None = None) -> TreeLaw:
    """Two trees over three tokens: the root's children 0 and 1 with node 2 below 0, and two children of a root."""
    rounds = {"anchor": [4, 5], "offset": [0, 3, 5], "request_offset": [0, 2]}
    batch = TensorDict({"rounds": {name: torch.tensor(value) for name, value in rounds.items()}})
    batch["nodes", "parents"] = torch.tensor([-1, 0, -1, -1, -1])  # depth-first: 1 lies below 0, next to 2
    trees = TreeIndex.of(batch)
    codes = torch.tensor([rule_code(name) for name in rules or ["sample_and_match"] * 5])
    return TreeLaw(
        trees,
        ROW,
        codes,
        logits=Q.log(),
        served=lambda part: P[part],
        without=torch.tensor(without or [False] * 5),
        alone=True,
    )


def test_the_mass_that_earlier_siblings_left() -> None:
    context, row = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([1, 0, 2, 2, 0])
    distinct = torch.tensor([True, True, True, False, False])
    left = log_left(Q.log(), context, row, distinct).exp()
    torch.testing.assert_close(left, torch.tensor([1.0, 0.8, 0.3, 1.0, 1.0], dtype=torch.float64))


def test_what_a_sure_token_leaves_has_a_value_and_a_gradient() -> None:
    logits = torch.tensor([[40.0, 0.0, 0.0]], requires_grad=True)  # in float32 one less the first's share is 0
    left = log_left(logits.log_softmax(-1), torch.tensor([0, 0]), torch.tensor([0, 1]), torch.tensor([True, True]))
    torch.testing.assert_close(left.detach(), torch.tensor([0.0, math.log(2) - 40]))
    left[1].backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.tensor([[-1.0, 0.5, 0.5]]))


def test_draws_without_replacement_are_given_their_earlier_siblings() -> None:
    expected = [0.5, 0.6, 0.3 / 0.5, 0.7, 0.25]  # the second tree draws with replacement
    without = [True, True, True, False, False]
    found = law(without)
    torch.testing.assert_close(found.log_q.exp(), torch.tensor(expected, dtype=torch.float64))
    recorded = torch.tensor([0.4, 0.1, 0.3, 0.2, 0.6], dtype=torch.float64)
    told = found.condition_on_siblings(recorded.log()).exp()
    torch.testing.assert_close(told, torch.tensor([0.4, 0.1, 0.3 / 0.6, 0.2, 0.6], dtype=torch.float64))


def test_where_a_recording_leaves_nothing_what_is_left_now_counts() -> None:
    recorded = torch.tensor([1.0, 0.1, 1e-9, 0.2, 0.6], dtype=torch.float64).log()
    told = law([True] * 5).condition_on_siblings(recorded)
    assert abs(float(told[2] - recorded[2]) + math.log(1e-5)) < 1e-12  # 0.5 is left now, and no more than 1e-5 is taken


def test_an_acceptance_hangs_on_draws_above_and_before() -> None:
    ratio = torch.tensor([2.0, 3.0, 5.0, 7.0, 11.0], dtype=torch.float64)
    # Node 1 on itself and 0; node 2 on itself and its earlier sibling 0; node 4 on itself and 3.
    torch.testing.assert_close(law().joint(ratio), torch.tensor([2.0, 6.0, 10.0, 7.0, 77.0], dtype=torch.float64))


def test_acceptance_is_that_of_the_rule_that_served_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    served = ["rejection", "greedy", "rejection", "sample_and_match", "sample_and_match"]
    context = law().context
    wanted, first = torch.zeros(2, 5, dtype=torch.float64)
    for rule in set(served):
        here = torch.tensor([name == rule for name in served])
        wanted[here] = get_rule(rule)().acceptance(P, Q, ROW[here], context[here])
        for node in here.nonzero()[:, 0].tolist():
            first[node] = get_rule(rule)().acceptance(P, Q, ROW[node : node + 1], context[node : node + 1])
    assert first.tolist() != wanted.tolist()
    for rows in (1, 2, 3):  # of a chunk
        monkeypatch.setattr("aurora_rl.objectives.tree_law.chunk_rows", lambda *_, rows=rows: rows)
        found = law(rules=served)
        assert found.needs_q.tolist() == [True, False, True, False, False]
        assert found.below.tolist() == [False, False, False, False, True]
        torch.testing.assert_close(found.acceptance, wanted)
        torch.testing.assert_close(found.alone, first)
