"""The stand-in for SGLang's kernels, each helper against a slow reading of its contract."""

from __future__ import annotations

import importlib.util
import math
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor


def _load() -> ModuleType:
    """By its path and under a name of its own: it is never installed, and SGLang is not needed to test it."""
    folder = Path(__file__).parent / "sglang_cpu" / "sgl_kernel"
    spec = importlib.util.spec_from_file_location(
        "sgl_kernel_stand_in", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


kernels = _load()

# Rounding of sums of at most 64 numbers of size 1. In bf16 the result itself is rounded, to 8 bits, and so are the
# weights before they meet the values.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
HEADS, KV_HEADS, SIZE, POOL = 6, 2, 16, 40
SCALE = 0.3  # not SIZE ** -0.5, so that a scale that is dropped is noticed


class Cache:
    """A KV cache of one layer with requests of given lengths in scattered slots; slots without a token hold NaN."""

    def __init__(self, lengths: list[int], dtype: torch.dtype = torch.float32) -> None:
        num_slots = 1 + POOL * len(lengths)
        self.lengths = torch.tensor(lengths)
        self.rows = torch.randperm(len(lengths) + 2)[: len(lengths)]
        self.table = torch.zeros(len(lengths) + 2, POOL, dtype=torch.int32)
        self.table[self.rows] = (1 + torch.randperm(num_slots - 1)).view(len(lengths), POOL).int()
        self.keys = torch.full((num_slots, KV_HEADS, SIZE), math.nan, dtype=dtype)
        self.values = self.keys.clone()
        for request, length in enumerate(lengths):
            slots = self.slots(request)[:length]
            self.keys[slots] = torch.randn(length, KV_HEADS, SIZE).to(dtype)
            self.values[slots] = torch.randn(length, KV_HEADS, SIZE).to(dtype)

    def slots(self, request: int) -> Tensor:
        return self.table[self.rows[request]].long()

    def naive(self, query: Tensor, request: int, visible: list[int]) -> Tensor:
        """Softmax attention of one query `[H, D]` over the listed positions of a request, head by head, in float64."""
        slots, output = self.slots(request)[visible], []
        for head in range(HEADS):
            keys, values = (cache[slots, head // (HEADS // KV_HEADS)].double() for cache in (self.keys, self.values))
            output.append((keys @ query[head].double() * SCALE).softmax(0) @ values)
        return torch.stack(output)

    def decode(
        self, query: Tensor, key: Tensor | None, value: Tensor | None, loc: Tensor, **overrides: object
    ) -> Tensor:
        arguments = dict(
            query=query, k_buffer=self.keys, v_buffer=self.values, k_scale=1.0, v_scale=1.0,
            output=torch.full_like(query, math.nan), key=key, value=value, loc=loc, attn_logits=torch.empty(0),
            req_to_token=self.table, req_pool_indices=self.rows, seq_lens=self.lengths, sm_scale=SCALE, logit_cap=0.0,
            is_cross_attn=False, sliding_window=0, encoder_lens=None, sinks=None,
        )  # fmt: skip
        arguments.update(overrides)
        torch.ops.sgl_kernel.decode_attention_cpu(*arguments.values())
        return arguments["output"]

    def extend(self, query: Tensor, new: list[int], tree_mask: Tensor | None = None, **overrides: object) -> Tensor:
        starts = [sum(new[:i]) for i in range(len(new))]
        arguments = dict(
            query=query, key=None, value=None, output=torch.full_like(query, math.nan), k_buffer=self.keys,
            v_buffer=self.values, k_scale=1.0, v_scale=1.0, req_to_token=self.table, req_pool_indices=self.rows,
            seq_lens=self.lengths, extend_seq_lens=torch.tensor(new, dtype=torch.int32),
            extend_start_loc=torch.tensor(starts, dtype=torch.int32), max_len_extend=max(new), sm_scale=SCALE,
            logit_cap=0.0, is_cross_attn=False, sliding_window=0, encoder_lens=None, sinks=None, tree_mask=tree_mask,
            is_causal=True,
        )  # fmt: skip
        arguments.update(overrides)
        torch.ops.sgl_kernel.extend_attention_cpu(*arguments.values())
        return arguments["output"]


def close(actual: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCES[actual.dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


# ---- attention ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("lengths", [[1], [17], [5, 5, 5], [3, 40, 1, 12]])
def test_decoding_stores_the_new_token_and_attends_over_the_request(lengths: list[int], dtype: torch.dtype) -> None:
    cache = Cache(lengths, dtype)
    query, key, value = (torch.randn(len(lengths), heads, SIZE).to(dtype) for heads in (HEADS, KV_HEADS, KV_HEADS))
    loc = torch.stack([cache.slots(i)[length - 1] for i, length in enumerate(lengths)])
    untouched = torch.ones(len(cache.keys), dtype=torch.bool).index_fill(0, loc, False)
    before = cache.keys[untouched], cache.values[untouched]
    output = cache.decode(query, key.flatten(1), value, loc)  # SGLang passes keys with and without a dimension of heads
    assert torch.equal(cache.keys[loc], key) and torch.equal(cache.values[loc], value)
    torch.testing.assert_close((cache.keys[untouched], cache.values[untouched]), before, rtol=0, atol=0, equal_nan=True)
    close(output, torch.stack([cache.naive(query[i], i, list(range(n))) for i, n in enumerate(lengths)]))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    ("lengths", "new"),
    [([7], [7]), ([9, 30], [4, 4]), ([9, 30, 12], [9, 1, 5]), ([9, 5, 8], [2, 0, 8])],
    ids=["whole prompt", "equal and after a prefix", "ragged", "one of them has nothing new"],
)
def test_extending_is_causal_after_the_prefix(lengths: list[int], new: list[int], dtype: torch.dtype) -> None:
    cache = Cache(lengths, dtype)
    query = torch.randn(sum(new), HEADS, SIZE).to(dtype)
    expected, rows = [], iter(query)
    for request, (length, n) in enumerate(zip(lengths, new, strict=True)):
        expected += [cache.naive(next(rows), request, list(range(i + 1))) for i in range(length - n, length)]
    close(cache.extend(query, new), torch.stack(expected))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("lengths", "new"), [([9], [4]), ([6, 40, 13], [5, 5, 5]), ([6, 40], [3, 5])])
def test_a_tree_mask_rules_among_the_new_tokens_only(lengths: list[int], new: list[int], dtype: torch.dtype) -> None:
    cache = Cache(lengths, dtype)
    query = torch.randn(sum(new), HEADS, SIZE).to(dtype)
    masks = [(torch.rand(n, n) < 0.5) | torch.eye(n, dtype=torch.bool) for n in new]
    expected, rows = [], iter(query)
    for request, (length, mask) in enumerate(zip(lengths, masks, strict=True)):
        prefix = length - len(mask)
        for seen in mask.tolist():
            positions = [*range(prefix), *(prefix + j for j, sees in enumerate(seen) if sees)]
            expected.append(cache.naive(next(rows), request, positions))
    close(cache.extend(query, new, torch.cat([mask.flatten() for mask in masks])), torch.stack(expected))


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ({"k_scale": 0.5}, "8-bit"),
        ({"logit_cap": 30.0}, "cap on logits"),
        ({"sliding_window": 8}, "sliding window"),
        ({"sinks": torch.zeros(HEADS)}, "sinks"),
        ({"is_cross_attn": True}, "cross-attention"),
    ],
)
def test_what_a_dense_llama_does_not_need_is_refused(asked: dict[str, object], name: str) -> None:
    cache, query = Cache([3]), torch.randn(1, HEADS, SIZE)
    with pytest.raises(NotImplementedError, match=name):
        cache.decode(query, None, None, cache.slots(0)[2:3], **asked)
    with pytest.raises(NotImplementedError, match=name):
        cache.extend(query, [1], **asked)


def test_bidirectional_attention_is_refused_and_no_amx_is_claimed() -> None:
    with pytest.raises(NotImplementedError, match="bidirectional"):
        Cache([3]).extend(torch.randn(1, HEADS, SIZE), [1], is_causal=False)
    assert not hasattr(torch.ops.sgl_kernel, "convert_weight_packed")  # SGLang's test for AMX


# ---- trees -------------------------------------------------------------------------------------------------------


class Drafted:
    """Candidates as SGLang's drafting of `steps` steps leaves them, and which of them are kept."""

    def __init__(self, rng: random.Random, topk: int, steps: int, num_nodes: int) -> None:
        self.topk = topk
        # The first step makes candidates 0 to topk - 1 and expands them all, each further step topk * topk of which
        # the best topk are expanded. What the last step makes is not.
        expansions = [[-1, *range(topk)]]
        for step in range(1, steps):
            first = topk + topk * topk * (step - 1)
            expansions.append(rng.sample(range(first, first + topk * topk), topk))
        self.parents = [candidate for step in expansions[:-1] for candidate in step]
        kept: list[int] = []
        while len(kept) < num_nodes - 1:  # any candidate whose parent is kept
            candidates = range(topk + topk * topk * (steps - 1))
            kept.append(rng.choice([c for c in candidates if c not in kept and self.parent(c) in {None, *kept}]))
        self.kept = sorted(kept)

    def parent(self, candidate: int) -> int | None:
        """The candidate that this one was drafted after; None after the root."""
        expansion = candidate // self.topk
        return None if expansion == 0 else self.parents[expansion]


def build(trees: list[Drafted], prefixes: list[int], num_nodes: int) -> dict[str, Tensor]:
    out = {
        "tree_mask": torch.ones(len(trees) * num_nodes * num_nodes, dtype=torch.bool),
        "positions": torch.empty(len(trees) * num_nodes, dtype=torch.long),
        **{
            f"retrive_{name}": torch.full((len(trees), num_nodes), -1)
            for name in ("index", "next_token", "next_sibling")
        },
    }
    kernels.build_tree_kernel_efficient_cpu(
        torch.tensor([tree.parents for tree in trees]),
        torch.tensor([tree.kept for tree in trees]),
        torch.tensor(prefixes),
        *out.values(),
        trees[0].topk,
        5,
        num_nodes,
        1,
    )
    return out


@settings(max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_trees_are_linked_as_a_walk_to_the_root_finds_them(
    rng: random.Random, topk: int, steps: int, requests: int
) -> None:
    num_nodes = 1 + rng.randint(1, topk + topk * topk * (steps - 1))
    trees = [Drafted(rng, topk, steps, num_nodes) for _ in range(requests)]
    prefixes = [rng.randint(1, 50) for _ in trees]
    out = build(trees, prefixes, num_nodes)
    masks = out["tree_mask"].view(requests, num_nodes, num_nodes)
    for i, (tree, prefix) in enumerate(zip(trees, prefixes, strict=True)):
        node_of = {None: 0, **{candidate: node for node, candidate in enumerate(tree.kept, start=1)}}
        children: dict[int, list[int]] = {node: [] for node in range(num_nodes)}
        for candidate in tree.kept:
            children[node_of[tree.parent(candidate)]].append(node_of[candidate])
        for candidate, node in node_of.items():
            path, up = {node}, candidate
            while up is not None:
                up = tree.parent(up)
                path.add(node_of[up])
            assert masks[i, node].nonzero().flatten().tolist() == sorted(path)
            assert out["positions"].view(requests, num_nodes)[i, node] == prefix + len(path) - 1
            first = out["retrive_next_token"][i, node].item()
            found = []
            while first != -1:
                found.append(first)
                first = out["retrive_next_sibling"][i, first].item()
            assert found == children[node]  # in rising order, the likelier candidate first
    assert out["retrive_next_sibling"][:, 0].eq(-1).all()
    assert torch.equal(out["retrive_index"].flatten(), torch.arange(requests * num_nodes))


def test_a_chain_and_a_tree_by_hand() -> None:
    chain = Drafted(random.Random(0), topk=1, steps=3, num_nodes=4)
    assert (chain.parents, chain.kept) == ([-1, 0, 1], [0, 1, 2])
    out = build([chain], [7], 4)
    assert out["retrive_next_token"].tolist() == [[1, 2, 3, -1]]
    assert out["retrive_next_sibling"].tolist() == [[-1, -1, -1, -1]]
    assert out["positions"].tolist() == [7, 8, 9, 10]
    tree = Drafted(random.Random(0), topk=2, steps=2, num_nodes=5)
    # Candidates 0, 1 are children of the root, 2, 3 of candidate 0, and 4, 5 of candidate 1.
    tree.parents, tree.kept = [-1, 0, 1], [0, 1, 3, 4]
    out = build([tree], [7], 5)
    assert out["retrive_next_token"].tolist() == [[1, 3, 4, -1, -1]]
    assert out["retrive_next_sibling"].tolist() == [[-1, 2, -1, -1, -1]]
    assert out["positions"].tolist() == [7, 8, 8, 9, 9]
    assert out["tree_mask"].view(5, 5).int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 0, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 0, 1, 0, 1],
    ]


