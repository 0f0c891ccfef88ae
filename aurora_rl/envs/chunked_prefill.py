"""Reading of prompts: whole while nothing decodes, otherwise in chunks between the rounds of decoding requests."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Sequence

from aurora_rl.envs.engine import Engine
from aurora_rl.envs.request import Request

# A prompt of so many tokens is read whole, in 2.6 rounds' time at most: chunks would cost a tenth of the throughput.
_SHORT = 64
# Tokens of the first chunk and of the shortest: a pass over fewer takes as long as a round all the same.
_FIRST, _LEAST = 16, 8
# A chunk takes about so many times the median of the last rounds, so many of them.
_SHARE, _ROUNDS = 1.0, 8


class ChunkedPrefill:
    """Reads the prompts of requests into their slots, first come, first served.

    While other slots decode, one chunk of a long prompt is read between two rounds. Its length follows from what is
    measured: a chunk is to take about as long as a round, which is about 12 tokens on a CPU and hundreds on a GPU.

    Attributes:
        chunk: Most tokens of the next chunk.

    Example:
        >>> import torch
        >>> from aurora_rl.envs import TransformersEngine
        >>> from aurora_rl.testing import tiny_target
        >>> engine = TransformersEngine(tiny_target(), num_slots=2, max_length=256, feature_layers=())
        >>> prefill = ChunkedPrefill(engine)
        >>> prefill.add(1, Request(0, torch.arange(150) % 30))
        >>> [len(prefill.read([1], decoding=True)) for _ in range(2)]
        [0, 0]
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._reading: dict[int, tuple[Request, int]] = {}  # by slot: the request, and how many tokens of it are read
        self._rounds: deque[float] = deque(maxlen=_ROUNDS)
        self.chunk = _FIRST

    def __contains__(self, slot: int) -> bool:
        return slot in self._reading

    def __len__(self) -> int:
        return len(self._reading)

    def add(self, slot: int, request: Request) -> None:
        """Let a request's prompt be read into a free slot."""
        self._engine.store.cache_salts[slot] = request.salt
        self._reading[slot] = (request, 0)

    def clear(self) -> None:
        """Forget every request whose prompt is not read to the end."""
        self._reading.clear()

    def drop(self, request: int) -> bool:
        """Forget a request, by its id, whose prompt is not read to the end; return whether there was one."""
        slot = next((slot for slot, (each, _) in self._reading.items() if each.id == request), None)
        return self._reading.pop(slot, None) is not None if slot is not None else False

    def round(self, seconds: float) -> None:
        """Note how long a round took."""
        self._rounds.append(seconds)

    def read(self, slots: Sequence[int], *, decoding: bool) -> list[tuple[int, Request]]:
        """Read on for ``slots``, while others decode or not; return those with complete prompts, and the requests."""
        waiting = [slot for slot in self._reading if slot in slots]
        if decoding:
            return [self._pop(slot) for slot in waiting[:1] if self._read_chunk(slot)]
        begun = {slot: done for slot in waiting if (done := self._reading[slot][1])}
        for slot, done in begun.items():
            prompt = self._reading[slot][0].prompt
            self._engine.prefill_chunk(slot, prompt, done, len(prompt))
        whole = [slot for slot in waiting if slot not in begun]
        if whole:
            self._engine.prefill(whole, [self._reading[slot][0].prompt for slot in whole])
        return [self._pop(slot) for slot in waiting]

    def _pop(self, slot: int) -> tuple[int, Request]:
        return slot, self._reading.pop(slot)[0]

    def _read_chunk(self, slot: int) -> bool:
        """Read a chunk of the slot's prompt; return whether the prompt is complete."""
        (request, done), began = self._reading[slot], time.perf_counter()
        most = self.chunk if len(request.prompt) > _SHORT else len(request.prompt)
        read = self._engine.prefill_chunk(slot, request.prompt, done, most)
        seconds = time.perf_counter() - began
        if read - done == self.chunk and self._rounds:  # neither the last tokens of a prompt nor rows that were kept
            longer = seconds < _SHARE * statistics.median(self._rounds)
            self.chunk = max(self.chunk * 5 // 4 if longer else self.chunk * 4 // 5, _LEAST)
        self._reading[slot] = (request, read)
        return read == len(request.prompt)
