"""Tiny random targets of families other than Llama in real SGLang: what is recorded of their passes, and a swap."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sglang_requests import Learner, environment, other_weights, requests
from transformers import AutoConfig, AutoModelForCausalLM

from aurora_rl.collectors.handshake import Handshake
from aurora_rl.envs.sglang.client import SGLangClient
from aurora_rl.policies import Eagle3Drafter, TargetParts
from aurora_rl.policies.formats.files import load_drafter, save_drafter
from aurora_rl.training.served_weights import drafts_agreed

pytestmark = pytest.mark.stress  # a server each

LAYERS = (2, 4, 5)
SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
EXPERTS: dict[str, Any] = {
    **SIZES,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
LATENT: dict[str, Any] = {
    **{**EXPERTS, "num_key_value_heads": 4, "head_dim": None},
    **{"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32},
    # SGLang has no other RoPE for these layers on a CPU.
    "rope_parameters": {
        **{"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128},
        **{"mscale": 1.0, "mscale_all_dim": 1.0},
    },
    **{
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 2,
        "n_shared_experts": 1,
        "moe_layer_freq": 1,
    },
}
# Not here: linear attention, for which SGLang needs a GPU, and attention sinks, which tests/sglang_cpu lacks.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {**SIZES, "head_dim": None},
    "qwen3": SIZES,
    "qwen3_moe": EXPERTS,
    "glm4_moe": EXPERTS,
    "deepseek_v3": LATENT,
}


@pytest.mark.parametrize(("family", "ranks"), [*((name, 1) for name in FAMILIES), ("qwen3_moe", 2), ("deepseek_v3", 2)])
def test_features_are_the_models_own_and_a_swap_serves(
    family: str, ranks: int, launch: Callable[..., SGLangClient], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    settings = {name: value for name, value in FAMILIES[family].items() if value is not None or name.endswith("_id")}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).eval().requires_grad_(False)
    model.save_pretrained(tmp_path / "target")
    parts = TargetParts.of(model)
    drafter = Eagle3Drafter.from_target(parts, draft_vocab=torch.arange(0, 512, 2), feature_layers=LAYERS)
    save_drafter(drafter, tmp_path / "drafter", "sglang")
    handshake = Handshake.of(parts, drafter, "eagle3")
    learner = Learner(handshake)
    request.addfinalizer(learner.die)
    with SGLangClient.launch(
        tmp_path / "target",
        drafter=tmp_path / "drafter",
        depth=3,
        width=1,
        num_nodes=3,
        dtype="float32",
        max_length=400,
        log=tmp_path / "log",
        arguments=["--chunked-prefill-size", "256", "--skip-tokenizer-init", "--tp-size", str(ranks)],
        environment=environment(),
    ) as engine:
        engine.attach(handshake=handshake, trajectories=learner.trajectories, weights=learner.weights)
        weights = other_weights(drafter, 1)
        new = load_drafter(tmp_path / "drafter", parts)
        new.install(weights)
        for version, served in ((0, drafter), (1, new)):
            if version:
                learner.publish(version, weights)
            asked = requests(40, 300, seed=version)
            for each in asked:
                engine.generate(each)
            recorded = learner.take(*(each.id for each in asked))
            for trajectory in recorded:
                tokens, prompt = trajectory["sequence", "tokens"], int(trajectory["sequence", "prompt_length"])
                logits = trajectory["sequence", "hidden"] @ model.lm_head.weight.T
                assert torch.equal(logits.argmax(-1), tokens[prompt:])
                if family == "deepseek_v3":  # on a CPU without AMX its states are others than those of transformers
                    continue
                states = model(tokens[None], output_hidden_states=True).hidden_states
                expected = torch.cat([states[layer][0] for layer in LAYERS], -1)[:-1]
                torch.testing.assert_close(trajectory["sequence", "features"], expected, atol=2e-4, rtol=1e-4)
            drafted, agreed = drafts_agreed(served, recorded, version)
            assert drafted > 5 and agreed == drafted
        assert engine.status()["skipped"] == {}
        engine.detach()
