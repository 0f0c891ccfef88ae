"""EAGLE-3: names and weights at day 0; the shared layer is in test_recurrent.py, the rest is check_drafter's."""

from __future__ import annotations

import pytest
import torch

from aurora_rl.policies import Eagle3Drafter, TargetParts
from aurora_rl.testing import tiny_target


def eagle3(vocab: torch.Tensor | None = None, architecture: str = "llama") -> Eagle3Drafter:
    torch.manual_seed(0)
    parts = TargetParts.of(tiny_target(architecture))
    return Eagle3Drafter.from_target(parts, draft_vocab=torch.arange(6) if vocab is None else vocab).double()


def test_published_names_are_those_of_serving_engines() -> None:
    assert {name: tuple(t.shape) for name, t in eagle3().published().items()} == {
        "fc.weight": (16, 32),
        "midlayer.input_layernorm.weight": (16,),
        "midlayer.hidden_norm.weight": (16,),
        "midlayer.post_attention_layernorm.weight": (16,),
        "midlayer.self_attn.q_proj.weight": (16, 32),
        "midlayer.self_attn.k_proj.weight": (8, 32),
        "midlayer.self_attn.v_proj.weight": (8, 32),
        "midlayer.self_attn.o_proj.weight": (16, 16),
        "midlayer.mlp.gate_proj.weight": (32, 16),
        "midlayer.mlp.up_proj.weight": (32, 16),
        "midlayer.mlp.down_proj.weight": (16, 32),
        "norm.weight": (16,),
        "lm_head.weight": (6, 16),
        "d2t": (6,),
    }


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_day_0_starts_from_the_target(architecture: str) -> None:
    target = tiny_target(architecture)
    vocab = torch.tensor([30, 4, 2])
    drafter = eagle3(vocab, architecture)
    last = target.model.layers[-1]
    published = {name: tensor.float() for name, tensor in drafter.published().items()}
    assert drafter.published()["d2t"].tolist() == [30, 3, 0]
    torch.testing.assert_close(published["lm_head.weight"], target.lm_head.weight[vocab].float())
    torch.testing.assert_close(published["midlayer.mlp.up_proj.weight"], last.mlp.up_proj.weight.float())
    torch.testing.assert_close(published["midlayer.hidden_norm.weight"], last.input_layernorm.weight.float())
    query = published["midlayer.self_attn.q_proj.weight"]
    assert not query[:, :16].any()
    torch.testing.assert_close(query[:, 16:], last.self_attn.q_proj.weight.float())
    # The deepest of the two features passes, the other nearly does not.
    torch.testing.assert_close(published["fc.weight"][:, 16:], torch.eye(16), atol=0.05, rtol=0)
    torch.testing.assert_close(published["fc.weight"][:, :16], torch.zeros(16, 16), atol=0.05, rtol=0)


def test_a_map_outside_the_vocabulary_is_refused() -> None:
    drafter = eagle3()
    weights = {**drafter.published(), "d2t": torch.full((6,), 31)}
    with pytest.raises(ValueError, match="'d2t' points outside the target's vocabulary of 32"):
        drafter.install(weights)
    assert drafter.draft_vocab.tolist() == [0, 1, 2, 3, 4, 5]
