"""With batch_invariant=True a token's logits are the same bits alone and in trees, batches and chunks of a prompt."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from served_models import FAMILIES, SIZES, model_of
from torch import Tensor
from transformers import PreTrainedModel

from aurora_rl.envs import TransformersEngine, forward_pass, transformers_engine
from aurora_rl.envs.exactness import UnsupportedModelError, check_batch_invariance
from aurora_rl.models import batch_invariant

LENGTH = 40
# No vector divides the intermediate size, and keys have three queries each.
SHAPE = {**SIZES, "hidden_size": 96, "intermediate_size": 100, "num_attention_heads": 6, "vocab_size": 200}
# Wide enough that rounding shows: products with hundreds of terms.
WIDE = {**SHAPE, "intermediate_size": 1500, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    torch.manual_seed(0)
    return {
        "llama": model_of(hf.LlamaConfig(**WIDE, head_dim=16), dtype=torch.bfloat16),
        "qwen3 that slides": model_of(
            hf.Qwen3Config(**SHAPE, head_dim=16, use_sliding_window=True, sliding_window=8, max_window_layers=2),
            dtype=torch.bfloat16,
        ),
        "float32": model_of(hf.LlamaConfig(**WIDE, head_dim=16)),
    }


def engine_of(model: PreTrainedModel, slots: int = 1, *, batch_invariant: bool = True) -> TransformersEngine:
    return TransformersEngine(
        copy.deepcopy(model), num_slots=slots, max_length=96, feature_layers=(0, 2), batch_invariant=batch_invariant
    )


def plain_logits(engine: TransformersEngine, text: Tensor, start: int = 1) -> Tensor:
    """Logits after each token from ``start - 1`` on, one token a pass, ``[len(text) - start + 1, V]``."""
    engine.prefill([0], [text[:start]])
    none, slots, rows = torch.zeros(1, 0, dtype=torch.int64), torch.tensor([0]), []
    for at in range(start, len(text) + 1):
        rows.append(engine.logits(engine.verify(slots, none, none, none.bool()))[0, 0])
        if at < len(text):
            engine.commit(slots, none, text[at : at + 1][None], torch.tensor([1]))
    engine.release(0)
    return torch.stack(rows)


def rounds(engine: TransformersEngine, texts: list[Tensor], seed: int) -> Iterator[tuple[int, int, Tensor]]:
    """Serve texts in all slots by random trees with the text on one path; yield text, position and logits there."""
    generator, slots, count = torch.Generator().manual_seed(seed), torch.arange(len(texts)), len(texts)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    engine.prefill(slots.tolist(), [text[: draw(2, 12)] for text in texts])
    while int(engine.store.lengths.max()) + 9 < LENGTH:
        nodes, lengths = draw(0, 9), engine.store.lengths.tolist()
        parents = torch.tensor([[draw(-1, node) for node in range(nodes)] for _ in texts], dtype=torch.int64)
        tokens = torch.randint(0, engine.vocab_size, parents.shape, generator=generator)
        valid = torch.ones_like(tokens, dtype=torch.bool)
        accepted, new = torch.full_like(parents, -1), torch.zeros(count, dtype=torch.int64)
        for i, text in enumerate(texts):
            path, node = [], draw(-1, nodes)
            while node >= 0:
                path, node = [node, *path], int(parents[i, node])
            tokens[i, path] = text[lengths[i] : lengths[i] + len(path)]
            for node in range(nodes):
                parent = int(parents[i, node])
                valid[i, node] = node in path or (draw(0, 5) > 0 and (parent < 0 or bool(valid[i, parent])))
            accepted[i, : len(path)] = torch.tensor(path, dtype=torch.int64)
            new[i] = len(path) + 1
        logits = engine.logits(engine.verify(slots, tokens, parents, valid))
        for i, path in enumerate(accepted.tolist()):
            for depth, column in enumerate([0, *(node + 1 for node in path if node >= 0)]):
                yield i, lengths[i] - 1 + depth, logits[i, column]
        ahead = [text[length : length + nodes + 1] for text, length in zip(texts, lengths, strict=True)]
        engine.commit(slots, accepted, torch.stack(ahead), new)
    for slot in slots.tolist():
        engine.release(slot)


def texts_of(model: PreTrainedModel, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, model.config.vocab_size, (LENGTH,), generator=generator) for _ in range(count)]


def differences(model: PreTrainedModel, *, batch_invariant: bool = True) -> int:
    """Nodes of trees in batches whose logits are not those of plain decoding alone."""
    texts = texts_of(model, 3)
    engine = engine_of(model, 3, batch_invariant=batch_invariant)
    expected = [plain_logits(engine, text) for text in texts]
    found = [(seed, *each) for seed in range(2) for each in rounds(engine, texts, seed)]
    assert len(found) > 50
    return sum(not torch.equal(logits, expected[text][position]) for _, text, position, logits in found)


@pytest.mark.parametrize("name", ["llama", "qwen3 that slides", "float32"])
def test_trees_in_batches_have_the_logits_of_plain_decoding_alone(
    models: dict[str, PreTrainedModel], name: str
) -> None:
    assert differences(models[name]) == 0


def test_without_it_they_differ(models: dict[str, PreTrainedModel]) -> None:
    # Otherwise the test above could not fail.
    assert differences(models["llama"], batch_invariant=False) > 0


def test_chunks_of_a_prompt_leave_the_same_keys_and_features(models: dict[str, PreTrainedModel]) -> None:
    engine, (text,) = engine_of(models["llama"], 2), texts_of(models["llama"], 1)
    engine.prefill([1], [text])
    done = 0
    for max_tokens in (1, 3, 16, 2, 40):
        done = engine.prefill_chunk(0, text, done, max_tokens)
    assert done == LENGTH
    for rows in (*engine._pass.cache.blocks.values(), engine.store.features[None]):
        assert torch.equal(rows[:, 0, : LENGTH - 1], rows[:, 1, : LENGTH - 1])
    logits = plain_logits(engine_of(models["llama"]), text)
    none = torch.zeros(2, 0, dtype=torch.int64)
    after = engine.logits(engine.verify(torch.tensor([0, 1]), none, none, none.bool()))
    assert torch.equal(after[0, 0], logits[-1]) and torch.equal(after[1, 0], logits[-1])


def without_whole_blocks(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    end = int(mask.sum(-1).max())
    key, value = (x[:, :, :end].repeat_interleave(len(mask) // len(x), 0) for x in (key, value))
    rows = query.transpose(1, 2).flatten(0, 1)[:, :, None]
    out = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask[..., :end], scale=scale, enable_gqa=True)
    return out.view(len(query), query.shape[2], query.shape[1], -1)


MUTANTS: dict[str, Callable[..., Tensor]] = {
    "in_sizes": lambda product, x, sizes: product(x),
    "invariant_attention": without_whole_blocks,
}


@pytest.mark.parametrize("part", MUTANTS)
def test_each_part_is_needed(part: str, models: dict[str, PreTrainedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_invariant, part, MUTANTS[part])
    monkeypatch.setattr(transformers_engine, "check_batch_invariance", lambda engine, text: None)
    assert differences(models["float32"]) > 0


def test_the_check_before_serving_finds_it(models: dict[str, PreTrainedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    engine, (text,) = engine_of(models["float32"]), texts_of(models["float32"], 1)
    check_batch_invariance(engine, text)
    assert engine.store.lengths.tolist() == [0]
    monkeypatch.setattr(forward_pass, "path_order", lambda *args: None)
    with pytest.raises(UnsupportedModelError, match=r"change in their last bits .*; set engine.batch_invariant=false"):
        check_batch_invariance(engine, text)


@pytest.mark.parametrize("family", ["gemma 2", "bloom"])
def test_models_that_are_not_fused_are_refused(family: str) -> None:
    model = model_of(FAMILIES[family][1]())
    with pytest.raises(UnsupportedModelError, match="serves models whose decoder layers are all fused"):
        TransformersEngine(model, num_slots=1, max_length=32, feature_layers=(), batch_invariant=True)
