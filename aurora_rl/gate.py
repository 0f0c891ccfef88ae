"""Replay of recorded streams, and the gate that decides with it whether new weights are published."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from aurora_rl.policies.drafter import Drafter, TreeShape
from aurora_rl.policies.policy import DrafterPolicy
from aurora_rl.trajectories import ContextStore
from aurora_rl.trees import depths, walk


class Replay(NamedTuple):
    """What a drafter would have had on recorded requests.

    Attributes:
        tokens: ``[n]`` int64, committed tokens of each request.
        rounds: ``[n]`` int64, rounds that it took.
    """

    tokens: Tensor
    rounds: Tensor

    @property
    def acceptance(self) -> Tensor:
        """``[n]`` tokens per round of each request."""
        return self.tokens / self.rounds

    @property
    def acceptance_length(self) -> float:
        """Tokens per round over all requests, bonus tokens included."""
        return float(self.tokens.sum() / self.rounds.sum())


@torch.inference_mode()
def replay(drafter: Drafter, trajectories: Sequence[TensorDictBase], shape: TreeShape) -> Replay:
    """The acceptance that a drafter would have had on recorded requests, exactly.

    Under greedy decoding and sample-and-match the text does not depend on the drafter, so the recorded text says which
    drafts the target would have accepted.

    Args:
        drafter: its serving cache is used; give a copy of one that serves.
        trajectories: recorded requests.
        shape: the tree to draft at every round.
    """
    n = len(trajectories)
    longest = max(len(t["spine", "tokens"]) for t in trajectories)
    features = trajectories[0]["spine", "features"]
    device = drafter.draft_vocab.device
    store = ContextStore(n, longest + 1, features.shape[-1], 0, features.dtype, device)
    ends = torch.tensor([len(t["spine", "tokens"]) for t in trajectories])
    for slot, trajectory in enumerate(trajectories):
        store.start(slot, trajectory["spine", "tokens"].to(device))
        store.features[slot, : ends[slot] - 1] = trajectory["spine", "features"].to(device)
        store.lengths[slot] = trajectory["spine", "prompt_length"]
    policy = DrafterPolicy(drafter, store, num_nodes=shape.budget, shape=shape)
    td = TensorDict({"is_init": torch.zeros(n, 1, dtype=torch.bool)}, batch_size=[n])
    rounds = torch.zeros(n, dtype=torch.int64)
    # What follows a text is a token that no drafter proposes.
    text = torch.cat([store.tokens, store.tokens.new_full((n, shape.depth + 1), -1)], dim=1)
    for slot, end in enumerate(ends.tolist()):
        text[slot, end:] = -1
    while len(slots := store.occupied):
        draft = policy(td)["draft"]
        parents, at = draft["parents"][slots], store.lengths[slots].to(device)
        depth = torch.cat([torch.zeros_like(at)[:, None], depths(parents)], dim=1)
        choices = text[slots.to(device)].gather(1, (at[:, None] + depth).clamp(max=text.shape[1] - 1))
        accepted = walk(draft["tokens"][slots], parents, draft["mask"][slots], choices).sum(1).cpu()
        rounds[slots] += 1
        lengths = store.lengths[slots] + accepted + 1
        store.lengths[slots] = torch.where(lengths >= ends[slots], 0, lengths)
    prompts = torch.tensor([int(t["spine", "prompt_length"]) for t in trajectories])
    return Replay(ends - prompts, rounds)
