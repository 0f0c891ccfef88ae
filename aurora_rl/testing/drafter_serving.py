"""The conformance check of drafters, on serving: proposals, their law, and the cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from aurora_kernels.trees import depths, valid_nodes
from aurora_rl.policies import Drafter, Proposal, TreeShape
from aurora_rl.testing.asserts import RECORDED, close, require
from aurora_rl.testing.tiny import dtype_of


def check_draws(drafter: Drafter, trajectories: list[TensorDict], shape: TreeShape, seed: int) -> None:
    """Check that nodes are drawn with the generator, from the distribution that is returned with them."""
    slots, what = filled(drafter, trajectories), f"propose with {shape}"

    def drawn(seed: int) -> Proposal:
        return drafter.propose(slots, shape, torch.Generator().manual_seed(seed))

    first, again, rest = drawn(seed), drawn(seed), [drawn(seed + i) for i in range(1, 5)]
    require(torch.equal(first.tokens, again.tokens), f"{what} ignores the generator: one seed gave two trees")
    differ = any(not torch.equal(first.tokens, tree.tokens) for tree in rest)
    require(differ, f"{what} draws nothing: seeds do not matter")
    nodes = (*first.tokens.shape, len(drafter.draft_vocab))
    require(first.q is not None and first.q.shape == nodes, f"{what}: q is not {nodes}")
    assert first.q is not None
    row = (first.tokens[:, :, None] == drafter.draft_vocab).int().argmax(-1, keepdim=True)
    total, of_token = first.q.sum(-1), first.q.gather(-1, row)[:, :, 0]
    require(close(total, torch.ones_like(total), 1e-4), f"{what}: a row of q does not sum to 1")
    same = close(of_token, first.log_probs.exp().to(of_token), 1e-4)
    require(same, f"{what}: q of a drawn token is not exp(log_probs)")


def check_proposals(drafter: Drafter, trajectories: list[TensorDict], shape: TreeShape, vocab_size: int) -> None:
    """Check that trees are within the shape, and of tokens that the drafter has."""
    slots = filled(drafter, trajectories)
    proposal, what = drafter.propose(slots, shape), f"propose with {shape}"
    _check_nodes(drafter, proposal, len(slots), shape, vocab_size, what)
    if shape.width == 1 and proposal.mask is None:
        drafted, most = proposal.tokens.shape[1], drafter.max_depth
        require(drafted == min(shape.depth, most), f"{what}: a chain of {drafted} nodes, max_depth is {most}")
    empty = drafter.propose(slots, TreeShape(0)).tokens
    require(empty.shape == (len(slots), 0), f"propose at depth 0 gave {tuple(empty.shape)} and not no nodes")


def _check_nodes(drafter: Drafter, proposal: Proposal, rows: int, shape: TreeShape, vocab_size: int, what: str) -> None:
    tokens, parents, log_probs, _, mask = proposal
    require(tokens.shape == parents.shape == log_probs.shape, f"{what}: tokens, parents and log_probs differ in shape")
    least = 1 if mask is None else 0
    fits = tokens.shape[0] == rows and least <= tokens.shape[1] <= shape.num_nodes
    require(fits, f"{what}: expected [{rows}, {least}..{shape.num_nodes}] nodes, got {tuple(tokens.shape)}")
    mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    require(mask.shape == tokens.shape and mask.dtype == torch.bool, f"{what}: mask is not bool {tuple(tokens.shape)}")
    require(tokens.dtype == parents.dtype == torch.int64, f"{what}: tokens and parents are not int64")
    require(log_probs.dtype == torch.float32, f"{what}: log_probs are {log_probs.dtype}, not float32")
    earlier = (parents >= -1) & (parents < torch.arange(parents.shape[1]))
    require(bool(earlier[mask].all()), f"{what}: a node's parent is neither an earlier node nor -1")
    require(bool((depths(parents)[mask] <= shape.depth).all()), f"{what}: a path is deeper than {shape.depth}")
    drawn = tokens[mask & (log_probs > -torch.inf)]
    require(bool(torch.isin(drawn, drafter.draft_vocab).all()), f"{what}: a token is outside the draft vocabulary")
    legal = valid_nodes(tokens, parents, mask, vocab_size)
    require(bool(legal[mask].all()), f"{what}: two siblings carry the same token")
    require(bool((log_probs[mask] <= 0).all()), f"{what}: a log-probability is above 0 or not a number")


def check_cache(drafter: Drafter, trajectories: list[TensorDict]) -> None:
    """Check that drafts depend neither on how a slot was filled nor on the other slots."""
    shape, atol = TreeShape(3, 2), RECORDED[dtype_of(drafter)]
    slots = filled(drafter, trajectories)
    lengths = torch.tensor([len(t["sequence", "tokens"]) - 1 for t in trajectories])
    require(torch.equal(drafter.cached, lengths), f"cached is {drafter.cached.tolist()} after {lengths.tolist()} pairs")
    expected = drafter.propose(slots, shape)

    def same(slots: Tensor, why: str) -> None:
        got = drafter.propose(slots, shape)
        for row, slot in enumerate(slots.tolist()):
            new, old = _nodes(got, row), _nodes(expected, slot)
            equal = torch.equal(new[0], old[0]) and torch.equal(new[1], old[1])
            require(equal and close(new[2], old[2], atol), f"proposals change {why}")

    same(slots, "when asked for again")
    same(slots.flip(0), "with the order of the slots")
    for slot in slots:
        same(slot[None], "when a slot is asked alone")

    drafter.forget(slots[1:2])
    require(int(drafter.cached[1]) == 0, "forget leaves pairs in `cached`")
    same(slots[:1], "when another slot is forgotten")
    for start in range(0, int(lengths[1]), 3):
        end = lengths[1:2].clamp(max=start + 3)
        _extend(drafter, trajectories[1:2], slots[1:2], torch.tensor([start]), end)
        drafter.propose(slots[1:2], shape)  # drafting between two rounds must leave no trace
    same(slots, "when a slot was forgotten and caught up in pieces")

    # Pieces of unequal length, one call for all slots: the shorter ones are padded.
    drafter.allocate(len(slots) + 2, int(lengths.max()) + 1)
    require(not bool(drafter.cached.any()), "allocate leaves pairs in `cached`")
    middle = lengths - 1 - torch.arange(len(slots)) % 3
    _extend(drafter, trajectories, slots, torch.zeros_like(lengths), middle)
    _extend(drafter, trajectories, slots, middle, lengths)
    same(slots, "when slots of unequal length are extended in one call, or next to empty slots")

    # A slot that is all but full, next to one that catches up from its first pair: the padding has no room there.
    longest = [trajectories[int(lengths.argmax())]] * 2
    full = lengths.max().expand(2)
    drafter.allocate(2, int(full[0]) + 1)
    _extend(drafter, longest[:1], slots[:1], torch.tensor([0]), full[:1] - 1)
    _extend(drafter, longest, slots[:2], torch.stack([full[0] - 1, torch.tensor(0)]), full)
    got = drafter.propose(slots[:2], shape)
    equal = all(close(a.double(), b.double(), atol) for a, b in zip(_nodes(got, 0), _nodes(got, 1), strict=True))
    require(equal, "proposals change when a full slot is extended next to one that catches up")
    _check_rows(drafter, longest, slots[:2], full)


def _check_rows(drafter: Drafter, trajectories: list[TensorDict], slots: Tensor, full: Tensor) -> None:
    """Half of the rows of slot 0 serve slot 1, which has never held anything."""
    drafter.allocate(2, int(full[0]) + 1)
    sources, rows, half = drafter.cache_rows(0), drafter.cache_rows(1), full[1:] // 2
    if sources is None or rows is None:
        return
    _extend(drafter, trajectories[:1], slots[:1], torch.tensor([0]), full[:1])
    for row, source in zip(rows, sources, strict=True):
        require(len(row) > int(full[0]), f"cache_rows gives {len(row)} rows, fewer than a slot has tokens")
        row[: int(half)] = source[: int(half)]
    drafter.cached[1:] = half
    _extend(drafter, trajectories[1:], slots[1:], half, full[1:])
    got = drafter.propose(slots, TreeShape(3, 2))
    parts = zip(_nodes(got, 0), _nodes(got, 1), strict=True)
    equal = all(a.shape == b.shape and close(a.double(), b.double(), RECORDED[dtype_of(drafter)]) for a, b in parts)
    require(equal, "proposals change when a slot takes over the rows that cache_rows gives of another")


def _nodes(proposal: Proposal, row: int) -> tuple[Tensor, ...]:
    """Return tokens, parents and log-probabilities of a row's nodes."""
    keep = slice(None) if proposal.mask is None else proposal.mask[row]
    return tuple(part[row][keep] for part in proposal[:3])


