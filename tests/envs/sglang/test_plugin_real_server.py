"""Real SGLang, unpatched, with our plugin in its scheduler (all of envs/sglang): records, swaps, learners."""

import threading
from collections import Counter

import pytest
import torch
from processes import wait
from same_rounds import ask_all, assert_same_rounds, assert_served_in_parts, recorded_here
from sglang_requests import Learner, _numbers, other_weights, requests

from aurora_rl.collectors.codec import checksum
from aurora_rl.collectors.handshake import Handshake
from aurora_rl.envs import Request
from aurora_rl.envs.remote.plugin_server import PluginError
from aurora_rl.envs.sglang.client import SGLangClient, SGLangError
from aurora_rl.policies import EagleDrafter, TreeShape
from aurora_rl.policies.formats.files import load_drafter
from aurora_rl.training.served_weights import drafts_agreed
from aurora_rl.trajectories import RULE_CODES

pytestmark = pytest.mark.sglang
SHAPES = {"chain": TreeShape(3, 1, 3), "tree": TreeShape(2, 4, 7)}


def with_weights(parts, sglang_models, weights):
    drafter = load_drafter(sglang_models / "eagle3", parts)
    drafter.install(weights)
    return drafter


@pytest.fixture
def attached(chain, learner, handshake):
    chain.attach(handshake=handshake, trajectories=learner.trajectories, weights=learner.weights)
    yield chain
    chain.detach()


@pytest.mark.parametrize("kind", ["chain", "tree"])
def test_both_engines_record_the_same(kind, request, model, drafter, handshake, learner, tmp_path):
    engine = request.getfixturevalue(kind)
    engine.attach(handshake=handshake, trajectories=learner.trajectories, weights=learner.weights)
    try:
        # 300: the prompt is run in two chunks. One after the other, and the last two side by side.
        asked = requests(5, 40, 300, 12, seed=1)
        answers = [engine.generate(each) for each in asked[:2]] + ask_all(engine, asked[2:])
        recorded = learner.take(*(each.id for each in asked))
        own = recorded_here(model, drafter, asked, SHAPES[kind], tmp_path)
        compared = 0
        for answer, trajectory in zip(answers, recorded, strict=True):
            embedded = own[answer.request.id]
            assert answer.tokens.tolist() == embedded["sequence", "tokens"][len(answer.request.prompt) :].tolist()
            assert answer.rounds == len(trajectory["rounds", "anchor"])
            compared += assert_same_rounds(trajectory, embedded)
            assert RULE_CODES[int(trajectory["sampling", "rule"])] == "greedy"
            assert float(trajectory["sampling", "temperature"]) == 0.0
        assert compared > 30
        assert sum(int(t["nodes", "accepted"].sum()) for t in recorded) > 10
        status = engine.status()
        assert status["skipped"] == {}
        accepted = Counter({int(count): rounds for count, rounds in status["served"]["accepted"].items()})
        told = sum((Counter(answer.accepted) for answer in answers), Counter())
        # SGLang counts drafts beyond the budget, too, in the last round of an answer.
        assert accepted.total() == told.total() and (told - accepted).total() <= len(answers)
        assert status["served"]["requests"] == len(answers)
        assert status["served"]["tokens"] == sum(len(answer.tokens) for answer in answers)
        assert status["served"]["speculative_rounds"] == sum(answer.rounds for answer in answers)
        # The first token of each answer comes from prefill.
        assert status["served"]["speculative_tokens"] == sum(len(answer.tokens) - 1 for answer in answers)
    finally:
        engine.detach()


def test_long_answers_come_in_parts_while_they_are_written(chain, model, drafter, handshake, learner, tmp_path):
    chain.attach(handshake=handshake, trajectories=learner.trajectories, weights=learner.weights, part_tokens=24)
    try:
        asked = requests(5, 20, new=150, seed=3)
        assert_served_in_parts(chain, learner, model, drafter, asked, SHAPES["chain"], tmp_path, 24)
    finally:
        chain.detach()


