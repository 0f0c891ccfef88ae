"""The conformance check of engines, against the plain model run path by path without a cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from aurora_kernels.trees import valid_nodes
from aurora_rl.envs import Engine, PromptChunk
from aurora_rl.testing.asserts import require

# Relative to the largest value. Hugging Face norms compute in float32 whatever the dtype, so float64 may differ by
# one that was rounded the other way.
_ENGINE = {torch.float64: 1e-6, torch.float32: 1e-4}


def check_engine(
    engine: Engine, reference: PreTrainedModel, *, feature_layers: Sequence[int], rounds: int = 4, seed: int = 0
) -> None:
    """Check an engine against its model run over each path of each tree by itself, without a cache.

    Random trees are verified on slots of unequal length, some nodes invalid; random paths are committed, some cut
    short; slots are left out of rounds, released and taken again. Of several slots one has its prompt read in chunks
    along with the rounds of the others.

    Args:
        engine: Engine in float64 or float32 with all slots free, and free afterwards, and room for about 40 tokens.
        reference: Model of the engine as Hugging Face runs it, a copy of its own.
        feature_layers: Layers whose inputs are the features of the engine.
        rounds: Rounds of each of the two turns.
        seed: Seed of prompts, trees and paths.

    Raises:
        AssertionError: Something differs; the message names it, and by how much.

    Example:
        >>> from aurora_rl.envs import TransformersEngine
        >>> from aurora_rl.testing import tiny_target
        >>> engine = TransformersEngine(tiny_target(), num_slots=2, max_length=64, feature_layers=(0, 3))
        >>> check_engine(engine, tiny_target(), feature_layers=(0, 3), rounds=2)
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    texts: list[list[int]] = [[] for _ in range(engine.num_slots)]
    prompts: list[int] = [0] * engine.num_slots
    for _ in range(2):  # in the second turn slots are used again, next to others that go on
        free = [slot for slot, text in enumerate(texts) if not text]
        late, done = free[-1] if engine.num_slots > 1 else None, 0
        for slot in free:
            prompts[slot] = 1 + (3 * slot + draw(3)) % 9
            texts[slot] = torch.randint(engine.vocab_size, (prompts[slot],), generator=generator).tolist()
        now = [slot for slot in free if slot != late]
        engine.prefill(now, [torch.tensor(texts[slot]) for slot in now])
        prompt: list[int] = []
        if late is not None:
            prompt, texts[late] = texts[late], []
        for _ in range(rounds):
            ready = [slot for slot, text in enumerate(texts) if text]
            slots = [slot for slot in ready if draw(4)] or ready[:1]
            if draw(2):  # a round that is verified and never committed must leave no trace
                engine.verify(torch.tensor(slots), *_random_trees(len(slots), draw(5), engine.vocab_size, generator))
            chunk = None
            if late is not None and not texts[late]:
                chunk = PromptChunk(late, torch.tensor(prompt), done, 1 + draw(5))
            done = _check_round(engine, reference, tuple(feature_layers), slots, texts, draw(7), generator, chunk)
            if chunk is not None and done == len(prompt):
                texts[chunk.slot] = prompt
            _check_store(engine, reference, tuple(feature_layers), texts, prompts)
        if late is not None and not texts[late]:
            require(engine.prefill_chunk(late, torch.tensor(prompt), done, len(prompt)) == len(prompt), "prefill_chunk")
            texts[late] = prompt
            _check_store(engine, reference, tuple(feature_layers), texts, prompts)
        for slot in range(0, engine.num_slots, 2):
            engine.release(slot)
            texts[slot] = []
            require(int(engine.store.lengths[slot]) == 0, f"slot {slot} is not free after release")
    for slot in range(1, engine.num_slots, 2):
        engine.release(slot)


