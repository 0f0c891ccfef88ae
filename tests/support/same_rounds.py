"""What a real engine recorded of requests, against what the embedded engine records of the same."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch

from aurora_rl.collectors.dataset import TrajectoryDataset
from aurora_rl.serving.recorded_requests import record_requests
from aurora_rl.trajectory_parts import part_of


def without_end(request):
    """The request, to its budget whatever it says."""
    return replace(request, sampling_params=replace(request.sampling_params, ignore_eos=True))


def ask_all(engine, asked):
    with ThreadPoolExecutor(len(asked)) as pool:
        return list(pool.map(engine.generate, asked))


def recorded_here(model, drafter, asked, shape, tmp_path):
    """The same requests on the embedded engine."""
    dataset = TrajectoryDataset(tmp_path / "own")
    record_requests(model, drafter, asked, dataset, shape=shape, num_slots=1)
    return {int(trajectory["request"]): trajectory for trajectory in dataset}


def assert_same_rounds(remote, embedded):
    """Where both engines began a round at one place they drafted one tree and accepted one path of it."""
    assert_same_sequence(remote, embedded)
    at = {int(anchor): row for row, anchor in enumerate(embedded["rounds", "anchor"])}
    compared = 0
    for row, anchor in enumerate(remote["rounds", "anchor"].tolist()):
        if anchor not in at:  # others make the first token in prefill, so rounds may stand otherwise for a while
            continue
        own = slice(*embedded["rounds", "offset"][at[anchor] : at[anchor] + 2].tolist())
        nodes = slice(*remote["rounds", "offset"][row : row + 2].tolist())
        for key in ("tokens", "parents", "accepted"):
            assert torch.equal(remote["nodes", key][nodes], embedded["nodes", key][own]), (key, anchor)
        for key, tolerance in (("log_probs", 1e-4), ("hidden", 2e-5)):
            torch.testing.assert_close(remote["nodes", key][nodes], embedded["nodes", key][own], atol=tolerance, rtol=0)
        compared += 1
    return compared


def assert_parts_of(embedded, parts, part_tokens):
    """Parts make up the text one after the other, each long enough; return how many of their rounds were compared."""
    ends = [len(part["sequence", "tokens"]) for part in parts]
    firsts = [int(embedded["sequence", "prompt_length"]), *ends[:-1]]
    assert [int(part["sequence", "prompt_length"]) for part in parts] == firsts
    assert all(end - first >= part_tokens for first, end in zip(firsts[:-1], ends[:-1], strict=True))
    bounds = zip(parts, firsts, ends, strict=True)
    return sum(assert_same_rounds(part, part_of(embedded, first, end)) for part, first, end in bounds)


def assert_served_in_parts(engine, learner, model, drafter, asked, shape, tmp_path, part_tokens):
    """Two requests side by side come in parts that are those of the embedded engine, and are counted once each."""
    answers = ask_all(engine, asked)
    own = recorded_here(model, drafter, asked, shape, tmp_path)
    for answer in answers:
        embedded = own[answer.request.id]
        parts = learner.take_parts(answer.request.id, len(embedded["sequence", "tokens"]))
        assert len(parts) >= 4 and sum(len(part["rounds", "anchor"]) for part in parts) == answer.rounds
        assert assert_parts_of(embedded, parts, part_tokens) > 10
    status = engine.status()
    assert (status["recorded"], status["sent"]) == (2, sum(map(len, learner.parts.values())))
    assert status["served"]["speculative_rounds"] == sum(answer.rounds for answer in answers)
    assert status["served"]["tokens"] == sum(len(answer.tokens) for answer in answers)


def assert_same_sequence(remote, embedded):
    """Both engines said the same, by the same states."""
    assert torch.equal(remote["sequence", "tokens"], embedded["sequence", "tokens"])
    for key in ("features", "hidden"):
        torch.testing.assert_close(remote["sequence", key], embedded["sequence", key], atol=2e-5, rtol=0)
