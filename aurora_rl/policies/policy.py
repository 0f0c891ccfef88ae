"""The drafter as a TorchRL policy over the slots of an engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from aurora_kernels.trees import tree_fault, valid_nodes
from aurora_rl.context import ContextStore
from aurora_rl.models.inference_modules import prepare_for_inference
from aurora_rl.models.weight_watch import WeightWatch
from aurora_rl.plausible import implausible
from aurora_rl.policies.drafter import Drafter, Proposal
from aurora_rl.policies.lookup import EarlierAnswers, Tree, ngram_tree, padded
from aurora_rl.policies.merging import TreeMerger
from aurora_rl.policies.row_budget import RowBudget
from aurora_rl.policies.tree_shape import CANDIDATES, TreeShape
from aurora_rl.prefix_cache import PrefixCache
from aurora_rl.tenants import tenant_of_salt
from aurora_rl.trajectories import DRAFT_MODES

# More pending pairs than this are appended slot by slot: padding every slot to a prompt's length would waste the pass.
_SHORT = 32


def not_finite(weights: Mapping[str, Tensor]) -> str | None:
    """Return a message about the first tensor that is not finite or far too large; None if there is none."""
    for name, tensor in weights.items():
        if (fault := implausible(tensor)) is not None:
            return f"tensor {name!r} {fault}; lower the learning rate"
    return None


class DrafterPolicy(TensorDictModuleBase):
    """Keeps a drafter's cache up to date with the context store and proposes a tree for every occupied slot.

    Before it drafts, the cache takes what it lacks from the store. That may be the tokens of the last round, a new
    request (``is_init``), a window of plain decoding, or everything after a swap. While requests decode, it takes about
    as many rows as are read in two fifths of a round's time. A slot gets no draft of the drafter's before its cache is
    level.

    New weights come by :meth:`stage` or :meth:`install`, with their version. Or something writes the parameters, as an
    optimizer, ``load_state_dict`` and ``update_policy_weights_`` of TorchRL's collectors do. The next round notices
    that: the weights are a new version, one up unless :attr:`version` was set along with them, and caches of the old
    ones are dropped as in a swap. ``aurora_rl.models.weight_watch.WeightWatch`` says which writes cannot be noticed.

    Args:
        drafter: Drafter, put into inference form in place; its serving cache is allocated here.
        store: Context store of the engine.
        num_nodes: Number of padded nodes ``N`` of the emitted trees.
        shape: Shape of the tree to propose; may be replaced between rounds, within ``num_nodes``.
        version: Version of the drafter's weights.
        vocab_size: Size of the target's vocabulary. With it, sampled drafts come with ("draft", "q"): the distribution
            ``[B, N, V]`` at each node's parent, which rejection rules compare with.
        generator: Source of randomness for sampled drafts, apart from that of verification. None takes PyTorch's own.
        layers: Layers of the store's features, if the engine serves drafters that read different ones; None if they are
            those of the drafter.

    Attributes:
        on_fault: Called with a slot and a message if the drafter fails or its tree is malformed. The slot's request
            goes on with lookup, or without speculation if the shape has none. None, the default, raises the drafter's
            own error instead.
        speculate: False emits empty trees: plain decoding.
        min_path_probability: Least chance of a path: a node whose path has less is left out of a tree. 0, the default,
            leaves none out. Nodes that were drawn at random always stay.
        drafted: Slots that the drafter was asked for in the last call, those with empty trees too, ``[B]`` bool.
        looked_up: Slots whose whole tree was looked up in the last call, empty trees too, ``[B]`` bool. Either the
            drafter failed their requests or has not read all of them, or the shape is ``lookup_only``.
        earlier: Answers in which lookup searches next to the request's own text, those of its salt; whoever gets
            completions adds them. None, the default, has none.
        merger: Merges what is looked up into the drafter's trees, and learns how likely the nodes of both are.
        prefix_cache: Rows of the drafter's cache of finished requests, by which it is filled where a request of
            the same salt begins alike. A swap empties it. None, the default, keeps none.
        rebuild_on_install: Whether a swap drops the caches, so that every row in them is of the new weights.
        notices_writes: Whether written parameters are a new version. False where all weights come by :meth:`stage`:
            any other write is then a fault, for a watchdog to find.

    Example:
        >>> from aurora_rl.envs import Request, SpecDecodeEnv, TransformersEngine
        >>> from aurora_rl.policies import MedusaDrafter, TargetParts
        >>> from aurora_rl.testing import tiny_target
        >>> target, requests = tiny_target(), [Request(0, torch.tensor([3, 4, 5]))]
        >>> drafter = MedusaDrafter.from_target(TargetParts.of(target), draft_vocab=torch.arange(16))
        >>> engine = TransformersEngine(target, num_slots=1, max_length=256, feature_layers=drafter.feature_layers)
        >>> policy = DrafterPolicy(drafter.double(), engine.store, num_nodes=3, shape=TreeShape(depth=3))
        >>> env = SpecDecodeEnv(engine, requests.pop, num_nodes=3)
        >>> env.rollout(4, policy)["draft", "tokens"].shape
        torch.Size([1, 4, 3])
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
        layers: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.in_keys = ["is_init"]
        drafted = ("tokens", "parents", "mask", "log_probs", "mode")
        self.out_keys = [*(("draft", key) for key in drafted), "policy_version", "cache_version"]
        self.drafter, self.num_nodes, self.version = drafter, num_nodes, version
        self.shape, self.speculate, self.rebuild_on_install, self.min_path_probability = shape, True, True, 0.0
        self._store, self._vocab_size, self._generator, self.layers = store, vocab_size, generator, layers
        self.on_fault: Callable[[int, str], None] | None = None
        self.prefix_cache: PrefixCache | None = None
        self.notices_writes = True
        self.earlier: EarlierAnswers | None = None
        self.merger = TreeMerger()
        self._budget = RowBudget()
        self._read = torch.zeros_like(store.tokens)  # tokens in the drafter's cache: the slot may hold the next request
        self._salts: list[str | None] = [None] * store.num_slots  # salts of the requests in the cache
        self._unsaved = torch.zeros(store.num_slots, dtype=torch.bool)  # slots whose rows are not in the prefix cache
        self._failed_slots = torch.zeros(store.num_slots, dtype=torch.bool)  # slots whose requests the drafter failed
        self.drafted, self.looked_up = torch.zeros(2, store.num_slots, dtype=torch.bool)
        prepare_for_inference(drafter, keep_weights=True)
        drafter.allocate(store.num_slots, store.max_length)
        self._cache_version = torch.full((store.num_slots,), version)
        self._watch, self._watched_version = WeightWatch(drafter), version

    @property
    def shape(self) -> TreeShape:
        """The tree to propose. ValueError if one is set that has more nodes than the policy's ``num_nodes``."""
        return self._shape

    @shape.setter
    def shape(self, shape: TreeShape) -> None:
        if shape.num_nodes > self.num_nodes:
            raise ValueError(f"a tree of {shape.num_nodes} nodes does not fit the policy's num_nodes={self.num_nodes}")
        self._shape = shape

    def stage(self, weights: dict[str, Tensor], version: int) -> Callable[[], None]:
        """Make weights ready alongside the rounds, and return a function that swaps them in between two rounds.

        Raises:
            ValueError: A weight is infinite or not a number, or see ``Drafter.stage``; nothing has changed then.
        """
        served = {name: tensor.dtype for name, tensor in self.drafter.published().items()}
        # As they will be served: half precision has no room for large values.
        cast = {name: tensor.to(served.get(name, tensor.dtype)) for name, tensor in weights.items()}
        if (fault := not_finite(cast)) is not None:
            raise ValueError(fault)
        put = self.drafter.stage(weights)

        def install() -> None:
            put()
            self._watch.accept()
            self._swapped(version)

        return install

    def _swapped(self, version: int) -> None:
        """Count the weights in place as this version, and drop what is kept of those before."""
        self.version = self._watched_version = version
        if self.prefix_cache is not None:
            self.prefix_cache.clear()
        if self.rebuild_on_install:
            self._forget(self._store.occupied)  # the others are forgotten when they get a request

    def install(self, weights: dict[str, Tensor], version: int) -> None:
        """Swap weights between two rounds; errors as of :meth:`stage`."""
        self.stage(weights, version)()

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the draft of every slot into ``tensordict``; rows of idle slots are empty.

        Raises:
            ValueError: The tensordict is of several environments, or of another environment than the store's.
        """
        self._check_environment(tensordict)
        tensordict.set("draft", self.draft(tensordict["is_init"], tensordict.get("speculate", None)))
        tensordict.set("policy_version", torch.full((self._store.num_slots,), self.version))
        tensordict.set("cache_version", self._cache_version.clone())
        return tensordict

    def _check_environment(self, tensordict: TensorDictBase) -> None:
        """Raise ValueError unless the tensordict comes from the environment whose engine has the store."""
        fix = (
            "a policy drafts for the one environment whose engine has its store, DrafterPolicy(drafter, engine.store, "
            "...); docs/extending.md, several environments, has the recipe for more"
        )
        slots = self._store.num_slots
        if tensordict["is_init"].shape != (slots, 1):
            raise ValueError(
                f"is_init is {list(tensordict['is_init'].shape)} and not [{slots}, 1], a row for each slot of the "
                f"policy's store: {fix}"
            )
        position = tensordict.get(("observation", "position"), None)
        if position is not None and not torch.equal(position.cpu(), self._store.lengths - 1):
            raise ValueError(
                f"the environment's slots stand at positions {position.tolist()}, those of the policy's store at "
                f"{(self._store.lengths - 1).tolist()}: {fix}"
            )

    @torch.inference_mode()
    def draft(self, is_init: Tensor, speculate: Tensor | None = None) -> TensorDict:
        """Draft for every slot.

        Args:
            is_init: Slots with a new request, ``[B, 1]`` bool.
            speculate: Slots whose request takes drafts, ``[B, 1]`` bool; None drafts for all.

        Returns:
            A TensorDict with "tokens", "parents", "mask" and "log_probs", each ``[B, N]``, and "q" ``[B, N, V]`` if it
            is asked for. "mode" ``[B]`` int64 is an index into ``aurora_rl.trajectories.DRAFT_MODES``.
        """
        if self.notices_writes:
            if self._watch.written():
                self._swapped(self.version + (self.version == self._watched_version))
            self._watched_version = self.version
        store, device = self._store, self._store.tokens.device
        fresh = is_init.flatten().cpu()
        waits = not bool(fresh[store.occupied].all())  # where every request is new, none has had tokens yet
        rows = self._budget.begin(waits=waits)
        self.renew(fresh)
        if self.drafter.adapters is not None:
            self.drafter.slot_adapters = self.drafter.adapters.places(store.adapters)
        # An empty cache has no older rows: all rows that it gets now are of these weights.
        self._cache_version[self.drafter.cached == 0] = self.version
        shape = (store.num_slots, self.num_nodes * (CANDIDATES if self.shape.lookup else 1))
        empty = {"tokens": 0, "parents": -1, "mask": False}
        draft = {name: torch.full(shape, value, device=device) for name, value in empty.items()}
        draft["log_probs"] = torch.zeros(shape, dtype=torch.float32, device=device)
        draft["mode"] = torch.full(shape[:1], DRAFT_MODES.index(self.shape.mode), device=device)
        if self._vocab_size is not None and self.shape.mode != "topk":
            draft["q"] = torch.zeros(*shape, self._vocab_size, dtype=torch.float32, device=device)
        # The first token of a text has no feature before it.
        ready = store.lengths > 1
        if speculate is not None:
            ready &= speculate.flatten().cpu()
        self.drafted, self.looked_up = torch.zeros(2, store.num_slots, dtype=torch.bool)
        if self.speculate and self.shape.depth:
            slots = (ready & ~self._failed_slots).nonzero().flatten()
            if len(slots) and not self.shape.lookup_only:
                self._fill(draft, slots, rows if waits else None)
                self.drafted = ready & ~self._failed_slots & (self.drafter.cached == store.lengths - 1)
            if self.shape.lookup:
                self.looked_up = ready & ~self.drafted  # with the slots that the drafter failed just now
            if self.shape.lookup or (self.min_path_probability and self.shape.mode == "topk"):
                self._finish(draft)
        # Candidates are merged into trees of at most so many nodes.
        draft |= {name: draft[name][:, : self.num_nodes] for name in ("tokens", "parents", "log_probs", "mask")}
        return TensorDict(draft, batch_size=shape[:1])

    def renew(self, fresh: Tensor) -> None:
        """Note which slots (``[B]`` bool, on the CPU) have another request than when the policy drafted last."""
        if self.prefix_cache is not None:
            self._save_rows(self.prefix_cache, self._unsaved & (fresh | (self._store.lengths == 0)))
        if bool(fresh.any()):
            self._failed_slots &= ~fresh
            slots, adapters = fresh.nonzero().flatten(), self.drafter.adapters
            self._forget(slots)
            self.merger.forget(slots.tolist())
            if adapters is not None:
                salts = [self._store.cache_salts[slot] for slot in slots.tolist()]
                self._store.adapters[slots] = adapters.codes([tenant_of_salt(salt) for salt in salts])

    def reset(self) -> None:
        """Drop every row of the drafter's cache, kept ones too, and ask it again for requests that it failed."""
        if self.prefix_cache is not None:
            self.prefix_cache.clear()
        self._unsaved.zero_()
        self._failed_slots.zero_()
        self._forget(self._store.occupied)  # the others are forgotten when they get a request

    def delete(self, tenant: str) -> None:
        """Drop what a tenant's requests left: rows, those of requests that ended since the last round, and chances."""
        self.merger.delete(tenant)
        if self.prefix_cache is not None:
            self.prefix_cache.delete(tenant)
        self._unsaved &= torch.tensor([tenant_of_salt(salt) != tenant for salt in self._salts])

    def _fill(self, draft: dict[str, Tensor], slots: Tensor, rows: int | None = None) -> None:
        """Draft for the slots, and read about so many ``rows`` of long texts for it; None reads all.

        Rows of the draft stay empty for slots that the drafter fails or has not read to the end.
        """
        try:
            if len(level := self._catch_up(slots, rows)):
                self._write(draft, level, self.drafter.propose(level, self.shape.candidates, self._generator))
        except Exception as error:  # whatever a drafter does, the requests are served
            if len(slots) == 1 or self.on_fault is None:
                self._fail(slots, error)
                return
            # Ask for each slot alone, without what the failed call left in the cache, to find whose fault it was.
            self._forget(slots)
            for slot in slots[~self._failed_slots[slots]]:
                self._fill(draft, slot[None])
            if not bool(self._failed_slots[slots].any()):
                # It fails only slots together, which would come again each round and cost all their caches.
                self._fail(slots, error)

    def _finish(self, draft: dict[str, Tensor]) -> None:
        """Merge what is looked up for each slot into its tree, which is empty if the drafter did not draft."""
        shape, store, slots = self.shape, self._store, (self.drafted | self.looked_up).nonzero().flatten().tolist()
        if not slots:
            return
        texts, lengths, device = store.tokens.cpu().numpy(), store.lengths.tolist(), draft["tokens"].device
        rows, trees = torch.tensor(slots, device=device), []
        held = zip(*(draft[name][rows].tolist() for name in ("tokens", "parents", "log_probs", "mask")), strict=True)
        for slot in slots:
            self.merger.learn(slot, texts[slot, : lengths[slot]])
        for slot, (tokens, parents, log_probs, mask) in zip(slots, held, strict=True):
            drafted = Tree(tokens, parents, log_probs).kept([node for node, there in enumerate(mask) if there])
            text, found = texts[slot, : lengths[slot]], Tree([], [], [])
            if shape.lookup:
                earlier = None if self.earlier is None else self.earlier.tokens(store.cache_salts[slot])
                wanted = shape if shape.lookup_only else shape.without_drafter(shape.lookup)
                found = ngram_tree(text, wanted, earlier)
            least, salt = self.min_path_probability, store.cache_salts[slot]
            trees.append(self.merger.merge(slot, len(text), drafted, found, shape.num_nodes, least, salt))
        both = padded(trees, draft["tokens"].shape[1], device)
        for name in ("tokens", "parents", "log_probs", "mask"):
            draft[name][rows] = getattr(both, name)

    def _write(self, draft: dict[str, Tensor], slots: Tensor, proposal: Proposal) -> None:
        """Write the trees to the rows of ``draft``; ValueError, and none is written, if one cannot be verified."""
        tokens, parents, log_probs, q, mask = proposal
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        shapes, most = [tuple(part.shape) for part in (tokens, parents, log_probs, mask)], draft["tokens"].shape[1]
        if len(set(shapes)) > 1 or shapes[0] not in [(len(slots), nodes) for nodes in range(most + 1)]:
            wanted = f"[{len(slots)}, 0..{most}]"
            raise ValueError(f"tokens, parents, log_probs and mask are {shapes}, not {wanted}")
        dtypes = (tokens.dtype, parents.dtype, mask.dtype)
        if dtypes != (torch.int64, torch.int64, torch.bool) or not log_probs.is_floating_point():
            names = ", ".join(map(str, (*dtypes, log_probs.dtype)))
            raise ValueError(f"tokens, parents, mask and log_probs are {names}, not int64, int64, bool and float")
        vocab_size, repeats = self.drafter.vocab_size, self.shape.mode == "sampled"
        whole = (valid_nodes(tokens, parents, mask, vocab_size, repeats=repeats) == mask).all(1)
        if not bool(whole.all()):
            row = int((~whole).nonzero()[0])
            fault = tree_fault(tokens[row], parents[row], mask[row], vocab_size, repeats=repeats)
            raise ValueError(f"slot {int(slots[row])}: malformed tree: {fault}")
        # Rounding may lift a sure token a little.
        if bool((wrong := mask & ~(log_probs <= 1e-3)).any()):
            row, node = wrong.nonzero()[0].tolist()
            value = float(log_probs[row, node])
            raise ValueError(
                f"slot {int(slots[row])}: node {node} has the log-probability {value:g}, not a number of at most 0"
            )
        rows, width = slots.to(draft["tokens"].device), tokens.shape[1]
        if "q" in draft:
            nodes = (*tokens.shape, len(self.drafter.draft_vocab))
            if q is None or q.shape != nodes:
                shape = None if q is None else tuple(q.shape)
                raise ValueError(f"q is {shape}, not {nodes}, in mode {self.shape.mode}")
            total = q[mask].float().sum(-1)
            if not bool((q[mask] >= 0).all()) or not torch.allclose(total, torch.ones_like(total), atol=1e-2):
                raise ValueError(
                    f"q has a row that is no distribution: the least number is {float(q[mask].min()):g}, sums are "
                    f"{float(total.min()):g} to {float(total.max()):g}; numbers must be at least 0 and sum to 1"
                )
            columns = torch.arange(width, device=rows.device)[:, None]
            draft["q"][rows[:, None, None], columns, self.drafter.draft_vocab] = q.float()
        draft["tokens"][rows, :width] = tokens
        draft["parents"][rows, :width] = parents
        draft["log_probs"][rows, :width] = log_probs.float()
        draft["mask"][rows, :width] = mask

    def _forget(self, slots: Tensor) -> None:
        """Empty the drafter's cache for the slots. If it cannot, it loses their requests."""
        try:
            self.drafter.forget(slots)
        except Exception as error:
            self._fail(slots[~self._failed_slots[slots]], error)
        self._cache_version[slots] = self.version

    def _fail(self, slots: Tensor, error: Exception) -> None:
        """Report the fault, and draft no more for the requests of the slots."""
        if self.on_fault is None:
            raise error
        self._failed_slots[slots] = True
        for slot in slots.tolist():
            self.on_fault(slot, f"{type(self.drafter).__name__} failed: {error!r}")

    def _catch_up(self, slots: Tensor, rows: int | None) -> Tensor:
        """Append to the drafter's cache the pairs of the store that it lacks, and return the slots that lack none.

        Of long texts at most ``rows`` pairs are read, the nearest to their end first; None reads all.
        """
        store, drafter = self._store, self.drafter
        if self.prefix_cache is not None:
            self._load_rows(self.prefix_cache, slots[drafter.cached[slots] == 0])
        missing = store.lengths[slots] - 1 - drafter.cached[slots]
        if len(short := slots[(missing > 0) & (missing <= _SHORT)]):
            self._extend(short, store.lengths[short] - 1 - drafter.cached[short])
        began, budget = time.perf_counter(), self._budget.rows
        left = total = int(missing[missing > _SHORT].sum()) if rows is None else rows
        for index in missing.argsort(stable=True).tolist():
            lacks = int(missing[index]) if missing[index] > _SHORT else 0
            while lacks and left:
                # Memory of a call is its rows times the length of the text, whoever waits.
                count = min(lacks, left, budget)
                self._extend(slots[index : index + 1], torch.tensor([count]))
                lacks, left = lacks - count, left - count
        self._budget.spent(total - left, time.perf_counter() - began)
        if self.prefix_cache is not None:
            self._read[slots], self._unsaved[slots] = store.tokens[slots], True
        return slots[drafter.cached[slots] == store.lengths[slots] - 1]

    def features(self, slots: Tensor | int, columns: Tensor | slice) -> Tensor:
        """Return what the drafter reads of the store's features at some positions, ``[..., F]``."""
        found = self._store.features[slots, columns]
        if self.layers is None:
            return found
        parts = found.unflatten(-1, (len(self.layers), -1))
        return parts[..., [self.layers.index(layer) for layer in self.drafter.feature_layers], :].flatten(-2)

    def _extend(self, slots: Tensor, count: Tensor) -> None:
        """Append the next ``count`` pairs of each slot, ``[b]`` int64, to the drafter's cache."""
        store, start = self._store, self.drafter.cached[slots]
        column = (start[:, None] + torch.arange(int(count.max()))).clamp(max=store.max_length - 2)
        column, rows = column.to(store.tokens.device), slots.to(store.tokens.device)[:, None]
        tokens = torch.cat([store.tokens[rows, column[:, :1]], store.tokens[rows, column + 1]], dim=1)
        self.drafter.extend(slots, tokens, self.features(rows, column), count)

    def _save_rows(self, cache: PrefixCache, ended: Tensor) -> None:
        """Save the drafter's rows of requests that ended, ``[B]`` bool, if all are of its present weights."""
        self._unsaved &= ~ended
        for slot in (ended & ~self._failed_slots & (self._cache_version == self.version)).nonzero().flatten().tolist():
            rows, held = self.drafter.cache_rows(slot), int(self.drafter.cached[slot])
            if rows is not None and held:
                # The rows of n pairs are of n + 1 tokens. The row after them is not read, see below.
                cache.save(self._read[slot, : held + 1], rows, self._salts[slot])

    def _load_rows(self, cache: PrefixCache, empty: Tensor) -> None:
        """Fill the drafter's empty caches with the rows of requests that began alike."""
        for slot in empty.tolist():
            self._salts[slot] = salt = self._store.cache_salts[slot]
            if (rows := self.drafter.cache_rows(slot)) is not None:
                # The last row is of another pair where the texts part after it. At least one pair is left to read: what
                # the drafter knows of the last pair alone is no row.
                text = self._store.tokens[slot, : int(self._store.lengths[slot]) - 1]
                self.drafter.cached[slot] = max(cache.load(text, rows, salt) - 1, 0)
