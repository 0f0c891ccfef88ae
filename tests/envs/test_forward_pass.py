"""A chunk of a prompt that rides in a round's pass leaves what a pass of its own leaves, in one pass."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from served_models import FAMILIES, HEADS, SIZES, model_of
from torch import Tensor
from transformers import PreTrainedModel

from aurora_rl.envs import Engine, PromptChunk, TransformersEngine
from aurora_rl.prefix_cache import PrefixCache

FUSED = [family for family, (form, _) in FAMILIES.items() if form == "fused"]
OTHERS = ["gemma 2", "gpt-oss", "bloom", "deepseek v3", "llama 4"]  # windows, sinks, ALiBi, latent keys, experts


def engine_of(model: PreTrainedModel, *, batch_invariant: bool = False) -> TransformersEngine:
    return TransformersEngine(
        copy.deepcopy(model), num_slots=4, max_length=64, feature_layers=(0, 2), batch_invariant=batch_invariant
    )


def prompt_of(engine: Engine, length: int = 33) -> Tensor:
    return torch.randint(3, engine.vocab_size, (length,), generator=torch.Generator().manual_seed(1))


def rounds(engine: Engine, *, together: bool, sizes: tuple[int, ...] = (1, 3, 17, 40)) -> list[Tensor]:
    """Rounds of two slots while a prompt is read into the slot between them, and what they leave."""
    generator, slots, prompt, done = torch.Generator().manual_seed(0), torch.tensor([0, 2]), prompt_of(engine), 0
    engine.prefill([0, 2], [prompt_of(engine, 12), prompt_of(engine, 5)])
    parents = torch.tensor([[-1, 0, 0, 1], [-1, -1, 1, -1]])
    valid = torch.tensor([[True] * 4, [True, True, True, False]])
    verify, out = type(engine).verify_with_chunk if together else Engine.verify_with_chunk, []
    for max_tokens in sizes:
        tokens = torch.randint(3, engine.vocab_size, (2, 4), generator=generator)
        hidden, done = verify(engine, slots, tokens, parents, valid, PromptChunk(1, prompt, done, max_tokens))
        path, new = torch.tensor([[0, 1, -1, -1], [1, 2, -1, -1]]), tokens.roll(1, 1)[:, [0, 1, 2, 3, 0]]
        out += [hidden, engine.commit(slots, path, new, torch.tensor([3, 2]))]
    assert done == len(prompt) == engine.store.lengths[1]
    none = torch.zeros(3, 0, dtype=torch.int64)
    out += [engine.verify(torch.arange(3), none, none, none.bool()), engine.store.features[1, : done - 1].clone()]
    for slot in range(3):
        engine.release(slot)
    return out


@pytest.mark.parametrize("family", [*FUSED, *OTHERS])
def test_a_chunk_in_a_round_leaves_what_a_pass_of_its_own_leaves(family: str) -> None:
    form, config = FAMILIES[family]
    engine = engine_of(model_of(config(), dtype=torch.float64 if form == "fused" else torch.float32))
    assert engine.exactness.form == form
    for both in zip(rounds(engine, together=True), rounds(engine, together=False), strict=True):
        if form == "fused":
            torch.testing.assert_close(*both, rtol=1e-6, atol=1e-7)  # norms are computed in float32
        else:
            assert torch.equal(*both)  # they are two passes either way


WINDOW = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
WIDE = {**SIZES, "hidden_size": 96, "intermediate_size": 1500, "num_attention_heads": 6, "vocab_size": 200}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["llama", "qwen3 that slides"])
def test_bit_for_bit_where_batches_are_invariant(name: str, dtype: torch.dtype) -> None:
    llama = name == "llama"
    config = hf.LlamaConfig(**WIDE, head_dim=16) if llama else hf.Qwen3Config(**WIDE, head_dim=16, **WINDOW)
    engine = engine_of(model_of(config, dtype=dtype), batch_invariant=True)
    for both in zip(rounds(engine, together=True), rounds(engine, together=False), strict=True):
        assert torch.equal(*both)
    # Nor does it matter how the prompt is divided.
    left = [rounds(engine, together=True, sizes=sizes)[-1] for sizes in ((40,), (9, 9, 9, 9))]
    assert torch.equal(*left)


def test_they_are_one_pass() -> None:
    engine, passes = engine_of(model_of(hf.LlamaConfig(**HEADS))), []
    engine.model.model.register_forward_hook(lambda module, args, out: passes.append(out.last_hidden_state.shape[:2]))
    rounds(engine, together=True, sizes=(1, 3, 17, 40))
    trees = 5 + 4
    assert passes[2:] == [(1, trees + 1), (1, trees + 3), (1, trees + 17), (1, trees + 11), (3, 1)]
    passes.clear()
    rounds(engine, together=False)
    assert len(passes) == 2 + 2 * 4 + 1


def test_forms_that_read_rows_of_one_kind_take_two() -> None:
    engine, passes = engine_of(model_of(FAMILIES["bloom"][1]())), []
    engine.model.transformer.register_forward_hook(lambda *args: passes.append(1))
    rounds(engine, together=True)
    assert len(passes) == 2 + 2 * 4 + 1


def test_a_chunk_has_no_more_rows_than_a_pass_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(model_of(hf.LlamaConfig(**HEADS)))
    monkeypatch.setattr(engine, "_prefill_rows", 10)
    engine.prefill([0], [prompt_of(engine, 3)])
    none, slots, prompt = torch.zeros(1, 0, dtype=torch.int64), torch.tensor([0]), prompt_of(engine)
    _, read = engine.verify_with_chunk(slots, none, none, none.bool(), PromptChunk(1, prompt, 0, 40))
    assert read == 10


def test_kept_rows_are_taken_over_and_a_prompt_of_nothing_but_a_root_is_complete_at_once() -> None:
    engine = engine_of(model_of(hf.LlamaConfig(**HEADS)))
    engine.prefix_cache, prompt = PrefixCache(100), prompt_of(engine)
    engine.prefill([1], [prompt])
    kept = engine.store.features[1, :32].clone()
    engine.release(1)
    engine.prefill([0], [prompt_of(engine, 3)])
    none, slots = torch.zeros(1, 0, dtype=torch.int64), torch.tensor([0])
    for slot, text, read in ((2, prompt, 33), (3, prompt[:1], 1), (1, torch.cat([prompt[:20], prompt[:9]]), 24)):
        chunk = PromptChunk(slot, text, 0, 4)
        assert engine.verify_with_chunk(slots, none, none, none.bool(), chunk)[1] == read
    assert engine.store.cached_lengths.tolist() == [3 - 1, 20, 32, 0]
    torch.testing.assert_close(engine.store.features[2, :32], kept)


@pytest.mark.parametrize("length", [0, 64])
def test_prompts_that_do_not_fit_are_refused(length: int) -> None:
    engine = engine_of(model_of(hf.LlamaConfig(**HEADS)))
    engine.prefill([0], [prompt_of(engine, 3)])
    none, slots = torch.zeros(1, 0, dtype=torch.int64), torch.tensor([0])
    with pytest.raises(ValueError, match=f"1..63 tokens in this engine, got {length}"):
        engine.verify_with_chunk(slots, none, none, none.bool(), PromptChunk(1, torch.zeros(length).long(), 0, 4))
