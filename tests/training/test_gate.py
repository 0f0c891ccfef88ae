"""Replay gives the acceptance that serving had, and the gate decides with it."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from itertools import count, islice

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from aurora_rl.envs import SamplingParams
from aurora_rl.objectives.imitation import ImitationLoss
from aurora_rl.policies import Drafter, Eagle3Drafter, MedusaDrafter, TargetParts, TreeShape
from aurora_rl.testing import serve, tiny_target, topk_form
from aurora_rl.training import gate as gate_module
from aurora_rl.training.gate import Decision, Gate, Replay, replay
from aurora_rl.training.shares import engine_of
from aurora_rl.trajectories import pack

PROMPTS = [torch.arange(n) * 5 % 32 for n in (1, 7, 3, 12, 2, 5)]
COLD = SamplingParams(temperature=0.3, seed=1)


def learned(kind: type[Drafter]) -> Drafter:
    """A drafter that learned the very texts of the prompts, so that drafts are accepted at every depth."""
    torch.manual_seed(0)
    target = tiny_target()
    parts = TargetParts.of(target)
    drafter = kind.from_target(parts, draft_vocab=torch.arange(32)).double()
    batch = pack(
        serve(drafter, target, PROMPTS, shape=TreeShape(0), max_new_tokens=16, num_slots=6, sampling_params=COLD)
    )
    loss, optimizer = ImitationLoss(drafter, parts.head), torch.optim.Adam(drafter.parameters(), lr=1e-2)
    for _ in range(25):
        optimizer.zero_grad()
        loss(batch)["loss_imitation"].backward()
        optimizer.step()
    return drafter.requires_grad_(False)


@pytest.fixture(scope="module")
def drafters() -> dict[tuple[type[Drafter], torch.dtype], Drafter]:
    trained = {kind: learned(kind) for kind in (Eagle3Drafter, MedusaDrafter)}
    return {(k, d): copy.deepcopy(trained[k]).to(d) for k in trained for d in (torch.float64, torch.float32)}


@pytest.mark.parametrize("shape", [TreeShape(3), TreeShape(3, 2, 7), TreeShape(1, 4), TreeShape(2, 2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", [Eagle3Drafter, MedusaDrafter])
def test_replay_equals_what_was_served(
    drafters: dict, kind: type[Drafter], dtype: torch.dtype, shape: TreeShape
) -> None:
    drafter = drafters[kind, dtype]
    target = tiny_target(dtype=dtype)
    served = serve(drafter, target, PROMPTS, shape=shape, max_new_tokens=16, num_slots=4, sampling_params=COLD)
    result = replay(copy.deepcopy(drafter), served, shape)
    assert result.tokens.tolist() == [16] * 6
    assert result.rounds.tolist() == [len(t["rounds", "anchor"]) for t in served]
    assert result.acceptance_length == 96 / sum(len(t["rounds", "anchor"]) for t in served)
    if shape.depth > 1:
        assert result.acceptance_length > 1.2  # else the equality above says little


def test_replay_names_features_of_another_drafter(drafters: dict) -> None:
    medusa, eagle = drafters[MedusaDrafter, torch.float64], drafters[Eagle3Drafter, torch.float64]
    served = serve(medusa, tiny_target(), PROMPTS[:1], shape=TreeShape(2), max_new_tokens=4)
    message = r"features are 16 wide, and the drafter reads 32, 2 layers \(0, 1\) of 16: they are of another target"
    with pytest.raises(ValueError, match=message):
        replay(copy.deepcopy(eagle), served, TreeShape(2))


def test_replay_names_features_of_another_drafter_without_hidden_states(drafters: dict) -> None:
    medusa, eagle = drafters[MedusaDrafter, torch.float64], drafters[Eagle3Drafter, torch.float64]
    target = tiny_target()
    served = serve(medusa, target, PROMPTS[:1], shape=TreeShape(2), max_new_tokens=4)
    likeliest = [topk_form(trajectory, TargetParts.of(target).head, 4) for trajectory in served]
    with pytest.raises(ValueError, match=r"recorded features, 16 wide, which it reads as those of the layers \(0, 1\)"):
        replay(copy.deepcopy(eagle), likeliest, TreeShape(2))


def test_replay_refuses_text_that_depends_on_the_drafts(drafters: dict) -> None:
    medusa, target = drafters[MedusaDrafter, torch.float64], tiny_target()
    chain = TreeShape(2, mode="sampled")
    served = [
        serve(medusa, target, PROMPTS[:1], shape=chain, max_new_tokens=4, sampling_params=COLD, rule=rule)[0]
        for rule in ("sample_and_match", "rejection")
    ]
    assert replay(copy.deepcopy(medusa), served[:1], chain).tokens.tolist() == [4]
    with pytest.raises(ValueError, match="the rule 'rejection' is not replayable: its text depends on what was draf"):
        replay(copy.deepcopy(medusa), served, chain)


def test_replay_of_one_drafter_tells_what_another_serves(drafters: dict) -> None:
    """The text is fixed, so a stream that one drafter served gives the other's rounds."""
    served_by, replayed, target = (
        drafters[MedusaDrafter, torch.float64],
        drafters[Eagle3Drafter, torch.float64],
        tiny_target(),
    )
    prompts = PROMPTS[:3]
    streams = serve(served_by, target, prompts, shape=TreeShape(0), max_new_tokens=9, sampling_params=COLD)
    eagle = serve(replayed, target, prompts, shape=TreeShape(2, 2), max_new_tokens=9, sampling_params=COLD)
    for stream, trajectory in zip(streams, eagle, strict=True):
        assert torch.equal(stream["sequence", "tokens"], trajectory["sequence", "tokens"])
        # The two read different layers; these features are what the second's own serving recorded.
        stream["sequence", "features"] = trajectory["sequence", "features"]
    result = replay(copy.deepcopy(replayed), streams, TreeShape(2, 2))
    assert result.rounds.tolist() == [len(t["rounds", "anchor"]) for t in eagle]


