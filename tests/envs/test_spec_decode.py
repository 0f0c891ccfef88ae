"""The environment as TorchRL sees it, the ends of requests, and requests that cannot be served."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from spec_decode_worlds import (
    LAYERS,
    MANY,
    NODES,
    VOCAB,
    Truth,
    World,
    check,
    knowing,
    letters,
    next_tokens,
    plain,
    random_drafter,
    requests,
)
from tensordict import TensorDictBase
from torchrl.collectors import Collector
from torchrl.envs.utils import check_env_specs

from aurora_rl.envs import Completion, Request, SamplingParams, SpecDecodeEnv, TransformersEngine
from aurora_rl.policies import DrafterPolicy, TreeShape
from aurora_rl.trajectories import validate

# ---- the environment as TorchRL sees it -------------------------------------------------------------------------


@pytest.mark.parametrize("idle", [False, True], ids=["busy", "one slot idle"])
def test_specs(idle: bool) -> None:
    # Both full and partial resets; the requests end after few rounds, so that resets happen in the checked rollout.
    numbers = iter(range(10**6))

    def source() -> Request | None:
        number = next(numbers)
        return (
            None if idle and number % 3 == 1 else Request(number, torch.tensor([1, 2, 3]), SamplingParams(max_tokens=3))
        )

    engine = World([]).engine
    env = SpecDecodeEnv(engine, source, num_nodes=NODES)
    check_env_specs(env, seed=0, break_when_any_done="both")


def test_collector() -> None:
    wanted = requests(*MANY)
    truths = {r.id: Truth.of(r).tokens for r in wanted}
    source = iter(range(10**6))
    done: list[Completion] = []

    def again() -> Request:
        number = next(source)
        request = wanted[number % len(wanted)]
        return Request(number, request.prompt, request.sampling_params)

    world = World([])
    env = SpecDecodeEnv(world.engine, again, num_nodes=NODES, on_completion=done.append)
    policy = DrafterPolicy(
        random_drafter(), world.engine.store, num_nodes=NODES, shape=TreeShape(3, 2, NODES), version=7
    )
    collector = Collector(env, policy, frames_per_batch=3 * 16, total_frames=3 * 48)
    rewards = []
    for batch in collector:
        assert batch.shape == (3, 16) and bool((batch["policy_version"] == 7).all())
        rewards.append(batch["next", "reward"])
    collector.shutdown()
    assert len(rewards) == 3 and len(done) > len(wanted)
    for completion in done:
        assert completion.tokens.tolist() == truths[completion.request.id % len(wanted)]
    in_flight = int((world.engine.store.lengths - world.engine.store.prompt_lengths).sum())
    assert int(torch.cat(rewards).sum()) == sum(len(c.tokens) for c in done) + in_flight


# ---- ends -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["plain", "chain", "tree"])
def test_stop_tokens(policy: str) -> None:
    wanted = requests(*MANY)
    truths = [Truth.of(r, stop_tokens=(6, 2)) for r in wanted]
    assert {True, False} == {t.terminated for t in truths}
    world = World(wanted, stop_tokens=(6, 2))
    check(world, world.run(plain if policy == "plain" else knowing(truths, chain=policy == "chain")), truths)


@pytest.mark.parametrize("policy", ["plain", "chain", "tree"])
def test_stop_tokens_are_tokens_like_others_where_a_request_says_so(policy: str) -> None:
    wanted = requests(*MANY)
    for request in wanted[::2]:
        request.sampling_params = replace(request.sampling_params, ignore_eos=True)
    truths = [Truth.of(r, stop_tokens=() if r.sampling_params.ignore_eos else (6, 2)) for r in wanted]
    assert any({6, 2} & set(truth.tokens[:-1]) for truth in truths[::2]) and any(t.terminated for t in truths[1::2])
    world = World(wanted, stop_tokens=(6, 2))
    check(world, world.run(plain if policy == "plain" else knowing(truths, chain=policy == "chain")), truths)
    for truth in truths:
        trajectory = world.completions[truth.request.id].trajectory
        assert trajectory is not None
        width = 16  # of the tiny target
        validate(trajectory, vocab_size=VOCAB, feature_size=width * len(LAYERS), hidden_size=width)
        assert trajectory["sequence", "tokens"].tolist() == [*truth.request.prompt.tolist(), *truth.tokens]
        features = truth.features[: len(trajectory["sequence", "features"])]
        assert torch.allclose(trajectory["sequence", "features"], features, rtol=0, atol=1e-6)


def test_a_stop_string_ends_what_stop_tokens_do_not() -> None:
    request = requests((4, 18))[0]
    known = Truth.of(request).tokens
    request.sampling_params = replace(request.sampling_params, ignore_eos=True, stop=(letters(known)[6:9],))
    truth = Truth.of(request)
    assert truth.terminated
    world = World([request], stop_tokens=tuple(set(known)), decode=letters)
    check(world, world.run(knowing([truth])), [truth])


def test_a_stop_token_as_the_last_of_the_budget_terminates() -> None:
    request = requests((4, 12))[0]
    known = Truth.of(request).tokens
    request.sampling_params = SamplingParams(max_tokens=known.index(known[5]) + 1)
    truth = Truth.of(request, stop_tokens=(known[5],))
    assert truth.terminated and len(truth.tokens) == request.sampling_params.max_tokens
    world = World([request], stop_tokens=(known[5],))
    check(world, world.run(knowing([truth])), [truth])


@pytest.mark.parametrize("policy", ["plain", "chain", "tree"])
def test_stop_strings(policy: str) -> None:
    # A stop string of three tokens, hence one that begins in one round and ends in another or inside a path.
    wanted = requests((4, 18), (3, 24), (9, 20), (2, 9))
    for request in wanted[:3]:
        said = letters(Truth.of(request).tokens)
        request.sampling_params = replace(request.sampling_params, stop=(said[6:9], "zz"))
    truths = [Truth.of(r) for r in wanted]
    assert [t.terminated for t in truths] == [True, True, True, False]
    world = World(wanted, decode=letters)
    check(world, world.run(plain if policy == "plain" else knowing(truths, chain=policy == "chain")), truths)


def test_record_false_leaves_no_trajectory() -> None:
    wanted = requests((4, 6))
    world = World(wanted, record=False)
    check(world, world.run(world.env.rand_action), [Truth.of(r) for r in wanted])
    assert world.completions[0].trajectory is None


def test_a_full_reset_drops_what_is_in_flight() -> None:
    wanted = requests(*MANY)
    world = World(wanted)
    td = world.env.reset()
    for _ in range(2):
        td = world.env.step_and_maybe_reset(plain(td))[1]
    served = set(world.completions)
    active = {int(i) for i in td["request"] if i >= 0}
    world.run(world.env.rand_action)
    assert set(world.completions) == {r.id for r in wanted} - (active - served)
    for id, completion in world.completions.items():
        assert completion.tokens.tolist() == Truth.of(wanted[id]).tokens


# ---- bad requests -----------------------------------------------------------------------------------------------

BAD: dict[str, tuple[Request, str]] = {
    "empty": (Request(9, torch.tensor([], dtype=torch.int64)), "request 9: the prompt is empty"),
    "too long": (
        Request(9, torch.ones(60, dtype=torch.int64), SamplingParams(max_tokens=5)),
        "request 9: a prompt of 60 tokens and 5 new ones exceed the context of 64; shorten",
    ),
    "unknown token": (
        Request(9, torch.tensor([1, VOCAB])),
        r"request 9: the prompt's tokens must lie in 0\.\.7 "
        r".*, got 1\.\.8",
    ),
    "sampled under greedy": (
        Request(9, torch.tensor([1]), SamplingParams(0.5, max_tokens=4)),
        "request 9: temperature 0.5 needs the rule 'sample_and_match', not 'greedy'",
    ),
    "stop without decode": (
        Request(9, torch.tensor([1]), SamplingParams(max_tokens=4, stop=("a",))),
        "request 9: stop strings need",
    ),
    "id": (Request(-3, torch.tensor([1])), "request -3: an id is not negative"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_request_is_named_and_changes_nothing(case: str) -> None:
    bad, message = BAD[case]
    good = requests((5, 12), (3, 4), (4, 6))
    world = World([good[0], bad, good[1], bad, good[2]], slots=2, rule="greedy")
    env, store = world.env, world.engine.store
    with pytest.raises(ValueError, match=message):
        env.check(bad)
    with pytest.raises(ValueError, match=message):  # taken together with a good one, which must not be lost
        env.reset()
    assert env.num_active == 0 and store.lengths.tolist() == [0, 0]
    td = env.reset()
    assert env.num_active == 2
    for _ in range(3):
        td = env.step_and_maybe_reset(plain(td))[1]
    with pytest.raises(ValueError, match=message):  # the second request ends, and its slot asks for the next
        env.step_and_maybe_reset(plain(td))
    assert env.num_active == 1 and store.lengths.tolist() == [9, 0]
    while env.num_active:  # serving goes on from where it was
        td = env.step_and_maybe_reset(plain(td))[1]
    assert {id: c.tokens.tolist() for id, c in world.completions.items()} == {r.id: Truth.of(r).tokens for r in good}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_request_that_is_handed_back_ends_no_other(case: str) -> None:
    bad, message = BAD[case]
    good = requests((5, 12), (3, 4), (4, 6))
    refused: list[tuple[Request, str]] = []
    world = World(
        [bad, good[0], good[1], bad, bad, good[2], bad],
        slots=2,
        rule="greedy",
        on_refused=lambda *both: refused.append(both),
    )
    world.run(plain)
    assert [request for request, _ in refused] == [bad] * 4 and all(re.match(message, reason) for _, reason in refused)
    assert {id: c.tokens.tolist() for id, c in world.completions.items()} == {r.id: Truth.of(r).tokens for r in good}


def test_the_largest_tree_that_fits_is_verified_to_the_end_of_a_slot() -> None:
    request = Request(
        0, torch.ones(4, dtype=torch.int64), SamplingParams(max_tokens=60)
    )  # fills the slot, its last rounds too
    most = TransformersEngine.max_nodes
    world = World([request], slots=1, num_nodes=most)

    def chain(td: TensorDictBase) -> TensorDictBase:
        tokens = torch.zeros(1, most, dtype=torch.int64)
        parents = torch.arange(-1, most - 1)[None]
        td["draft"] = {"tokens": tokens, "parents": parents, "mask": torch.ones(1, most, dtype=torch.bool)}
        return td

    world.run(chain)
    assert world.completions[0].tokens.tolist() == next_tokens((1,) * 4, request.sampling_params, "llama", 60)
    with pytest.raises(
        ValueError, match=f"num_nodes={most + 1} is more than the {most} nodes that the engine verifies"
    ):
        World([], num_nodes=most + 1)


def test_the_largest_request_that_fits_is_served() -> None:
    request = Request(0, torch.ones(59, dtype=torch.int64), SamplingParams(max_tokens=5))
    world = World([request], slots=1)
    world.run(plain)
    assert world.completions[0].tokens.tolist() == Truth.of(request).tokens
