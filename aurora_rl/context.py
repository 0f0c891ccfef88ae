"""State of each slot's request while it is served: its context, and its rounds until they become a trajectory.

Legend: ``B`` slots, ``b`` of them in a call, ``P`` tokens of a prompt, ``F`` feature size, ``H`` hidden size, ``D``
most new tokens of a round.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDict
from torch import Tensor

from aurora_kernels.trees import reorder_depth_first
from aurora_rl.sampling_params import SamplingParams
from aurora_rl.trajectories import make_trajectory


class ContextStore:
    """Tokens, features and hidden states of every slot's request so far, in one block.

    The engine appends at ``commit``; the environment and the policy read. Row ``t`` of ``features`` and ``hidden``
    belongs to token ``t``; the last committed token has been through no target pass yet and has no row.

    Args:
        num_slots: Number of slots ``B``.
        max_length: Most tokens (prompt and completion) that a slot can hold.
        feature_size: Width ``F`` of the features that the drafter reads.
        hidden_size: Width ``H`` of the output head's input.
        dtype: Dtype of features and hidden states.
        device: Device of all but the lengths.

    Attributes:
        tokens: Tokens of each slot, ``[B, max_length]`` int64.
        features: Features of each slot, ``[B, max_length, F]``.
        hidden: Hidden states from position ``P - 1`` on, ``[B, max_length, H]``.
        lengths: Number of tokens, 0 if the slot is free, ``[B]`` int64 on the CPU.
        prompt_lengths: Number of tokens of the prompt, ``[B]`` int64 on the CPU.
        cached_lengths: Number of tokens of the prompt whose rows a prefix cache had, ``[B]`` int64 on the CPU.
        cache_salts: Salt of each slot's request, None if it has none; set before its prompt is read. What is kept of a
            request is for requests of its salt.
        adapters: Code of the drafter's adapter for each slot's request, 0 if it has none, ``[B]`` int64 on the CPU. The
            policy sets it; see ``aurora_rl.trajectories.adapter_code``.
    """

    def __init__(
        self,
        num_slots: int,
        max_length: int,
        feature_size: int,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self.num_slots, self.max_length = num_slots, max_length
        self.tokens = torch.zeros(num_slots, max_length, dtype=torch.int64, device=device)
        self.features = torch.zeros(num_slots, max_length, feature_size, dtype=dtype, device=device)
        self.hidden = torch.zeros(num_slots, max_length, hidden_size, dtype=dtype, device=device)
        self.lengths = torch.zeros(num_slots, dtype=torch.int64)
        self.prompt_lengths = torch.zeros(num_slots, dtype=torch.int64)
        self.cached_lengths = torch.zeros(num_slots, dtype=torch.int64)
        self.cache_salts: list[str | None] = [None] * num_slots
        self.adapters = torch.zeros(num_slots, dtype=torch.int64)

    @property
    def occupied(self) -> Tensor:
        """Indices of the slots that hold a request, ``[b]`` int64 on the CPU."""
        return self.lengths.nonzero().flatten()

    def start(self, slot: int, prompt: Tensor) -> None:
        """Put a prompt (``[P]`` int64) into a free slot, whose features the engine has written."""
        self.tokens[slot, : len(prompt)] = prompt
        self.lengths[slot] = self.prompt_lengths[slot] = len(prompt)

    def append(self, slots: Tensor, tokens: Tensor, num_new: Tensor, features: Tensor, hidden: Tensor) -> None:
        """Append what a round committed.

        Args:
            slots: Slots that took part, ``[b]`` int64.
            tokens: New tokens, oldest first, ``[b, D]``; columns from ``num_new`` on are ignored.
            num_new: Number of new tokens, ``[b]`` int64 on the CPU.
            features: Features, ``[b, D, F]``; row ``i`` belongs to the position just before ``tokens[:, i]``.
            hidden: Hidden states, ``[b, D, H]``, aligned like ``features``.
        """
        start = self.lengths[slots]
        row, column = torch.where(torch.arange(tokens.shape[1]) < num_new[:, None])
        indices = (slots[row], start[row] + column, row, column)
        slot, position, row, column = (index.to(self.tokens.device) for index in indices)
        self.tokens[slot, position] = tokens[row, column]
        self.features[slot, position - 1] = features[row, column].to(self.features.dtype)
        self.hidden[slot, position - 1] = hidden[row, column].to(self.hidden.dtype)
        self.lengths[slots] = start + num_new

    def release(self, slot: int) -> None:
        """Free the slot."""
        self.lengths[slot] = self.prompt_lengths[slot] = self.adapters[slot] = 0
        self.cache_salts[slot] = None


class TrajectoryRecorder:
    """Collect the rounds of each slot of a store, and make packed trajectories of them."""

    def __init__(self, store: ContextStore) -> None:
        self._store = store
        # Of each slot's rounds: the anchor, the two versions, and the nodes.
        self._rounds: dict[int, list[tuple[int, int, int, tuple[Tensor, ...]]]] = {}

    def start(self, slot: int) -> None:
        """Begin an empty record for the request that entered the slot."""
        self._rounds[slot] = []

    def round(
        self,
        slots: Sequence[int],
        anchors: Sequence[int],
        tokens: Tensor,
        parents: Tensor,
        log_probs: Tensor,
        valid: Tensor,
        accepted: Tensor,
        hidden: Tensor,
        policy_versions: Sequence[int],
        cache_versions: Sequence[int],
    ) -> None:
        """Record one round of ``b`` slots whose trees have ``n`` padded nodes.

        Args:
            slots: The slots.
            anchors: Position of each slot's root in its request.
            tokens: Token of each node, ``[b, n]``.
            parents: Parent of each node, ``[b, n]``.
            log_probs: Log-probability of each node given its path, ``[b, n]``.
            valid: Nodes to record, ``[b, n]`` bool.
            accepted: Accepted nodes, ``[b, n]`` bool.
            hidden: Hidden states, the root's first, ``[b, n + 1, H]``.
            policy_versions: Version of the weights that drafted, per slot.
            cache_versions: Oldest version with rows in the drafter's cache, per slot.
        """
        columns = (tokens, parents, log_probs, accepted, hidden[:, 1:])
        for i, slot in enumerate(slots):
            keep = valid[i].nonzero().flatten()
            nodes = (keep, *(c[i, keep] for c in columns))
            self._rounds[slot].append((anchors[i], policy_versions[i], cache_versions[i], nodes))

    def forget(self, slot: int) -> None:
        """Drop the record of the slot's request."""
        del self._rounds[slot]

    def trajectory_from(
        self, slot: int, first: int, request: int, sampling_params: SamplingParams, rule: str, draft_mode: str
    ) -> TensorDict:
        """Return the packed trajectory of the slot's request so far, in memory of its own, on the CPU.

        Its completion begins at token ``first``, the prompt's length or where an earlier round ended; what comes before
        is its prompt. The other arguments are those of :func:`~aurora_rl.trajectories.make_trajectory`.
        """
        store, length = self._store, int(self._store.lengths[slot])
        rounds = [each for each in self._rounds[slot] if each[0] >= first - 1]
        return make_trajectory(
            request=request,
            tokens=store.tokens[slot, :length].cpu().clone(),
            prompt_length=first,
            features=store.features[slot, : length - 1].cpu().clone(),
            target={"hidden": store.hidden[slot, first - 1 : length - 1].cpu().clone()},
            anchors=[anchor for anchor, *_ in rounds],
            trees=[_pack_tree(*nodes) for *_, nodes in rounds],
            policy_versions=[version for _, version, *_ in rounds],
            cache_versions=[version for *_, version, _ in rounds],
            sampling_params=sampling_params,
            rule=rule,
            draft_mode=draft_mode,
            adapter=int(store.adapters[slot]),
        )


def _pack_tree(
    keep: Tensor, tokens: Tensor, parents: Tensor, log_probs: Tensor, accepted: Tensor, hidden: Tensor
) -> dict[str, Tensor]:
    """Return one tree's valid nodes, depth-first, with parents relative to the tree."""
    place = torch.full((int(keep[-1]) + 2 if len(keep) else 1,), -1, dtype=torch.int64, device=keep.device)
    place[keep] = torch.arange(len(keep), device=keep.device)
    order, parents = reorder_depth_first(torch.where(parents < 0, -1, place[parents]))
    rows = {"tokens": tokens, "log_probs": log_probs, "accepted": accepted, "hidden": hidden}
    return {"parents": parents, **{name: row[order] for name, row in rows.items()}}
