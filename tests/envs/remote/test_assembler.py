"""Rounds in SGLang's form, made from trajectories that the embedded engine recorded, must become those again."""

import random
import time
from dataclasses import replace

import pytest
import torch
from engine_rounds import assert_same, links, rounds_of, sampling_of, without_first_round
from hypothesis import given, settings
from hypothesis import strategies as st

from aurora_rl.envs.remote.assembler import TrajectoryAssembler, parents_of, request_number
from aurora_rl.policies import Eagle3Drafter, TargetParts, TreeShape
from aurora_rl.sampling_params import SamplingParams
from aurora_rl.testing import tiny_target, tiny_trajectory
from aurora_rl.trajectories import acceptance_length


@pytest.fixture(scope="module")
def drafter():
    target = tiny_target()
    torch.manual_seed(0)
    return Eagle3Drafter.from_target(TargetParts.of(target), draft_vocab=torch.arange(16)).double()


def served(drafter, request=7, **kwargs):
    return tiny_trajectory(drafter, shape=TreeShape(3, 2, 5), max_new_tokens=20, request=request, **kwargs)


def chain_start(drafter, request=7):
    """A trajectory whose first round accepted nothing, so that an engine's prefill would have made the same token."""
    for seed in range(request, request + 200):
        trajectory = served(drafter, request=seed)
        anchor = trajectory["rounds", "anchor"]
        if len(anchor) > 4 and int(anchor[1] - anchor[0]) == 1:
            return trajectory
    raise AssertionError("no such trajectory")


@pytest.fixture
def out():
    return []


def new_assembler(out, **kwargs):
    return TrajectoryAssembler(
        lambda trajectory, *_: out.append(trajectory), **{"max_bytes": 1 << 20, "store_bytes": 1 << 20, **kwargs}
    )


def play(assembler, trajectory, *, rid=None, cached=0, chunks=1, version=0, rounds=None, finish=True, terminated=False):
    tokens, prompt = trajectory["sequence", "tokens"], int(trajectory["sequence", "prompt_length"])
    rid = rid or str(int(trajectory["request"]))
    assert assembler.begin(rid, tokens[:prompt].tolist(), cached, version, sampling_of(trajectory))
    parts = trajectory["sequence", "features"][cached:prompt].chunk(chunks)
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        assembler.prompt(rid, part, {"hidden": trajectory["sequence", "hidden"][:1]} if last else None)
    for drafted in rounds if rounds is not None else rounds_of(trajectory, version=version):
        assembler.round(rid, drafted)
    if finish:
        assembler.finish(rid, tokens[prompt:].tolist(), terminated=terminated)


def await_count(assembler, reason, count=1):
    deadline = time.monotonic() + 5
    while assembler.counts[reason] < count:
        assert time.monotonic() < deadline, dict(assembler.counts)
        time.sleep(0.005)


@pytest.mark.parametrize("chunks", [1, 3])
def test_rounds_become_the_trajectory_that_they_came_from(drafter, out, chunks):
    trajectory = chain_start(drafter)
    assembler = new_assembler(out)
    play(assembler, trajectory, chunks=chunks)
    assembler.close()
    assert_same(out[0], without_first_round(trajectory))
    assert assembler.counts == {"recorded": 1} and assembler._reserved == assembler._released > 0


def test_sums_over_the_recorded_requests_are_told(drafter, out):
    assembler = new_assembler(out)
    assert assembler.totals.acceptance_length is None
    for request in (7, 8):
        play(assembler, chain_start(drafter, request), rid=f"r{request}", terminated=request == 8)
    play(assembler, served(drafter, 9), cached=4)  # not recorded: nobody knows the prefix
    assembler.close()
    sums = assembler.totals
    assert sums.requests == assembler.counts["recorded"] == 2 and assembler.counts["prefix"] == 1
    assert sums.terminated == 1
    assert sums.prompt_tokens == sum(int(t["sequence", "prompt_length"]) for t in out)
    assert sums.drafted_tokens == sum(len(t["nodes", "tokens"]) for t in out)
    assert sums.tokens == sum(len(t["sequence", "tokens"]) - int(t["sequence", "prompt_length"]) for t in out)
    lengths = [acceptance_length(t) for t in out]
    assert (sums.speculative_tokens, sums.speculative_rounds) == tuple(map(sum, zip(*lengths, strict=True)))
    assert sum(sums.accepted.values()) == sums.speculative_rounds
    assert sum(count * times for count, times in sums.accepted.items()) == sum(
        int(t["nodes", "accepted"].sum()) for t in out
    )
    assert sums.acceptance_length == sums.speculative_tokens / sums.speculative_rounds > 1


