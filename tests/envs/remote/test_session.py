"""What a learner that attached has inside SGLang: fields that are refused, and the target's distribution."""

import pytest
import torch
from attach_fields import FIELDS, HEAD
from processes import wait
from tensordict import TensorDict

from aurora_rl.collectors.collector import ZMQCollector
from aurora_rl.collectors.handshake import Handshake
from aurora_rl.collectors.keys import learner_keys, make_keys
from aurora_rl.collectors.weights import WeightPublisher
from aurora_rl.envs.remote.plugin_server import PluginError
from aurora_rl.envs.remote.session import ATTACH, Session


@pytest.mark.parametrize("name", sorted(ATTACH))
def test_a_field_that_is_missing_or_of_another_type_is_named(name):
    for fields in ({k: v for k, v in FIELDS.items() if k != name}, {**FIELDS, name: None}):
        with pytest.raises(PluginError, match=rf"^attach needs {name} of type \w+( or \w+)?, got None$"):
            Session(fields, engine="SGLang", exact=True)


@pytest.mark.parametrize(("told", "part_tokens"), [(0, None), (7, 7)])
def test_zero_tokens_of_a_part_are_whole_requests(told, part_tokens):
    session = Session({**FIELDS, "part_tokens": told}, engine="SGLang", exact=True)
    session.close()
    assert session.assembler._part_tokens == part_tokens
    with pytest.raises(PluginError, match="^part_tokens must be 0, for whole requests, or more, got -1$"):
        Session({**FIELDS, "part_tokens": -1}, engine="SGLang", exact=True)


@pytest.mark.parametrize("exact", [True, False])
def test_the_target_is_kept_by_its_head_or_by_its_likeliest_tokens(exact):
    session = Session(FIELDS, engine="SGLang", exact=exact)
    try:
        hidden = torch.randn(3, 2)
        logits = hidden @ HEAD.T
        rows = session.target_rows(hidden, logits)
        if exact:
            assert set(rows) == {"hidden"} and torch.equal(rows["hidden"], hidden)
            assert session.target_rows(None, logits) is None
            return
        assert rows["topk_ids"].shape == (3, 6)
        session.top_k = 2
        rows = session.target_rows(None, logits)
        best = logits.softmax(-1).topk(2)
        assert torch.equal(rows["topk_ids"], best.indices)
        torch.testing.assert_close(rows["topk_log_probs"].exp(), best.values)
        torch.testing.assert_close(rows["tail_log_prob"].exp(), 1 - best.values.sum(-1))
    finally:
        session.close()


def test_a_version_that_is_rolled_back_is_said_to_serve_no_more():
    session = Session(FIELDS, engine="SGLang", exact=True)
    try:
        session.receiver.acknowledge(FIELDS["version"] + 3, "a checksum", 1.0)
        session.roll_back(FIELDS["version"] + 3, FIELDS["version"], "stale")
        assert session.version == session.receiver.version == FIELDS["version"]
        assert session.receiver._checksum is None  # of what the server was started on none is known
    finally:
        session.close()


def test_both_sides_have_keys_or_none(tmp_path):
    with pytest.raises(
        PluginError, match="the learner has keys and the engine has none; set wire.keys there, and AURORA"
    ):
        Session({**FIELDS, "keys": True}, engine="SGLang", exact=True)
    make_keys(tmp_path)
    with pytest.raises(PluginError, match="the engine has keys and the learner has none"):
        Session(FIELDS, engine="SGLang", exact=True, keys=str(tmp_path))
    Session({**FIELDS, "keys": True}, engine="SGLang", exact=True, keys=str(tmp_path)).close()


@pytest.mark.parametrize("keys", [True, False])
def test_an_engine_has_one_name_for_trajectories_and_for_weights(tmp_path, keys):
    make_keys(tmp_path, "host-7")
    ends = {
        "handshake": Handshake.from_meta(FIELDS["handshake"]),
        "keys": learner_keys(tmp_path) if keys else None,
    }
    collector, publisher = (end("tcp://127.0.0.1:*", **ends) for end in (ZMQCollector, WeightPublisher))
    addresses = {"trajectories": collector.address, "weights": publisher.address, "keys": keys}
    session = Session({**FIELDS, **addresses}, engine="SGLang", exact=True, keys=str(tmp_path) if keys else None)
    try:
        session.sink.extend(TensorDict({"x": torch.arange(3)}))
        (trajectory,) = collector.poll(10.0)
        wait(lambda: publisher.engines)
        assert list(publisher.engines) == [trajectory["source"]] == [session.receiver.name]
        assert (trajectory["source"] == "host-7") == keys
    finally:
        session.close()
        collector.shutdown()
        publisher.close()
