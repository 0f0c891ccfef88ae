"""Faster forms of modules compute what the modules computed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GemmaConfig, GemmaForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from aurora_kernels import TreeMask
from aurora_rl.models.attention import GROUPED_ATTENTION, PassMask
from aurora_rl.models.inference_modules import (
    FusedDecoderLayer,
    PackedLinear,
    fuse_decoder_layers,
    prepare_for_inference,
    stage,
)
from aurora_rl.testing import tiny_target

native_bf16 = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    reason="this CPU does not multiply bf16 natively, so it packs float32 alone",
)


# ---- packed linear layers ---------------------------------------------------------------------------------------


def linear(bias: bool, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(96, 40, bias=bias).bfloat16().requires_grad_(False)


def assert_product(y: Tensor, x: Tensor, layer: nn.Linear) -> None:
    """Equal to the product in fp32, within the rounding of the result to bf16 (8 bits, hence 2**-8 of it)."""
    bias = None if layer.bias is None else layer.bias.float()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), F.linear(x.float(), layer.weight.float(), bias), rtol=2**-8, atol=1e-5)


@native_bf16
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 96), (7, 96), (2, 3, 96), (1, 1, 96), (33, 96)])
def test_a_packed_linear_layer_is_the_product_in_fp32(bias: bool, shape: tuple[int, ...]) -> None:
    layer, x = linear(bias), torch.randn(shape).bfloat16()
    packed = PackedLinear(layer, keep_weight=False)
    assert not dict(packed.named_parameters()).keys() & {"weight"}  # the point of not keeping it: one copy in memory
    assert torch.equal(packed.weight, layer.weight)
    assert_product(packed(x), x, layer)


@native_bf16
def test_packed_linear_reads_strided_rows() -> None:
    layer, x = linear(True), torch.randn(5, 2, 192).bfloat16()[:, 1, ::2]
    assert not x.is_contiguous()
    assert_product(PackedLinear(layer, keep_weight=False)(x), x, layer)


@native_bf16
def test_staged_weights_reach_a_packed_layer() -> None:
    model, old, new = nn.Sequential(linear(True)), linear(True), linear(True, seed=1)
    x = torch.randn(3, 96).bfloat16()
    prepare_for_inference(model, keep_weights=True)
    assert isinstance(model[0], PackedLinear)
    install = stage(model, {f"0.{name}": value for name, value in new.state_dict().items()})  # names are kept
    assert_product(model(x), x, old)  # the old ones serve until then
    install()
    # The trap: a packed layer whose plain weight alone was replaced goes on with the old one.
    assert_product(model(x), x, new)
    assert torch.equal(model[0].weight, new.weight)


def test_staged_weights_are_copies_in_the_models_own_dtype() -> None:
    model, weights = nn.Sequential(nn.Linear(4, 2)), {"0.weight": torch.ones(2, 4).double(), "0.bias": torch.ones(2)}
    parameter, held = model[0].weight, model[0].weight.detach()
    install = stage(model, weights)
    weights["0.bias"].zero_()
    install()
    assert model[0].weight is parameter and parameter.dtype == torch.float32  # an optimizer's parameter stays its own
    assert bool((model[0].weight == 1).all()) and bool((model[0].bias == 1).all())
    assert not bool((held == 1).any())  # whoever looks at the old weights still sees those


@native_bf16
def test_layers_of_dtypes_that_the_cpu_multiplies_natively_are_packed() -> None:
    layers = {"bf16": linear(False), "fp32": nn.Linear(4, 4), "fp64": nn.Linear(4, 4).double()}
    model = nn.ModuleDict({**layers, "deep": nn.Sequential(linear(False))})
    prepare_for_inference(model)
    packed = [isinstance(layer, PackedLinear) for layer in (*map(model.get_submodule, layers), model["deep"][0])]
    assert packed == [True, True, False, True]


@pytest.mark.parametrize("rows", [1, 2, 5, 9, 100])
def test_a_packed_layer_in_float32_multiplies_in_float32(rows: int) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(96, 40), torch.randn(rows, 96)
    with torch.inference_mode():
        got, exact = PackedLinear(layer, keep_weight=False)(x), layer.double()(x.double())
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)


# ---- norms ------------------------------------------------------------------------------------------------------


class ShiftedRMSNorm(LlamaRMSNorm):
    """Gemma's formula under Llama's attribute names, so that only its values tell it apart."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon) * (1 + self.weight)


