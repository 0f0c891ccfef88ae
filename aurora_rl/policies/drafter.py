"""The drafter seam: a module that proposes trees at serving and scores them in training.

Legend: ``B`` slots, ``b`` of them in a call, ``N`` nodes without the root, ``Vd`` draft vocabulary, ``F`` features,
``C`` completion tokens of a batch, ``J`` unroll steps, ``R`` rounds and ``M`` nodes of a batch.
"""

from __future__ import annotations

import copy
import functools
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Self

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from aurora_kernels.rows import log_softmax
from aurora_rl.models.inference_modules import stage
from aurora_rl.models.parts import TargetParts
from aurora_rl.policies.adapters import Adapters
from aurora_rl.policies.head_logits import HeadLogits
from aurora_rl.policies.hub import HubMixin
from aurora_rl.policies.tree_shape import TreeShape
from aurora_rl.settings import check_values, settings_of
from aurora_rl.trajectories import DRAFT_MODES
from aurora_rl.tree_index import TreeIndex, true_chains


class Proposal(NamedTuple):
    """Trees of ``b`` slots with ``n`` nodes each, in topological order, parent −1 = root.

    Attributes:
        tokens: Target token ids, ``[b, n]`` int64.
        parents: Index of each node's parent, ``[b, n]`` int64.
        log_probs: Log-probability q of each token given its path, ``[b, n]`` float32.
        q: Distribution at each node's parent, ``[b, n, Vd]``; None unless nodes were sampled.
        mask: Which columns are nodes, ``[b, n]`` bool; None says all.
    """

    tokens: Tensor
    parents: Tensor
    log_probs: Tensor
    q: Tensor | None = None
    mask: Tensor | None = None


class Unroll(NamedTuple):
    """Predictions of every completion token from anchors at growing distance.

    Attributes:
        logits: ``J`` tensors ``[C, Vd]``. Row ``c`` of step ``j`` predicts completion token ``c`` at depth ``j + 1``
            of a chain of the true tokens. It belongs to row ``c`` of ("sequence", "hidden"). If the head is one matrix,
            make them :class:`~aurora_rl.policies.HeadLogits`, which objectives can go through without ``[C, Vd]``.
        valid: Whether a row counts, ``[J, C]`` bool: its anchor is at the last prompt token or later, with a feature.
        states: Inputs of the draft head, ``J`` tensors ``[C, H]``; None if they do not have the target's hidden size.
    """

    logits: list[Tensor]
    valid: Tensor
    states: list[Tensor] | None = None


_DEFAULT_DTYPE = threading.RLock()


@contextmanager
def modules_in_float32() -> Iterator[None]:
    """Make modules in float32, whatever PyTorch's default dtype is. One thread does at a time.

    The default is the process's: tensors that other threads make meanwhile are in float32 too.

    Example:
        >>> with modules_in_float32():
        ...     print(nn.Linear(1, 1).weight.dtype)
        torch.float32
    """
    with _DEFAULT_DTYPE:
        usual = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(usual)


