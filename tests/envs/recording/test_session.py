"""What a learner that attached has inside SGLang: fields that are refused, and the target's distribution."""

import pytest
import torch
from attach_fields import FIELDS, HEAD

from aurora_rl.collectors.keys import make_keys
from aurora_rl.envs.recording.plugin_server import PluginError
from aurora_rl.envs.recording.session import ATTACH, Session


@pytest.mark.parametrize("name", sorted(ATTACH))
def test_a_field_that_is_missing_or_of_another_type_is_named(name):
    for fields in ({k: v for k, v in FIELDS.items() if k != name}, {**FIELDS, name: None}):
        with pytest.raises(PluginError, match=f"attach needs {name}"):
            Session(fields, engine="SGLang", exact=True)


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


def test_both_sides_have_keys_or_none(tmp_path):
    with pytest.raises(
        PluginError, match="the learner has keys and the engine has none; set wire.keys there, and AURORA"
    ):
        Session({**FIELDS, "keys": True}, engine="SGLang", exact=True)
    make_keys(tmp_path)
    with pytest.raises(PluginError, match="the engine has keys and the learner has none"):
        Session(FIELDS, engine="SGLang", exact=True, keys=str(tmp_path))
    Session({**FIELDS, "keys": True}, engine="SGLang", exact=True, keys=str(tmp_path)).close()