class CentredRMSNorm(LlamaRMSNorm):
    """A layer norm that calls itself RMSNorm."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, None, self.variance_epsilon)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_llama_norms_are_fused(dtype: torch.dtype) -> None:
    norm = LlamaRMSNorm(16, eps=1e-3).to(dtype)  # a large eps, so that losing it would show
    nn.init.normal_(norm.weight)
    model, x = nn.Sequential(norm), (0.1 * torch.randn(5, 16)).to(dtype)
    prepare_for_inference(model)
    assert isinstance(model[0], nn.RMSNorm)
    # bf16: Llama's rounds before it multiplies by the weight, hence two roundings of 2**-8 against one.
    torch.testing.assert_close(model(x), norm(x), **({"rtol": 2**-7, "atol": 1e-6} if dtype == torch.bfloat16 else {}))


@pytest.mark.parametrize("kind", [ShiftedRMSNorm, CentredRMSNorm])
@pytest.mark.parametrize("weight", [0.0, 1.0, None], ids=["zeros", "ones", "random"])
def test_other_norms_are_left_alone(kind: type[LlamaRMSNorm], weight: float | None) -> None:
    norm = kind(16)
    nn.init.normal_(norm.weight) if weight is None else nn.init.constant_(norm.weight, weight)
    model, x = nn.Sequential(norm), torch.randn(5, 16)
    before = model(x)
    prepare_for_inference(model)
    assert torch.equal(model(x), before)
    if kind is ShiftedRMSNorm or weight != 0:  # a centred norm of zeros gives zeros, as RMSNorm does
        assert model[0] is norm


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma"])
def test_whole_models_compute_the_same(architecture: str) -> None:
    if architecture == "gemma":
        model = GemmaForCausalLM(
            GemmaConfig(
                vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=1, head_dim=8, pad_token_id=0,
            )
        ).eval()  # fmt: skip
    else:
        model = tiny_target(architecture, dtype=torch.float32)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        before = model(tokens).logits
        prepare_for_inference(model)
        torch.testing.assert_close(model(tokens).logits, before, rtol=1e-4, atol=1e-4)
    fused = sum(isinstance(module, nn.RMSNorm) for module in model.modules())
    # Two a layer and the last, and Qwen3's of queries and keys.
    assert fused == {"llama": 7, "qwen3": 13, "gemma": 0}[architecture]


# ---- decoder layers ---------------------------------------------------------------------------------------------


def small_model(model_type: str, **settings: object) -> PreTrainedModel:
    """A model of two layers whose weights are all random: no norm of ones, no bias of zeros."""
    config = AutoConfig.for_model(
        model_type, vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().double().requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.3 * torch.randn_like(parameter)
    model.set_attn_implementation(GROUPED_ATTENTION)
    return model


def grouped_pass(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    mask = PassMask.of(TreeMask(torch.tensor([0])), tokens)
    return model(tokens, attention_mask=mask, past_key_values=DynamicCache()).logits


@pytest.mark.parametrize(
    ("model_type", "settings", "fused"),
    [
        ("llama", {}, True),
        ("llama", {"attention_bias": True}, True),
        ("qwen2", {}, True),
        ("qwen3", {"head_dim": 8}, True),
        ("mistral", {"sliding_window": None}, True),
        ("granite", {"residual_multiplier": 0.5}, False),  # the parts of Llama, put together in another way
        ("olmo2", {}, False),
        ("phi3", {}, False),
    ],
)
def test_decoder_layers_are_fused_where_that_changes_nothing(
    model_type: str, settings: dict[str, object], fused: bool
) -> None:
    model, tokens = small_model(model_type, **settings), torch.randint(32, (1, 9))
    before = grouped_pass(model, tokens)
    layers = list(model.model.layers)
    undo = fuse_decoder_layers(model.model.layers, model.model.rotary_emb, 63)
    assert {isinstance(layer, FusedDecoderLayer) for layer in model.model.layers} == {fused} == {undo is not None}
    torch.testing.assert_close(grouped_pass(model, tokens), before)
    if undo is not None:
        undo()
        assert list(model.model.layers) == layers
        torch.testing.assert_close(grouped_pass(model, tokens), before)