class Checkpoint(NamedTuple):
    """A drafter on disk: what ``model.safetensors`` and ``config.json`` hold."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]


class Drafter(HubMixin, nn.Module, ABC):
    """A drafter with two faces that must agree: serving (with a cache) and training (on packed trajectories).

    A *pair* ``t`` is the feature of position ``t`` with token ``t + 1``; a slot of length ``n`` has ``n - 1`` pairs,
    and drafting for it needs all of them.

    Attributes:
        feature_layers: Ids of the target's layers whose states are the features, see ``TransformersEngine``; may be
            empty.
        draft_vocab: Target token of each row of the draft head, ``[Vd]`` int64, rising.
        vocab_size: Size of the target's vocabulary.
        cached: Number of pairs held for each slot, ``[B]`` int64 on the CPU.
        max_depth: Depth of the deepest node that the drafter can propose.
        unroll_depth: Depths that imitation unrolls by default.
        draft_modes: Modes of :class:`TreeShape` that the drafter can draft in.
        formats: Names of the formats that :meth:`write` and :meth:`read` know; runs are kept in the first.
        target_sizes: Entries of a checkpoint's ``config.json`` that must be the target's.
        sglang_algorithm: SGLang's ``--speculative-algorithm`` for folders in the format "sglang"; None if SGLang does
            not serve the architecture. ``aurora_rl.envs.sglang.LEARNED`` has those that learn there.
        vllm_method: vLLM's ``"method"`` for folders in the format "vllm"; None if vLLM does not serve the architecture.
            ``aurora_rl.envs.vllm.LEARNED`` has those that learn there.
        options: Keywords that a subclass's :meth:`from_target` took, kept in the folder.
        serves_other_targets: Whether an untrained drafter fits any target with the same tokenizer. :meth:`from_target`
            then leaves :attr:`trained_for` None, as it does without :attr:`formats`.
        trained_for: ``TargetParts.fingerprint`` of its target, kept in the folder; None if unknown or any.
        takes_adapters: Whether ``adapters.add_adapters`` can give it adapters. Its :meth:`extend` and :meth:`propose`
            then follow :attr:`slot_adapters`, and what learns follows ``("sequence", "adapter")`` of the batch.
        adapters: Its adapters; None if it has none.
        slot_adapters: Place of each slot's adapter, −1 for none, ``[B]`` int64 on the CPU; the policy sets it.

    Example:
        >>> from aurora_rl.policies import Drafter, MedusaDrafter
        >>> from aurora_rl.testing import tiny_target
        >>> drafter = MedusaDrafter.from_target(TargetParts.of(tiny_target()), draft_vocab=torch.arange(16))
        >>> isinstance(drafter, Drafter), drafter.vocab_size, len(drafter.draft_vocab)
        (True, 32, 16)
    """

    max_depth: float = math.inf
    unroll_depth: int = 3
    draft_modes: ClassVar[tuple[str, ...]] = DRAFT_MODES
    formats: ClassVar[tuple[str, ...]] = ("aurora_rl",)
    target_sizes: ClassVar[tuple[str, ...]] = ("hidden_size", "vocab_size")
    sglang_algorithm: ClassVar[str | None] = None
    vllm_method: ClassVar[str | None] = None
    serves_other_targets: ClassVar[bool] = False
    takes_adapters: ClassVar[bool] = False
    feature_layers: tuple[int, ...]
    draft_vocab: Tensor
    vocab_size: int
    cached: Tensor
    adapters: Adapters | None = None
    slot_adapters: Tensor
    options: Mapping[str, Any] = MappingProxyType({})
    trained_for: str | None = None

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Let the class's :meth:`from_target` work in float32, and state the target in what it returns."""
        super().__init_subclass__(**keywords)
        own = vars(cls).get("from_target")
        if not isinstance(own, classmethod):
            return

        @functools.wraps(own.__func__)
        def from_target(kind: type[Drafter], parts: TargetParts, *args: Any, **options: Any) -> Drafter:
            with modules_in_float32():
                started: Drafter = own.__get__(None, kind)(parts, *args, **options)
            if isinstance(started, Drafter) and started.formats and not started.serves_other_targets:
                started.trained_for = parts.fingerprint
            return started

        cls.from_target = classmethod(from_target)  # type: ignore[method-assign, assignment]

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """Raise ValueError naming the first option that :meth:`from_target` does not take, or of another type."""
        own = ("parts", "draft_vocab", "feature_layers")
        known = {name: kind for name, kind in settings_of(cls.from_target).items() if name not in own}
        check_values(options, known, cls.__name__)

    @classmethod
    @abstractmethod
    def from_target(
        cls, parts: TargetParts, *, draft_vocab: Tensor, feature_layers: tuple[int, ...] | None = None
    ) -> Self:
        """Start a day-0 drafter in float32 for a target, whose weights :attr:`trained_for` then states.

        A subclass may take more keywords, which configurations set as ``drafter.options``.

        Args:
            parts: Frozen pieces of the target.
            draft_vocab: Target token of each row of the draft head, ``[Vd]`` int64.
            feature_layers: Layer ids to read; None takes the architecture's default.
        """

    # ---- serving ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def allocate(self, num_slots: int, max_length: int) -> None:
        """Allocate the cache of ``num_slots`` requests of at most ``max_length`` tokens, every slot empty.

        Keep it in attributes of the drafter and not in its modules, which a shallow copy of the drafter shares.
        """

    def forget(self, slots: Tensor) -> None:
        """Drop the pairs of the slots (``[b]`` int64)."""
        self.cached[slots] = 0

    @abstractmethod
    def extend(self, slots: Tensor, tokens: Tensor, features: Tensor, num_new: Tensor) -> None:
        """Append pairs to the slots.

        Args:
            slots: Slots to extend, ``[b]`` int64.
            tokens: Tokens at the positions of the features and the next one, ``[b, T + 1]`` int64: pair ``i`` is
                ``features[:, i]`` with ``tokens[:, i + 1]``. Columns after the last new pair are padding.
            features: Feature of each pair, ``[b, T, F]``.
            num_new: Number of new pairs, at least 1, ``[b]`` int64 on the CPU.
        """

    def cache_rows(self, slot: int) -> list[Tensor] | None:
        """Return views of what the cache holds of a slot's pairs, so that a request that begins alike can take it over.

        Returns:
            Tensors ``[L, ...]`` with ``L >= max_length``. :meth:`extend` writes row ``t`` with pair ``t``, from this
            pair and those before it. It reads and writes nothing else of earlier pairs. None, the default, if there
            are no such rows.
        """
        return None

    @abstractmethod
    def propose(self, slots: Tensor, shape: TreeShape, generator: torch.Generator | None = None) -> Proposal:
        """Draft a tree after the last pair of each slot; ``policies.tree_search.grow`` makes it of log-probabilities.

        Args:
            slots: Slots to draft for, ``[b]`` int64, each with at least one pair.
            shape: Shape of the tree. The policy, not the drafter, does its lookup.
            generator: Source of randomness if the shape's mode samples; None takes PyTorch's own.
        """

    # ---- training ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def context_logits(self, batch: TensorDictBase, trees: TreeIndex, wanted: Tensor) -> Tensor:
        """Predict at contexts of the recorded trees, on the drafter's own states as in serving.

        Args:
            batch: Packed trajectories, see ``aurora_rl.trajectories.pack``.
            trees: ``TreeIndex.of(batch)``.
            wanted: Contexts that are asked for, ``[R + M]`` bool, in the order of ``trees``. Rows of those without a
                prediction (a ``root`` of −1, a depth of ``max_depth`` or more) mean nothing.

        Returns:
            ``[number wanted, Vd]``, with gradients; :class:`~aurora_rl.policies.HeadLogits` if the head is one matrix,
            or each row has one.
        """

    def unroll(self, batch: TensorDictBase, steps: int) -> Unroll:
        """Run the training-time test: predict completion tokens as serving would, had the first drafts been right.

        Chains of the true tokens are laid after every anchor and go through :meth:`context_logits`. Drafters that can
        share work between the anchors override this.

        Args:
            batch: Packed trajectories, see ``aurora_rl.trajectories.pack``.
            steps: Depths ``J`` to unroll; a parallel drafter stops at its number of heads.
        """
        steps = int(min(steps, self.max_depth))
        chains, node, valid = true_chains(batch, steps)
        trees = TreeIndex.of(chains)
        contexts = trees.parent[node.clamp(min=0)]
        wanted = torch.zeros(len(trees.depth), dtype=torch.bool, device=contexts.device)
        wanted[contexts[valid]] = True
        predicted = self.context_logits(chains, trees, wanted)
        rows = (wanted.cumsum(0) - 1).clamp(min=0)[contexts]
        some = predicted.some if isinstance(predicted, HeadLogits) else predicted.__getitem__
        return Unroll([some(row) for row in rows], valid)

    def score(self, batch: TensorDictBase) -> Tensor:
        """Return the log-probability of every recorded node given its path, ``[M]`` float, with gradients.

        It equals what serving recorded if the weights are those that drafted and the cache had no older rows. It is
        −inf for what the drafter cannot have drafted: a token outside the draft vocabulary, or a node that is too deep.
        """
        trees = TreeIndex.of(batch)
        log_q = log_softmax(self.context_logits(batch, trees, trees.drawn_from))
        row, nodes = draft_rows(self.draft_vocab, batch["nodes", "tokens"]), slice(trees.num_rounds, None)
        possible = (row >= 0) & (trees.root[nodes] >= 0) & (trees.depth[nodes] <= self.max_depth)
        return torch.where(possible, log_q[trees.context, row.clamp(min=0)], -torch.inf)

    # ---- weights ----------------------------------------------------------------------------------------------------

    @property
    def vocab_tables(self) -> tuple[Tensor, ...]:
        """Parameters ``[Vd, H]`` that start as the target's rows of the draft vocabulary, whose tokens may change.

        Empty for a drafter whose vocabulary stays as it is.
        """
        return ()

    def serving_copy(self, dtype: torch.dtype, device: torch.device | None = None) -> Self:
        """Return a copy that serves or replays: in ``dtype`` and on ``device``, or where this is; without gradients."""
        return copy.deepcopy(self).to(device, dtype).eval().requires_grad_(False)

    def published(self) -> dict[str, Tensor]:
        """Return the tensors that a swap replaces, by their checkpoint names, without frozen parts of the target.

        They are the state dict, and ``d2t``, the offsets from draft rows to target ids, as engines name them.
        """
        rows = torch.arange(len(self.draft_vocab), device=self.draft_vocab.device)
        return {**{name: value.detach() for name, value in self.state_dict().items()}, "d2t": self.draft_vocab - rows}

    def stage(self, weights: dict[str, Tensor]) -> Callable[[], None]:
        """Copy replacements of the :meth:`published` tensors, in the form that serving needs, while the old ones serve.

        Staging may run in another thread, alongside the rounds.

        Returns:
            A function that puts the copies in place, by reference, to be called between two rounds.

        Raises:
            ValueError: A tensor is missing, unknown or of another shape, or ``d2t`` is no rising map into the target's
                vocabulary. The message names it, and nothing is changed.
        """
        old = self.draft_vocab
        check_weights(self.published(), weights)
        vocab = weights["d2t"].to(old) + torch.arange(len(old)).to(old)
        check_draft_vocab(vocab, self.vocab_size)
        put = stage(self, {name: weights[name] for name in self.state_dict()})

        def install() -> None:
            put()
            self.draft_vocab = vocab

        return install

    def install(self, weights: dict[str, Tensor]) -> None:
        """Replace the :meth:`published` tensors; errors as of :meth:`stage`."""
        self.stage(weights)()

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def write(self, format: str) -> Checkpoint:
        """Return the drafter in one of its :attr:`formats`; by default with the arguments of :meth:`from_target`."""
        config = {
            "architectures": [type(self).__name__],
            "vocab_size": self.vocab_size,
            "draft_vocab_size": len(self.draft_vocab),
            "feature_layers": list(self.feature_layers),
            "options": dict(self.options),
        }
        return Checkpoint(self.published(), config)

    @classmethod
    def recognizes(cls, config: Mapping[str, Any]) -> bool:
        """Return whether a ``config.json`` is of a drafter of this class, in whichever of its :attr:`formats`."""
        return config.get("architectures") == [cls.__name__]

    @classmethod
    def read(cls, checkpoint: Checkpoint, parts: TargetParts, format: str, **options: Any) -> Self:
        """Read a drafter for a target, in float32, from what :meth:`write` wrote or another program published.

        Args:
            checkpoint: Tensors and configuration.
            parts: Frozen pieces of the target.
            format: One of the :attr:`formats`.
            options: ``drafter.options`` of the user; only what the checkpoint does not say is taken from here.

        Raises:
            ValueError: An entry or tensor does not fit the target or the class; the message names the first.
        """
        tensors, config = checkpoint
        if "d2t" not in tensors:
            raise ValueError("tensor 'd2t' is missing; was it written for another drafter?")
        drafter = cls.from_target(
            parts,
            draft_vocab=torch.arange(len(tensors["d2t"])),
            feature_layers=tuple(config["feature_layers"]),
            **{**options, **config["options"]},
        )
        drafter.install(tensors)
        return drafter


