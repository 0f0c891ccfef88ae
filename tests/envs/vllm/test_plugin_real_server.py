"""Real vLLM, unpatched, with our plugin in its worker (all of envs/vllm): records, swaps, learners."""

import json
import threading
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from same_rounds import (
    ask_all,
    assert_same_rounds,
    assert_same_sequence,
    assert_served_in_parts,
    recorded_here,
    without_end,
)
from sglang_requests import _numbers, other_weights, requests

from aurora_rl.cli import main as cli
from aurora_rl.collectors.handshake import Handshake
from aurora_rl.envs import Request, SamplingParams
from aurora_rl.envs.remote.plugin_server import PluginError
from aurora_rl.policies import TreeShape
from aurora_rl.policies.formats.files import load_drafter
from aurora_rl.training.served_weights import drafts_agreed
from aurora_rl.trajectories import RULE_CODES

pytestmark = pytest.mark.vllm
CHAIN = TreeShape(3, 1, 3)


@pytest.fixture
def attached(server, learner, handshake):
    server.attach(handshake=handshake, trajectories=learner.trajectories, weights=learner.weights)
    yield server
    server.detach()


def with_weights(parts, vllm_models, weights):
    drafter = load_drafter(vllm_models / "eagle3", parts)
    drafter.install(weights)
    return drafter


@contextmanager
def states_of(model, layers):
    """What enters layers in the pass that is run meanwhile."""
    states = {}

    def keep(layer):
        return lambda module, args, kwargs: states.update({layer: args[0] if args else kwargs["hidden_states"]})

    handles = [model.model.layers[n].register_forward_pre_hook(keep(n), with_kwargs=True) for n in layers]
    yield states
    for handle in handles:
        handle.remove()


def test_both_engines_record_the_same(attached, learner, model, drafter, tmp_path):
    # Two one after the other, three side by side. Of the last two the prompts are read in chunks, next to each other:
    # there vLLM's drafter gets another token at the end of each chunk, and may draft something else (docs/vllm.md).
    asked, chunked = (list(map(without_end, each)) for each in (requests(5, 40, 12, 30, 60), requests(300, 200)))
    answers = [attached.generate(each) for each in asked[:2]]
    answers += ask_all(attached, asked[2:]) + ask_all(attached, chunked)
    recorded = learner.take(*(each.request.id for each in answers))
    own = recorded_here(model, drafter, [*asked, *chunked], CHAIN, tmp_path)
    compared = 0
    for answer, trajectory in zip(answers, recorded, strict=True):
        embedded = own[answer.request.id]
        assert answer.tokens.tolist() == embedded["sequence", "tokens"][len(answer.request.prompt) :].tolist()
        if answer.request in asked:
            compared += assert_same_rounds(trajectory, embedded)
        assert_same_sequence(trajectory, embedded)
        assert RULE_CODES[int(trajectory["sampling", "rule"])] == "greedy"
        assert float(trajectory["sampling", "temperature"]) == 0.0
    assert compared > 30
    assert sum(int(t["nodes", "accepted"].sum()) for t in recorded) > 10
    status = attached.status()
    assert status["skipped"] == {"opt_out": 1}  # the request that showed the hooks
    accepted = Counter({int(count): rounds for count, rounds in status["served"]["accepted"].items()})
    told = sum((Counter(answer.accepted) for answer in answers), Counter())
    # vLLM counts drafts beyond the budget, too, in the last round of an answer.
    assert accepted.total() == told.total() and (told - accepted).total() <= len(answers)
    assert status["served"]["requests"] == len(answers)
    assert status["served"]["tokens"] == sum(len(answer.tokens) for answer in answers)
    assert status["served"]["speculative_rounds"] == sum(answer.rounds for answer in answers)


def test_long_answers_come_in_parts_while_they_are_written(server, model, drafter, handshake, learner, tmp_path):
    server.attach(handshake=handshake, trajectories=learner.trajectories, weights=learner.weights, part_tokens=24)
    try:
        asked = list(map(without_end, requests(5, 20, new=150, seed=3)))
        assert_served_in_parts(server, learner, model, drafter, asked, CHAIN, tmp_path, 24)
    finally:
        server.detach()