def test_a_round_begun_after_the_end_is_left_out(drafter, out):
    trajectory = chain_start(drafter)
    rounds = list(rounds_of(trajectory))
    late = list(rounds_of(trajectory))[-1]
    late.anchor = torch.tensor(len(trajectory["sequence", "tokens"]) - 1)
    assembler = new_assembler(out)
    play(assembler, trajectory, rounds=[*rounds, late])
    assembler.close()
    assert_same(out[0], without_first_round(trajectory))


def test_acceptance_ends_with_the_text(drafter, out):
    # A round that accepted two drafts or more, of which the text keeps one.
    long, seed = None, 7
    while long is None:
        trajectory = chain_start(drafter, seed)
        seed = int(trajectory["request"]) + 1
        assert seed < 500, "no such trajectory"
        anchor, prompt = trajectory["rounds", "anchor"], int(trajectory["sequence", "prompt_length"])
        long = next((r for r in range(1, len(anchor) - 1) if int(anchor[r + 1] - anchor[r]) > 2), None)
    full = without_first_round(trajectory)
    end = int(anchor[long]) + 2  # the text stops at the first accepted draft of this round
    assembler = new_assembler(out)
    rid = "1"
    play(assembler, trajectory, rid=rid, rounds=list(rounds_of(trajectory))[:long], finish=False)
    assembler.finish(rid, trajectory["sequence", "tokens"][prompt:end].tolist(), terminated=True)
    assembler.close()
    assert len(out[0]["sequence", "tokens"]) == end and len(out[0]["sequence", "features"]) == end - 1
    last = slice(*out[0]["rounds", "offset"][-2:].tolist())
    assert int(out[0]["nodes", "accepted"][last].sum()) == 1
    before = int(out[0]["rounds", "offset"][-2])
    assert torch.equal(out[0]["nodes", "accepted"][:before], full["nodes", "accepted"][:before])


def with_lost_nodes(drafted, at):
    """The round with a node that no link leads to at a place, and a child of it after that."""

    def moved(places):
        return torch.where(places >= at, places + 2, places)

    def spread(rows, filler):
        return torch.cat([rows[:at], filler.expand(2, *rows.shape[1:]), rows[at:]])

    child = spread(moved(drafted.first_child), torch.tensor(-1))
    child[at] = at + 1
    return replace(
        drafted,
        tokens=spread(drafted.tokens, torch.tensor(3)),
        first_child=child,
        next_sibling=spread(moved(drafted.next_sibling), torch.tensor(-1)),
        path=moved(drafted.path),
        joint_log_probs=torch.cat(
            [drafted.joint_log_probs[: at - 1], -torch.ones(2), drafted.joint_log_probs[at - 1 :]]
        ),
        features=spread(drafted.features, torch.tensor(9.0)),
        target={key: spread(rows, torch.tensor(9.0)) for key, rows in drafted.target.items()},
    )


@pytest.mark.parametrize("at", [1, 3])
def test_a_child_that_the_engine_kept_without_its_parent_is_left_out(drafter, out, at):
    trajectory = chain_start(drafter)
    assembler = new_assembler(out)
    play(assembler, trajectory, rounds=[with_lost_nodes(each, at) for each in rounds_of(trajectory)])
    assembler.close()
    assert_same(out[0], without_first_round(trajectory))


