"""The context store, and what is recorded of its rounds, on hand-made numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aurora_rl.context import ContextStore, TrajectoryRecorder
from aurora_rl.sampling_params import SamplingParams
from aurora_rl.trajectories import acceptance_length, accepted_per_round, validate
from aurora_rl.trajectory_parts import part_of


def store_of_two() -> ContextStore:
    """Slot 1 holds the prompt 5 6 7; features are the position, hidden is ten times it."""
    store = ContextStore(2, 10, feature_size=1, hidden_size=1, dtype=torch.float32)
    store.start(1, torch.tensor([5, 6, 7]))
    store.features[1, :2, 0] = torch.tensor([0.0, 1.0])
    return store


def committed(first: int, count: int, width: int) -> tuple[Tensor, Tensor]:
    """Features and hidden rows of positions ``first`` on, and rubbish after them."""
    rows = torch.full((1, width, 1), 99.0)
    rows[0, :count, 0] = first + torch.arange(count)
    return rows, 10 * rows


def test_store_appends_at_each_slots_end() -> None:
    store = store_of_two()
    store.cache_salts[0] = "a"
    store.start(0, torch.tensor([9]))
    store.append(
        torch.tensor([0, 1]),
        torch.tensor([[1, 0, 0], [2, 3, 0]]),
        torch.tensor([1, 2]),
        torch.tensor([[[0.0], [7.0], [7.0]], [[2.0], [3.0], [7.0]]]),
        torch.tensor([[[0.0], [7.0], [7.0]], [[20.0], [30.0], [7.0]]]),
    )
    assert store.lengths.tolist() == [2, 5] and store.prompt_lengths.tolist() == [1, 3]
    assert store.tokens[1, :5].tolist() == [5, 6, 7, 2, 3] and store.tokens[0, :2].tolist() == [9, 1]
    assert store.features[1, :5, 0].tolist() == [0.0, 1.0, 2.0, 3.0, 0.0]  # the last token has no row yet
    assert store.hidden[1, 2:4, 0].tolist() == [20.0, 30.0]
    assert store.occupied.tolist() == [0, 1]
    store.release(0)
    assert store.occupied.tolist() == [1] and store.lengths.tolist() == [0, 5]
    assert store.cache_salts == [None, None]


def test_a_request_has_the_documented_layout() -> None:
    store, slots = store_of_two(), torch.tensor([1])
    recorder = TrajectoryRecorder(store)
    recorder.start(1)
    # Round 1: the root is 7 at position 2; a tree in order of breadth, its fourth node invalid; 3 and then 4 accepted.
    recorder.round(
        [1], [2],
        tokens=torch.tensor([[2, 3, 8, 9, 4]]),
        parents=torch.tensor([[-1, -1, 0, 9, 1]]),
        log_probs=torch.tensor([[-1.0, -0.5, -2.0, 0.0, -0.1]]),
        valid=torch.tensor([[True, True, True, False, True]]),
        accepted=torch.tensor([[False, True, False, False, True]]),
        hidden=torch.tensor([[[0.0], [1.0], [2.0], [3.0], [4.0], [5.0]]]),
        policy_versions=[6], cache_versions=[5],
    )  # fmt: skip
    store.append(slots, torch.tensor([[3, 4, 1]]), torch.tensor([3]), *committed(2, 3, 3))
    # Round 2: no tree, one token.
    none = torch.zeros(1, 0, dtype=torch.int64)
    recorder.round(
        [1], [5], none, none, none.float(), none.bool(), none.bool(), torch.zeros(1, 1, 1),
        policy_versions=[7], cache_versions=[7],
    )  # fmt: skip
    store.append(slots, torch.tensor([[30]]), torch.tensor([1]), *committed(5, 1, 1))
    said = {
        "request": 4,
        "sampling_params": SamplingParams(0.5, 3, 0.9, 11),
        "rule": "sample_and_match",
        "draft_mode": "topk",
    }
    trajectory, second = recorder.trajectory_from(1, first=3, **said), recorder.trajectory_from(1, first=6, **said)

    validate(trajectory, vocab_size=32, feature_size=1, hidden_size=1)
    flat = {".".join(k): trajectory[k].tolist() for k in trajectory.keys(True, True) if isinstance(k, tuple)}
    assert flat == {
        "sequence.tokens": [5, 6, 7, 3, 4, 1, 30],
        "sequence.prompt_length": 3,
        "sequence.features": [[0.0], [1.0], [2.0], [3.0], [4.0], [5.0]],
        "sequence.hidden": [[20.0], [30.0], [40.0], [50.0]],
        "rounds.anchor": [2, 5],
        "rounds.offset": [0, 4, 4],
        "rounds.policy_version": [6, 7],
        "rounds.cache_version": [5, 7],
        "nodes.tokens": [2, 8, 3, 4],
        "nodes.parents": [-1, 0, -1, 2],
        "nodes.log_probs": pytest.approx([-1.0, -2.0, -0.5, -0.1]),
        "nodes.accepted": [False, False, True, True],
        "nodes.hidden": [[1.0], [3.0], [2.0], [5.0]],
        "sampling.temperature": 0.5,
        "sampling.top_k": 3,
        "sampling.top_p": pytest.approx(0.9),
        "sampling.seed": 11,
        "sampling.rule": 1,
        "sampling.draft_mode": 0,
    }
    assert int(trajectory["request"]) == 4

    # From the second round on.
    expected = part_of(trajectory, 6)
    assert second["rounds", "anchor"].tolist() == [5] and second["sequence", "hidden"].tolist() == [[50.0]]
    assert set(second.keys(True, True)) == set(expected.keys(True, True))
    assert all(torch.equal(second[key], expected[key]) for key in second.keys(True, True))

    # Memory of its own: the slot may be used again.
    before = trajectory.clone()
    for block in (store.tokens, store.features, store.hidden):
        block.zero_()
    assert all(torch.equal(trajectory[key], before[key]) for key in before.keys(True, True))

    assert [part.tolist() for part in accepted_per_round(trajectory)] == [[2, 0], [4, 0]]
    # The first round committed 3 tokens, the second, without a tree, 1: it counts where drafts were asked for.
    assert acceptance_length(trajectory) == acceptance_length(trajectory, torch.tensor([True, False])) == (3, 1)
    assert acceptance_length(trajectory, torch.tensor([True, True])) == (4, 2)
