"""The check that an engine makes of itself: models of many families served exactly, wrong forms never served."""

from __future__ import annotations

import copy
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from aurora_rl.envs import Request, SamplingParams, SpecDecodeEnv, TransformersEngine, exactness, transformers_engine
from aurora_rl.envs.exactness import UnsupportedModelError
from aurora_rl.models import inference_modules
from aurora_rl.models import kv_cache as slot_cache
from aurora_rl.models.target_head import decoder_layers
from aurora_rl.testing import check_engine

# Wide weights: a random model with small ones has nearly flat logits, and everything would agree by chance.
SIZES: dict[str, Any] = dict(
    vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3, bos_token_id=None, eos_token_id=None,
    pad_token_id=0,
)  # fmt: skip
HEADS = {**SIZES, "head_dim": 8}
GPT = dict(
    vocab_size=48, n_embd=32, n_layer=3, n_head=4, n_positions=256, initializer_range=0.3, bos_token_id=None,
    eos_token_id=None,
)  # fmt: skip
OPT = dict(
    vocab_size=48, hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4,
    max_position_embeddings=256, init_std=0.3, bos_token_id=None, eos_token_id=None, pad_token_id=0,
)  # fmt: skip
MLA = dict(
    num_key_value_heads=4, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
    topk_group=1, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8,
    v_head_dim=6,
)  # fmt: skip
LLAMA4 = dict(intermediate_size_mlp=48, num_local_experts=2, num_experts_per_tok=1, no_rope_layers=[1, 0, 1])
MOE = dict(num_local_experts=4, num_experts_per_tok=2)
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
LONGROPE = dict(
    rope_type="longrope", rope_theta=1e4, factor=4.0, short_factor=[1.0, 1.1, 1.2, 1.3],
    long_factor=[4.0, 5.0, 6.0, 7.0],
)  # fmt: skip
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=16)
SCALED = {**YARN, "llama_4_scaling_beta": 0.5, "mscale": 1.0, "mscale_all_dim": 1.0}


def glm4_moe() -> PretrainedConfig:
    return hf.Glm4MoeConfig(
        **HEADS, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_group=1, topk_group=1,
        first_k_dense_replace=1,
    )  # fmt: skip


# The form in which each family is served, and its configuration.
FAMILIES: dict[str, tuple[str, Callable[[], PretrainedConfig]]] = {
    "llama": ("fused", lambda: hf.LlamaConfig(**HEADS)),
    "odd head groups, tied": (
        "fused",
        lambda: hf.LlamaConfig(
            **{**HEADS, "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3}, tie_word_embeddings=True
        ),
    ),
    "yarn": ("fused", lambda: hf.LlamaConfig(**HEADS, rope_parameters=YARN)),
    "longrope": (
        "fused",
        lambda: hf.LlamaConfig(**HEADS, rope_parameters={**LONGROPE, "original_max_position_embeddings": 128}),
    ),
    "mistral": ("fused", lambda: hf.MistralConfig(**HEADS, sliding_window=8)),
    "qwen3, some layers slide": (
        "fused",
        lambda: hf.Qwen3Config(**HEADS, use_sliding_window=True, sliding_window=8, max_window_layers=2),
    ),
    "gemma 2": (
        "grouped",
        lambda: hf.Gemma2Config(
            **HEADS, sliding_window=8, query_pre_attn_scalar=8, attn_logit_softcapping=5.0, tie_word_embeddings=False,
            final_logit_softcapping=8.0,
        ),  # fmt: skip
    ),
    "gemma 3": (
        "grouped",
        lambda: hf.Gemma3TextConfig(**HEADS, sliding_window=8, layer_types=ALTERNATING, tie_word_embeddings=False),
    ),
    "gpt-oss": ("grouped", lambda: hf.GptOssConfig(**HEADS, **MOE, sliding_window=8, rope_parameters=YARN)),
    "gpt-2": ("grouped", lambda: hf.GPT2Config(**GPT)),
    "gpt-neox": (
        "grouped",
        lambda: hf.GPTNeoXConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}),
    ),
    "opt": ("grouped", lambda: hf.OPTConfig(**OPT, word_embed_proj_dim=32)),
    "opt, projected": ("grouped", lambda: hf.OPTConfig(**OPT, word_embed_proj_dim=16, do_layer_norm_before=False)),
    "bloom": (
        "eager",
        lambda: hf.BloomConfig(
            vocab_size=48, hidden_size=32, n_layer=3, n_head=4, initializer_range=0.3, bos_token_id=None,
            eos_token_id=None, pad_token_id=0,
        ),  # fmt: skip
    ),
    "deepseek v3": ("grouped", lambda: hf.DeepseekV3Config(**{**SIZES, **MLA})),
    "llama 4": (
        "grouped",
        lambda: hf.Llama4TextConfig(**HEADS, **LLAMA4, attention_chunk_size=8, attn_temperature_tuning=False),
    ),
    "granite": ("grouped", lambda: hf.GraniteConfig(**SIZES, logits_scaling=4.0, residual_multiplier=0.5)),
    "cohere": ("grouped", lambda: hf.CohereConfig(**SIZES, logit_scale=0.5)),
    # What a fused layer of Llama's parts would leave out.
    "clipped projections": ("grouped", lambda: hf.OlmoConfig(**SIZES, clip_qkv=1.0)),
    "attention scaled by position": (
        "grouped",
        lambda: hf.Ministral3Config(**HEADS, sliding_window=None, rope_parameters=dict(SCALED)),
    ),
    "partial rotary": ("grouped", glm4_moe),
}  # fmt: skip