def filled(drafter: Drafter, trajectories: Sequence[TensorDictBase]) -> Tensor:
    """Give each trajectory a slot and put all of its pairs there, slot by slot; returns the slots."""
    lengths = torch.tensor([len(t["sequence", "tokens"]) - 1 for t in trajectories])
    slots = torch.arange(len(trajectories))
    drafter.allocate(len(slots), int(lengths.max()) + 1)
    for i in slots.tolist():
        _extend(drafter, trajectories[i : i + 1], slots[i : i + 1], torch.tensor([0]), lengths[i : i + 1])
    return slots


def _extend(
    drafter: Drafter, trajectories: Sequence[TensorDictBase], slots: Tensor, start: Tensor, end: Tensor
) -> None:
    """Append pairs ``start`` to ``end - 1`` of each trajectory to its slot; there is always a column of padding."""
    count = end - start
    width = int(count.max()) + 1
    first = trajectories[0]["sequence", "features"]
    tokens = torch.zeros(len(slots), width + 1, dtype=torch.int64)
    features = first.new_full((len(slots), width, first.shape[1]), 7.0)
    for i, trajectory in enumerate(trajectories):
        here = slice(int(start[i]), int(end[i]))
        tokens[i, : int(count[i]) + 1] = trajectory["sequence", "tokens"][int(start[i]) : int(end[i]) + 1]
        features[i, : int(count[i])] = trajectory["sequence", "features"][here]
    drafter.extend(slots, tokens, features, count)