def test_replay_without_drafts_takes_a_round_for_each_token(drafters: dict) -> None:
    drafter = drafters[MedusaDrafter, torch.float64]
    streams = serve(drafter, tiny_target(), PROMPTS[:2], shape=TreeShape(2), max_new_tokens=5, sampling_params=COLD)
    result = replay(copy.deepcopy(drafter), streams, TreeShape(0))
    assert result.rounds.tolist() == [5, 5] and result.acceptance_length == 1.0


def test_acceptance_of_literal_counts() -> None:
    result = Replay(torch.tensor([6, 9]), torch.tensor([2, 6]))
    assert result.acceptance.tolist() == [3.0, 1.5]
    assert result.acceptance_length == 15 / 8


# ---- the gate -------------------------------------------------------------------------------------------------------


def small_gate(requests: int = 2, margin: float = 0.0) -> Gate:
    parts = TargetParts.of(tiny_target())
    drafter = MedusaDrafter.from_target(parts, draft_vocab=torch.arange(8)).double()
    return Gate(requests, margin, TreeShape(2), drafter)


def arrivals(*numbers: int) -> list[TensorDict]:
    return [TensorDict({"request": torch.tensor(n)}) for n in numbers]


def numbers(trajectories: Sequence[TensorDict]) -> list[int]:
    return [int(t["request"]) for t in trajectories]


def test_arrivals_pass_until_the_gate_holds() -> None:
    gate = small_gate(requests=3)
    assert numbers(gate.admit(arrivals(1, 2))) == [1, 2] and not gate.ready
    gate.hold()
    assert numbers(gate.admit(arrivals(3, 4))) == [] and not gate.ready
    assert numbers(gate.admit([])) == []
    with pytest.raises(RuntimeError, match="the gate holds back 2 requests of 3; call hold"):
        gate.decide({}, {})
    assert numbers(gate.admit(arrivals(5, 6, 7))) == [6, 7] and gate.ready
    assert numbers(gate.admit(arrivals(8))) == [8]


_NUMBERS = count()


def of_engines(*engines: str) -> list[TensorDict]:
    """One request of each."""
    return [TensorDict({"request": torch.tensor(next(_NUMBERS))}).set_non_tensor("source", e) for e in engines]


def test_later_parts_of_a_request_that_decides_are_not_learned_from_before() -> None:
    gate = small_gate(requests=2)
    assert numbers(gate.admit(arrivals(1, 2))) == [1, 2]
    gate.hold()
    assert numbers(gate.admit(arrivals(1, 1, 3, 1))) == [3]  # both places are of request 1, whose last part waits too
    assert gate.ready and numbers(gate._held) == [1, 1, 1]
    elsewhere = arrivals(1)[0].set_non_tensor("source", "another engine")
    assert gate.admit([elsewhere]) == [elsewhere]  # another request: engines number their own


