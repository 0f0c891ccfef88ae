"""Choose the tree to draft next, or none, from measured acceptance and the measured cost of rounds."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Literal

import torch
from tensordict import TensorDictBase
from torch import Tensor

from aurora_rl.policies.policy import DrafterPolicy
from aurora_rl.policies.tree_shape import TreeShape

# Shares of the best shape's tokens per second at which a shape is as good as it, and at which no speculation is better.
_AS_GOOD, _PLAIN_ENOUGH = 0.99, 0.98
# Guess of an unknown chance, and the number of trials that it is worth; a time measured at start is worth as many.
_GUESS, _WORTH = 0.25, 4
# Optimistic guess of lookup's chances: trying it costs next to nothing.
_HOPE = 0.75
# Trials that old measurements keep once they may no longer hold.
_LEFT = 8
# Rounds over which the pace of live rounds is averaged, and the cap of a loss, in plain rounds.
_RECENT, _LOSS = 64, 32
# Trials of a probe, the share of plain decoding's time that probes may lose, and how many times longer than that they
# wait at most while they keep finding nothing.
_PROBE, _SHARE, _PATIENCE = 24, 0.02, 8

# Kinds of rounds; rounds of one kind share a pace.
_PLAIN, _DRAFTER, _LOOKUP = range(3)

Outcome = Literal["likeliest", "sibling", "rejected", "undrafted"]
"""What happened at the end of an accepted path: which child was accepted, that none was, or none was drafted."""


class TreeController:
    """Chooses the shape with the most expected tokens per second, no speculation being one of them.

    The drafter's likeliest child is accepted with chance ``f``, one of its siblings otherwise with chance ``s``, and
    any is drafted with chance ``c``, all measured by depth. A depth is passed with chance ``a = c f`` in a chain and
    ``c (f + (1 - f) s)`` in a tree. So depth ``L`` delivers ``1 + sum over d <= L of a[1] * ... * a[d]`` tokens. An
    untried depth counts as good as the one before it.

    The shape of ``lookup_only`` delivers one token and the chances of its first ``n`` nodes, at the best ``n``. They
    fade towards an optimistic guess, so that lookup is tried first, and again now and then. Where it is faster it takes
    the place of no speculation.

    A round takes the time measured for its shape and number of occupied slots, less that of the nodes that are left
    out. It is multiplied by the pace of live rounds of its kind: plain, drafter's or lookup's.

    No speculation, once best, stays until the number of occupied slots changes or a probe of a few rounds finds a
    drafter that improved. A probe comes soon after :meth:`swapped`. Otherwise it comes once the last probe's loss (at
    least one plain round) is at most 2% of the plain-decoding time since.

    Args:
        costs: Seconds of a round, by number of occupied slots and by shape; one of the shapes has depth 0.
        memory: Speculative rounds over which acceptance fades.

    Attributes:
        plain: Shape of depth 0.

    Raises:
        ValueError: There are no costs, no shape of depth 0 or several, or other shapes for some number of slots.

    Example:
        Drafting one token adds a tenth to a round of one slot, and doubles a round of eight.

        >>> none, chain = TreeShape(0), TreeShape(1)
        >>> controller = TreeController({1: {none: 1.0, chain: 1.1}, 8: {none: 1.5, chain: 3.0}})
        >>> for outcome in ["likeliest", "likeliest", "rejected"] * 50:
        ...     controller.observe(chain, 1, seconds=1.1, outcomes=[[outcome]])
        >>> controller.choose(1).depth, controller.choose(8).depth
        (1, 0)
    """

    def __init__(self, costs: Mapping[int, Mapping[TreeShape, float]], *, memory: int = 400) -> None:
        self._costs, self._occupancies, self._memory = costs, sorted(costs), memory
        measured = list(costs[self._occupancies[0]]) if costs else []
        plain = [shape for shape in measured if not shape.depth]
        if len(plain) != 1 or any(set(by_shape) != set(measured) for by_shape in costs.values()):
            found = {occupied: [(s.depth, s.width) for s in by_shape] for occupied, by_shape in costs.items()}
            raise ValueError(
                "costs name the same shapes for every number of slots, one of them of depth 0; got (depth, width) "
                f"by number of slots: {found}"
            )
        self.plain = plain[0]
        self._node_seconds = {count: _node_seconds(by_shape) / count for count, by_shape in costs.items()}
        # Lookup alone, of the most nodes; plain without lookup.
        alone = (shape for shape in measured if shape.lookup_only)
        self._alone = max(alone, key=lambda shape: shape.num_nodes, default=self.plain)
        self._shapes = [shape for shape in measured if not shape.lookup_only or shape == self._alone]
        deepest = max(shape.depth for shape in measured)
        # [hits, trials] by depth; whether any child was drafted, of chains and of trees.
        self._likeliest, self._siblings, *self._drafted = ([[0.0, 0.0] for _ in range(deepest)] for _ in range(4))
        # The same by node of lookup alone, and whether it was verified.
        self._found, self._verified = ([[0.0, 0.0] for _ in range(self._alone.num_nodes)] for _ in range(2))
        # Live over measured seconds of plain, of drafter's and of lookup's rounds, and of how many of each.
        self._pace, self._timed = [1.0, 1.0, 1.0], [0, 0, 0]
        self._kept = 1.0  # share of the nodes of the drafter's shapes that are verified
        self._kind, self._run = -1, 0  # which of the three kinds ran last, and for how many rounds
        self._resting = 0  # the number of occupied slots at which it was best to leave the drafter alone
        self._probing = 0  # trials that the probe still wants
        # Seconds: of rounds without the drafter since the last one with it, and what drafting had lost by then.
        self._since, self._lost = math.inf, 0.0
        self._doubted = False  # whether that loss reached its limit, at which what was measured before counts little
        self._patience = 1
        self._below = 0.0  # nodes accepted below the shape's depth, of a slot that was drafted for

    @staticmethod
    def candidates(most: TreeShape) -> list[TreeShape]:
        """Return the shapes to measure: none, and every depth up to that of ``most``, in its width and as a chain.

        With lookup there are no bare chains: nodes are looked up in their place, as many as may be, and a single one,
        which is never chosen. The difference tells what a node costs.

        Example:
            >>> [(s.depth, s.width, s.num_nodes) for s in TreeController.candidates(TreeShape(2, width=4, num_nodes=5))]
            [(0, 4, 0), (1, 1, 1), (1, 4, 4), (2, 1, 2), (2, 4, 5)]
        """
        shapes = [replace(most, depth=0)]
        for depth in range(1, most.depth + 1):
            # Nodes that are drawn have no order, so what several of them have accepted says nothing about a single one.
            if most.width > 1 and most.mode == "topk" and not most.lookup:
                shapes.append(replace(most, depth=depth, width=1, num_nodes=depth))
            shapes.append(replace(most, depth=depth))
        return shapes + [most.without_drafter(count) for count in sorted({1, most.lookup}) if most.lookup]

    def acceptance(self, shape: TreeShape) -> list[float]:
        """Estimate the chances ``a[1], a[2], ...`` of a shape, or those of its nodes if they are looked up."""
        if shape.lookup_only:
            tried = self._found[: shape.num_nodes]
            return list(accumulate(tried, lambda guess, counts: _estimate(counts, guess), initial=_HOPE))[1:]
        likeliest, sibling, drafted, passed = _GUESS, _GUESS, 1.0, []
        for d in range(shape.depth):
            likeliest = _estimate(self._likeliest[d], likeliest)
            sibling = _estimate(self._siblings[d], sibling)
            drafted = _estimate(self._drafted[shape.width > 1][d], drafted)
            passed.append(drafted * (likeliest + (1 - likeliest) * sibling if shape.width > 1 else likeliest))
        return passed

    def price(self, shape: TreeShape, occupied: int) -> float:
        """Return the chance of being accepted below which a node of a shape costs more than it brings.

        It has to bring what the best shape delivers in the time of its row. Then tokens per second, over all slots
        together, are highest (Dinkelbach, "On Nonlinear Fractional Programming", 1967).
        """
        node = self._pace[_kind(shape)] * self._interpolated(self._node_seconds, occupied)
        return occupied * max(self._rate(each, occupied) for each in self._shapes) * node

    def without_drafter(self, shape: TreeShape) -> TreeShape:
        """Return the shape of a round in which the drafter failed every slot: lookup alone, or plain without it."""
        return self._alone if shape.lookup else self.plain

    def choose(self, occupied: int) -> TreeShape:
        """Choose the shape of the next round, for a number of occupied slots."""
        rates = {shape: self._rate(shape, occupied) for shape in self._shapes}
        drafting, rest = [shape for shape in self._shapes if _kind(shape) == _DRAFTER], self._rest(occupied)
        best = max(drafting, key=rates.__getitem__, default=rest)
        if rates[rest] < _PLAIN_ENOUGH * rates[best]:
            # While the drafter rests, mostly the paces change. Following them back and forth would cost a catch-up of
            # its cache each time.
            if self._probing or self._resting != occupied:
                # Of equally good shapes the deepest: what is drafted is tried and recorded, hence learned from.
                as_good = (shape for shape in drafting if rates[shape] >= _AS_GOOD * rates[best])
                return max(as_good, key=lambda shape: (shape.depth, rates[shape]))
        elif not self._probing:
            if rest.lookup_only and self._found[0][1] < _LEFT:
                return rest  # a guess, which a few rounds confirm or not
            self._resting = occupied
        if not self._probing:
            if self._since * _SHARE < max(self._lost, self._seconds(self.plain, occupied, 0)) * self._patience:
                return rest
            self._resting, self._probing, self._lost = 0, _PROBE, 0.0
            self._patience = min(2 * self._patience, _PATIENCE)
            self._doubt()
        return best

    def observe(
        self,
        shape: TreeShape,
        occupied: int,
        seconds: float,
        outcomes: Sequence[Sequence[Outcome]] = (),
        below: int = 0,
        found: Sequence[Sequence[bool]] = (),
        nodes: int | None = None,
    ) -> None:
        """Take in a round.

        Args:
            shape: Shape that was drafted, whether or not it was the one chosen.
            occupied: Number of slots that took part.
            seconds: Wall time of the round.
            outcomes: Outcomes by depth, as far as drafts were verified, of each slot that was drafted for. Slots that
                the drafter failed are left out; without any other slot the shape is that of :meth:`without_drafter`.
            below: Lookup's nodes that were accepted below the shape's depth, over all slots.
            found: Whether each node that was verified was accepted, for each slot, if the shape is ``lookup_only``.
            nodes: Nodes that were verified, over all slots; None if all of the shape's were.
        """
        whole = occupied * shape.num_nodes
        self._keep_pace(shape, occupied, seconds, whole if nodes is None else nodes)
        _fade((*self._found, *self._verified), self._memory)
        if _kind(shape) != _DRAFTER:
            self._since += seconds
            for accepted_nodes in found:
                for node in range(shape.num_nodes):
                    _count(self._verified[node], node < len(accepted_nodes))
                    _count(self._found[node], node < len(accepted_nodes) and accepted_nodes[node])
            return
        if nodes is not None and whole:
            self._kept += (nodes / whole - self._kept) / min(self._timed[_DRAFTER] + 1, _RECENT)
        tokens = 1 + (below + sum(map(_accepted, outcomes))) / occupied
        self._below += (below / max(len(outcomes), 1) - self._below) / _RECENT
        # Each kind at its pace: that the machine holds rounds up is no loss. A catch-up of the drafter's cache is.
        spent = seconds if self._run == 1 else self._seconds(shape, occupied, whole if nodes is None else nodes)
        # Time that the best shape without the drafter would have taken for as many tokens. A profit is not saved up,
        # and a long loss is not held for ever against weights to come.
        instead = tokens / self._rate(self._rest(occupied), occupied)
        self._lost, limit = max(self._lost + spent - instead, 0.0), _LOSS * self._seconds(self.plain, occupied, 0)
        if self._lost > limit:
            self._lost = limit
            if not self._doubted:  # again only once drafting has paid: what is measured from here on is to count
                self._doubted = True
                self._doubt()
        elif not self._lost:
            self._doubted = False
        self._since = 0.0
        self._probing = max(self._probing - len(outcomes), 0)
        if not self._probing and not self._lost:
            self._patience = 1
        chains, trees = self._drafted
        _fade((*self._likeliest, *self._siblings, *chains, *trees), self._memory)
        for path in outcomes:
            for d, outcome in enumerate(path):
                _count(self._drafted[shape.width > 1][d], outcome != "undrafted")
                if outcome != "undrafted":
                    _count(self._likeliest[d], outcome == "likeliest")
                if shape.width > 1 and outcome in ("sibling", "rejected"):
                    _count(self._siblings[d], outcome == "sibling")

    def swapped(self) -> None:
        """Note that other weights draft from now on: measurements of the old ones count little."""
        self._doubt()
        self._patience, self._run = 1, 0

    def _doubt(self) -> None:
        for counts in (*self._likeliest, *self._siblings):
            counts[:] = [count * min(_LEFT / max(counts[1], 1e-9), 1.0) for count in counts]

    def _rest(self, occupied: int) -> TreeShape:
        """Return the best of the shapes that leave the drafter alone."""
        enough = self._rate(self.plain, occupied) >= _PLAIN_ENOUGH * self._rate(self._alone, occupied)
        return self.plain if enough else self._alone

    def _rate(self, shape: TreeShape, occupied: int) -> float:
        if shape.lookup_only:
            shares = [_estimate(counts, 1.0) for counts in self._verified]
            tokens, nodes = accumulate(self.acceptance(shape), initial=1.0), accumulate(shares, initial=0.0)
            return max(
                each / self._seconds(shape, occupied, count * occupied)
                for each, count in zip(tokens, nodes, strict=True)
            )
        return self._tokens(shape) / self._seconds(shape, occupied, self._kept * shape.num_nodes * occupied)

    def _tokens(self, shape: TreeShape) -> float:
        reach = tokens = 1.0
        for passed in self.acceptance(shape):
            reach *= passed
            tokens += reach
        # What lookup adds below the tree is taken to be the same for every depth of it.
        return tokens + self._below if _kind(shape) == _DRAFTER else tokens

    def _seconds(self, shape: TreeShape, occupied: int, nodes: float) -> float:
        return self._pace[_kind(shape)] * self._measured(shape, occupied, nodes)

    def _measured(self, shape: TreeShape, occupied: int, nodes: float) -> float:
        """Return the seconds measured at start, of a round of which so many nodes over all slots are verified."""
        whole = self._interpolated({count: by_shape[shape] for count, by_shape in self._costs.items()}, occupied)
        return whole - self._interpolated(self._node_seconds, occupied) * (occupied * shape.num_nodes - nodes)

    def _interpolated(self, by_occupied: Mapping[int, float], occupied: int) -> float:
        """Interpolate linearly between two measured numbers of slots."""
        known = self._occupancies
        above = min(bisect_left(known, occupied), len(known) - 1)
        low, high = known[max(above - 1, 0)], known[above]
        share = min((occupied - low) / (high - low), 1.0) if high > low else 0.0
        return by_occupied[low] * (1 - share) + by_occupied[high] * share

    def _keep_pace(self, shape: TreeShape, occupied: int, seconds: float, nodes: int) -> None:
        kind = _kind(shape)
        if kind != self._kind:
            self._kind, self._run = kind, 0
        self._run += 1
        if kind == _DRAFTER and self._run == 1:
            return  # the drafter's cache caught up, as it does in no round that follows
        self._timed[kind] += 1
        old, weight = self._pace[kind], 1 / min(self._timed[kind] + _WORTH, _RECENT)
        # Clipped: one round that the machine held up says little about the others.
        live = min(seconds / self._measured(shape, occupied, nodes), 4 * old)
        self._pace[kind] += (live - old) * weight
        for rest, timed in enumerate(self._timed):
            if rest != kind and (self._run > _RECENT or not timed):
                # A pace that changes soon after the kind did tells the kinds apart; one that changes later changes all.
                self._pace[rest] *= self._pace[kind] / old


def observe_round(
    controller: TreeController, policy: DrafterPolicy, done: TensorDictBase, occupied: int, seconds: float
) -> None:
    """Have a controller take in a round of a policy, attributed to the shape that was drafted.

    Slots where the drafter raised are ignored.

    Args:
        controller: The controller.
        policy: The policy, as its call for the round left it.
        done: The environment's step, with its results in "next".
        occupied: Number of slots that took part.
        seconds: Wall time of the round, without prefill.
    """
    shape, outcomes = controller.plain, []
    found: list[list[bool]] = []
    if bool(policy.drafted.any()):
        shape, outcomes = policy.shape, _outcomes(done, policy.drafted)
    elif bool(policy.looked_up.any()):
        shape = policy.shape if policy.shape.lookup_only else controller.without_drafter(policy.shape)
        verifier, mask = done["next", "verifier"].cpu(), done["draft", "mask"].cpu()
        # Where a request ended inside the path, nothing after its last token was judged.
        judged_slots = policy.looked_up & (verifier["bonus_token"] >= 0)
        found = [verifier["accepted"][slot][mask[slot]].tolist() for slot in judged_slots.nonzero().flatten()]
    judged = [path[: shape.depth] for path in outcomes]
    # What n-grams had accepted below the drafter's tree says nothing about a deeper tree of the drafter.
    below = sum(map(_accepted, outcomes)) - sum(map(_accepted, judged))
    controller.observe(shape, occupied, seconds, judged, below, found, int(done["draft", "mask"].sum()))


def _outcomes(done: TensorDictBase, slots: Tensor) -> list[list[Outcome]]:
    """Return the outcomes of a round's drafts, by depth, for each of the slots ``[B]`` bool."""
    draft, verifier = done["draft"], done["next", "verifier"]
    parents, log_probs, mask = draft["parents"], draft["log_probs"], draft["mask"]
    siblings = (parents[:, :, None] == parents[:, None]) & mask[:, None]
    # N-grams' log-probabilities are all alike, and the likelier stands before its siblings.
    before = torch.ones_like(siblings).tril(-1)
    own, sibling = log_probs[:, :, None], log_probs[:, None]
    likeliest = ~(siblings & ((sibling > own) | (sibling == own) & before)).any(-1)
    # Where a request ended inside the path, nothing after its last token was judged.
    judged = (verifier["bonus_token"] >= 0).tolist()
    out = []
    for slot in slots.nonzero().flatten().tolist():
        path = verifier["accepted"][slot].nonzero().flatten()
        outcomes: list[Outcome] = ["likeliest" if best else "sibling" for best in likeliest[slot, path].tolist()]
        if judged[slot]:
            end = int(path[-1]) if len(path) else -1
            outcomes.append("rejected" if bool((mask[slot] & (parents[slot] == end)).any()) else "undrafted")
        out.append(outcomes)
    return out


