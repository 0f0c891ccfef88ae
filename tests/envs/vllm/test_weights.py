"""Published weights in the form that vLLM's loader takes, and refusals before anything is touched."""

from types import SimpleNamespace

import pytest
import torch

from aurora_rl.envs.remote.session import SwapError
from aurora_rl.envs.vllm.weights import DraftLoader, as_fused, draft_vocab, loadable
from aurora_rl.policies import Eagle3Drafter, TargetParts
from aurora_rl.policies.formats.files import save_drafter
from aurora_rl.storage import read_folder
from aurora_rl.testing import tiny_target

PART, WHOLE = torch.tensor([2, 7, 11, 30]), torch.arange(32)


def drafter_of(vocab):
    torch.manual_seed(0)
    return Eagle3Drafter.from_target(
        TargetParts.of(tiny_target(dtype=torch.float32)), draft_vocab=vocab, feature_layers=(1, 2)
    )


@pytest.fixture
def folder(tmp_path):
    def save(vocab):
        save_drafter(drafter_of(vocab), tmp_path / "drafter", "vllm")
        return read_folder(tmp_path / "drafter", "config.json")

    return save


@pytest.mark.parametrize("vocab", [PART, WHOLE])
def test_published_weights_are_those_of_the_exported_folder(folder, vocab):
    tensors, config = folder(vocab)
    new = loadable(drafter_of(vocab).published(), config)
    assert new.keys() == tensors.keys() - {"t2d"}
    for name, tensor in new.items():
        torch.testing.assert_close(tensor, tensors[name], check_dtype=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("norm.weight"), r"tensor 'norm.weight' \(16,\) is missing"),
        (lambda weights: weights.update({"fc.bias": torch.zeros(16)}), "tensor 'fc.bias' is unknown to vLLM"),
        (lambda weights: weights.update({"fc.weight": torch.zeros(2, 2)}), "'fc.weight' must have shape"),
        (lambda weights: weights.pop("d2t"), "tensor 'd2t' is missing"),
    ],
)
def test_what_does_not_fit_is_named(folder, change, message):
    _, config = folder(PART)
    weights = drafter_of(PART).published()
    change(weights)
    with pytest.raises(SwapError, match=f"vLLM's drafter does not take the weights: .*{message}"):
        loadable(weights, config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights["fc.weight"].fill_(torch.inf), "tensor 'fc.weight' has .* infinite or not a number"),
        (lambda weights: weights["d2t"].add_(1), "the draft map 'd2t' differs .*; restart vLLM with the learner's"),
    ],
)
def test_weights_that_no_drafter_may_have_reach_no_model(folder, change, message):
    _, config = folder(PART)
    model = SimpleNamespace(config=SimpleNamespace(draft_vocab_size=4), draft_id_to_target_id=PART - torch.arange(4))
    drafting = SimpleNamespace(hf_config=SimpleNamespace(to_dict=lambda: config))
    settings = SimpleNamespace(speculative_config=SimpleNamespace(draft_model_config=drafting))
    weights = {name: tensor.clone() for name, tensor in drafter_of(PART).published().items()}
    change(weights)
    with pytest.raises(SwapError, match=f"^{message}"):  # and no fault of a model that is none of vLLM's
        DraftLoader(model, torch.nn.Identity(), settings).load(weights)


def test_fused_projections_hold_their_parts_in_order(folder):
    weights = loadable(drafter_of(PART).published(), folder(PART)[1])
    fused = as_fused(weights)
    parts = [weights[f"midlayer.self_attn.{name}_proj.weight"] for name in "qkv"]
    assert torch.equal(fused["model.layers.0.self_attn.qkv_proj.weight"], torch.cat(parts))
    assert "lm_head.weight" in fused and "model.fc.weight" in fused and not any("d2t" in name for name in fused)
    assert sum(tensor.numel() for tensor in fused.values()) == sum(
        tensor.numel() for name, tensor in weights.items() if name != "d2t"
    )


def test_the_draft_vocabulary_is_read_from_offsets():
    model = SimpleNamespace(config=SimpleNamespace(draft_vocab_size=4), draft_id_to_target_id=PART - torch.arange(4))
    assert draft_vocab(model).tolist() == PART.tolist()
    model.draft_id_to_target_id = None
    assert draft_vocab(model).tolist() == [0, 1, 2, 3]
