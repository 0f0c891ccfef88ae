"""The shape of the trees that are drafted."""

from __future__ import annotations

from dataclasses import dataclass, replace

from aurora_rl.trajectories import DRAFT_MODES

# Longest path, and most children of a node, in trees that are looked up.
_DEEPEST_LOOKUP, _WIDEST_LOOKUP = 6, 4
CANDIDATES = 3
"""Times as many nodes as are kept, which the drafter is asked for where lookup proposes some, too."""
USUAL_LOOKUP = 8
"""Most nodes that are looked up where nobody says how many."""


@dataclass(frozen=True, slots=True, init=False)
class TreeShape:
    """The tree that is drafted in a round.

    Attributes:
        depth: Longest path of the drafter's tree; 0 drafts nothing.
        width: Nodes expanded at each depth and children tried of each; 1 is a chain.
        num_nodes: Most nodes: the drafter's likeliest nodes by joint probability are kept. None, or more than there
            can be, stands for all nodes of this depth and width.
        mode: "topk" takes the drafter's likeliest nodes. "sampled" draws ``width`` chains that part at the root, as
            many as ``num_nodes`` holds whole. Their first tokens are independent. "sampled_without_replacement" draws
            first tokens that differ.
        lookup: Most nodes that are looked up in the request's text and in earlier answers (``policies.lookup``). They
            are merged into the drafter's tree, whose ``num_nodes`` likeliest nodes are kept; they may be deeper than
            ``depth``. 0 looks nothing up.
        lookup_only: Whether the drafter rests: the whole tree, of this depth and width, is looked up.

    Raises:
        ValueError: An attribute is out of range, ``num_nodes`` cannot hold one path, or lookup is combined with a mode
            that samples.

    Example:
        >>> TreeShape(depth=3, width=2).num_nodes, TreeShape(depth=3, width=2, num_nodes=8).num_nodes
        (10, 8)
    """

    depth: int
    width: int
    num_nodes: int
    mode: str
    lookup: int
    lookup_only: bool

    def __init__(
        self,
        depth: int,
        width: int = 1,
        num_nodes: int | None = None,
        mode: str = "topk",
        lookup: int = 0,
        lookup_only: bool = False,
    ) -> None:
        if mode not in DRAFT_MODES:
            raise ValueError(f"mode must be one of {', '.join(DRAFT_MODES)}, got {mode!r}")
        if depth < 0 or width < 1:
            raise ValueError(f"a tree has depth >= 0 and width >= 1, got depth {depth}, width {width}")
        if num_nodes is not None and num_nodes < depth:
            raise ValueError(f"num_nodes={num_nodes} cannot hold one path of depth {depth}")
        if lookup < 0 or (lookup_only and not lookup):
            raise ValueError(f"lookup must be at least {int(lookup_only)}, got {lookup}")
        if lookup and mode != "topk":
            raise ValueError(f"lookup={lookup} adds nodes that the drafter did not draw; set it to 0 in mode {mode!r}")
        most = width + (depth - 1) * width**2 if mode == "topk" else depth * width
        nodes = 0 if not depth else most if num_nodes is None else min(num_nodes, most + lookup)
        values = {"depth": depth, "width": width, "num_nodes": nodes, "mode": mode, "lookup": lookup}
        for name, value in {**values, "lookup_only": lookup_only}.items():
            object.__setattr__(self, name, value)

    @property
    def candidates(self) -> TreeShape:
        """Shape that the drafter is asked for: with lookup more nodes than are kept, to choose from.

        Example:
            >>> TreeShape(2, width=4, num_nodes=4, lookup=8).candidates.num_nodes
            12
        """
        return replace(self, num_nodes=CANDIDATES * self.num_nodes) if self.lookup else self

    @property
    def max_nodes(self) -> int:
        """Most nodes of a tree of this shape, and of what is looked up in its place."""
        return max(self.num_nodes, self.lookup)

    def without_drafter(self, num_nodes: int) -> TreeShape:
        """Return the shape of rounds in which the drafter rests and at most so many nodes are looked up.

        Example:
            >>> TreeShape(2, width=4, num_nodes=4, lookup=8).without_drafter(8).depth
            6
        """
        return replace(
            self,
            depth=min(num_nodes, _DEEPEST_LOOKUP),
            width=min(num_nodes, _WIDEST_LOOKUP),
            num_nodes=num_nodes,
            lookup_only=True,
        )

    @property
    def num_chains(self) -> int:
        """Number of chains of a sampled tree."""
        return min(self.width, self.num_nodes // max(self.depth, 1))
