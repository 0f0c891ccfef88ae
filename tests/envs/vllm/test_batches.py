"""Batches of vLLM become the trajectories that the embedded engine recorded of the same requests."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from aurora_rl.envs.remote.assembler import TrajectoryAssembler
from aurora_rl.envs.vllm.batches import BatchPart, Draft, assemble_part, places
from aurora_rl.policies import Eagle3Drafter, TargetParts, TreeShape
from aurora_rl.sampling_params import SamplingParams
from aurora_rl.testing import tiny_target, tiny_trajectory

Step = tuple[BatchPart, torch.Tensor, dict[str, torch.Tensor], list[int], Draft]


@pytest.fixture(scope="module")
def trajectory() -> TensorDict:
    """A request served here in chains of three. Its first round accepted nothing: vLLM makes that token in prefill."""
    torch.manual_seed(0)
    drafter = Eagle3Drafter.from_target(TargetParts.of(tiny_target()), draft_vocab=torch.arange(16)).double()
    for request in range(200):
        found = tiny_trajectory(drafter, shape=TreeShape(3), max_new_tokens=20, request=request, prompt_length=9)
        anchor = found["rounds", "anchor"]
        if int(anchor[1] - anchor[0]) == 1 and int((anchor.diff() > 1).sum()) > 1:
            return found
    raise AssertionError("no such trajectory")


def steps_of(trajectory: TensorDict, rid: str, *, cached: int = 0, chunk: int = 99, version: int = 3) -> list[Step]:
    """What each batch has of the request, and what it delivers."""
    tokens, prompt = trajectory["sequence", "tokens"], int(trajectory["sequence", "prompt_length"])
    features, hidden = trajectory["sequence", "features"], trajectory["sequence", "hidden"]
    steps: list[Step] = []
    for start in range(cached, prompt, chunk):
        end = min(start + chunk, prompt)
        part = BatchPart(rid, start, end - start, prompt, int(tokens[start]), ())
        # Within a prompt the head is read at the chunk's last position too, and nobody needs what it says.
        head = hidden[:1] if end == prompt else torch.full_like(hidden[:1], 7.0)
        steps.append(
            (part, features[start:end], {"hidden": head}, tokens[prompt : prompt + (end == prompt)].tolist(), Draft(0))
        )
    anchor, offset = trajectory["rounds", "anchor"].tolist(), trajectory["rounds", "offset"].tolist()
    for r in range(1, len(anchor)):
        at, nodes = anchor[r], slice(offset[r], offset[r + 1])
        drafts, accepted = (
            trajectory["nodes", "tokens"][nodes].tolist(),
            int(trajectory["nodes", "accepted"][nodes].sum()),
        )
        rows = torch.full(
            (1 + len(drafts), features.shape[1]), 9.0, dtype=features.dtype
        )  # rejected ones are no text's
        known = features[at : at + 1 + accepted]
        rows[: len(known)] = known
        target = {"hidden": torch.cat([hidden[at - prompt + 1][None], trajectory["nodes", "hidden"][nodes]])}
        joint = trajectory["nodes", "log_probs"][nodes].cumsum(0)
        said = [*drafts[:accepted], int(tokens[min(at + accepted + 1, len(tokens) - 1)])]
        part = BatchPart(rid, at, 1 + len(drafts), prompt, int(tokens[at]), drafts)
        # Three are always drafted, of which the scheduler may verify fewer.
        steps.append(
            (part, rows, target, said, Draft(version, torch.cat([joint, joint.new_full((3 - len(drafts),), -9.0)])))
        )
    return steps


def new_assembler(out: list[TensorDict], **limits: int) -> TrajectoryAssembler:
    limits = {"max_bytes": 1 << 20, "store_bytes": 1 << 20, **limits}
    return TrajectoryAssembler(lambda trajectory, *_: out.append(trajectory), **limits)


def play(assembler: TrajectoryAssembler, step: Step) -> None:
    assemble_part(assembler, *step, ready=lambda: None)


def begin(assembler: TrajectoryAssembler, trajectory: TensorDict, rid: str, cached: int = 0) -> None:
    prompt = int(trajectory["sequence", "prompt_length"])
    asked = trajectory["sequence", "tokens"][:prompt].tolist()
    assert assembler.begin(rid, asked, cached, 0, SamplingParams(max_tokens=20))


def end(assembler: TrajectoryAssembler, trajectory: TensorDict, rid: str) -> None:
    tokens, prompt = trajectory["sequence", "tokens"], int(trajectory["sequence", "prompt_length"])
    assembler.finish(rid, tokens[prompt:].tolist(), terminated=False)


def without_first_round(trajectory: TensorDict) -> TensorDict:
    """What remains where prefill makes the first token."""
    out, first = trajectory.clone(), int(trajectory["rounds", "offset"][1])
    for key in ("anchor", "policy_version", "cache_version"):
        out["rounds", key] = out["rounds", key][1:]
    out["rounds", "offset"] = trajectory["rounds", "offset"][1:] - first
    for key in list(out["nodes"].keys()):
        out["nodes", key] = out["nodes", key][first:]
    return out


def assert_same(got: TensorDict, trajectory: TensorDict) -> None:
    expected = without_first_round(trajectory)
    for key in expected.keys(include_nested=True, leaves_only=True):
        if key[0] in ("sequence", "nodes") or key in (("rounds", "anchor"), ("rounds", "offset")):
            torch.testing.assert_close(got[key], expected[key], check_dtype=False, msg=str(key))
    assert got["rounds", "policy_version"].tolist() == [3] * len(expected["rounds", "anchor"])


@pytest.mark.parametrize("chunk", [99, 4, 1])
def test_batches_become_the_trajectory_that_they_came_from(trajectory: TensorDict, chunk: int) -> None:
    out: list[TensorDict] = []
    assembler = new_assembler(out)
    begin(assembler, trajectory, "7")
    for step in steps_of(trajectory, "7", chunk=chunk):
        play(assembler, step)
    end(assembler, trajectory, "7")
    assembler.close()
    assert assembler.counts == {"recorded": 1}
    assert_same(out[0], trajectory)


def test_requests_of_one_batch_are_told_apart(trajectory: TensorDict) -> None:
    """One decodes while another's prompt is read in chunks."""
    out: list[TensorDict] = []
    assembler = new_assembler(out)
    early, late = steps_of(trajectory, "1"), steps_of(trajectory, "2", chunk=2)
    begin(assembler, trajectory, "1")
    play(assembler, early[0])
    begin(assembler, trajectory, "2")
    for number in range(max(len(early) - 1, len(late))):
        batch = [steps[number] for steps in (late, early[1:]) if number < len(steps)]
        # As one pass lays them out, request after request.
        features = torch.cat([step[1] for step in batch])
        hidden = torch.cat([step[2]["hidden"] for step in batch])
        for step, (positions, head) in zip(batch, places([step[0] for step in batch]), strict=True):
            play(assembler, (step[0], features[positions], {"hidden": hidden[head]}, *step[3:]))
    for rid in ("2", "1"):  # in another order than they began
        end(assembler, trajectory, rid)
    assembler.close()
    assert assembler.counts == {"recorded": 2} and [int(each["request"]) for each in out] == [2, 1]
    for each in out:
        assert_same(each, trajectory)