def test_later_parts_of_a_request_that_takes_an_open_place_wait_too() -> None:
    gate = small_gate(requests=4)
    gate.admit(of_engines("few"))
    gate.hold()
    gate.admit(of_engines(*["many"] * 6))  # two are held, the share of this engine
    (first, other), (few,) = of_engines("many", "many"), of_engines("few")
    # One place is open, and nothing more may arrive in time: the first part takes it, and the second one waits.
    assert gate.admit([first, first.copy(), other, few]) == [other]
    assert numbers(gate._held[-3:]) == numbers([few, first, first])


def test_each_engine_that_sends_has_an_equal_share_of_a_decision() -> None:
    gate = small_gate(requests=4)
    gate.admit(of_engines("few"))
    gate.hold()
    passed = gate.admit(of_engines(*["many"] * 5))
    assert len(passed) == 3 and not gate.ready  # its share is held; the others are learned from
    assert gate.admit(of_engines("few", "many", "few", "few")) != [] and gate.ready
    assert [engine_of(each) for each in gate._held] == ["many", "many", "few", "few"]


def test_an_engine_that_has_gone_has_no_share_of_a_decision() -> None:
    gate = small_gate(requests=4)
    gate.admit(of_engines("gone", *["here"] * (8 * 4 - 1)))
    gate.hold()
    gate.admit(of_engines("here"))
    assert len(gate._held) == 1
    gate.admit(of_engines("here", "here", "here"))
    assert gate.ready


def test_a_decision_that_waited_for_a_share_takes_what_comes_shares_first() -> None:
    gate = small_gate(requests=4)
    gate.admit(of_engines("few"))
    gate.hold()
    assert len(gate.admit(of_engines(*["many"] * 6))) == 4 and not gate.ready
    # Two places are open, and two more may arrive in time: a share goes before who came first.
    assert [engine_of(each) for each in gate.admit(of_engines("many", "many", "few"))] == ["many"]
    assert [engine_of(each) for each in gate._held] == ["many", "many", "few", "many"] and gate.ready


@pytest.mark.parametrize("requests", [8, 24])
@pytest.mark.parametrize("poll", [1, 5])
def test_an_engine_that_is_slow_delays_no_decision(requests: int, poll: int) -> None:
    """At 2% of the other's rate; a decision of 8 waited for it for 37 arrivals on average, and for up to 149."""
    gate = small_gate(requests)
    slow = (torch.rand(50 * requests, generator=torch.Generator().manual_seed(0)) < 0.02).tolist()
    stream, number, taken, held = iter(of_engines(*["slow" if each else "fast" for each in slow])), 0, 0, Counter()
    while polled := list(islice(stream, poll)):
        gate.hold()
        gate.admit(polled)
        number += len(polled)
        taken += sum(engine_of(each) == "slow" for each in polled)
        if gate.ready:
            assert requests <= number < 2 * requests + poll
            held.update(map(engine_of, gate._held))
            gate._held, gate._arrived, number = [], 0, 0
    assert held["slow"] > 0.9 * taken > 0  # its claims come first: nearly all that it sends decides


def test_a_resumed_gate_decides_no_later() -> None:
    gate, again = small_gate(requests=4), small_gate(requests=4)
    gate.admit(of_engines("few"))
    gate.hold()
    gate.admit(of_engines(*["many"] * 6))
    again.load_state_dict(gate.state_dict())
    again.admit(of_engines("many", "many"))
    assert again.ready


