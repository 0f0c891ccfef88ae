"""Parts of a request: nothing of it is learned twice or left out, and each is a trajectory that all readers take."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tiny_drafters import noisy_drafter_and_head
from tiny_recordings import trajectory_of

from aurora_rl.objectives.imitation import ImitationLoss
from aurora_rl.policies import Drafter, Eagle3Drafter, MedusaDrafter
from aurora_rl.trajectories import pack, validate
from aurora_rl.trajectory_parts import part_is_due, part_of

KINDS = [Eagle3Drafter, MedusaDrafter]


def whole_of(kind: type[Drafter]) -> tuple[TensorDict, list[int]]:
    """A request of some rounds, and the places where its parts begin: where a round ended."""
    drafter, _ = noisy_drafter_and_head(kind)
    whole = trajectory_of(drafter, prompt_length=4, max_new_tokens=20)
    starts = [4, *(whole["rounds", "anchor"][[4, 5, 9]] + 1).tolist()]
    assert starts == sorted(set(starts))
    return whole, starts


def parts_of(whole: TensorDict, starts: list[int]) -> list[TensorDict]:
    return [part_of(whole, first, end) for first, end in zip(starts, [*starts[1:], None], strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_valid_trajectories_that_make_up_the_whole(kind: type[Drafter]) -> None:
    whole, starts = whole_of(kind)
    parts = parts_of(whole, starts)
    features, hidden = whole["sequence", "features"], whole["sequence", "hidden"]
    for part in parts:
        validate(part, vocab_size=32, feature_size=features.shape[1], hidden_size=hidden.shape[1])
        end = len(part["sequence", "tokens"])
        assert torch.equal(part["sequence", "tokens"], whole["sequence", "tokens"][:end])
        assert torch.equal(part["sequence", "features"], features[: end - 1])
        assert part["request"] == whole["request"]
    assert [int(part["sequence", "prompt_length"]) for part in parts] == starts
    assert torch.equal(torch.cat([part["sequence", "hidden"] for part in parts]), hidden)
    for key in ("anchor", "policy_version", "cache_version"):
        assert torch.equal(torch.cat([part["rounds", key] for part in parts]), whole["rounds", key])
    for key in whole["nodes"].keys():
        assert torch.equal(torch.cat([part["nodes", key] for part in parts]), whole["nodes", key])
    drafted = torch.cat([part["rounds", "offset"].diff() for part in parts])
    assert torch.equal(drafted, whole["rounds", "offset"].diff()) and int(drafted.sum()) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_parts_teach_what_the_whole_teaches(kind: type[Drafter]) -> None:
    """With one draft ahead, as no window then goes on in the next part: the text before a part is read as context."""
    whole, starts = whole_of(kind)
    drafter, head = noisy_drafter_and_head(kind)
    gradients = []
    for batch in (pack([whole]), pack(parts_of(whole, starts))):
        drafter.zero_grad()
        loss = ImitationLoss(drafter, head, steps=1)(batch)["loss_imitation"]
        loss.backward()
        gradients.append([loss.detach(), *(p.grad for p in drafter.parameters() if p.grad is not None)])
    assert len(gradients[0]) > 2
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(("first", "end"), [(3, None), (5, 5), (4, 25), (24, None)])
def test_what_is_no_part_of_the_completion_is_refused(first: int, end: int | None) -> None:
    whole, _ = whole_of(MedusaDrafter)
    with pytest.raises(ValueError, match=rf"completion, tokens 4 to 23; got {first} to {(end or 24) - 1}"):
        part_of(whole, first, end)


@pytest.mark.parametrize("prompt", [1, 100, 5000])
@pytest.mark.parametrize("size", [1, 256])
def test_parts_bring_along_a_bounded_amount_of_text(prompt: int, size: int) -> None:
    first, sent, parts = prompt, 0, []
    for length in range(prompt + 1, prompt + 40_000):
        if part_is_due(length, first, size):
            parts.append(length - first)
            first, sent = length, sent + length
            assert sent + length <= 6 * length
    assert len(parts) > 5 and min(parts) >= size