@pytest.mark.parametrize("running", [True, False])
def test_a_cached_prefix_is_taken_from_who_brought_it(trajectory: TensorDict, running: bool) -> None:
    out: list[TensorDict] = []
    assembler = new_assembler(out)
    begin(assembler, trajectory, "1")
    for step in steps_of(trajectory, "1"):
        play(assembler, step)
    if not running:
        end(assembler, trajectory, "1")
    begin(assembler, trajectory, "2", cached=6)
    for step in steps_of(trajectory, "2", cached=6):
        play(assembler, step)
    end(assembler, trajectory, "2")
    if running:
        deadline = time.monotonic() + 5
        while not assembler.counts["recorded"]:
            assert time.monotonic() < deadline, dict(assembler.counts)
            time.sleep(0.005)
        end(assembler, trajectory, "1")
    assembler.close()
    assert assembler.counts == {"recorded": 2}
    for each in out:
        assert_same(each, trajectory)


def test_a_prefix_that_nobody_saw_leaves_the_request_out(trajectory: TensorDict) -> None:
    out: list[TensorDict] = []
    assembler = new_assembler(out)
    begin(assembler, trajectory, "2", cached=6)
    for step in steps_of(trajectory, "2", cached=6):
        play(assembler, step)
    end(assembler, trajectory, "2")
    assembler.close()
    assert assembler.counts == {"prefix": 1} and out == []


@pytest.mark.parametrize("start", ["from the beginning", "from its cached text"])
def test_a_request_that_is_put_back_and_run_again_is_left_out(trajectory: TensorDict, start: str) -> None:
    assembler = new_assembler([])
    begin(assembler, trajectory, "1")
    steps = steps_of(trajectory, "1")
    for step in steps[:3]:
        play(assembler, step)
    prompt, part = int(trajectory["sequence", "prompt_length"]), steps[3][0]
    tokens, features = trajectory["sequence", "tokens"], trajectory["sequence", "features"]
    # It has its prompt and what it said so far in one pass; or, from the prefix cache, all but the end of it.
    at = 0 if start == "from the beginning" else prompt + 1
    again = BatchPart("1", at, part.start + 1 - at, prompt, int(tokens[at]), ())
    assert again.count > 1
    play(assembler, (again, features[at : part.start + 1], {"hidden": features[:1, :16]}, [1], Draft(0)))
    assert "1" not in assembler and assembler.counts == {"retracted": 1}


def test_a_round_without_drafts_is_a_round(trajectory: TensorDict) -> None:
    """Where a text comes near the longest that is served, nothing is drafted any more."""
    out: list[TensorDict] = []
    assembler = new_assembler(out)
    begin(assembler, trajectory, "1")
    steps = steps_of(trajectory, "1")
    for step in steps[:2]:
        play(assembler, step)
    tokens, prompt = trajectory["sequence", "tokens"], int(trajectory["sequence", "prompt_length"])
    features, hidden = trajectory["sequence", "features"], trajectory["sequence", "hidden"]
    for at in range(steps[1][0].start + len(steps[1][3]), len(tokens) - 1):
        part = BatchPart("1", at, 1, prompt, int(tokens[at]), ())
        row = {"hidden": hidden[at - prompt + 1][None]}
        play(assembler, (part, features[at][None], row, [int(tokens[at + 1])], Draft(3)))
    end(assembler, trajectory, "1")
    assembler.close()
    assert assembler.counts == {"recorded": 1}
    torch.testing.assert_close(out[0]["sequence", "features"], features)
    sizes: Any = out[0]["rounds", "offset"].diff().tolist()
    assert sizes[0] > 0 and set(sizes[1:]) == {0} and "log_probs" in out[0]["nodes"].keys()