@pytest.mark.parametrize(
    ("candidate", "margin", "publish"),
    [([3.0, 2.0], 0.0, True), ([2.0, 2.0], 0.0, False), ([2.0, 2.0], 0.01, True), ([1.0, 2.5], 0.2, False)],
)
def test_decision_on_literal_numbers(
    candidate: list[float], margin: float, publish: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = small_gate(requests=2, margin=margin)
    weights = {name: tensor.clone() for name, tensor in gate._drafter.published().items()}
    gate.hold()
    gate.admit(arrivals(1, 2))
    results = iter([candidate, [2.0, 2.0]])

    def fake(drafter: Drafter, trajectories: Sequence[TensorDict], shape: TreeShape) -> Replay:
        assert numbers(trajectories) == [1, 2] and shape == TreeShape(2)
        return Replay(torch.tensor(next(results)) * 4, torch.tensor([4, 4]))

    monkeypatch.setattr(gate_module, "replay", fake)
    decision, released = gate.decide(weights, weights)
    first, second = (c - 2 for c in candidate)
    mean, half = (first + second) / 2, 1.96 * (abs(first - second) / 2) / 2**0.5
    assert decision.publish is publish
    assert decision.difference == pytest.approx(mean)
    assert decision.interval == pytest.approx((mean - half, mean + half))
    assert (decision.candidate, decision.serving) == pytest.approx((sum(candidate) / 2, 2.0))
    assert decision.requests == 2 and numbers(released) == [1, 2]
    # The gate is free again.
    assert not gate.holding and not gate.ready
    assert numbers(gate.admit(arrivals(3))) == [3]


@pytest.mark.parametrize("kind", [Eagle3Drafter, MedusaDrafter])
def test_a_better_drafter_is_published_and_a_destroyed_one_is_not(drafters: dict, kind: type[Drafter]) -> None:
    drafter = drafters[kind, torch.float64]
    good = {name: tensor.clone() for name, tensor in drafter.published().items()}
    bad: dict[str, Tensor] = {n: torch.randn_like(t) if t.is_floating_point() else t for n, t in good.items()}
    shape = TreeShape(3)
    held = serve(drafter, tiny_target(), PROMPTS, shape=shape, max_new_tokens=16, num_slots=6, sampling_params=COLD)
    gate = Gate(6, 0.05, shape, copy.deepcopy(drafter))
    for candidate, serving, publish in ((bad, good, False), (good, bad, True), (good, good, True)):
        gate.hold()
        assert gate.admit(held) == [] and gate.ready
        decision, released = gate.decide(candidate, serving)
        assert decision.publish is publish
        assert len(released) == 6
        served = 96 / sum(len(t["rounds", "anchor"]) for t in held)
        assert (decision.candidate if candidate is good else decision.serving) == pytest.approx(served)


@pytest.mark.parametrize("margin", [0.05, 100.0])
def test_a_candidate_that_cannot_draft_is_refused_with_the_reason_and_the_next_one_decided(
    drafters: dict, margin: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter, shape = drafters[MedusaDrafter, torch.float64], TreeShape(3)
    good = {name: tensor.clone() for name, tensor in drafter.published().items()}
    bad = {**good, "lm_heads.0.weight": good["lm_heads.0.weight"] * float("nan")}
    held = serve(drafter, tiny_target(), PROMPTS, shape=shape, max_new_tokens=16, num_slots=6, sampling_params=COLD)
    gate = Gate(6, margin, shape, copy.deepcopy(drafter))

    def decide(candidate: dict[str, Tensor]) -> Decision:
        gate.hold()
        assert gate.admit(held) == []
        decision, released = gate.decide(candidate, good)
        assert len(released) == 6 and not gate.holding
        return decision

    refused = decide(bad)
    assert not refused.publish and refused.reason is not None and "'lm_heads.0.weight' has" in refused.reason
    # It counts as plain decoding.
    assert refused.candidate == 1.0 and refused.difference == pytest.approx(1 - decide(good).serving, abs=0.2)
    propose, calls = MedusaDrafter.propose, []

    def fails_once(self: MedusaDrafter, *args: object) -> object:
        calls.append(1)
        if len(calls) == 1:
            raise ValueError("overflow")
        return propose(self, *args)

    monkeypatch.setattr(MedusaDrafter, "propose", fails_once)
    failed = decide(good)
    assert not failed.publish and failed.reason == "the drafter fails with these weights: overflow"
    assert decide(good).publish and decide(good).reason is None


def test_the_offered_weights_are_what_is_decided_on(drafters: dict) -> None:
    """Weights that are not a drafter's are an error that names them, not a decision."""
    drafter = drafters[MedusaDrafter, torch.float64]
    gate = Gate(1, 0.0, TreeShape(2), copy.deepcopy(drafter))
    weights = drafter.published()
    gate.hold()
    gate.admit(arrivals(1))
    with pytest.raises(ValueError, match="'lm_heads.0.weight' .* is missing"):
        gate.decide({name: t for name, t in weights.items() if name != "lm_heads.0.weight"}, weights)
