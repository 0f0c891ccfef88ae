"""The engine seam: it serves the target in rounds, on slots."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from aurora_rl.context import ContextStore
from aurora_rl.prefix_cache import PrefixCache
from aurora_rl.registry import Registry
from aurora_rl.remote_engines import REMOTE_ENGINES


class PromptChunk(NamedTuple):
    """What is to be read of the prompt of a free slot.

    Attributes:
        slot: The slot.
        prompt: Its whole prompt, ``[P]`` int64, ``1 <= P < max_length``.
        done: Tokens that are read, as the call before returned; 0 at first.
        max_tokens: Most tokens to read, at least one.
    """

    slot: int
    prompt: Tensor
    done: int
    max_tokens: int


class Engine(ABC):
    """An in-process engine: a block of slots, each with its own KV cache and length.

    A round is ``verify`` then ``commit``. Between rounds the KV cache of a slot covers every committed token but the
    last, which is the *root* of the next tree. The store's features end at the same place.

    Attributes:
        store: Tokens, features and hidden states of each slot; the engine appends to it.
        vocab_size: Size of the target's vocabulary.
        prefill_seconds: Wall time spent on prompts so far: that of :meth:`prefill` and :meth:`prefill_chunk`, which the
            engine counts, and what chunks add to rounds, which the environment does.
        max_nodes: Most nodes of a slot's tree without its root.
        prefix_cache: Rows of finished requests, which an engine may use where a prompt of the same salt
            (``store.cache_salts``) begins alike; None keeps none.
    """

    max_nodes: int = 64
    prefix_cache: PrefixCache | None = None

    store: ContextStore
    vocab_size: int
    prefill_seconds: float

    @property
    def num_slots(self) -> int:
        """Number of slots ``B``."""
        return self.store.num_slots

    @property
    def max_length(self) -> int:
        """Most tokens, prompt and completion, that a slot holds."""
        return self.store.max_length

    @abstractmethod
    def prefill(self, slots: Sequence[int], prompts: Sequence[Tensor]) -> None:
        """Load prompts (each ``[P]`` int64, ``1 <= P < max_length``) into free slots."""

    def prefill_chunk(self, slot: int, prompt: Tensor, done: int, max_tokens: int) -> int:
        """Read on in the prompt of a free slot, between rounds of other slots.

        An engine that cannot stop within a prompt reads it whole, as this method does unless it is overridden. The
        slot stays free until its prompt is complete; a prompt that is begun at 0 again takes the place of another.

        Arguments are the fields of :class:`PromptChunk`.

        Returns:
            How many tokens are read now, ``P`` where the prompt is complete.
        """
        self.prefill([slot], [prompt])
        return len(prompt)

    @abstractmethod
    def verify(self, slots: Tensor, tokens: Tensor, parents: Tensor, valid: Tensor) -> Tensor:
        """Run the target once over the root and every node of each slot's tree.

        Args:
            slots: Occupied slots in rising order, ``[b]`` int64 on the CPU.
            tokens: Token of each node, ``[b, n]`` int64; ``n = 0`` is plain decoding.
            parents: Parent of each node, topological, −1 = root, ``[b, n]`` int64.
            valid: Nodes that count, ``[b, n]`` bool.

        Returns:
            The output head's input at the root (column 0) and at each node, ``[b, n + 1, H]``.
        """

    def verify_with_chunk(
        self, slots: Tensor, tokens: Tensor, parents: Tensor, valid: Tensor, chunk: PromptChunk
    ) -> tuple[Tensor, int]:
        """Verify a round, and read on in the prompt of a free slot.

        An engine may do both in one pass, which then reads the weights once. Unless this method is overridden, the
        chunk is read by :meth:`prefill_chunk`, in a pass of its own.

        ``chunk`` is of a slot that is none of ``slots``. The other arguments are those of :meth:`verify`.

        Returns:
            What :meth:`verify` returns, and how many tokens of the prompt are read now, ``P`` where it is complete. Its
            slot takes part from the next round on.
        """
        read = self.prefill_chunk(*chunk)
        return self.verify(slots, tokens, parents, valid), read

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """Apply the target's output head: ``[..., H]`` to ``[..., V]``."""

    @abstractmethod
    def commit(self, slots: Tensor, path: Tensor, tokens: Tensor, num_new: Tensor) -> Tensor:
        """Keep the accepted path of the round just verified and append its tokens.

        Args:
            slots: Slots of :meth:`verify`, ``[b]``.
            path: Indices of the accepted nodes in order of depth, then −1, ``[b, n]`` int64.
            tokens: Delivered tokens, oldest first, ``[b, n + 1]`` int64.
            num_new: Number of delivered tokens, at least one, ``[b]`` int64 on the CPU.

        Returns:
            Features, ``[b, n + 1, F]``; row ``i`` is the feature at the position just before ``tokens[:, i]``.
        """

    @abstractmethod
    def release(self, slot: int) -> None:
        """Free the slot; its request is over."""


ENGINES: Registry[type[Engine]] = Registry("engine", "aurora_rl.engines", Engine, reserved=tuple(REMOTE_ENGINES))
"""In-process engines by name, constructed as ``TransformersEngine`` is. ``REMOTE_ENGINES`` are servers of their own."""

register_engine = ENGINES.register
"""Decorator that makes an engine's class available by a name, as in ``engine.name``: :meth:`Registry.register`."""

get_engine = ENGINES.get
"""Return an engine's class by its name, an entry point, or ``package.module:Class``: :meth:`Registry.get`."""