def test_text_is_that_of_plain_decoding(attached, model):
    asked = requests(17, new=48, seed=9)[0]
    plain = model.generate(asked.prompt[None], max_new_tokens=48, do_sample=False)[0, len(asked.prompt) :]
    assert attached.generate(asked).tokens.tolist() == plain.tolist()


@pytest.mark.parametrize("running", [False, True])
def test_a_cached_prefix_is_recorded_with_its_features(attached, learner, model, drafter, tmp_path, running):
    first = requests(100, seed=2 + running, new=200 if running else 32)[0]
    longer = Request(next(_numbers), torch.cat([first.prompt, torch.tensor([9, 8, 7])]), SamplingParams(max_tokens=32))
    if running:
        thread = threading.Thread(target=attached.generate, args=(first,))
        thread.start()
        while attached.status()["seen"]["verify"] < 3:
            pass
        attached.generate(longer)
        thread.join()
    else:
        attached.generate(first)
        attached.generate(longer)
    (trajectory,) = learner.take(longer.id)
    own = recorded_here(model, drafter, [longer], CHAIN, tmp_path)
    assert assert_same_rounds(trajectory, own[longer.id]) > 5


def test_a_text_as_long_as_it_may_be_has_rounds_without_drafts_at_its_end(attached, learner, model):
    """vLLM verifies fillers there, which no drafter made."""
    (prompt,) = (each.prompt for each in requests(400, seed=7))
    asked = Request(next(_numbers), prompt, SamplingParams(max_tokens=80, ignore_eos=True))
    answer = attached.generate(asked)
    assert len(answer.tokens) == 80  # as many as the server's 480 leave
    (trajectory,) = learner.take(asked.id)
    text = torch.cat([asked.prompt, answer.tokens])
    assert torch.equal(trajectory["sequence", "tokens"], text)
    with states_of(model, (2, 4, 5)) as states:
        model(text[None, :-1])
    expected = torch.cat([states[layer][0] for layer in (2, 4, 5)], dim=-1)
    torch.testing.assert_close(trajectory["sequence", "features"], expected, atol=2e-5, rtol=0)
    sizes = trajectory["rounds", "offset"].diff()
    assert sizes[0] == 3 and sizes[-1] == 0 and bool((trajectory["rounds", "anchor"].diff() > 0).all())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"frequency_penalty": 0.5}, "penalty"),
        ({"repetition_penalty": 1.2}, "penalty"),
        ({"min_tokens": 2}, "penalty"),
        ({"structured_outputs": {"choice": ["a", "b"]}, "ignore_eos": False}, "grammar"),
        ({"vllm_xargs": {"aurora_rl": "false"}}, "opt_out"),
    ],
)
def test_requests_with_another_distribution_are_served_counted_and_not_recorded(attached, learner, change, reason):
    number, before = next(_numbers), Counter(attached.status()["skipped"])
    body = {"prompt": [5, 6, 7, 8], "max_tokens": 6, "temperature": 0.0, "ignore_eos": True, "request_id": str(number)}
    assert attached.post("/v1/completions", {**body, **change}, 60)["usage"]["completion_tokens"] >= 1
    (plain,) = requests(6, new=6)
    attached.generate(plain)
    learner.take(plain.id)
    assert number not in learner.got and Counter(attached.status()["skipped"]) - before == {reason: 1}


def test_sampled_requests_are_recorded(attached, learner):
    """By temperature alone: with top-k vLLM 0.32 itself ends in its sampler on a CPU, where it verifies drafts."""
    sampled = SamplingParams(temperature=0.7, seed=5, max_tokens=32)
    asked = [Request(next(_numbers), each.prompt, sampled) for each in requests(8, 9, 10, seed=8)]
    answers = ask_all(attached, asked)
    for answer, trajectory in zip(answers, learner.take(*(each.id for each in asked)), strict=True):
        assert trajectory["sequence", "tokens"][len(answer.request.prompt) :].tolist() == answer.tokens.tolist()
        assert RULE_CODES[int(trajectory["sampling", "rule"])] == "sample_and_match"
        assert float(trajectory["sampling", "temperature"]) == pytest.approx(0.7)
        assert int(trajectory["sampling", "seed"]) == 5


