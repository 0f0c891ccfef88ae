"""The hybrid: chains merged into trees by definition, and one tree of two drafters under one budget."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aurora_rl.policies import (
    Eagle3Drafter,
    HybridDrafter,
    MedusaDrafter,
    TargetParts,
    TreeShape,
    load_drafter,
    save_drafter,
)
from aurora_rl.policies.hybrid import merge_chain
from aurora_rl.policies.lookup import Tree
from aurora_rl.testing import tiny_target, tiny_trajectory
from aurora_rl.training.checkpoint import CheckpointError
from aurora_rl.trajectories import pack


@st.composite
def trees(draw: st.DrawFn) -> dict[tuple[int, ...], float]:
    """Paths with their log-probabilities: up to eight nodes, siblings differ."""
    paths: dict[tuple[int, ...], float] = {}
    for _ in range(draw(st.integers(0, 8))):
        parent = draw(st.sampled_from([(), *paths]))
        paths.setdefault((*parent, draw(st.integers(0, 3))), draw(st.floats(-5, 0)))
    return paths


def as_tree(paths: dict[tuple[int, ...], float]) -> Tree:
    index = {path: i for i, path in enumerate(paths)}
    return Tree([p[-1] for p in paths], [index.get(p[:-1], -1) for p in paths], list(paths.values()))


def as_paths(tree: Tree) -> dict[tuple[int, ...], float]:
    paths: list[tuple[int, ...]] = []
    for node, (token, parent) in enumerate(zip(tree.tokens, tree.parents, strict=True)):
        assert -1 <= parent < node
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    assert len(set(paths)) == len(paths)
    return dict(zip(paths, tree.log_probs, strict=True))


@given(trees(), st.lists(st.integers(0, 3), max_size=4), st.integers(4, 12))
def test_a_merged_chain_is_there_and_the_likeliest_of_the_others(
    paths: dict[tuple[int, ...], float], chain: list[int], budget: int
) -> None:
    merged = as_paths(merge_chain(as_tree(paths), chain, budget))
    needed = {tuple(chain[:end]) for end in range(1, len(chain) + 1)}
    assert needed <= merged.keys() and len(merged) == min(budget, len(needed | paths.keys()))
    for path, log_prob in merged.items():
        assert log_prob == paths.get(path, -math.inf)

    def joint(path: tuple[int, ...]) -> float:
        return sum(paths[path[:end]] for end in range(1, len(path) + 1))

    # No node that went was likelier than one that stayed, the chain's aside.
    went = [joint(path) for path in paths.keys() - merged.keys()]
    stayed = [joint(path) for path in merged.keys() - needed]
    assert not went or not stayed or max(went) <= min(stayed) + 1e-9


def made(learned: str = "eagle3") -> HybridDrafter:
    parts = TargetParts.of(tiny_target())
    return HybridDrafter.from_target(parts, draft_vocab=torch.arange(20), learned=learned).double()


def test_both_propose_in_one_tree_under_one_budget() -> None:
    """The chain that followed the text's end before takes the place of the learned drafter's least likely nodes."""
    drafter = made()
    drafter.allocate(2, 16)
    text = torch.tensor([[25, 26, 27, 28, 25, 26], [1, 2, 3, 4, 5, 6]])  # 25 to 28 have no row in the draft head
    features = torch.randn(2, 5, 16 * len(drafter.feature_layers), dtype=torch.float64)
    slots = torch.arange(2)
    drafter.extend(slots, text, features, torch.tensor([5, 5]))
    merged = drafter.propose(slots, TreeShape(3, 2, 8))
    eight, six = (drafter.learned.propose(slots, TreeShape(3, 2, nodes)) for nodes in (8, 6))
    assert merged.mask is not None and merged.mask.all()
    assert merged.tokens[0, 6:].tolist() == [27, 28] and merged.parents[0, 6:].tolist() == [-1, 6]
    assert merged.log_probs[0, 6:].tolist() == [-torch.inf] * 2  # the learned drafter did not draw them
    for column, of_eight, of_six in zip(merged[:3], eight[:3], six[:3], strict=True):
        torch.testing.assert_close(column[0, :6], of_six[0])
        torch.testing.assert_close(column[1], of_eight[1])
    shallow = drafter.propose(slots, TreeShape(1, 1, 4))
    assert shallow.tokens[0].tolist()[1:] == [27, 28] and shallow.mask.tolist() == [[True] * 3, [True, False, False]]
    assert drafter.propose(slots, TreeShape(0)).tokens.shape == (2, 0)


def test_n_grams_alone_need_the_text_only() -> None:
    drafter = made()  # no cache at all
    proposal = drafter.from_text([25, 26, 27, 28, 25, 26], TreeShape(3, 1, 3, free=True))
    assert proposal.tokens.tolist() == [[27, 28, 25]] and proposal.parents.tolist() == [[-1, 0, 1]]
    assert proposal.log_probs.tolist() == [[-math.inf] * 3]  # the learned drafter did not draw them
    assert drafter.from_text([1, 2, 3], TreeShape(3)).tokens.shape == (1, 0)
    assert drafter.learned.from_text([1, 2, 1, 2], TreeShape(3)) is None


def test_only_the_learned_drafter_is_published_and_saved() -> None:
    drafter = made()
    assert drafter.published().keys() == drafter.learned.published().keys()
    checkpoint = drafter.write("sglang")
    assert Eagle3Drafter.recognizes(checkpoint.config)
    parts = TargetParts.of(tiny_target())
    read = HybridDrafter.read(checkpoint, parts, "sglang", lookup=3)
    assert isinstance(read.learned, Eagle3Drafter) and read.lookup == 3
    with pytest.raises(ValueError, match="config.json is of Eagle3Drafter, and learned=medusa is asked for"):
        HybridDrafter.read(checkpoint, parts, "sglang", learned="medusa")
    assert isinstance(HybridDrafter.read(checkpoint, parts, "sglang", learned="eagle3").learned, Eagle3Drafter)


class OtherHeads(MedusaDrafter):
    """A learned drafter that has no name, only its import path."""


def test_a_learned_drafter_that_only_its_path_names_is_saved_and_read(tmp_path: Path) -> None:
    parts, options = TargetParts.of(tiny_target()), {"learned": f"{__name__}:OtherHeads", "lookup": 3}
    drafter = HybridDrafter.from_target(parts, draft_vocab=torch.arange(20), **options)
    save_drafter(drafter, tmp_path / "drafter")
    read = load_drafter(tmp_path / "drafter", parts, HybridDrafter, options=options)
    assert isinstance(read, HybridDrafter) and type(read.learned) is OtherHeads and read.options == drafter.options
    batch = pack([tiny_trajectory(drafter.double())])
    assert torch.equal(read.double().score(batch), drafter.score(batch))
    with pytest.raises(
        CheckpointError, match=r"\['OtherHeads'\]; there are .* drafter.name=package.module:Class names"
    ):
        load_drafter(tmp_path / "drafter", parts, HybridDrafter)
    save_drafter(MedusaDrafter.from_target(parts, draft_vocab=torch.arange(20)), tmp_path / "drafter")
    with pytest.raises(
        CheckpointError, match="config.json is of MedusaDrafter, and learned=.*:OtherHeads is asked for"
    ):
        load_drafter(tmp_path / "drafter", parts, HybridDrafter, options=options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lookup": 0}, "lookup must be at least 1, got 0"),
        ({"learned": "medus"}, "no drafter is called 'medus'; did you mean 'medusa'"),
        ({"learned": "hybrid"}, "learned=hybrid names a drafter that does not learn by itself"),
        ({"learned": "ngram"}, "learned=ngram names a drafter that does not learn by itself"),
        ({"learned_options": {"heads": 2}}, "MedusaDrafter has no setting 'heads'; did you mean 'num_heads'"),
        ({"learned_options": {"num_heads": "two"}}, "MedusaDrafter: num_heads must be an integer, got 'two'"),
    ],
)
def test_bad_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HybridDrafter.from_target(TargetParts.of(tiny_target()), draft_vocab=torch.arange(20), **options)


def test_sampled_trees_are_refused() -> None:
    drafter = made("medusa")
    assert isinstance(drafter.learned, MedusaDrafter)
    with pytest.raises(ValueError, match="n-grams are no draws of the learned drafter"):
        drafter.propose(torch.tensor([0]), TreeShape(1, mode="sampled"))
