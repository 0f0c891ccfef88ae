"""Reading of prompts: whole while nothing decodes, otherwise a chunk along with each round of decoding requests."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Sequence

from torch import Tensor

from aurora_rl.envs.engine import Engine, PromptChunk
from aurora_rl.envs.request import Request

# Tokens of the first chunk and of the shortest: where an engine reads it in a pass of its own, fewer take as long.
_FIRST_CHUNK, _MIN_CHUNK = 16, 8
# A round with a chunk may take about this many times the median of the last so many rounds without one: less than twice
# by so much that the slowest of a hundred such rounds stays below twice as well (benchmarks/prefill.py).
_MAX_DELAY, _ROUNDS = 1.6, 8


class ChunkedPrefill:
    """Reads the prompts of requests into their slots, first come, first served.

    While other slots decode, a chunk of a prompt is read along with each round, in one pass with it where the engine
    can. Its length follows from the time from one round's end to the next's, which is to be less than twice as long as
    without a chunk. That leaves room for about 12 tokens on a CPU and for hundreds on a GPU. After eight rounds with a
    chunk, one goes without and is measured.

    Attributes:
        chunk: Most tokens of the next chunk.

    Example:
        >>> import torch
        >>> from aurora_rl.envs import TransformersEngine
        >>> from aurora_rl.testing import tiny_target
        >>> engine = TransformersEngine(tiny_target(), num_slots=2, max_length=256, feature_layers=())
        >>> engine.prefill([0], [torch.tensor([5, 6, 7])])
        >>> prefill = ChunkedPrefill(engine)
        >>> prefill.add(1, Request(0, torch.arange(30)))
        >>> none = torch.zeros(1, 0, dtype=torch.int64)
        >>> for _ in range(2):
        ...     hidden = prefill.verify(torch.tensor([0]), none, none, none.bool())
        ...     print(prefill.take([1], decoding=True))
        []
        [(1, Request(...))]
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._reading: dict[int, tuple[Request, int]] = {}  # slot -> request, and tokens of its prompt that are read
        self._rounds: deque[float] = deque(maxlen=_ROUNDS)  # seconds of those without a chunk
        self._read, self._with_chunk = 0, 0  # tokens in this round, and rounds with a chunk in a row
        self._ended = time.perf_counter()
        self._counted = engine.prefill_seconds  # the engine's count at the last round's end
        self.chunk = _FIRST_CHUNK

    def __contains__(self, slot: int) -> bool:
        return slot in self._reading

    def __len__(self) -> int:
        return len(self._reading)

    def add(self, slot: int, request: Request) -> None:
        """Let a request's prompt be read into a free slot."""
        self._engine.store.cache_salts[slot] = request.salt
        self._reading[slot] = (request, 0)

    def clear(self) -> None:
        """Forget every request that was not taken."""
        for slot in list(self._reading):
            self._forget(slot)

    def drop(self, request: int) -> bool:
        """Forget a request, by its id, that was not taken; return whether there was one."""
        slot = next((slot for slot, (each, _) in self._reading.items() if each.id == request), None)
        if slot is not None:
            self._forget(slot)
        return slot is not None

    def _forget(self, slot: int) -> None:
        if self._complete(slot):
            self._engine.release(slot)
        del self._reading[slot]

    def _complete(self, slot: int) -> bool:
        request, done = self._reading[slot]
        return done == len(request.prompt)

    def take(self, slots: Sequence[int], *, decoding: bool) -> list[tuple[int, Request]]:
        """Return those of ``slots`` with complete prompts, and their requests; while nothing decodes, read them all."""
        waiting = [slot for slot in self._reading if slot in slots]
        if not decoding:
            begun = [slot for slot in waiting if self._reading[slot][1] and not self._complete(slot)]
            for slot in begun:
                request, done = self._reading[slot]
                self._engine.prefill_chunk(slot, request.prompt, done, len(request.prompt))
            whole = [slot for slot in waiting if not self._reading[slot][1]]
            if whole:
                self._engine.prefill(whole, [self._reading[slot][0].prompt for slot in whole])
            self._note_end()  # no round waited for this
        else:
            waiting = [slot for slot in waiting if self._complete(slot)]
        return [(slot, self._reading.pop(slot)[0]) for slot in waiting]

    def verify(self, slots: Tensor, tokens: Tensor, parents: Tensor, valid: Tensor) -> Tensor:
        """Do what the engine's ``verify`` does, and read a chunk of the first prompt that is not complete."""
        self._read = 0
        slot = next((slot for slot in self._reading if not self._complete(slot)), None)
        if slot is None or self._with_chunk == _ROUNDS:
            self._with_chunk = 0
            return self._engine.verify(slots, tokens, parents, valid)
        request, done = self._reading[slot]
        chunk = PromptChunk(slot, request.prompt, done, self.chunk)
        hidden, read = self._engine.verify_with_chunk(slots, tokens, parents, valid, chunk)
        self._reading[slot] = (request, read)
        self._read, self._with_chunk = read - done, self._with_chunk + 1
        return hidden

    def end_round(self) -> None:
        """Note that the round has ended that was verified."""
        seconds = time.perf_counter() - self._ended
        if not self._read:
            self._rounds.append(seconds)
        elif self._rounds:
            usual, engine = statistics.median(self._rounds), self._engine
            # What the chunk added, unless the engine has counted more by itself.
            engine.prefill_seconds = max(engine.prefill_seconds, self._counted + seconds - usual)
            if self._read == self.chunk:  # neither the last tokens of a prompt nor rows that were kept
                if seconds < _MAX_DELAY * usual:
                    self.chunk += max(self.chunk // 8, 1)
                else:
                    self.chunk = max(self.chunk * 4 // 5, _MIN_CHUNK)
        self._note_end()

    def _note_end(self) -> None:
        self._ended, self._counted = time.perf_counter(), self._engine.prefill_seconds
