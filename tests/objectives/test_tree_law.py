"""Recorded trees as draws from the drafter: sums and masses over earlier siblings, against plain loops."""

from __future__ import annotations

import torch

from aurora_rl.objectives.tree_law import before


def test_sums_over_earlier_siblings() -> None:
    context, values = torch.tensor([2, 0, 2, 2, 1, 0]), torch.arange(1.0, 7.0)
    expected = [sum(float(values[j]) for j in range(i) if context[j] == context[i]) for i in range(6)]
    assert before(context, values).tolist() == expected
    assert before(context[:0], values[:0]).tolist() == []