def test_a_node_whose_parent_was_not_kept_is_out_of_reach() -> None:
    tree = Drafted(random.Random(0), topk=2, steps=2, num_nodes=3)
    tree.parents, tree.kept = [-1, 0, 1], [0, 4]  # 4 is a child of 1, which a tie left out
    out = build([tree], [7], 3)
    assert out["retrive_next_token"].tolist() == [[1, -1, -1]]
    assert out["retrive_next_sibling"].tolist() == [[-1, -1, -1]]


def test_masks_of_other_modes_are_refused() -> None:
    nothing = torch.empty(0)
    with pytest.raises(NotImplementedError, match="mode 0"):
        kernels.build_tree_kernel_efficient_cpu(*[nothing] * 8, 1, 1, 1, 0)


@settings(max_examples=100, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 9), st.integers(1, 3), st.integers(1, 5))
def test_the_greedy_verdict_is_the_path_that_the_target_would_say(
    rng: random.Random, num_nodes: int, requests: int, longest: int
) -> None:
    """Few different tokens, so that many are accepted and siblings may repeat one another."""
    parents = [[None, *(rng.randrange(node) for node in range(1, num_nodes))] for _ in range(requests)]
    candidates, wanted = (torch.randint(0, 3, (requests, num_nodes), generator=_generator(rng)) for _ in range(2))
    rows = torch.arange(requests * num_nodes).view(requests, num_nodes)
    first, sibling = torch.full((2, requests, num_nodes), -1)
    for i in range(requests):
        for node in reversed(range(1, num_nodes)):
            sibling[i, node] = first[i, parents[i][node]].item()
            first[i, parents[i][node]] = node
    predicts = torch.full((requests * num_nodes,), -7, dtype=torch.int32)
    accept_index = torch.full((requests, longest), -1, dtype=torch.int32)
    accepted = torch.full((requests,), -7, dtype=torch.int32)
    kernels.verify_tree_greedy_cpu(
        predicts=predicts,
        accept_index=accept_index,
        accept_token_num=accepted,
        candidates=candidates,
        retrive_index=rows,
        retrive_next_token=first,
        retrive_next_sibling=sibling,
        target_predict=wanted,
    )
    expected = torch.full_like(predicts, -7)
    for i in range(requests):
        path = [0]
        while len(path) < longest:
            said = wanted[i, path[-1]]
            children = [n for n in range(1, num_nodes) if parents[i][n] == path[-1] and candidates[i, n] == said]
            if not children:
                break
            path.append(children[0])
        assert accepted[i] == len(path) - 1
        assert accept_index[i].tolist() == [i * num_nodes + n for n in path] + [-1] * (longest - len(path))
        for node in path:
            expected[i * num_nodes + node] = wanted[i, node]
    assert torch.equal(predicts, expected)


