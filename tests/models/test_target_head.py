"""The target's head, found by what a model's logits are."""

from __future__ import annotations

import pytest
import torch
from families import random_family
from transformers import LlamaConfig, LlamaForCausalLM

from aurora_rl.models.inference_modules import prepare_for_inference
from aurora_rl.models.target_head import TargetHead, context_length, decoder_layers


@pytest.mark.parametrize(
    ("name", "settings", "scale", "softcap", "bias"),
    [
        ("llama", {}, 1.0, None, False),
        ("granite", {"logits_scaling": 4.0}, 0.25, None, False),
        ("cohere", {"logit_scale": 0.5}, 0.5, None, False),
        ("gemma2", {"final_logit_softcapping": 3.0}, 1.0, 3.0, False),
        ("phi", {}, 1.0, None, True),
    ],
)
def test_the_head_of_a_family(
    name: str, settings: dict[str, float], scale: float, softcap: float | None, bias: bool
) -> None:
    model = random_family(name, **settings)
    head = TargetHead.of(model)
    assert (head.scale, head.softcap, head.bias is not None) == (scale, softcap, bias)
    tokens = torch.tensor([[5, 6, 7]])
    hidden, some = model.get_decoder()(tokens).last_hidden_state, torch.tensor([7, 0])
    torch.testing.assert_close(head(hidden), model(tokens).logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(head(hidden, some), head(hidden)[..., some])
    torch.testing.assert_close(head.rows(some), scale * head.weight[some])
    assert len(head) == 48


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_head_of_a_model_in_inference_form_is_found_again(dtype: torch.dtype) -> None:
    """A second engine on the same model: its head adds up 1,024 products in another order than a plain one."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=5000
    )
    model = LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)
    torch.nn.init.normal_(model.lm_head.weight)
    first = TargetHead.of(model).weight.clone()
    with torch.inference_mode():
        prepare_for_inference(model)
        assert torch.equal(TargetHead.of(model).weight, first)


def test_a_head_that_does_more_is_refused() -> None:
    model = random_family("llama")
    model.lm_head.register_forward_hook(lambda module, args, output: output.abs())
    with pytest.raises(ValueError, match="LlamaForCausalLM does more to make its logits"):
        TargetHead.of(model)


def test_everything_that_shapes_logits_identifies_a_head() -> None:
    weight = torch.eye(3)
    assert set(TargetHead(weight).tensors()) == {"head"}
    whole = TargetHead(weight, torch.ones(3), scale=2.0, softcap=5.0)
    assert set(whole.tensors()) == {"head", "bias", "scale", "softcap"}


def test_a_head_that_shares_tensors_is_cast_alone() -> None:
    head = TargetHead(torch.eye(3), torch.ones(3), scale=2.0, softcap=5.0)
    shared = TargetHead.like(head)
    assert shared.weight.data_ptr() == head.weight.data_ptr()
    x = torch.tensor([1.0, 2.0, 3.0])
    assert shared.double()(x.double()).dtype == torch.float64 and head(x).dtype == torch.float32
    torch.testing.assert_close(shared(x.double()).float(), head(x))
    assert torch.equal(TargetHead.like(torch.eye(3))(x), x)


def test_layers_and_context_by_any_name() -> None:
    for name, context in (("gpt2", 128), ("mpt", 128), ("opt", 128), ("bloom", None)):
        model = random_family(name)
        assert len(decoder_layers(model)) == 3 and context_length(model.config) == context
