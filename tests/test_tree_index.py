"""Where recorded trees stand in a batch: intervals of ancestors against paths walked one by one, passes counted."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

from aurora_kernels.trees import reorder_depth_first
from aurora_rl.policies import TargetParts, TreeShape, get_drafter
from aurora_rl.testing import serve, tiny_target
from aurora_rl.trajectories import pack
from aurora_rl.tree_index import TreeIndex


def batch_of(trees: list[list[int]]) -> TensorDict:
    """Two requests: the first has all rounds but the last."""
    counts = torch.tensor([0, *(len(parents) for parents in trees)])
    rounds = {
        "anchor": 3 + torch.arange(len(trees)),
        "offset": counts.cumsum(0),
        "request_offset": torch.tensor([0, len(trees) - 1, len(trees)]),
    }
    parents = torch.tensor([parent for tree in trees for parent in tree], dtype=torch.int64)
    return TensorDict({"rounds": rounds, "nodes": {"parents": parents}}, batch_size=[])


def ancestors_or_self(trees: TreeIndex, node: int) -> set[int]:
    found = {node}
    while (above := int(trees.parent[node]) - trees.num_rounds) >= 0:
        found.add(node := above)
    return found


def random_tree(size: int, generator: torch.Generator) -> list[int]:
    drawn = [int(torch.randint(-1, node, (), generator=generator)) if node else -1 for node in range(size)]
    return reorder_depth_first(torch.tensor(drawn, dtype=torch.int64))[1].tolist()


@pytest.mark.parametrize("seed", range(5))
def test_a_node_is_seen_from_itself_to_the_end_of_its_subtree(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    trees = TreeIndex.of(batch_of([random_tree(size, generator) for size in (7, 0, 1, 12, 9)]))
    ends = trees.ends
    for node in range(len(ends)):
        seen = {ancestor for ancestor in range(len(ends)) if ancestor <= node < ends[ancestor]}
        assert seen == ancestors_or_self(trees, node)


def test_no_interval_holds_the_subtrees_of_other_orders() -> None:
    for parents in ([-1, -1, 0], [-1, 0, 0, 1]):  # by depth: the last node's parent is not on the path before it
        with pytest.raises(ValueError, match="not depth-first; order it by aurora_kernels.trees.reorder"):
            _ = TreeIndex.of(batch_of([[-1, 0], parents])).ends


def test_nothing_drafted() -> None:
    assert TreeIndex.of(batch_of([[], []])).ends.tolist() == []


@pytest.mark.parametrize(
    ("name", "part", "passes"),
    [("eagle3", "midlayer", 4), ("eagle", "layers.0", 4), ("dflash", "layers.0", 1), ("medusa", "blocks.0", 1)],
)
def test_a_pass_scores_all_nodes_of_a_depth_or_all_there_are(name: str, part: str, passes: int) -> None:
    """However many trees, branches and requests there are: a path alone would take as many for its own nodes."""
    target = tiny_target()
    drafter = get_drafter(name).from_target(TargetParts.of(target), draft_vocab=torch.arange(0, 32, 2)).double()
    prompts = [torch.arange(length) for length in (3, 9, 5)]
    batch = pack(serve(drafter, target, prompts, shape=TreeShape(4, 3, 12), max_new_tokens=6))
    assert int(TreeIndex.of(batch).depth.max()) == 4 and len(batch["nodes", "tokens"]) > 50
    counted = []
    drafter.get_submodule(part).register_forward_hook(lambda *_: counted.append(1))
    drafter.score(batch)
    assert len(counted) == passes


def test_recorded_trees() -> None:
    """Two requests: one of three rounds, of which the second drafted nothing, and one whose root is its first token."""
    batch = TensorDict({
        "rounds": {
            "offset": torch.tensor([0, 3, 3, 5, 6]), "anchor": torch.tensor([4, 5, 7, 0]),
            "request_offset": torch.tensor([0, 3, 4]),
        },
        "nodes": {"parents": torch.tensor([-1, 0, 0, -1, 0, -1])},
    })  # fmt: skip
    trees = TreeIndex.of(batch)
    assert trees.num_rounds == 4
    assert trees.request.tolist() == [0, 0, 0, 1] + [0, 0, 0, 0, 0, 1]
    assert trees.root.tolist() == [3, 4, 6, -1] + [3, 3, 3, 6, 6, -1]
    assert trees.depth.tolist() == [0, 0, 0, 0] + [1, 2, 2, 1, 2, 1]
    assert trees.parent.tolist() == [0, 4, 4, 2, 7, 3]