def _generator(rng: random.Random) -> torch.Generator:
    return torch.Generator().manual_seed(rng.randrange(1 << 30))


def test_bonus_tokens_are_each_requests_last() -> None:
    tokens = torch.tensor([[11, 12, 0], [21, 0, 0], [31, 32, 33]], dtype=torch.int32)
    bonus = torch.zeros(3, dtype=torch.int32)
    kernels.fill_bonus_tokens_cpu(tokens, torch.tensor([2, 1, 3], dtype=torch.int32), bonus, 3)
    assert bonus.tolist() == [12, 21, 33]


def test_accepted_slots_are_joined_in_order() -> None:
    out = torch.zeros(6, dtype=torch.long)
    index = torch.tensor([[0, 2, -1], [4, -1, -1]], dtype=torch.int32)
    kernels.fill_accept_out_cache_loc_cpu(index, torch.tensor([50, 51, 52, 53, 54]), out)
    assert out.tolist() == [50, 52, 54, 0, 0, 0]


# ---- slots -------------------------------------------------------------------------------------------------------


def test_allocated_slots_go_into_each_requests_range_and_come_back() -> None:
    table = torch.zeros(4, 6, dtype=torch.int32)
    rows, start, end = torch.tensor([3, 1, 0]), torch.tensor([1, 2, 0]), torch.tensor([4, 2, 2])
    kernels.assign_req_to_token_pool_cpu(rows, table, start, end, torch.tensor([10, 11, 12, 13, 14]), 6)
    assert table.tolist() == [[13, 14, 0, 0, 0, 0], [0] * 6, [0] * 6, [0, 10, 11, 12, 0, 0]]
    out = torch.full((7,), -1)
    kernels.assign_extend_cache_locs_cpu(rows, table, start, end, out, 6)
    assert out.tolist() == [10, 11, 12, 13, 14, -1, -1]


