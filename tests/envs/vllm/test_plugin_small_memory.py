"""Real vLLM with little room, and a drafter whose head begins as the target's: what is put back, whose head is new."""

import pytest
import torch
from same_rounds import ask_all, assert_same_rounds, assert_same_sequence, recorded_here, without_end
from sglang_requests import Learner, other_weights, requests

from aurora_rl.collectors.handshake import Handshake
from aurora_rl.policies import Eagle3Drafter, TreeShape
from aurora_rl.policies.formats.files import load_drafter, save_drafter

pytestmark = pytest.mark.vllm
CHAIN = TreeShape(3, 1, 3)


@pytest.fixture(scope="module")
def whole(parts, vllm_models):
    """A drafter with a row for every token. vLLM finds that they are the target's, and keeps one head for both."""
    torch.manual_seed(0)
    drafter = Eagle3Drafter.from_target(parts, draft_vocab=torch.arange(512), feature_layers=(2, 4, 5))
    save_drafter(drafter, vllm_models / "whole", "vllm")
    return load_drafter(vllm_models / "whole", parts)


@pytest.fixture(scope="module")
def attached(launch, parts, whole):
    """A server with room for three of its four slots, a learner's ends, and what was said of the drafter's head."""
    learner = Learner(Handshake.of(parts, whole, "eagle3"))
    with launch("--num-gpu-blocks-override", "20", drafter="whole") as engine:
        engine.attach(handshake=learner.handshake, trajectories=learner.trajectories, weights=learner.weights)
        yield engine, learner
    learner.die()


def test_requests_that_are_put_back_are_served_and_counted(attached, model, whole, tmp_path):
    engine, learner = attached
    asked = list(map(without_end, requests(90, 91, 92, 93, new=110, seed=4)))
    answers = ask_all(engine, asked)
    own = recorded_here(model, whole, asked, CHAIN, tmp_path)
    for answer in answers:
        prompt = len(answer.request.prompt)
        assert answer.tokens.tolist() == own[answer.request.id]["sequence", "tokens"][prompt:].tolist()
    status = engine.status()
    assert status["skipped"]["retracted"] >= 1 and status["error"] == ""
    assert status["recorded"] + status["skipped"]["retracted"] == 4
    if status["recorded"]:
        learner.collector.poll(5.0)
    for trajectory in learner.got.values():
        assert_same_sequence(trajectory, own[int(trajectory["request"])])


def test_a_swap_leaves_the_target_s_head_alone(attached, model, whole, parts, vllm_models, tmp_path):
    engine, learner = attached
    assert "sharing target model lm_head" in engine._log.read_text().lower()
    (asked,) = map(without_end, requests(20, new=48, seed=5))
    before = engine.generate(asked).tokens
    weights = other_weights(whole, 1)
    learner.publish(1, weights)
    (again,) = map(without_end, requests(20, new=48, seed=5))
    after = engine.generate(again)
    assert torch.equal(after.tokens, before), "the target says something else"
    new = load_drafter(vllm_models / "whole", parts)
    new.install(weights)
    own = recorded_here(model, new, [again], CHAIN, tmp_path)[again.id]
    (trajectory,) = learner.take(again.id)
    assert set(trajectory["rounds", "policy_version"].tolist()) == {1}
    assert assert_same_rounds(trajectory, own) > 5
