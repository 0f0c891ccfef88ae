"""The embedded engine against the model run path by path."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from served_models import FAMILIES, engine_of, model_of
from transformers import CohereConfig, CohereForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from aurora_rl.envs import TransformersEngine, transformers_engine
from aurora_rl.testing import check_engine, tiny_target


def none(slots: int = 1) -> torch.Tensor:
    return torch.zeros(slots, 0, dtype=torch.int64)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("num_slots", [1, 4])
def test_rounds_equal_the_model_run_path_by_path(architecture: str, dtype: torch.dtype, num_slots: int) -> None:
    engine = TransformersEngine(
        tiny_target(architecture, dtype=dtype), num_slots=num_slots, max_length=64, feature_layers=(0, 2, 3)
    )
    check_engine(engine, tiny_target(architecture, dtype=dtype), feature_layers=(0, 2, 3))


@pytest.fixture(scope="module")
def pair() -> tuple[TransformersEngine, PreTrainedModel]:
    engine = TransformersEngine(tiny_target(), num_slots=3, max_length=48, feature_layers=(1, 3))
    return engine, tiny_target()


@given(seed=st.integers(0, 2**31))
@settings(max_examples=8, deadline=None)
def test_any_trees_paths_and_slots(pair: tuple[TransformersEngine, PreTrainedModel], seed: int) -> None:
    engine, reference = pair
    check_engine(engine, reference, feature_layers=(1, 3), rounds=2, seed=seed)


def test_the_last_layer_id_is_the_input_of_the_head() -> None:
    engine = TransformersEngine(tiny_target(), num_slots=1, max_length=32, feature_layers=(3,))
    engine.prefill([0], [torch.tensor([5, 6, 7])])
    slots = torch.tensor([0])
    hidden = engine.verify(slots, none(), none(), none().bool())
    features = engine.commit(slots, none(), torch.tensor([[9]]), torch.tensor([1]))
    assert torch.equal(features, hidden)
    assert torch.equal(engine.store.hidden[0, 2], hidden[0, 0])


def test_padding_of_unequal_trees_is_not_computed() -> None:
    engine = TransformersEngine(tiny_target().double(), num_slots=3, max_length=32, feature_layers=(0, 2))
    engine.prefill([0, 1, 2], [torch.arange(3, 6 + slot) for slot in range(3)])
    rows: list[int] = []
    engine.model.model.layers[1].register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[:2].numel()))
    tokens, parents = torch.randint(0, 16, (3, 4)), torch.tensor([-1, 0, 0, 1]).expand(3, -1)
    nodes = torch.tensor([4, 1, 0])
    valid = torch.arange(4) < nodes[:, None]
    together = engine.verify(torch.arange(3), tokens, parents, valid)
    assert rows == [3 + 5]
    for slot, count in enumerate(nodes.tolist()):
        alone = engine.verify(torch.tensor([slot]), *(each[[slot], :count] for each in (tokens, parents, valid)))
        torch.testing.assert_close(together[[slot], : count + 1], alone)
        assert not together[slot, count + 1 :].any()


def test_prompts_are_loaded_next_to_running_slots() -> None:
    engine = TransformersEngine(tiny_target(), num_slots=2, max_length=32, feature_layers=(0, 1))
    alone = TransformersEngine(tiny_target(), num_slots=1, max_length=32, feature_layers=(0, 1))
    prompt, neighbour = torch.tensor([3, 1, 4, 1, 5]), torch.tensor([9, 2])
    alone.prefill([0], [prompt])
    engine.prefill([1], [neighbour])
    engine.prefill([0], [prompt])
    assert engine.store.lengths.tolist() == [5, 2]
    torch.testing.assert_close(engine.store.features[0, :4], alone.store.features[0, :4])
    assert engine.prefill_seconds > 0


def test_a_full_slot_still_takes_a_tree() -> None:
    engine = TransformersEngine(tiny_target(), num_slots=2, max_length=8, feature_layers=(0,))
    engine.prefill([0, 1], [torch.arange(7), torch.arange(7)])
    slots, width = torch.tensor([0, 1]), 64
    tokens = torch.zeros(2, width, dtype=torch.int64)
    chains = torch.arange(-1, width - 1).repeat(2, 1)
    first = engine.verify(slots, tokens, chains, torch.ones(2, width, dtype=torch.bool))
    again = engine.verify(slots, none(2), none(2), none(2).bool())
    # Slot 0's tree would spoil slot 1 if it ran over its end.
    torch.testing.assert_close(again[:, 0], first[:, 0])
    with pytest.raises(ValueError, match="65 nodes exceeds the engine's 64"):
        engine.verify(slots, *(torch.zeros(2, 65, dtype=torch.int64),) * 2, torch.ones(2, 65, dtype=torch.bool))


@pytest.mark.parametrize("length", [0, 8])
def test_prompts_that_do_not_fit_are_refused(length: int) -> None:
    engine = TransformersEngine(tiny_target(), num_slots=1, max_length=8, feature_layers=(0,))
    with pytest.raises(ValueError, match=f"1..7 tokens in this engine, got {length}"):
        engine.prefill([0], [torch.zeros(length, dtype=torch.int64)])


def test_a_drafter_may_read_no_features() -> None:
    engine = TransformersEngine(tiny_target(), num_slots=1, max_length=8, feature_layers=())
    engine.prefill([0], [torch.tensor([1, 2, 3])])
    assert engine.store.features.shape == (1, 8, 0)


@pytest.mark.parametrize("layers", [(4,), (-1, 0)])
def test_feature_layers_out_of_range_are_refused(layers: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"layer ids in 0..3"):
        TransformersEngine(tiny_target(), num_slots=1, max_length=8, feature_layers=layers)


@pytest.mark.parametrize("length", [1, 513])
def test_contexts_out_of_range_are_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"2..512 .the model's context., got {length}"):
        TransformersEngine(tiny_target(), num_slots=1, max_length=length, feature_layers=(0,))


def test_a_sliding_window_and_scaled_logits_are_served() -> None:
    sizes = dict(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.4, pad_token_id=0,
    )  # fmt: skip
    for model in (
        MistralForCausalLM(MistralConfig(**sizes, head_dim=4, sliding_window=5, max_position_embeddings=64)),
        CohereForCausalLM(CohereConfig(**sizes, logit_scale=0.5, bos_token_id=1, eos_token_id=2)),
    ):
        engine = TransformersEngine(copy.deepcopy(model).eval(), num_slots=2, max_length=64, feature_layers=(0,))
        check_engine(engine, model.eval(), feature_layers=(0,), rounds=2)


def test_a_model_serves_a_second_engine() -> None:
    """Its layers and norms are in their faster form already."""
    model, prompt, slot = tiny_target(), torch.tensor([3, 1, 4]), torch.tensor([0])
    outputs = []
    for _ in range(2):
        engine = TransformersEngine(model, num_slots=1, max_length=8, feature_layers=(0,))
        engine.prefill([0], [prompt])
        outputs.append(engine.verify(slot, none(1), none(1), none(1).bool()))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("family", ["gpt-2", "gemma 3", "deepseek v3", "bloom", "opt", "gpt-oss", "cohere"])
def test_rounds_of_every_family_equal_the_model_run_path_by_path(family: str) -> None:
    model = model_of(FAMILIES[family][1]())
    engine = TransformersEngine(copy.deepcopy(model), num_slots=2, max_length=64, feature_layers=(0, 2))
    check_engine(engine, model, feature_layers=(0, 2), rounds=2)


@pytest.mark.parametrize("family", ["llama", "gemma 3", "llama 4", "bloom", "deepseek v3"])
def test_prompts_read_in_chunks_are_read_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt, slots = model_of(FAMILIES[family][1]()), torch.randint(3, 48, (61,)), torch.tensor([0])
    none = torch.zeros(1, 0, dtype=torch.int64)
    engine = TransformersEngine(model, num_slots=1, max_length=64, feature_layers=(1,))
    results = []
    for scores, rows in ((2**24, 512), (2**24, 16), (2**24, 23), (2**24, 59), (1, 512), (4 * 61 * 31, 512)):
        monkeypatch.setattr(transformers_engine, "_PREFILL_SCORES", scores)
        monkeypatch.setattr(engine, "_prefill_rows", rows)
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
    # MB. It is about 1; the scores of one chunk are 98, and one mask of all pairs, for 8 heads in float32, is 1152.
    assert float(run.stdout) < 30


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
