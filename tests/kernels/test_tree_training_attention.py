"""Attention of texts and their trees in training: values, gradients, single branches, and FlexAttention's mask."""

from __future__ import annotations

import sys
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from aurora_kernels import tree_training_attention
from aurora_kernels.tree_training_attention import compiled_attention, training_block_mask


class World(NamedTuple):
    """A text with trees of random shapes, depth-first, sorted by where they leave it."""

    query: Tensor
    key: Tensor
    value: Tensor
    text_seen: Tensor
    ends: Tensor
    paths: list[list[int]]

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value

    def dense(self) -> Tensor:
        """What each row sees, ``[S + N, S + N]``, of paths and not of `ends`."""
        size = self.query.shape[2] - len(self.paths)
        seen = torch.zeros(self.query.shape[2], self.query.shape[2], dtype=torch.bool)
        seen[:size, :size] = torch.ones(size, size).tril()
        for node, path in enumerate(self.paths):
            seen[size + node, : int(self.text_seen[0, node])] = True
            seen[size + node, [size + each for each in path]] = True
        return seen


def world(size: int, trees: int, nodes: int, heads: int = 4, groups: int = 2, d: int = 4) -> World:
    paths: list[list[int]] = []
    for tree in range(trees):
        for node in range(nodes):
            # The next node depth-first hangs below the last one or below one of its ancestors.
            last = paths[-1] if node else []
            paths.append([*last[: int(torch.randint(len(last) + 1, ()))], tree * nodes + node])
    ends = torch.tensor([1 + max(i for i, path in enumerate(paths) if node in path) for node in range(len(paths))])
    leaves = torch.randint(1, size + 1, (trees,)).sort().values.repeat_interleave(nodes)

    def normal(count: int) -> Tensor:
        return torch.randn(1, count, size + len(paths), d, dtype=torch.float64, requires_grad=True)

    return World(normal(heads), normal(groups), normal(groups), leaves[None], ends.long()[None], paths)


def reference(w: World, scale: float = 0.5) -> Tensor:
    group = w.query.shape[1] // w.key.shape[1]
    key, value = (part.repeat_interleave(group, dim=1) for part in (w.key, w.value))
    return (w.query @ key.mT * scale).masked_fill(~w.dense(), -torch.inf).softmax(-1) @ value


@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (3, 3), (4, 1)])
@pytest.mark.parametrize(("trees", "nodes"), [(0, 0), (1, 1), (7, 5), (40, 8)])
def test_values_and_gradients(heads: int, groups: int, trees: int, nodes: int) -> None:
    w = world(20, trees, nodes, heads, groups)
    out, expected = tree_training_attention(*w.parts, w.text_seen, w.ends), reference(w)
    torch.testing.assert_close(out, expected)
    direction = torch.randn_like(out)
    found, right = (torch.autograd.grad(each, w.parts, direction) for each in (out, expected))
    torch.testing.assert_close(found, right)


def test_texts_of_a_batch_have_trees_of_their_own() -> None:
    first, second = world(20, 3, 5), world(20, 5, 3)
    parts = [torch.cat(each) for each in zip(first[:5], second[:5], strict=True)]
    out = tree_training_attention(*parts)
    torch.testing.assert_close(out, torch.cat([reference(first), reference(second)]))


def test_a_pass_over_a_tree_is_that_over_each_of_its_branches() -> None:
    w = world(9, 1, 12)
    whole = tree_training_attention(*w.parts, w.text_seen, w.ends, scale=0.3)
    seen = int(w.text_seen[0, 0])
    for node, path in enumerate(w.paths):
        rows = [*range(seen), *(9 + each for each in path)]
        query, key, value = (part[:, :, rows] for part in w.parts)
        chain = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=0.3, enable_gqa=True
        )
        torch.testing.assert_close(whole[:, :, 9 + node], chain[:, :, -1])


def test_a_change_reaches_descendants_and_no_others() -> None:
    w = world(9, 3, 6)
    before = tree_training_attention(*w.parts, w.text_seen, w.ends)
    for column in (4, 9, 15, 20):
        key = w.key.detach().clone()
        key[:, :, column] += 1
        after = tree_training_attention(w.query, key, w.value, w.text_seen, w.ends)
        assert torch.equal((after != before).any(-1).all(1)[0], w.dense()[:, column])


def test_columns_that_no_row_of_a_block_sees_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    w, read = world(400, 50, 8), []
    monkeypatch.setattr(sys.modules[tree_training_attention.__module__], "_ROWS", 64)
    attend = torch.nn.functional.scaled_dot_product_attention

    def noted(query: Tensor, key: Tensor, *args: Tensor, **kwargs: object) -> Tensor:
        read.append(key.shape[2])
        return attend(query, key, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    torch.testing.assert_close(tree_training_attention(*w.parts, w.text_seen, w.ends), reference(w))
    assert read[0] == 400 and read[1:] == [
        int(w.text_seen[0, min(start + 63, 399)]) + min(64, 400 - start) for start in range(0, 400, 64)
    ]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # which takes half a minute
@pytest.mark.parametrize(
    ("size", "trees", "nodes"), [(1, 1, 1), (50, 10, 6), (128, 16, 8), (130, 40, 9), (300, 3, 100), (70, 1, 300)]
)
def test_the_block_mask_is_the_one_that_asks_for_every_pair(
    size: int, trees: int, nodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where another test made transformers look for a package of this name, it found our folder, which has no file.
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    w = world(size, trees, nodes, heads=1, groups=1)
    found, length = training_block_mask(size, w.text_seen, w.ends), size + trees * nodes
    dense = w.dense()
    right = create_block_mask(lambda b, h, q, k: dense[q, k], 1, 1, length, length, device="cpu")
    assert torch.equal(found.to_dense(), right.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks"):
        assert torch.equal(getattr(found, name), getattr(right, name)), name
    out = flex_attention(*(part.detach() for part in w.parts), block_mask=found, scale=0.5)
    torch.testing.assert_close(out, reference(w).detach())


def test_random_trees_are_compiled_twice_at_most() -> None:
    torch.manual_seed(0)
    counter = CompileCounter()  # Dynamo's part, which does not need a GPU
    attend = compiled_attention(counter)
    for tree in range(50):
        size, trees, nodes = (int(torch.randint(1, most, ())) for most in (200, 8, 9))
        w = world(size, trees, nodes, heads=2, groups=1, d=16)
        blocks = training_block_mask(size, w.text_seen, w.ends)
        out = attend(*(part.detach() for part in w.parts), block_mask=blocks, scale=0.5, enable_gqa=True)
        if tree % 10 == 0:
            torch.testing.assert_close(out, reference(w).detach())
    assert 1 <= counter.frame_count <= 2  # one of fixed sizes, and one of any


def test_shapes_that_do_not_fit_are_refused() -> None:
    w = world(9, 3, 6)
    with pytest.raises(ValueError, match=r"text_seen and ends \[b, N\], got .*\[1, 18\], \[1, 17\]"):
        tree_training_attention(*w.parts, w.text_seen, w.ends[:, 1:])