def _check_round(
    engine: Engine,
    reference: PreTrainedModel,
    layers: tuple[int, ...],
    slots: list[int],
    texts: list[list[int]],
    num_nodes: int,
    generator: torch.Generator,
    chunk: PromptChunk | None,
) -> int:
    """Check a round, and return how many tokens of the chunk's prompt are read after it."""
    tokens, parents, valid = _random_trees(len(slots), num_nodes, engine.vocab_size, generator)
    read = 0
    if chunk is None:
        hidden = engine.verify(torch.tensor(slots), tokens, parents, valid)
    else:
        hidden, read = engine.verify_with_chunk(torch.tensor(slots), tokens, parents, valid, chunk)
        whole = len(chunk.prompt)
        where = f"slot {chunk.slot}, {chunk.done} of {whole} tokens, at most {chunk.max_tokens} more"
        require(chunk.done < read <= whole, f"verify_with_chunk read {read} tokens in all, {where}")
        held = int(engine.store.lengths[chunk.slot])
        require(held == (whole if read == whole else 0), f"the store holds {held} tokens with {read} read, {where}")
    size = engine.store.hidden.shape[-1]
    require(hidden.shape == (len(slots), num_nodes + 1, size), f"verify gave {tuple(hidden.shape)}")
    logits = engine.logits(hidden)
    paths = torch.full((len(slots), num_nodes), -1)
    committed = torch.zeros(len(slots), num_nodes + 1, dtype=torch.int64)
    num_new = torch.zeros(len(slots), dtype=torch.int64)
    for row, slot in enumerate(slots):
        require(int(engine.store.lengths[slot]) == len(texts[slot]), f"verify changed the length of slot {slot}")
        nodes = [-1, *valid[row].nonzero().flatten().tolist()]
        for node in nodes:
            path = _path(parents[row].tolist(), node)
            text = texts[slot] + tokens[row, path].tolist()
            expected, _, expected_logits = _reference_pass(reference, text, layers)
            where = f"slot {slot} at {len(texts[slot])} tokens, path {path} of parents {parents[row].tolist()}"
            _same_values(hidden[row, node + 1], expected[-1], f"hidden, {where}")
            _same_values(logits[row, node + 1], expected_logits[-1], f"logits, {where}")
        path = _path(parents[row].tolist(), nodes[int(torch.randint(len(nodes), (), generator=generator))])
        bonus = int(torch.randint(engine.vocab_size, (), generator=generator))
        delivered = [*tokens[row, path].tolist(), bonus]
        # A stop token or the budget may end the delivery anywhere.
        keep = 1 + int(torch.randint(len(delivered), (), generator=generator))
        num_new[row] = keep
        committed[row, :keep] = torch.tensor(delivered[:keep])
        kept = path[:keep]
        paths[row, : len(kept)] = torch.tensor(kept, dtype=torch.int64)
        texts[slot] += delivered[:keep]
    features = engine.commit(torch.tensor(slots), paths, committed, num_new)
    for row, slot in enumerate(slots):
        count = int(num_new[row])
        _, expected, _ = _reference_pass(reference, texts[slot], layers)
        _same_values(features[row, :count], expected[-1 - count : -1], f"features that commit gave for slot {slot}")
    return read


def _check_store(
    engine: Engine, reference: PreTrainedModel, layers: tuple[int, ...], texts: list[list[int]], prompts: list[int]
) -> None:
    store = engine.store
    for slot, text in enumerate(texts):
        length = len(text)
        require(int(store.lengths[slot]) == length, f"slot {slot} has length {int(store.lengths[slot])}, not {length}")
        if not text:  # its prompt is not complete
            continue
        require(int(store.prompt_lengths[slot]) == prompts[slot], f"slot {slot} forgot the length of its prompt")
        require(store.tokens[slot, :length].tolist() == text, f"the store has other tokens in slot {slot}")
        hidden, features, _ = _reference_pass(reference, text, layers)
        _same_values(store.features[slot, : length - 1], features[:-1], f"features in the store, slot {slot}")
        first = prompts[slot] - 1
        _same_values(store.hidden[slot, first : length - 1], hidden[first:-1], f"hidden in the store, slot {slot}")


@torch.inference_mode()
def _reference_pass(model: PreTrainedModel, text: list[int], layers: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden ``[S, H]``, features ``[S, F]`` and logits ``[S, V]`` of a text, from one pass without a cache."""
    out = model(input_ids=torch.tensor([text]), output_hidden_states=True, use_cache=False)
    return out.hidden_states[-1][0], torch.cat([out.hidden_states[layer][0] for layer in layers], dim=-1), out.logits[0]


def _random_trees(
    count: int, num_nodes: int, vocab_size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw trees with some nodes masked out, and a few with invalid parents or tokens."""
    tokens = torch.randint(-1, vocab_size + 1, (count, num_nodes), generator=generator)
    parents = torch.zeros(count, num_nodes, dtype=torch.int64)
    for node in range(num_nodes):
        parents[:, node] = torch.randint(-1, node + 1, (count,), generator=generator)
    mask = torch.rand(count, num_nodes, generator=generator) < 0.9
    return tokens, parents, valid_nodes(tokens, parents, mask, vocab_size)


def _path(parents: list[int], node: int) -> list[int]:
    """Return the nodes from the root's child down to ``node``; none for the root."""
    path: list[int] = []
    while node >= 0:
        path.append(node)
        node = parents[node]
    return path[::-1]


def _same_values(got: Tensor, expected: Tensor, what: str) -> None:
    require(got.shape == expected.shape, f"{what}: shape {tuple(got.shape)}, the reference has {tuple(expected.shape)}")
    if not got.numel():
        return
    gap = float((got - expected).abs().max())
    limit = _ENGINE[got.dtype] * max(1.0, float(expected.abs().max()))
    require(gap <= limit, f"{what}: differs by {gap:.2g} from the reference, {limit:.2g} is rounding")
