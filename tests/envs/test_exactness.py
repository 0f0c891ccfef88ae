"""The check that an engine makes of itself: models of many families served exactly, wrong forms never served."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import transformers as hf
from served_models import FAMILIES, HEADS, SIZES, engine_of, generated, model_of, served
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from aurora_kernels import TreeMask
from aurora_rl.envs import exactness, forward_pass, transformers_engine
from aurora_rl.envs.attention_span import First
from aurora_rl.envs.exactness import UnsupportedModelError
from aurora_rl.models import attention, inference_modules
from aurora_rl.models import kv_cache as slot_cache
from aurora_rl.models.target_head import decoder_layers


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_that_of_generate(family: str) -> None:
    form, config = FAMILIES[family]
    model, count = model_of(config()), 22
    prompts = [torch.randint(3, 48, (length,)) for length in (5, 13, 2)]
    texts = [generated(model, prompt, count) for prompt in prompts]
    engine = engine_of(model, slots=2, max_length=13 + count)
    assert engine.exactness.form == form
    plain, plain_rounds = served(engine, prompts, texts, drafted=False)
    speculative, rounds = served(engine, prompts, texts, drafted=True)
    assert plain == texts and speculative == texts
    assert rounds < plain_rounds / 1.5  # trees were accepted


# ---- wrong forms ----------------------------------------------------------------------------------------------------


def _patched_grouped(monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], None]) -> None:
    """Our attention, told other arguments."""
    right = attention.grouped_attention

    def wrong(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *args: Any, **kwargs: Any):
        change(kwargs)
        return right(module, query, key, value, mask, *args, **kwargs)

    monkeypatch.setitem(hf.AttentionInterface._global_mapping, attention.GROUPED_ATTENTION, wrong)


@pytest.mark.parametrize(
    ("family", "change", "form"),
    [
        ("gemma 2", lambda kwargs: kwargs.update(softcap=None), "eager"),  # transformers' SDPA drops it too
        ("gpt-oss", lambda kwargs: kwargs.update(s_aux=None), "eager"),
        ("deepseek v3", lambda kwargs: kwargs.update(bias_of_a_new_kind=torch.ones(1)), "sdpa"),
    ],
)
def test_attention_that_drops_a_term_is_switched_off(
    family: str, change: Callable[[dict[str, Any]], None], form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _patched_grouped(monkeypatch, change)
    exact = engine_of(model_of(FAMILIES[family][1]())).exactness
    assert exact.form == form and "grouped" in exact.switched_off


def _has_the_parts(layer: nn.Module, rotary: object, far: int) -> bool:
    try:
        inference_modules.FusedDecoderLayer(copy.deepcopy(layer))
    except AttributeError:
        return False
    return True


@pytest.mark.parametrize("family", ["clipped projections", "attention scaled by position", "partial rotary"])
def test_layers_that_only_look_like_llamas_are_not_served_fused(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's check holds without that of each layer."""
    monkeypatch.setattr(inference_modules, "_can_be_fused", _has_the_parts)
    model = model_of(FAMILIES[family][1]())
    if family == "clipped projections":
        model.get_input_embeddings().weight[::7] *= 50
    exact = engine_of(model).exactness
    assert exact.form == "grouped" and "fused" in exact.switched_off


def _wrong_order(monkeypatch: pytest.MonkeyPatch) -> None:
    join = inference_modules._join
    monkeypatch.setattr(inference_modules, "_join", lambda layers: join([layers[0], *layers[:0:-1]]))