def _accepted(path: Sequence[Outcome]) -> int:
    return sum(outcome in ("likeliest", "sibling") for outcome in path)


def _kind(shape: TreeShape) -> int:
    if not shape.depth:
        return _PLAIN
    return _LOOKUP if shape.lookup_only else _DRAFTER


def _node_seconds(by_shape: Mapping[TreeShape, float]) -> float:
    """Return the seconds that another node of every slot's tree takes; 0 if no shapes differ in their nodes alone."""
    alike: dict[int, list[tuple[int, float]]] = {}
    for shape, seconds in by_shape.items():
        if shape.depth:
            alike.setdefault(0 if shape.lookup_only else shape.depth, []).append((shape.num_nodes, seconds))
    ends = [(min(each), max(each)) for each in alike.values()]
    slopes = [(high[1] - low[1]) / (high[0] - low[0]) for low, high in ends if high[0] > low[0]]
    return max(sum(slopes) / len(slopes), 0.0) if slopes else 0.0


def _fade(table: Sequence[list[float]], memory: int) -> None:
    for counts in table:
        counts[:] = [(1 - 1 / memory) * count for count in counts]


def _count(counts: list[float], hit: bool) -> None:
    counts[0] += hit
    counts[1] += 1


def _estimate(counts: list[float], guess: float) -> float:
    return (counts[0] + _WORTH * guess) / (counts[1] + _WORTH)