def model_of(config: PretrainedConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return model.to(dtype).eval().requires_grad_(False)


def engine_of(model: PreTrainedModel, *, slots: int = 1, max_length: int = 64) -> TransformersEngine:
    return TransformersEngine(model, num_slots=slots, max_length=max_length, feature_layers=())


@torch.inference_mode()
def generated(model: PreTrainedModel, prompt: Tensor, count: int) -> list[int]:
    model = copy.deepcopy(model)
    out = model.generate(
        prompt[None], attention_mask=torch.ones_like(prompt[None]), max_new_tokens=count, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


def served(
    engine: TransformersEngine, prompts: Sequence[Tensor], texts: Sequence[list[int]], *, drafted: bool
) -> tuple[list[list[int]], int]:
    """Greedy texts and the rounds they took; trees hold the right path among wrong nodes, and errors in it."""
    rng, nodes = random.Random(0), 6
    queue = [
        Request(i, prompt, SamplingParams(max_tokens=len(text)))
        for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
    ]
    done: dict[int, list[int]] = {}
    env = SpecDecodeEnv(
        engine,
        lambda: queue.pop(0) if queue else None,
        num_nodes=nodes,
        on_completion=lambda completion: done.update({completion.request.id: completion.tokens.tolist()}),
    )
    td, rounds = env.reset(), 0
    while env.num_active:
        tokens = torch.zeros(engine.num_slots, nodes, dtype=torch.int64)
        parents, mask = torch.full_like(tokens, -1), torch.zeros_like(tokens, dtype=torch.bool)
        for slot in engine.store.occupied.tolist() if drafted else []:
            at, parent = int(engine.store.lengths[slot] - engine.store.prompt_lengths[slot]), -1
            right = texts[env.request_of(slot).id][at : at + nodes // 2]
            for node in range(nodes):
                true = node % 2 == 1 and node // 2 < len(right)
                tokens[slot, node] = (
                    right[node // 2] if true and rng.random() > 0.2 else rng.randrange(engine.vocab_size)
                )
                parents[slot, node], mask[slot, node] = parent, True
                parent = node if true else parent
        td["draft"] = {"tokens": tokens, "parents": parents, "mask": mask, "log_probs": torch.zeros(tokens.shape)}
        _, td = env.step_and_maybe_reset(td)
        rounds += 1
    return [done[i] for i in range(len(prompts))], rounds


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


def test_dynamic_rope_serves_a_request_after_another_that_filled_the_context() -> None:
    config = hf.LlamaConfig(
        **{**HEADS, "max_position_embeddings": 32},
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
    )
    model = model_of(config)
    prompts = [torch.tensor([5, 9, 11, 7, 21]), torch.tensor([8, 30, 2, 17])]
    texts = [generated(model, prompts[0], 27), generated(model, prompts[1], 20)]
    engine = engine_of(model, max_length=32)
    for drafted in (False, True):
        assert served(engine, prompts, texts, drafted=drafted)[0] == texts


# ---- wrong forms ----------------------------------------------------------------------------------------------------


def _patched_grouped(monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], None]) -> None:
    """Our attention, told other arguments."""
    right = inference_modules.grouped_attention

    def wrong(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *args: Any, **kwargs: Any):
        change(kwargs)
        return right(module, query, key, value, mask, *args, **kwargs)

    monkeypatch.setitem(hf.AttentionInterface._global_mapping, inference_modules.GROUPED_ATTENTION, wrong)


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


def _longer_window(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = transformers_engine.mask_kinds

    def wrong(config: PretrainedConfig, name: str, max_length: int):
        right = kinds(config, name, max_length)
        return {kind: lambda query, key, sees=sees: sees(query, key + 1) for kind, sees in right.items()}

    monkeypatch.setattr(transformers_engine, "mask_kinds", wrong)


def _positions_by_column(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        transformers_engine, "column_positions",
        lambda depth, past, end: torch.arange(end).expand(len(past), -1),
    )  # fmt: skip


def _positions_shifted(monkeypatch: pytest.MonkeyPatch) -> None:
    right = transformers_engine.depths
    monkeypatch.setattr(transformers_engine, "depths", lambda parents: right(parents) + 1)


def _wrong_column(monkeypatch: pytest.MonkeyPatch) -> None:
    aim = slot_cache.SlotCache.aim
    monkeypatch.setattr(
        slot_cache.SlotCache, "aim",
        lambda self, slots, columns, end: aim(self, slots, columns.flip(1), end),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("family", "mutate"),
    [
        ("mistral", _longer_window),
        ("gemma 3", _longer_window),
        ("llama 4", _longer_window),
        ("bloom", _positions_by_column),
        ("llama 4", _positions_by_column),
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

SHORT = {"original_max_position_embeddings": 32}
REFUSED: dict[str, tuple[Callable[[], PretrainedConfig], str]] = {
    "longrope": (
        lambda: hf.LlamaConfig(**HEADS, rope_parameters={**LONGROPE, **SHORT}),
        r"LlamaForCausalLM has longrope RoPE.* beyond 32 tokens.*; set engine.max_length <= 32 \(got 64\)",
    ),
    "dynamic": (
        lambda: hf.LlamaConfig(
            **HEADS, rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4, **SHORT}
        ),
        r"LlamaForCausalLM has dynamic RoPE.*; set engine.max_length <= 32 \(got 64\)",
    ),
    "convolutions": (
        lambda: hf.Lfm2Config(**SIZES, layer_types=["conv", "full_attention", "conv"]),
        "Lfm2ForCausalLM has layers of the kind conv, .*serve it with engine.name=sglang",
    ),
    "recurrent": (
        lambda: hf.MambaConfig(vocab_size=48, hidden_size=32, num_hidden_layers=3, state_size=4),
        "MambaForCausalLM has layers of the kind mamba, .*serve it with engine.name=sglang",
    ),
    "linear attention": (
        lambda: hf.Qwen3NextConfig(
            **HEADS, layer_types=["linear_attention", "full_attention", "linear_attention"], num_experts=4,
            num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16,
            linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
        ),  # fmt: skip
        "Qwen3NextForCausalLM has layers of the kind linear_attention, .*serve it with engine.name=sglang",
    ),
    "temperature": (
        lambda: hf.Llama4TextConfig(**HEADS, **LLAMA4, attention_chunk_size=8, floor_scale=16),
        r"Llama4ForCausalLM scales attention .* position 16 on.*; set engine.max_length <= 15 \(got 64\)",
    ),
    "looks ahead": (
        lambda: hf.Gemma3TextConfig(**HEADS, sliding_window=8, use_bidirectional_attention=True),
        "Gemma3ForCausalLM .*other tokens follow.* it is no causal language model.*engine.name=sglang may serve it",
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


def test_a_second_engine_of_a_model_checks_its_own_length() -> None:
    model = model_of(REFUSED["dynamic"][0]())
    engine_of(model, max_length=32)
    with pytest.raises(UnsupportedModelError, match=r"dynamic RoPE.* \(got 64\)"):
        engine_of(model)


def test_a_second_engine_serves_a_model_further_than_the_first() -> None:
    model, prompt = model_of(FAMILIES["attention scaled by position"][1]()), torch.tensor([5, 9, 11, 7, 21])
    text = generated(model, prompt, 50)
    engine_of(model, max_length=15)  # attention is not scaled up to here
    assert served(engine_of(model), [prompt], [text], drafted=True)[0] == [text]


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


# ---- prefill --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma 3", "llama 4", "bloom", "deepseek v3"])
def test_prompts_read_in_chunks_are_read_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt, slots = model_of(FAMILIES[family][1]()), torch.randint(3, 48, (61,)), torch.tensor([0])
    none = torch.zeros(1, 0, dtype=torch.int64)
    engine = TransformersEngine(model, num_slots=1, max_length=64, feature_layers=(1,))
    results = []
    for scores, rows in ((2**24, 512), (2**24, 16), (2**24, 23), (2**24, 59), (1, 512), (4 * 61 * 31, 512)):
        monkeypatch.setattr(transformers_engine, "_PREFILL_SCORES", scores)
        monkeypatch.setattr(transformers_engine, "_PREFILL_ROWS", rows)
        engine.prefill([0], [prompt])
        results.append((engine.store.features[0, :60].clone(), engine.verify(slots, none, none, none.bool())))
        engine.release(0)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-3, atol=1e-4)


_MEMORY = """
import resource, sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
from aurora_rl.envs import TransformersEngine
torch.set_num_threads(1)
config = LlamaConfig(vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=8,
    num_key_value_heads=1, head_dim=2, max_position_embeddings=16384, bos_token_id=None, eos_token_id=None)
engine = TransformersEngine(LlamaForCausalLM(config).eval(), num_slots=1, max_length=6008, feature_layers=(0,))
most = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
engine.prefill([0], [torch.randint(300, (500,))])
before = most()
engine.prefill([0], [torch.randint(300, (6000,))])
print(most() - before)
"""


def test_memory_of_a_long_prompt_is_linear_in_its_length() -> None:
    run = subprocess.run([sys.executable, "-c", _MEMORY], capture_output=True, text=True, timeout=120, check=True)
    # MB. It is about 90, of the scores of one chunk; one mask of all pairs, for 8 heads in float32, is 1152.
    assert float(run.stdout) < 150


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


@pytest.mark.parametrize("family", ["gpt-2", "gemma 3", "deepseek v3", "bloom", "opt", "gpt-oss", "cohere"])
def test_rounds_equal_the_model_run_path_by_path(family: str) -> None:
    model = model_of(FAMILIES[family][1]())
    engine = TransformersEngine(copy.deepcopy(model), num_slots=2, max_length=64, feature_layers=(0, 2))
    check_engine(engine, model, feature_layers=(0, 2), rounds=2)


# ---- half precision, and what an earlier user of the model left -------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("layers", "width"), [(3, 0.05), (30, 0.05), (30, 0.3)])
def test_a_scale_that_is_a_tenth_off_is_found_in_half_precision(
    layers: int, width: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scaled(given: dict[str, Any]) -> None:
        given["scaling"] = 1.1 * given["scaling"]

    _patched_grouped(monkeypatch, scaled)
    sizes = {**SIZES, "num_hidden_layers": layers, "initializer_range": width}
    sizes.pop("num_key_value_heads")
    found = engine_of(model_of(hf.GPTNeoXConfig(**sizes), dtype=dtype)).exactness
    assert found.form == "sdpa" and "(in float32)" in found.switched_off["grouped"]


@pytest.mark.parametrize("cap", [5.0, 50.0])
def test_a_cap_that_is_dropped_is_found_in_half_precision(cap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    _patched_grouped(monkeypatch, lambda given: given.update(softcap=None))
    sizes = {**HEADS, "num_hidden_layers": 26, "initializer_range": 0.05}
    config = hf.Gemma2Config(**sizes, query_pre_attn_scalar=8, attn_logit_softcapping=cap)
    found = engine_of(model_of(config, dtype=torch.bfloat16)).exactness
    assert found.form == "eager" and "(in float32)" in found.switched_off["grouped"]


@pytest.mark.parametrize("kind", [{"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}, LONGROPE])
def test_a_longer_pass_before_the_engine_was_built_leaves_no_trace(kind: dict[str, Any]) -> None:
    sizes = {**SIZES, "max_position_embeddings": 128 if kind is LONGROPE else 32}
    rope = {**kind, "original_max_position_embeddings": 32} if kind is LONGROPE else kind
    model = model_of(hf.LlamaConfig(**sizes, rope_parameters=rope))
    fresh, text = copy.deepcopy(model), torch.arange(3, 15)
    with torch.inference_mode():
        model(torch.arange(48)[None])
        expected = fresh(text[None]).logits[0, -1]
    engine = engine_of(model, max_length=32)
    engine.prefill([0], [text])
    none = torch.zeros(1, 0, dtype=torch.int64)
    torch.testing.assert_close(
        engine.logits(engine.verify(torch.tensor([0]), none, none, none.bool()))[0, 0], expected, rtol=0, atol=1e-4
    )


def test_two_engines_of_one_alibi_model_take_turns() -> None:
    model = model_of(hf.BloomConfig(vocab_size=48, hidden_size=32, n_layer=3, n_head=4, initializer_range=0.3))
    reference, texts = copy.deepcopy(model), (torch.arange(3, 15), torch.arange(5, 40))
    engines = [engine_of(model) for _ in texts]
    for engine, text in zip(engines, texts, strict=True):
        engine.prefill([0], [text])
    none = torch.zeros(1, 0, dtype=torch.int64)
    for engine, text in zip(engines, texts, strict=True):
        logits = engine.logits(engine.verify(torch.tensor([0]), none, none, none.bool()))[0, 0]
        torch.testing.assert_close(logits, reference(text[None]).logits[0, -1], rtol=0, atol=1e-4)


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
    with pytest.raises(UnsupportedModelError, match="itself gives other logits for the same text"):
        engine_of(model)


def test_a_text_is_compared_beyond_its_first_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask that hides what is more than 30 columns back."""
    right = transformers_engine.cache_mask

    def wrong(seen: Tensor, past: Tensor, end: int) -> Tensor:
        mask = right(seen, past, end).clone()
        mask[..., : max(end - 30, 0)] = False
        return mask

    monkeypatch.setattr(transformers_engine, "cache_mask", wrong)
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