def _norm_without_eps(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sharper(inference_modules.FusedDecoderLayer):
        def __init__(self, layer: Any) -> None:
            super().__init__(layer)
            norm = copy.copy(self.input_layernorm)
            norm.variance_epsilon = 0.0
            self.input_layernorm = norm

    monkeypatch.setattr(inference_modules, "FusedDecoderLayer", Sharper)


@pytest.mark.parametrize("mutate", [_wrong_order, _norm_without_eps])
@pytest.mark.parametrize("layers_are_checked", [True, False])
def test_a_wrong_fused_layer_is_switched_off(
    mutate: Callable[[pytest.MonkeyPatch], None], layers_are_checked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate(monkeypatch)
    if not layers_are_checked:
        monkeypatch.setattr(inference_modules, "_can_be_fused", lambda *args: True)
    exact = engine_of(model_of(hf.LlamaConfig(**HEADS, rms_norm_eps=1e-2))).exactness
    assert exact.form == "grouped"
    assert ("fused" in exact.switched_off) is not layers_are_checked


def test_a_norm_that_drops_eps_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_eps(module: nn.Module) -> nn.RMSNorm | None:
        if type(module).__name__ != "LlamaRMSNorm":
            return None
        norm = nn.RMSNorm(module.weight.shape, eps=0.0, device="meta")
        norm.weight = module.weight
        return norm

    monkeypatch.setattr(inference_modules, "_fused_norm", without_eps)
    with pytest.raises(UnsupportedModelError, match="norms and linear layers of LlamaForCausalLM compute something el"):
        engine_of(model_of(hf.LlamaConfig(**HEADS, rms_norm_eps=1e-2)))


def _with_windows(monkeypatch: pytest.MonkeyPatch, change: Callable[[First, Tensor], Tensor]) -> None:
    kinds = transformers_engine.mask_kinds

    def wrong(config: PretrainedConfig, name: str, max_length: int):
        right = kinds(config, name, max_length)
        return {kind: None if first is None else partial(change, first) for kind, first in right.items()}

    monkeypatch.setattr(transformers_engine, "mask_kinds", wrong)


def _longer_window(monkeypatch: pytest.MonkeyPatch) -> None:
    _with_windows(monkeypatch, lambda first, position: (first(position) - 1).clamp(min=0))


def _windows_by_column(monkeypatch: pytest.MonkeyPatch) -> None:
    _with_windows(monkeypatch, lambda first, position: first(position[:, :1] + torch.arange(position.shape[1])))


def _positions_by_column(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        forward_pass, "column_positions",
        lambda depth, past, end: torch.arange(end).expand(len(past), -1),
    )  # fmt: skip


def _positions_shifted(monkeypatch: pytest.MonkeyPatch) -> None:
    right = transformers_engine.depths
    monkeypatch.setattr(transformers_engine, "depths", lambda parents: right(parents) + 1)


def _wrong_column(monkeypatch: pytest.MonkeyPatch) -> None:
    aim = slot_cache.SlotCache.aim
    monkeypatch.setattr(
        slot_cache.SlotCache, "aim",
        lambda self, part, packed: aim(self, part._replace(columns=part.columns.flip(1)), packed=packed),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("family", "mutate"),
    [
        ("mistral", _longer_window),
        ("gemma 3", _longer_window),
        ("llama 4", _longer_window),
        ("bloom", _positions_by_column),
        ("mistral", _windows_by_column),
        ("llama 4", _windows_by_column),
        ("llama", _positions_shifted),
        ("gpt-2", _wrong_column),
        ("llama", _wrong_column),
    ],
)
def test_what_is_wrong_in_every_form_is_refused(
    family: str, mutate: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate(monkeypatch)
    with pytest.raises(UnsupportedModelError, match=r"(ForCausalLM|LMHeadModel) is not served exactly: its logits"):
        engine_of(model_of(FAMILIES[family][1]()))


# ---- refusals -------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Callable[[], PretrainedConfig], str]] = {
    "looks ahead": (
        lambda: hf.Gemma3TextConfig(**HEADS, sliding_window=8, use_bidirectional_attention=True),
        "Gemma3ForCausalLM is not causal, or .*with later tokens.*engine.name=sglang may serve it",
    ),
    "bert": (
        lambda: hf.BertConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}),
        "BertLMHeadModel .*engine.name=sglang may serve it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_cannot_be_served_exactly_are_refused_by_name(case: str) -> None:
    config, message = REFUSED[case]
    with pytest.raises(UnsupportedModelError, match=message):
        engine_of(model_of(config()))


def test_a_context_too_short_to_check_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="has a context of 7 tokens, too short to check its logits in"):
        engine_of(model_of(hf.LlamaConfig(**{**HEADS, "max_position_embeddings": 7})), max_length=7)


# ---- half precision -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3, some layers slide", "gpt-2", "gemma 3", "deepseek v3"])
def test_rounding_is_no_disagreement(family: str, dtype: torch.dtype) -> None:
    form, config = FAMILIES[family]
    for seed in range(4):
        exact = engine_of(model_of(config(), seed=seed, dtype=dtype)).exactness
        assert exact.form == form and not exact.switched_off
        assert exact.error <= exact.tolerance <= exactness._LARGEST


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", transformers_engine._FORMS)
def test_every_form_can_be_taken_in_half_precision(
    form: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers_engine, "_FORMS", (form,))
    assert engine_of(model_of(hf.LlamaConfig(**HEADS), dtype=dtype)).exactness.form == form


# ---- models that other code uses too --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma 3", "bloom", "opt, projected"])
def test_a_model_in_inference_form_serves_again_and_gives_its_own_logits(family: str) -> None:
    model, tokens = model_of(FAMILIES[family][1]()), torch.randint(3, 48, (2, 12))
    before, text = model(tokens, use_cache=False).logits, generated(model, tokens[0], 12)
    for slots in (1, 2):
        engine = engine_of(model, slots=slots, max_length=32)
        assert engine.exactness.form == FAMILIES[family][0]
        assert served(engine, [tokens[0]], [text], drafted=True)[0] == [text]
        torch.testing.assert_close(model(tokens, use_cache=False).logits, before, rtol=1e-4, atol=1e-4)


# ---- half precision, and what an earlier user of the model left -------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("layers", "width"), [(3, 0.05), (30, 0.05), (30, 0.3)])
def test_a_scale_that_is_a_tenth_off_is_found_in_half_precision(
    layers: int, width: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scaled(kwargs: dict[str, Any]) -> None:
        kwargs["scaling"] = 1.1 * kwargs["scaling"]

    _patched_grouped(monkeypatch, scaled)
    sizes = {**SIZES, "num_hidden_layers": layers, "initializer_range": width}
    sizes.pop("num_key_value_heads")
    found = engine_of(model_of(hf.GPTNeoXConfig(**sizes), dtype=dtype)).exactness
    assert found.form == "sdpa" and "(in float32)" in found.switched_off["grouped"]


@pytest.mark.parametrize("cap", [5.0, 50.0])
def test_a_cap_that_is_dropped_is_found_in_half_precision(cap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    _patched_grouped(monkeypatch, lambda kwargs: kwargs.update(softcap=None))
    sizes = {**HEADS, "num_hidden_layers": 26, "initializer_range": 0.05}
    config = hf.Gemma2Config(**sizes, query_pre_attn_scalar=8, attn_logit_softcapping=cap)
    found = engine_of(model_of(config, dtype=torch.bfloat16)).exactness
    assert found.form == "eager" and "(in float32)" in found.switched_off["grouped"]


def test_weights_that_say_nothing_are_named() -> None:
    broken, empty = (model_of(hf.LlamaConfig(**SIZES)) for _ in range(2))
    with torch.no_grad():
        broken.lm_head.weight[0] = torch.nan
        empty.lm_head.weight.zero_()
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM gives logits that are not finite"):
        engine_of(broken)
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM gives every token the same logit"):
        engine_of(empty)


def test_a_router_that_returns_more_than_a_product_is_not_packed() -> None:
    config = hf.PhimoeConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    assert engine_of(model_of(config, dtype=torch.bfloat16)).exactness.form in ("grouped", "sdpa", "eager")


def _sees_its_sibling(monkeypatch: pytest.MonkeyPatch) -> None:
    right = transformers_engine.ancestor_mask

    def wrong(parents: Tensor, valid: Tensor) -> Tensor:
        seen = right(parents, valid).clone()
        if seen.shape[1] > 2:
            seen[:, 2, 1] = True
        return seen

    monkeypatch.setattr(transformers_engine, "ancestor_mask", wrong)


def _keys_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot_cache.SlotCache, "move", lambda *args: None)


@pytest.mark.parametrize("mutate", [_sees_its_sibling, _keys_stay])
@pytest.mark.parametrize("family", ["gpt-2", "llama", "opt"])
def test_a_wrong_mask_or_cache_is_found_in_half_precision(
    family: str, mutate: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With weights that make attention all but one-hot nothing of it shows; the weights as they are show it."""
    mutate(monkeypatch)
    for seed in range(3):
        with pytest.raises(UnsupportedModelError, match="not served exactly"):
            engine_of(model_of(FAMILIES[family][1](), seed=seed, dtype=torch.bfloat16))


def _later_tokens(x: Tensor) -> Tensor:
    return x + 0.1 * x.mean(1, keepdim=True)


def _other_rows(x: Tensor) -> Tensor:
    return x + 0.1 * x.mean(0, keepdim=True)


def _length_of_the_pass(x: Tensor) -> Tensor:
    return x * (1.05 if x.shape[1] > 40 else 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", [_later_tokens, _other_rows, _length_of_the_pass])
@pytest.mark.parametrize("family", ["gpt-2", "gemma 3", "llama"])
def test_a_model_that_depends_on_more_than_its_text_is_refused(
    family: str, change: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    model = model_of(FAMILIES[family][1](), dtype=dtype)

    def hook(module: torch.nn.Module, args: tuple, out: Any) -> Any:
        return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    decoder_layers(model)[0].register_forward_hook(hook)
    with pytest.raises(UnsupportedModelError, match=r"its logits change by [\d.]+% of their spread with later tokens"):
        engine_of(model)


def test_a_text_is_compared_beyond_its_first_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask that hides what is more than 30 columns back."""

    class Short(TreeMask):
        def dense(self, length: int, columns: int) -> Tensor:
            mask = super().dense(length, columns).clone()
            mask[..., : max(columns - 30, 0)] = False
            return mask

    monkeypatch.setattr(attention, "TreeMask", Short)
    with pytest.raises(UnsupportedModelError, match="not served exactly"):
        engine_of(model_of(FAMILIES["llama"][1]()))


def test_float32_cosines_are_fused_in_half_precision() -> None:
    config = hf.OlmoConfig(**SIZES)
    assert engine_of(model_of(config, dtype=torch.bfloat16)).exactness.form == "fused"


def test_logits_cast_to_float32_are_judged_as_those_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    right = hf.LlamaForCausalLM.forward

    def cast(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        out = right(self, *args, **kwargs)
        out.logits = out.logits.float()
        return out

    monkeypatch.setattr(hf.LlamaForCausalLM, "forward", cast)
    for seed in range(4):
        exact = engine_of(model_of(hf.LlamaConfig(**HEADS), seed=seed, dtype=torch.float16)).exactness
        assert exact.form == "fused" and exact.tolerance > 1e-3


WIDE = {**SIZES, "hidden_size": 64}


@pytest.mark.parametrize(
    ("config", "seed"),
    [
        (hf.MixtralConfig(**{**WIDE, "num_hidden_layers": 4, "initializer_range": 0.1}, num_local_experts=8), 3),
        (hf.PhimoeConfig(**{**WIDE, "num_hidden_layers": 6, "initializer_range": 0.12}, num_local_experts=8), 0),
    ],
    ids=["mixtral", "phimoe"],
)
def test_an_expert_that_rounding_chooses_does_not_switch_a_form_off(config: PretrainedConfig, seed: int) -> None:
    assert engine_of(model_of(config, seed=seed, dtype=torch.bfloat16)).exactness.form == "grouped"