@pytest.mark.parametrize(
    ("server", "name"), [("eagle_chain", "eagle_whole"), ("eagle_tree", "eagle"), ("published_chain", "published")]
)
def test_other_folders_draft_the_same_in_both_engines_before_and_after_a_swap(
    server, name, request, model, parts, sglang_models, tmp_path
):
    """EAGLE's, and EAGLE-3's as its authors publish it: the same nodes are drafted and accepted in every round.

    The first of three servers has two replicas, and the last two ranks: each replica records and loads for itself, and
    each rank loads its shards.
    """
    engine, shape = request.getfixturevalue(server), SHAPES[server.split("_")[1]]
    drafter = load_drafter(sglang_models / name, parts)
    learner = Learner(Handshake.of(parts, drafter, "eagle" if isinstance(drafter, EagleDrafter) else "eagle3"))
    engine.attach(handshake=learner.handshake, trajectories=learner.trajectories, weights=learner.weights)
    try:
        before, after = requests(5, 40, 300, seed=1), requests(20, seed=4)
        ask_all(engine, before)
        weights = other_weights(drafter, 1)
        replicas = engine.status()["dp_size"]
        learner.publish(1, weights, engines=replicas)
        ask_all(engine, after)
        new = load_drafter(sglang_models / name, parts)
        new.install(weights)
        compared, accepted = [], 0
        for version, (served, asked) in enumerate(((drafter, before), (new, after))):
            own = recorded_here(model, served, asked, shape, tmp_path / str(version))
            recorded = learner.take(*(each.id for each in asked))
            accepted += sum(int(t["nodes", "accepted"].sum()) for t in recorded)
            compared.append(sum(assert_same_rounds(t, own[int(t["request"])]) for t in recorded))
            drafted, agreed = drafts_agreed(served, recorded, version)
            assert drafted > 5 and agreed == drafted
        assert compared[0] > 10 and compared[1] > 5 and accepted > 10, (compared, accepted)
        status = engine.status()
        assert status["skipped"] == {} and status["swaps"] == replicas == len(learner.publisher.engines)
        assert status["recorded"] == len(before) + len(after)
        if (ranks := status["tp_size"]) > 1:
            assert [(rank["rank"], rank["version"]) for rank in status["ranks"]] == [(n, 1) for n in range(ranks)]
            assert {rank["checksum"] for rank in status["ranks"]} == {checksum(weights)}
            learner.publisher.publish(2, {**weights, "midlayer.unheard_of.weight": torch.zeros(4)})
            assert not learner.publisher.wait_ack(2, 10.0)
            reason = "rank 0 of 2: SGLang's drafter has no parameter for 'midlayer.unheard_of.weight'"
            assert list(learner.publisher.rejected_by(2).values()) == [reason] and engine.status()["version"] == 1
    finally:
        engine.detach()
        learner.die()


def test_a_cached_prefix_is_recorded_with_its_features(attached, learner, model, drafter, tmp_path):
    (first,) = requests(60, seed=2)
    attached.generate(first)
    longer = Request(next(_numbers), torch.cat([first.prompt, torch.tensor([9, 8, 7])]), first.sampling_params)
    attached.generate(longer)
    (trajectory,) = learner.take(longer.id)
    own = recorded_here(model, drafter, [longer], SHAPES["chain"], tmp_path)
    assert assert_same_rounds(trajectory, own[longer.id]) > 5


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"frequency_penalty": 0.5}, "penalty"),
        ({"repetition_penalty": 1.2}, "penalty"),
        ({"logit_bias": {"7": 5.0}}, "penalty"),
        ({"temperature": 0.7}, "temperature"),
        ({"custom_params": {"aurora_rl": False}}, "opt_out"),
    ],
)
def test_requests_with_another_distribution_are_served_counted_and_not_recorded(attached, learner, change, reason):
    number = next(_numbers)
    params = {"max_new_tokens": 6, "temperature": 0.0, "ignore_eos": True, **change}
    body = {"input_ids": [5, 6, 7, 8], "sampling_params": params, "rid": str(number)}
    assert len(attached.post("/generate", body, 60)["output_ids"]) == 6
    (plain,) = requests(6, new=6)
    attached.generate(plain)
    learner.take(plain.id)
    assert number not in learner.got and attached.status()["skipped"] == {reason: 1}


def test_a_share_of_the_requests_is_captured(chain, learner, handshake):
    chain.attach(handshake=handshake, trajectories=learner.trajectories, weights=learner.weights, capture_rate=0.5)
    try:
        asked = requests(*[6] * 24, new=3)
        ask_all(chain, asked)

        def counts() -> tuple[int, int]:
            status = chain.status()
            return status["recorded"], status["skipped"]["not_captured"]

        wait(lambda: sum(counts()) == 24)  # the last answers are out before their requests are counted
        assert 4 <= counts()[0] <= 20
    finally:
        chain.detach()


def test_recording_can_be_switched_off_and_on_in_service(attached, learner):
    silent, heard = requests(6, 7, new=6)
    assert not attached.set_recording(False)["recording"]
    attached.generate(silent)
    assert attached.set_recording(True)["recording"]
    attached.generate(heard)
    learner.take(heard.id)
    assert silent.id not in learner.got