def test_drafts_are_written_after_the_text() -> None:
    table = torch.arange(30).view(3, 10)
    out = torch.zeros(8, dtype=torch.long)
    kernels.assign_draft_cache_locs_contiguous_cpu(torch.tensor([2, 0]), table, torch.tensor([3, 5]), out, 10, 2, 2)
    assert out.tolist() == [23, 24, 25, 26, 5, 6, 7, 8]


def test_each_branch_reads_the_text_and_then_itself() -> None:
    table = torch.arange(30, dtype=torch.int32).view(3, 10)
    before = table.clone()
    rows = kernels.build_draft_decode_metadata_cpu(table, torch.tensor([2, 0]), torch.tensor([3, 5]), 2, 2, 10)
    assert rows.shape == (4, 10) and torch.equal(table, before)
    assert [row[:length] for row, length in zip(rows.tolist(), (5, 5, 7, 7), strict=True)] == [
        [20, 21, 22, 23, 24],
        [20, 21, 22, 25, 26],
        [0, 1, 2, 3, 4, 5, 6],
        [0, 1, 2, 3, 4, 7, 8],
    ]


@pytest.mark.parametrize(
    ("source", "target"), [([5, 2], [1, 0]), ([3, 4, 5], [2, 3, 4]), ([1, 2, 3], [2, 3, 4]), ([1, 4], [4, 1]), ([], [])]
)
def test_rows_move_in_every_layer_even_where_they_overlap(source: list[int], target: list[int]) -> None:
    layers = [torch.randn(6, 2, 3), torch.randn(6, 5).bfloat16(), torch.randn(6, 1, 7)]
    expected = [layer.clone() for layer in layers]
    for layer, original in zip(expected, layers, strict=True):
        layer[target] = original[source]  # `original` still has the values from before
    kernels.copy_all_layer_kv_cache_cpu(
        torch.tensor([layer.data_ptr() for layer in layers], dtype=torch.uint64),
        torch.tensor([layer[0].nbytes for layer in layers]),
        torch.tensor(target, dtype=torch.long),
        torch.tensor(source, dtype=torch.long),
    )
    for layer, wanted in zip(layers, expected, strict=True):
        assert torch.equal(layer, wanted)
