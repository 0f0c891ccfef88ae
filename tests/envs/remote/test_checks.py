"""An engine's target and drafter against the learner's, and weights against the drafter that they are for."""

from types import SimpleNamespace

import pytest
import torch
from attach_fields import DRAFT_VOCAB, HANDSHAKE, HEAD

from aurora_rl.envs.remote.checks import check_target, weights_fault
from aurora_rl.envs.remote.plugin_server import PluginError

CONFIG = SimpleNamespace(vocab_size=len(HEAD))


def check(head=HEAD, bias=None, config=CONFIG, vocab=DRAFT_VOCAB):
    check_target(HANDSHAKE, head=head, bias=bias, config=config, vocab=vocab, folder="one folder, so to say")


def test_the_learner_s_own_target_and_drafter_are_taken():
    check()
    check(torch.cat([HEAD, torch.ones(2, HEAD.shape[1])]))  # rows of padding
    check(config=SimpleNamespace(vocab_size=len(HEAD), logit_scale=0.5))  # the model has it, its logits do not


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"head": HEAD + 1}, "output head differs from the learner's .*in torch.float32.*; serve the same model"),
        ({"head": HEAD.bfloat16()}, "output head differs from the learner's .*in torch.bfloat16"),
        ({"bias": torch.ones(len(HEAD))}, "output head differs"),
        ({"config": SimpleNamespace(vocab_size=len(HEAD) - 1)}, "output head differs"),
        ({"vocab": DRAFT_VOCAB + 1}, r"draft vocabulary \(d2t\) differs .*; start both on one folder, so to say$"),
    ],
)
def test_another_target_or_drafter_is_named(changed, message):
    with pytest.raises(PluginError, match=message):
        check(**changed)


def test_weights_must_be_finite_and_of_the_draft_vocabulary():
    shift = DRAFT_VOCAB - torch.arange(len(DRAFT_VOCAB))
    good = {"fc.weight": torch.ones(2), "d2t": shift}
    assert weights_fault(good, DRAFT_VOCAB, engine="vLLM") == ""
    assert weights_fault({"fc.weight": torch.ones(2)}, DRAFT_VOCAB, engine="vLLM") == ""
    fault = weights_fault({**good, "fc.weight": torch.tensor([1.0, torch.inf])}, DRAFT_VOCAB, engine="vLLM")
    assert fault.startswith("tensor 'fc.weight' ")
    fault = weights_fault({**good, "d2t": shift + 1}, DRAFT_VOCAB, engine="vLLM")
    assert fault.startswith("the draft map 'd2t' differs") and "restart vLLM with the learner's drafter" in fault