def test_a_temperature_is_refused_by_name_on_this_device(attached):
    (request,) = requests(6, temperature=0.7)
    with pytest.raises(SGLangError, match="temperature 0.7.*greedily on a CPU"):
        attached.generate(request)


# ---- attaching ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"feature_layers": (2, 4, 6)}, r"feature_layers is \(2, 4, 6\) at the learner and \(2, 4, 5\) at the engine"),
        ({"head_checksum": "0" * 16}, "output head differs.*float32"),
        ({"draft_map_checksum": ""}, r"draft vocabulary \(d2t\) differs"),
    ],
)
def test_a_learner_of_another_deployment_is_refused(chain, learner, handshake, changed, message):
    another = Handshake(**{**handshake.__dict__, **changed})
    with pytest.raises(PluginError, match=message):
        chain.attach(handshake=another, trajectories=learner.trajectories, weights=learner.weights)
    assert not chain.status()["attached"]


def test_a_second_learner_is_refused_until_the_first_is_gone(attached, learner, handshake):
    with pytest.raises(PluginError, match="attached already; detach first"):
        attached.attach(handshake=handshake, trajectories=learner.trajectories, weights=learner.weights)


def test_after_detaching_the_server_goes_on_unrecorded(chain, learner, handshake):
    before, after = requests(8, 8, new=6, seed=3)
    chain.attach(handshake=handshake, trajectories=learner.trajectories, weights=learner.weights)
    first = chain.generate(before)
    learner.take(before.id)
    assert not chain.detach()["attached"]
    assert len(chain.generate(after).tokens) == len(first.tokens)
    assert learner.collector.poll(0.3) == []


def test_an_engine_without_a_plugin_address_cannot_be_attached_to(chain):
    with pytest.raises(PluginError, match="no plugin address"):
        SGLangClient(chain.url).status()


# ---- swaps --------------------------------------------------------------------------------------------------------


def target_sums(engine):
    """Some of the target's weights, as the server gives them out."""
    names = ("model.embed_tokens.weight", "model.layers.3.mlp.down_proj.weight", "lm_head.weight", "model.norm.weight")
    return {n: engine.post("/get_weights_by_name", {"name": n, "truncate_size": 512}, 30) for n in names}


def test_after_a_swap_the_server_drafts_what_the_new_weights_predict(
    attached, learner, model, drafter, parts, sglang_models, tmp_path
):
    target = target_sums(attached)
    weights = other_weights(drafter, 1)
    learner.publish(1, weights)
    (asked,) = requests(20, seed=4)
    attached.generate(asked)
    (trajectory,) = learner.take(asked.id)
    assert set(trajectory["rounds", "policy_version"].tolist()) == {1}
    new = with_weights(parts, sglang_models, weights)
    own = recorded_here(model, new, [asked], SHAPES["chain"], tmp_path)
    assert assert_same_rounds(trajectory, own[asked.id]) > 5
    drafted, agreed = drafts_agreed(new, [trajectory], 1)
    assert drafted > 5 and agreed == drafted
    drafted, agreed = drafts_agreed(drafter, [trajectory], 1)
    assert agreed < 0.8 * drafted, "the comparison must tell the old weights from the new ones"
    assert target_sums(attached) == target, "the target's weights were touched"
    learner.publish(2, other_weights(drafter, 0))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda w: {**w, "d2t": w["d2t"] + 1}, "draft map 'd2t' differs"),
        (
            lambda w: {**w, "midlayer.unheard_of.weight": torch.zeros(4)},
            "no parameter for 'midlayer.unheard_of.weight'",
        ),
    ],
)
def test_weights_that_do_not_fit_are_rejected_and_the_old_ones_serve(attached, learner, drafter, spoil, reason):
    learner.publisher.publish(3, spoil(other_weights(drafter, 0)))
    assert not learner.publisher.wait_ack(3, 10.0)
    (engine,) = learner.publisher.engines.values()
    assert engine.rejected[0] == 3 and reason in engine.rejected[1]
    (asked,) = requests(9, new=8)
    attached.generate(asked)
    assert learner.take(asked.id)[0]["rounds", "policy_version"].unique().tolist() == [0]
    learner.publish(4, other_weights(drafter, 0))  # a good one is taken


def test_swaps_under_load_change_no_text_and_fail_no_request(attached, learner, drafter):
    asked = requests(*[10] * 12, new=120, seed=5)
    expected = [answer.tokens for answer in ask_all(attached, asked[:4])]
    again = [Request(next(_numbers), each.prompt, each.sampling_params) for _ in range(4) for each in asked[:4]]
    stop = threading.Event()
    answers = []

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
    learner.publish(version + 1, other_weights(drafter, 0))


# ---- learners and servers that go and come back ---------------------------------------------------------------------


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