def check_weights(expected: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    """Raise ValueError naming the first tensor by which ``weights`` differ from ``expected`` in name, shape or kind."""
    for name, tensor in expected.items():
        if name not in weights:
            raise ValueError(f"tensor {name!r} {tuple(tensor.shape)} is missing; was it written for another drafter?")
        if weights[name].shape != tensor.shape:
            raise ValueError(
                f"tensor {name!r} has shape {tuple(weights[name].shape)}, this drafter needs {tuple(tensor.shape)}; "
                "was it written for another target or draft vocabulary?"
            )
        if weights[name].is_floating_point() != tensor.is_floating_point():
            wanted = "floating-point numbers" if tensor.is_floating_point() else "integers"
            raise ValueError(f"tensor {name!r} is {weights[name].dtype}, this drafter needs {wanted}")
    if unknown := [name for name in weights if name not in expected]:
        raise ValueError(f"tensor {unknown[0]!r} is unknown to this drafter; it has {sorted(expected)}")


def check_draft_vocab(draft_vocab: Tensor, vocab_size: int, name: str = "tensor 'd2t'") -> None:
    """Raise ValueError about ``name`` unless tokens of draft rows, ``[Vd]`` int64, rise and lie in the vocabulary."""
    if len(outside := ((draft_vocab < 0) | (draft_vocab >= vocab_size)).nonzero()):
        row = int(outside[0])
        raise ValueError(
            f"{name} points outside the target's vocabulary of {vocab_size}: row {row} is token "
            f"{int(draft_vocab[row])}; was it written for another target, or does it hold ids in place of offsets?"
        )
    known, count = draft_vocab.unique(return_counts=True)
    if bool((count > 1).any()):
        token = int(known[count > 1][0])
        raise ValueError(f"{name} gives token {token} more than one row; every row needs a token of its own")
    if len(falls := (draft_vocab.diff() < 0).nonzero()):
        row = int(falls[0])
        raise ValueError(
            f"{name} is not rising: row {row} is token {int(draft_vocab[row])}, row {row + 1} token "
            f"{int(draft_vocab[row + 1])}; whoever knows only which tokens have a row would take them for others"
        )


def draft_rows(draft_vocab: Tensor, tokens: Tensor) -> Tensor:
    """Return the row of the draft head of each target token, −1 if it has none; any shape.

    Example:
        >>> draft_rows(torch.tensor([9, 2, 5]), torch.tensor([5, 3, 9]))
        tensor([ 2, -1,  0])
    """
    order = draft_vocab.argsort()
    row = order[torch.searchsorted(draft_vocab[order], tokens).clamp(max=len(draft_vocab) - 1)]
    return torch.where(draft_vocab[row] == tokens, row, -1)
