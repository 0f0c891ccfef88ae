"""How tensors are compared with what was published; the watchdogs' own tests have the faults themselves."""

from __future__ import annotations

import torch

from aurora_rl.policies.faults import difference, sample


def test_a_difference_is_named_by_its_kind() -> None:
    published = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    for held, words in (
        (published.clone().fill_(float("nan")), "has 4 values that are infinite or not a number"),
        (torch.zeros(2, 2), "is all zero"),
        (published.T.contiguous(), "is transposed"),
        (published + torch.tensor([[0.0, 1.0], [0.0, 0.0]]), "differs from what was published in 1 of 4 values"),
    ):
        assert difference(held, published) == words


def test_a_large_tensor_is_sampled_from_end_to_end() -> None:
    large = torch.arange(1 << 18)
    assert len(sample(large)) <= 1 << 16 and int(sample(large)[-1]) >= (1 << 18) - 4
    assert torch.equal(sample(large[:100].view(10, 10)), large[:100])
