"""A real SGLang that records and that nobody learns from: a spoiled drafter is mended, a tenant's data deleted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from processes import wait
from sglang_requests import requests

from aurora_rl.collectors.handshake import Handshake
from aurora_rl.envs.sglang.client import SGLangClient
from aurora_rl.policies.faults import EVERY, PORTIONS

pytestmark = pytest.mark.sglang


@pytest.fixture
def alone(chain: SGLangClient, handshake: Handshake) -> Iterator[SGLangClient]:
    """Attached, and no learner is at its addresses."""
    chain.attach(handshake=handshake, trajectories="tcp://127.0.0.1:1", weights="tcp://127.0.0.1:2")
    yield chain
    chain.detach()


def test_a_spoiled_drafter_is_found_and_loaded_again_without_a_learner(alone: SGLangClient) -> None:
    (first,) = requests(20, new=160)
    before = alone.generate(first)
    assert alone.status()["faults"] == []
    # SGLang's own means of tests for weight syncs: other numbers in every tensor but those that are the target's.
    spoil = {"action": "reset_tensors", "selector": "draft", "skip_tensor_list": ["embed_tokens"]}
    assert alone.post("/weights_checker", spoil, 30)["success"]
    rounds, answers = 0, []
    while not alone.status()["faults"]:
        answers.append(alone.generate(requests(20, new=8, seed=len(answers))[0]))
        rounds += answers[-1].rounds
        assert rounds <= PORTIONS * EVERY + answers[-1].rounds
    (fault,) = alone.status()["faults"]
    assert (fault["version"], fault["cause"]) == (0, "corrupted")
    assert fault["action"] == "its weights were loaded again" and "differs from what was published" in fault["detail"]
    again = alone.generate(requests(20, new=160)[0])
    assert again.tokens.tolist() == before.tokens.tolist()  # texts never changed
    assert again.rounds == before.rounds  # and it drafts as it did
    assert len(alone.status()["faults"]) == 1


def test_a_tenants_trajectories_are_deleted_from_the_queue_and_no_others(alone: SGLangClient) -> None:
    waiting = alone.status()["queued"]
    asked = [
        replace(request, tenant=tenant) for request, tenant in zip(requests(9, 9, 9), ("a", "a", "b"), strict=True)
    ]
    for request in asked:
        alone.generate(request)
    wait(lambda: alone.status()["queued"] == waiting + 3)
    assert alone.delete("a") == {"trajectories": 2, "learner": "absent"}
    assert alone.status()["queued"] == waiting + 1
    assert alone.delete("a") == {"trajectories": 0, "learner": "absent"}
    wait(lambda: alone.generate(replace(asked[0], id=asked[0].id + 10**7)).tokens is not None)  # and it serves on
    wait(lambda: alone.status()["queued"] == waiting + 2)  # what begins later is another matter