@pytest.mark.parametrize(("brought", "served"), [(3, 5), (5, 3)])
def test_a_cached_prefix_takes_its_features_from_the_request_that_brought_it(drafter, out, brought, served):
    trajectory = chain_start(drafter)
    assembler = new_assembler(out)
    play(assembler, trajectory, rid="1", version=brought)
    await_count(assembler, "recorded")
    play(assembler, trajectory, rid="2", cached=3, version=served)
    assembler.close()
    first, second = out
    assert torch.equal(second["sequence", "features"], first["sequence", "features"])
    assert second["rounds", "policy_version"].unique().tolist() == [served]
    assert second["rounds", "cache_version"].unique().tolist() == [3], "rows of the drafter's cache are older"


def test_a_cached_prefix_of_a_request_that_still_runs_is_found(drafter, out):
    trajectory = chain_start(drafter)
    assembler = new_assembler(out)
    play(assembler, trajectory, rid="1", finish=False)
    play(assembler, trajectory, rid="2", cached=3)
    await_count(assembler, "recorded")
    assembler.close()
    assert_same(out[0].exclude("request"), without_first_round(trajectory).exclude("request"))


def test_an_unknown_prefix_is_counted_and_not_recorded(drafter, out):
    assembler = new_assembler(out)
    play(assembler, chain_start(drafter), cached=3)
    assembler.close()
    assert out == [] and assembler.counts == {"prefix": 1}


def test_a_missing_round_is_noticed(drafter, out):
    trajectory = chain_start(drafter)
    assembler = new_assembler(out)
    play(assembler, trajectory, rounds=list(rounds_of(trajectory))[:-2])
    assembler.close()
    assert out == [] and assembler.counts == {"incomplete": 1}


def test_a_missing_round_is_noticed_where_the_last_one_runs_over_the_end(drafter, out):
    trajectory = chain_start(drafter)
    first, second, *rest = rounds_of(trajectory)
    last = rest[-1]
    over = replace(last, **{name: torch.cat([getattr(last, name)] * 20) for name in ("features",)})
    over = replace(over, path=torch.arange(len(over.features)), path_length=torch.tensor(len(over.features)))
    over = replace(over, target={name: torch.cat([rows] * 20) for name, rows in last.target.items()})
    assembler = new_assembler(out)
    play(assembler, trajectory, rounds=[first, *rest[:-1], over])
    assembler.close()
    assert out == [] and assembler.counts == {"incomplete": 1}


def test_beyond_the_memory_requests_are_served_without_a_record(drafter, out):
    trajectory = chain_start(drafter)
    assembler = new_assembler(out, max_bytes=100)
    play(assembler, trajectory, rid="1", finish=False)
    assert not assembler.begin("2", [1, 2], 0, 0, SamplingParams())
    assert assembler.counts == {"memory": 1}
    assembler.drop("1", "aborted")
    assert assembler.begin("3", [1, 2], 0, 0, SamplingParams())
    assembler.close()
    assert assembler.counts == {"memory": 1, "aborted": 1}


def test_without_scores_there_are_no_log_probabilities(drafter, out):
    trajectory = chain_start(drafter)
    assembler = new_assembler(out)
    play(assembler, trajectory, rounds=list(rounds_of(trajectory, joint=False)))
    assembler.close()
    assert ("nodes", "log_probs") not in out[0].keys(True, True)
    assert_same(out[0], without_first_round(trajectory).exclude(("nodes", "log_probs")))


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=12), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_parents_come_back_from_links(choices, seed):
    parents = [choice % (node + 1) - 1 for node, choice in enumerate(choices)]
    child, sibling = links(parents)
    assert parents_of(child, sibling) == parents
    random.seed(seed)  # some other tree has other links
    another = [random.randrange(-1, node) if node else -1 for node in range(len(parents))]
    assert (links(another) == (child, sibling)) == (another == parents)


def test_ids_become_request_numbers():
    assert request_number("12") == 12
    assert 0 <= request_number("a-b") < 2**62 and request_number("a-b") != request_number("a-c")
    assert 0 <= request_number(str(2**70)) < 2**62
