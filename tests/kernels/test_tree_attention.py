"""Tree attention against attention query by query in float64: the plain form, and the kernel where triton is installed.

Without a GPU the kernel runs in Triton's interpreter, which proves its indices and its arithmetic, in float32 and
float16, and neither its speed nor that it compiles.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import pytest
import torch
from attention_problems import assert_same, in_parts, kernel, problem, random_trees, reference
from tensor_sizes import largest_tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from aurora_kernels import TreeMask, tree_attention

module = sys.modules[tree_attention.__module__]


both = pytest.mark.parametrize("attend", [tree_attention, in_parts, kernel], ids=["plain", "in parts", "triton"])


@both
@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (4, 1), (3, 3), (9, 3)])
def test_ragged_batches_of_random_trees(attend: Any, heads: int, groups: int) -> None:
    query, key, value, mask = problem([0, 37, 101, 64], 7, heads, groups)
    assert_same(attend(query, key, value, mask), reference(query, key, value, mask))


@both
def test_no_tree_is_the_text_alone(attend: Any) -> None:
    query, key, value, mask = problem([9, 4], 2)
    mask = TreeMask(mask.prefix, mask.seen[:, :, :0])
    assert_same(attend(query, key, value, mask), reference(query, key, value, mask))
    nothing = TreeMask(torch.zeros_like(mask.prefix), mask.seen)
    assert not bool(attend(query, key, value, nothing).any())


@both
@pytest.mark.parametrize("nodes", [0, 1, 63, 64])
def test_trees_of_any_size(attend: Any, nodes: int) -> None:
    query, key, value, mask = problem([33, 5], nodes, d=8)
    assert_same(attend(query, key, value, mask, scale=0.7), reference(query, key, value, mask, scale=0.7))


@both
@pytest.mark.parametrize(("d", "dv"), [(32, 32), (64, 64), (80, 80), (96, 64), (128, 128), (256, 256)])
def test_head_sizes(attend: Any, d: int, dv: int) -> None:
    query, key, value, mask = problem([40, 3], 3, d=d, dv=dv)
    assert_same(attend(query, key, value, mask), reference(query, key, value, mask))


@both
@pytest.mark.parametrize("prefixes", [[50], [0], [50, 7]])
def test_a_chunk_of_a_prompt_sees_the_text_and_itself_causally(attend: Any, prefixes: list[int]) -> None:
    query, key, value, _ = problem(prefixes, 19)
    mask = TreeMask(torch.tensor(prefixes))
    assert_same(attend(query, key, value, mask), reference(query, key, value, mask))


@both
@pytest.mark.parametrize("prefixes", [[20, 3], [20], [0]])
def test_padded_rows_of_a_chunk_have_no_columns(attend: Any, prefixes: list[int]) -> None:
    query, key, value, _ = problem(prefixes, 5)
    columns = prefixes[0] + 2  # two of the first slot's six rows are there
    key, value, mask = key[:, :, :columns], value[:, :, :columns], TreeMask(torch.tensor(prefixes))
    expected = reference(query[:, :, :2], key, value, mask)
    assert_same(attend(query, key, value, mask)[:, :, :2], expected)


@both
@pytest.mark.parametrize("terms", [{"softcap": 1.5}, {"sinks": True}, {"softcap": 2.0, "sinks": True}])
@pytest.mark.parametrize("causal", [False, True])
def test_caps_and_sinks(attend: Any, terms: dict[str, Any], causal: bool) -> None:
    query, key, value, mask = problem([40, 9], 4)
    mask = TreeMask(mask.prefix) if causal else mask
    terms = {name: torch.randn(4) if term is True else term for name, term in terms.items()}
    assert_same(attend(query, key, value, mask, **terms), reference(query, key, value, mask, **terms))


def test_scores_of_a_cap_are_made_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value, mask = problem([40, 9], 6)
    monkeypatch.setattr(module, "_SCORES", 2**9)
    out = tree_attention(query, key, value, mask, softcap=1.5)
    assert_same(out, reference(query, key, value, mask, softcap=1.5))


@both
def test_windows(attend: Any) -> None:
    query, key, value, mask = problem([40, 9], 4)
    first = torch.stack([torch.arange(30, 35), torch.arange(5)])
    mask = TreeMask(mask.prefix, mask.seen, first)
    assert_same(attend(query, key, value, mask), reference(query, key, value, mask))


@both
def test_a_query_that_sees_nothing_is_zero(attend: Any) -> None:
    query, key, value, mask = problem([0, 9], 4)
    mask.seen[0, 2] = False
    out = attend(query, key, value, mask)
    assert bool((out[0, :, 2] == 0).all()) and not bool(out.isnan().any())


@both
def test_pages_are_the_columns_that_the_table_names(attend: Any) -> None:
    query, key, value, mask = problem([40, 9], 4)
    key, value = (torch.nn.functional.pad(part, (0, 0, 0, 48 - part.shape[2])) for part in (key, value))
    table = torch.randperm(9)[:6].view(2, 3)
    pages = [part.new_full((9, 2, 16, 16), 1e9) for part in (key, value)]
    for held, part in zip(pages, (key, value), strict=True):
        held[table] = part.unflatten(2, (3, 16)).transpose(1, 2)
    assert_same(attend(query, *pages, mask, block_table=table), reference(query, key, value, mask))


@both
def test_a_change_reaches_descendants_and_no_others(attend: Any) -> None:
    query, key, value, mask = problem([21], 9)
    before = attend(query, key, value, mask)
    for node in (0, 4, 9):
        changed = key.clone()
        changed[:, :, 21 + node] += 1
        after = attend(query, changed, value, mask)
        moved = (after != before).any(-1).all(1)[0]
        assert torch.equal(moved, mask.seen[0, :, node])
        assert torch.equal(after[:, :, ~moved], before[:, :, ~moved])


@both
def test_half_precision(attend: Any) -> None:
    query, key, value, mask = problem([150, 20], 8, d=64)
    half = [part.half() for part in (query, key, value)]
    out = attend(*half, mask)
    assert out.dtype == torch.float16
    assert_same(out, reference(*half, mask), tolerance=2e-3)


@pytest.mark.parametrize("names", [["softcap"], ["sinks"], ["softcap", "sinks"]], ids="-".join)
def test_caps_and_sinks_have_gradients(names: list[str]) -> None:
    query, key, value, mask = problem([2, 5], 2, heads=2, groups=1)
    mask.seen[0, 1] = False
    mask = TreeMask(mask.prefix, mask.seen, torch.tensor([[0, 9, 1], [2, 0, 1]]))  # a query of the first sees nothing
    terms: dict[str, Any] = {"softcap": 1.5, "sinks": torch.randn(2, dtype=torch.float64, requires_grad=True)}
    terms = {name: terms[name] for name in names}
    parts = [part.double().requires_grad_() for part in (query, key, value)]
    sinks = [terms["sinks"]] if "sinks" in terms else []
    assert torch.autograd.gradcheck(lambda *each: tree_attention(*each[:3], mask, **terms), [*parts, *sinks])


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="without triton no kernel attends")
def test_the_kernel_leaves_to_pytorch_what_needs_gradients() -> None:
    with FakeTensorMode():
        query = torch.empty(1, 2, 3, 8, device="cuda")
    assert module._by_kernel(query, learns=False) and not module._by_kernel(query, learns=True)
    sinks = torch.zeros(2, requires_grad=True)
    assert module._learns(query, query, query, sinks) and not module._learns(query, query, query, None)
    with torch.no_grad():
        assert not module._learns(query, query, query, sinks)


def test_the_plain_form_has_gradients() -> None:
    query, key, value, mask = problem([5, 2], 3)
    parts = [part.double().requires_grad_() for part in (query, key, value)]
    assert torch.autograd.gradcheck(lambda *each: tree_attention(*each, mask), parts)
    chunk = TreeMask(mask.prefix[:1])
    first = [part[:1].detach().requires_grad_() for part in parts]
    assert torch.autograd.gradcheck(lambda *each: tree_attention(*each, chunk), first)


def test_a_prompt_takes_memory_linear_in_its_length() -> None:
    """A mask of the text, or its scores, would have rows times columns."""

    def elements(columns: int) -> int:
        query, key = torch.randn(1, 4, 32, 8), torch.randn(1, 2, columns, 8)
        return largest_tensor(lambda: tree_attention(query, key, key, TreeMask(torch.tensor([columns - 32]))))

    assert elements(4096) <= 2 * 4096 * 8


@pytest.mark.parametrize("terms", [{}, {"window": True}, {"softcap": 2.0}, {"sinks": True}], ids=str)
def test_trees_in_several_slots_take_memory_linear_in_their_texts(
    terms: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    columns, nodes = 8192, 32
    query, key = torch.randn(2, 4, nodes, 8), torch.randn(2, 2, columns + nodes, 8)
    prefix = torch.tensor([columns, columns - 100])
    first = (prefix[:, None] // 2 + torch.arange(nodes)) if terms.pop("window", False) else None
    mask = TreeMask(prefix, random_trees(2, nodes - 1), first)
    if "sinks" in terms:
        terms["sinks"] = torch.zeros(4)
    monkeypatch.setattr(module, "_SCORES", 2**16)  # scores of a few rows are made for a cap or sinks
    # A mask has 2 slots * 64 rows * 8,224 columns.
    assert largest_tensor(lambda: tree_attention(query, key, key, mask, **terms)) <= key.numel()


@both
def test_what_is_not_a_number_reaches_what_sees_it_alone(attend: Any) -> None:
    query, key, value, mask = problem([21, 4], 9)
    expected = attend(query, key, value, mask)
    spoiled = query.clone()
    spoiled[0, :, 3] = torch.nan
    out = attend(spoiled, key, value, mask)
    assert bool(out[0, :, 3].isnan().all()), "a query that is not a number has no result"
    out[0, :, 3] = expected[0, :, 3]
    assert torch.equal(out, expected)
    text = key.clone()
    text[0, :, 5] = torch.nan  # every query of the slot sees it
    out = attend(query, text, value, mask)
    assert bool(out[0].isnan().all())
    assert torch.equal(out[1], expected[1])


@both
def test_a_value_without_a_key_to_see_it_may_be_anything(attend: Any) -> None:
    query, key, value, mask = problem([21, 4], 9)
    expected = attend(query, key, value, mask)
    for junk in (key, value):
        junk[1, :, 4 + 10 :] = -1e30  # after the second slot's tree
    assert torch.equal(attend(query, key, value, mask), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": torch.zeros(2, 3, 20, 16)}, r"g a divisor of h, got \[2, 4, 5, 16\], \[2, 3, 20, 16\]"),
        ({"key": torch.zeros(1, 2, 20, 16), "value": torch.zeros(1, 2, 20, 16)}, "2 slots, mask 2 and keys 1"),
        ({"mask": TreeMask(torch.tensor([3]))}, "2 slots, mask 1 and keys 2"),
        ({"mask": TreeMask(torch.tensor([3, 3]), torch.ones(2, 4, 4).bool())}, r"5 rows, .* have \[4\]"),
        ({"mask": TreeMask(torch.tensor([3, 3]), torch.ones(2, 5, 99).bool())}, "99 keys does not fit into 27"),
        ({"sinks": torch.zeros(3)}, r"sinks must be \[h\] = \[4\], got \[3\]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    query, key, value, mask = problem([20, 3], 4)
    arguments = {"query": query, "key": key, "value": value, "mask": mask, **change}
    with pytest.raises(ValueError, match=message):
        tree_attention(**arguments)