def test_ends_are_told_apart(attached, learner):
    """At its budget, at a stop token, and at a stop string, which the engine hears of as an abort."""
    (asked,) = requests(12, new=40, seed=3)
    text = attached.generate(asked).tokens
    again = Request(next(_numbers), asked.prompt, SamplingParams(max_tokens=40))
    first = next(i for i in range(4, 30) if int(text[i]) not in text[:i].tolist())
    answer = attached.generate(again, stop_tokens=[int(text[first])])
    assert answer.terminated and answer.tokens.tolist() == text[: first + 1].tolist()
    served = attached.post("/v1/completions", {"prompt": asked.prompt.tolist(), "max_tokens": 40, "temperature": 0}, 60)
    said, number = served["choices"][0]["text"], next(_numbers)
    body = {"prompt": asked.prompt.tolist(), "max_tokens": 40, "temperature": 0, "stop": [said[10:12]]}
    stopped = attached.post("/v1/completions", {**body, "request_id": str(number)}, 60)["choices"][0]
    assert stopped["finish_reason"] == "stop" and len(stopped["text"]) <= 10
    whole, ended, at_string = learner.take(asked.id, again.id, number)
    assert len(whole["sequence", "tokens"]) == 12 + 40 and len(ended["sequence", "tokens"]) == 12 + first + 1
    tokens = at_string["sequence", "tokens"].tolist()
    assert 12 < len(tokens) < 12 + 40 and tokens == whole["sequence", "tokens"][: len(tokens)].tolist()
    assert attached.status()["served"]["terminated"] == 2


def test_a_share_of_the_requests_is_captured(server, learner, handshake):
    server.attach(handshake=handshake, trajectories=learner.trajectories, weights=learner.weights, capture_rate=0.5)
    try:
        ask_all(server, requests(*[6] * 24, new=3))
        status = server.status()
        assert status["recorded"] + status["skipped"]["not_captured"] == 24
        assert 4 <= status["recorded"] <= 20
    finally:
        server.detach()


def test_recording_can_be_switched_off_and_on_in_service(attached, learner):
    silent, heard = requests(6, 7, new=6)
    assert not attached.set_recording(False)["recording"]
    attached.generate(silent)
    assert attached.set_recording(True)["recording"]
    attached.generate(heard)
    learner.take(heard.id)
    assert silent.id not in learner.got


# ---- attaching ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"feature_layers": (2, 4, 6)}, r"feature_layers is \(2, 4, 6\) at the learner and \(2, 4, 5\) at the engine"),
        ({"head_checksum": "0" * 16}, "output head differs.*float32"),
        ({"draft_map_checksum": ""}, r"draft vocabulary \(d2t\) differs"),
    ],
)
def test_a_learner_of_another_deployment_is_refused(server, learner, handshake, changed, message):
    another = Handshake(**{**handshake.__dict__, **changed})
    with pytest.raises(PluginError, match=message):
        server.attach(handshake=another, trajectories=learner.trajectories, weights=learner.weights)
    assert not server.status()["attached"]


def test_a_second_learner_is_refused_until_the_first_is_gone(attached, learner, handshake):
    with pytest.raises(PluginError, match="attached already; detach first"):
        attached.attach(handshake=handshake, trajectories=learner.trajectories, weights=learner.weights)


def test_the_command_tells_the_status_and_detaches(server, learner, handshake, capsys):
    server.attach(handshake=handshake, trajectories=learner.trajectories, weights=learner.weights)
    address = f"engine.plugin_address={server.plugin_address}"
    for kind, attached in (("status", True), ("detach", False), ("status", False)):
        assert cli.main(["vllm", kind, address]) == 0
        status = json.loads(capsys.readouterr().out)
        assert status["attached"] == attached and status["vllm"] == "0.32.0" and status["missing"] == []
    (after,) = requests(8, new=6, seed=3)
    assert len(server.generate(after).tokens) == 6
    assert learner.collector.poll(0.3) == []


# ---- swaps --------------------------------------------------------------------------------------------------------


