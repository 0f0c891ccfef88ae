"""The drafter as a TorchRL policy over the slots of an engine."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from aurora_rl.inference_modules import prepare_for_inference
from aurora_rl.policies.drafter import Drafter, Proposal, TreeShape
from aurora_rl.trajectories import ContextStore
from aurora_rl.trees import tree_fault, valid_nodes

# More pending pairs than this are appended slot by slot: padding every slot to a prompt's length would waste the pass.
_SHORT = 32


class DrafterPolicy(TensorDictModuleBase):
    """Keeps a drafter's cache level with the context store and proposes a tree for every occupied slot.

    The cache catches up from the store, whatever put it behind: the tokens of the last round, a new request
    (``is_init``), a window of plain decoding or a swap of weights.

    Args:
        drafter: the drafter, put into inference form in place; its serving cache is allocated here.
        store: the engine's context store.
        num_nodes: ``N``, padded nodes of the emitted trees.
        shape: the tree to propose; may be replaced between rounds, within ``num_nodes``.
        version: of the drafter's weights.
        vocab_size: of the target. Where it is given and nodes are sampled, ("draft", "q") is written too: the
            distribution ``[B, N, V]`` at each node's parent, which rejection rules compare with.
        generator: of sampled drafts; its numbers must not be those of verification. None takes PyTorch's own.

    Attributes:
        on_fault: called with a slot and what is wrong, where the drafter fails or its tree is malformed: the slot's
            request goes on without speculation. None, the default, raises instead.
        speculate: False emits empty trees: plain decoding.
        rebuild_on_install: whether a swap drops the caches, so that every row in them is of the new weights.
    """

    def __init__(
        self,
        drafter: Drafter,
        store: ContextStore,
        *,
        num_nodes: int,
        shape: TreeShape,
        version: int = 0,
        vocab_size: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.in_keys = ["is_init"]
        self.out_keys = [
            ("draft", "tokens"),
            ("draft", "parents"),
            ("draft", "mask"),
            ("draft", "log_probs"),
            "policy_version",
            "cache_version",
        ]
        self.drafter, self.num_nodes, self.version = drafter, num_nodes, version
        self.shape, self.speculate, self.rebuild_on_install = shape, True, True
        self._store, self._vocab_size, self._generator = store, vocab_size, generator
        self.on_fault: Callable[[int, str], None] | None = None
        self._refused = torch.zeros(store.num_slots, dtype=torch.bool)
        prepare_for_inference(drafter, keep_weights=True)
        drafter.allocate(store.num_slots, store.max_length)
        self._cache_version = torch.full((store.num_slots,), version)

    @property
    def shape(self) -> TreeShape:
        """The tree to propose."""
        return self._shape

    @shape.setter
    def shape(self, shape: TreeShape) -> None:
        if shape.most_nodes > self.num_nodes:
            raise ValueError(f"a tree of {shape.most_nodes} nodes does not fit the policy's num_nodes={self.num_nodes}")
        self._shape = shape

    def stage(self, weights: dict[str, Tensor], version: int) -> Callable[[], None]:
        """Make weights ready beside the rounds; what is returned swaps them in, between two rounds.

        Raises:
            ValueError: see ``Drafter.stage``; nothing has changed then.
        """
        put = self.drafter.stage(weights)

        def install() -> None:
            put()
            self.version = version
            if self.rebuild_on_install:
                self.drafter.forget(torch.arange(self._store.num_slots))

        return install

    def install(self, weights: dict[str, Tensor], version: int) -> None:
        """Swap weights between two rounds; errors as of :meth:`stage`."""
        self.stage(weights, version)()

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the draft of every slot into ``tensordict``; rows of idle slots are empty."""
        tensordict.set("draft", self.draft(tensordict["is_init"]))
        tensordict.set("policy_version", torch.full((self._store.num_slots,), self.version))
        tensordict.set("cache_version", self._cache_version.clone())
        return tensordict

    @torch.inference_mode()
    def draft(self, is_init: Tensor) -> TensorDict:
        """Draft for every slot.

        Args:
            is_init: ``[B, 1]`` bool, slots with a new request.

        Returns:
            "tokens", "parents", "mask" and "log_probs", each ``[B, N]``, and "q" ``[B, N, V]`` where it is asked for.
        """
        store, device = self._store, self._store.tokens.device
        fresh = is_init.flatten().cpu()
        if bool(fresh.any()):
            self.drafter.forget(fresh.nonzero().flatten())
            self._refused &= ~fresh
        # An empty cache has no older rows: what is put into it now is of these weights.
        self._cache_version[self.drafter.cached == 0] = self.version
        shape = (store.num_slots, self.num_nodes)
        tokens = torch.zeros(shape, dtype=torch.int64, device=device)
        parents = torch.full(shape, -1, device=device)
        mask = torch.zeros(shape, dtype=torch.bool, device=device)
        log_probs = torch.zeros(shape, device=device)
        draft = {"tokens": tokens, "parents": parents, "mask": mask, "log_probs": log_probs}
        if self._vocab_size is not None and self.shape.mode != "topk":
            draft["q"] = torch.zeros(*shape, self._vocab_size, device=device)
        # The first token of all has no feature before it.
        slots = ((store.lengths > 1) & ~self._refused).nonzero().flatten()
        if self.speculate and self.shape.depth and len(slots) and (proposal := self._propose(slots)) is not None:
            rows, width = slots.to(device), proposal.tokens.shape[1]
            tokens[rows, :width] = proposal.tokens
            parents[rows, :width] = proposal.parents
            log_probs[rows, :width] = proposal.log_probs
            mask[rows, :width] = True if proposal.mask is None else proposal.mask
            if "q" in draft:
                assert proposal.q is not None  # sampled
                at = (rows[:, None, None], torch.arange(width, device=device)[:, None], self.drafter.draft_vocab)
                draft["q"][at] = proposal.q.float()
            self._refuse_malformed(tokens, parents, mask)
        return TensorDict(draft, batch_size=shape[:1])

    def _propose(self, slots: Tensor) -> Proposal | None:
        """The drafter's trees; None where it failed."""
        try:
            self._catch_up(slots)
            proposal = self.drafter.propose(slots, self.shape, self._generator)
            shapes = [tuple(part.shape) for part in proposal[:3]]
            if len(set(shapes)) > 1 or shapes[0][0] != len(slots) or shapes[0][1] > self.num_nodes:
                raise ValueError(f"tokens, parents and log_probs are {shapes}, not [{len(slots)}, 0..{self.num_nodes}]")
        except Exception as error:  # whatever a drafter does, the requests are served
            if self.on_fault is None:
                raise
            for slot in slots.tolist():
                self._refuse(slot, f"{type(self.drafter).__name__} failed: {error!r}")
            self.drafter.forget(slots)  # what the failed call left in the cache
            return None
        return proposal

    def _refuse_malformed(self, tokens: Tensor, parents: Tensor, mask: Tensor) -> None:
        """Empty the trees that verification would cut, and draft no more for their requests."""
        vocab_size, repeats = self.drafter.vocab_size, self.shape.mode == "sampled"
        whole = (valid_nodes(tokens, parents, mask, vocab_size, repeats=repeats) == mask).all(1)
        for slot in (~whole).nonzero().flatten().tolist():
            tree = (tokens[slot], parents[slot], mask[slot])
            self._refuse(slot, f"malformed tree: {tree_fault(*tree, vocab_size, repeats=repeats)}")
            mask[slot] = False

    def _refuse(self, slot: int, fault: str) -> None:
        if self.on_fault is None:
            raise ValueError(f"{type(self.drafter).__name__}, slot {slot}: {fault}")
        self._refused[slot] = True
        self.on_fault(slot, fault)

    def _catch_up(self, slots: Tensor) -> None:
        """Append to the drafter's cache the pairs that the store has and it has not."""
        store, drafter = self._store, self.drafter
        behind = store.lengths[slots] - 1 - drafter.cached[slots]
        long = behind > _SHORT
        for group in (slots[~long & (behind > 0)], *slots[long].split(1)):
            if not len(group):
                continue
            start, count = drafter.cached[group], store.lengths[group] - 1 - drafter.cached[group]
            column = (start[:, None] + torch.arange(int(count.max()))).clamp(max=store.max_length - 2)
            column, rows = column.to(store.tokens.device), group.to(store.tokens.device)[:, None]
            tokens = torch.cat([store.tokens[rows, column[:, :1]], store.tokens[rows, column + 1]], dim=1)
            drafter.extend(group, tokens, store.features[rows, column], count)