def test_after_a_swap_the_server_drafts_what_the_new_weights_predict(
    attached, learner, model, drafter, parts, vllm_models, tmp_path
):
    weights = other_weights(drafter, 1)
    learner.publish(1, weights)
    (asked,) = requests(20, seed=4)
    text = attached.generate(asked).tokens
    (trajectory,) = learner.take(asked.id)
    assert set(trajectory["rounds", "policy_version"].tolist()) == {1}
    new = with_weights(parts, vllm_models, weights)
    own = recorded_here(model, new, [asked], CHAIN, tmp_path)
    assert text.tolist() == own[asked.id]["sequence", "tokens"][20:].tolist()
    assert assert_same_rounds(trajectory, own[asked.id]) > 5
    drafted, agreed = drafts_agreed(new, [trajectory], 1)
    assert drafted > 5 and agreed == drafted
    drafted, agreed = drafts_agreed(drafter, [trajectory], 1)
    assert agreed < 0.8 * drafted, "the comparison must tell the old weights from the new ones"
    learner.publish(2, other_weights(drafter, 0))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda w: {**w, "d2t": w["d2t"] + 1}, "draft map 'd2t' differs"),
        (
            lambda w: {**w, "midlayer.unheard_of.weight": torch.zeros(4)},
            "'midlayer.unheard_of.weight' is unknown",
        ),
        (lambda w: {**w, "fc.weight": torch.zeros(4, 4)}, "'fc.weight' must have shape"),
    ],
)
def test_weights_that_do_not_fit_are_rejected_and_the_old_ones_serve(
    attached, learner, model, drafter, spoil, reason, tmp_path
):
    learner.publisher.publish(3, spoil(other_weights(drafter, 0)))
    assert not learner.publisher.wait_ack(3, 10.0)
    (engine,) = learner.publisher.engines.values()
    assert engine.rejected[0] == 3 and reason in engine.rejected[1]
    (asked,) = requests(9, new=24)
    attached.generate(asked)
    (trajectory,) = learner.take(asked.id)
    assert trajectory["rounds", "policy_version"].unique().tolist() == [0]
    own = recorded_here(model, drafter, [asked], CHAIN, tmp_path)
    assert assert_same_rounds(trajectory, own[asked.id]) > 3
    learner.publish(4, other_weights(drafter, 0))  # a good one is taken


def test_swaps_under_load_change_no_text_and_fail_no_request(attached, learner, drafter, parts, vllm_models):
    asked = requests(*[10] * 4, new=120, seed=5)
    expected = [answer.tokens for answer in ask_all(attached, asked)]
    again = [Request(next(_numbers), each.prompt, each.sampling_params) for _ in range(4) for each in asked]
    stop, answers = threading.Event(), []

    def load():
        answers.extend(ask_all(attached, again))
        stop.set()

    thread = threading.Thread(target=load)
    thread.start()
    version = 10
    while not stop.is_set() and version < 40:
        learner.publish(version, other_weights(drafter, version % 3))
        version += 1
    thread.join()
    status = attached.status()
    assert status["swaps"] >= 5 and len(answers) == 16
    for number, answer in enumerate(answers):
        assert torch.equal(answer.tokens, expected[number % 4])
    trajectories = learner.take(*(each.id for each in again))
    served = [t["rounds", "policy_version"].unique().tolist() for t in trajectories]
    assert any(len(versions) > 1 for versions in served), "no swap met a request in flight"
    for trajectory in trajectories:
        cached, drafted = (trajectory["rounds", f"{kind}_version"] for kind in ("cache", "policy"))
        assert bool((cached <= drafted).all()) and len(cached.unique()) == 1
    # Rounds say which weights drafted them. Older rows in the drafter's cache make some drafts nobody's.
    agreed = Counter()
    for number in sorted({each for versions in served for each in versions} - {0}):
        for seed in range(3):
            new = with_weights(parts, vllm_models, other_weights(drafter, seed))
            agreed[(seed - number) % 3] += drafts_agreed(new, trajectories, number)[1]
    assert agreed[0] > 2 * max(agreed[1], agreed[2]), agreed
    learner.publish(version + 1, other_weights(drafter, 0))


# ---- learners that go and come back ---------------------------------------------------------------------------------


def test_a_dead_learner_costs_no_answer_and_a_new_one_is_served(attached, learner, drafter):
    first, alone, last = requests(8, 8, 8, new=8, seed=6)
    attached.generate(first)
    learner.take(first.id)
    learner.die()
    assert len(attached.generate(alone).tokens) == 8
    learner.come_back()
    attached.generate(last)
    learner.take(last.id)
    learner.publish(learner.publisher.next_version, other_weights(drafter, 0))
