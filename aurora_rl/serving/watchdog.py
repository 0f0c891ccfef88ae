"""Check that the serving drafter is still what was published: its tensors, its answers, its cache.

Acceptance may fall because the traffic changed. So nothing here is judged by acceptance: each check compares something
that must be equal, and names the cause by what it compared.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from aurora_rl.envs import Engine
from aurora_rl.policies import Drafter, DrafterPolicy, TreeShape
from aurora_rl.policies.faults import EVERY, PORTIONS, Fault, TensorSample, difference, sample, unchanged

_PAIRS, _FEWEST = 32, 4  # pairs that are replayed, at most and at least
_ASKED = TreeShape(1)
_SAME = 1e-2  # difference of log-probabilities that some device may give to the same operations
# Rounding depends on how many pairs an engine appends at a time. Rows that differ by more, in relation to their size,
# are of other inputs.
_ROUNDING = 0.25
# Rounds over which acceptance is averaged, and the share of the long mean below which the short one is suspicious.
_SHORT, _LONG, _SUSPICIOUS = 12, 200, 0.5


class _Question(NamedTuple):
    """A question to a drafter, and its answer."""

    version: int
    tokens: Tensor
    features: Tensor
    log_probs: Tensor


class Watchdog:
    """Checks the drafter of one policy every few rounds.

    Args:
        policy: The policy. A shallow copy of its drafter is asked, with the same weights and a cache of its own:
            ``Drafter.allocate`` keeps caches in attributes of the drafter, not in its modules.
        engine: Engine that it drafts for.
    """

    def __init__(self, policy: DrafterPolicy, engine: Engine) -> None:
        self._policy, self._engine, self._store = policy, engine, engine.store
        self._frozen: dict[str, TensorSample] = {}  # samples of the version in question
        self._question: _Question | None = None
        self._turn = 0
        self._short = self._long = 0.0

    def _fixed(self) -> list[tuple[str, Tensor]]:
        """Return the tensors that are not published, by name, such as the target's embedding."""
        drafter = self._policy.drafter
        published = drafter.published()
        return [(name, tensor) for name, tensor in drafter.named_buffers() if name not in published]

    def observe(self, accepted: float) -> None:
        """Take in how many drafts a round accepted for a slot."""
        self._short += (accepted - self._short) / _SHORT
        self._long += (accepted - self._long) / _LONG

    def check(
        self, weights: Mapping[str, Tensor], earlier: Mapping[int, Mapping[str, Tensor]], fresh: Tensor
    ) -> Fault | None:
        """Check what is due in this round, and return the first fault.

        Args:
            weights: What was published as the version that drafts, in the form of ``Drafter.published``.
            earlier: The same of earlier versions.
            fresh: Slots with a new request, ``[B]`` bool: the drafter's cache is still of the one before.
        """
        self._turn += 1
        if self._turn % EVERY:
            return None
        part = self._turn // EVERY % PORTIONS
        try:
            return (
                self._tensors(weights, earlier, list(weights)[part::PORTIONS])
                or self._constants()
                or self._answer(weights, earlier)
                or self._cache(fresh)
            )
        except torch.OutOfMemoryError:  # the copy ran out of memory, which says nothing of the drafter
            return None
        except Exception as error:  # whatever a drafter does, the requests are served
            return Fault("dead", f"asked for a draft, it raises {error!r}")

    # ---- tensors ----------------------------------------------------------------------------------------------------

    def _tensors(
        self, weights: Mapping[str, Tensor], earlier: Mapping[int, Mapping[str, Tensor]], names: Sequence[str]
    ) -> Fault | None:
        """Compare some of the tensors with those that were published; all of them if one differs."""
        held = self._policy.drafter.published()
        if all(torch.equal(held[name], weights[name]) for name in names):
            return None
        for version, old in earlier.items():
            if held.keys() == old.keys() and all(torch.equal(held[name], tensor) for name, tensor in old.items()):
                return Fault("stale", f"all tensors are those of version {version}, not {self._policy.version}")
        different = [name for name in held if not torch.equal(held[name], weights[name])]
        name = different[0]
        more = f", and {len(different) - 1} other tensors differ" if len(different) > 1 else ""
        return Fault("corrupted", f"tensor {name!r} {difference(held[name], weights[name])}{more}")

    def _constants(self) -> Fault | None:
        """Compare what no weights change with what it was at the start."""
        read = self._policy.layers or tuple(self._policy.drafter.feature_layers)
        if (handed := getattr(self._engine, "feature_layers", read)) != read:  # engines need not say it
            return Fault("mismatched", f"it reads the layers {read}, and the engine hands it those of {handed}")
        if self._question is None or self._question.version != self._policy.version:
            return None
        for name, tensor in self._fixed():
            if not unchanged(tensor, self._frozen[name]):
                return Fault("mismatched", f"tensor {name!r}, which is not published, changed while it served")
        return None

    # ---- answers and cache ------------------------------------------------------------------------------------------

    def _probe(self, tokens: Tensor, features: Tensor, slot: int | None = None) -> Drafter:
        """Return the drafter with a cache of its own, of one slot that holds these pairs, with a slot's adapter."""
        probe = copy.copy(self._policy.drafter)  # a copy of the module with the same weights
        probe.allocate(1, len(tokens) + _ASKED.depth + 1)
        if slot is not None and probe.adapters is not None:
            probe.slot_adapters = self._policy.drafter.slot_adapters[slot : slot + 1]
        probe.extend(torch.tensor([0]), tokens[None], features[None], torch.tensor([len(features)]))
        return probe

    @torch.inference_mode()
    def _answer(self, weights: Mapping[str, Tensor], earlier: Mapping[int, Mapping[str, Tensor]]) -> Fault | None:
        """Ask once more what the drafter was asked when this version was new."""
        if self._question is None or self._question.version != self._policy.version:
            if (fault := self._tensors(weights, earlier, list(weights))) is not None:
                return fault
            pairs = self._made_up()
            self._question = _Question(self._policy.version, *pairs, self._ask(*pairs))
            self._frozen = {name: sample(tensor) for name, tensor in self._fixed()}
            return None
        version, tokens, features, before = self._question
        now = self._ask(tokens, features)
        if now.shape == before.shape and torch.allclose(now, before, rtol=0, atol=_SAME):
            return None
        if not now.numel():
            return Fault("dead", "asked for a draft, it gives none")
        return self._tensors(weights, earlier, list(weights)) or Fault(
            "mismatched",
            f"the same text and features give other drafts than when version {version} was new, and its tensors are "
            "those that were published",
        )

    def _ask(self, tokens: Tensor, features: Tensor) -> Tensor:
        """Return the log-probability of the likeliest token after these pairs, ``[1, 1]``; ``[1, 0]`` without any."""
        return self._probe(tokens, features).propose(torch.tensor([0]), _ASKED).log_probs.float()

    @torch.inference_mode()
    def _cache(self, fresh: Tensor) -> Fault | None:
        """Replay the beginning of a slot's text, all of it if acceptance fell, and compare with the drafter's cache."""
        suspicious = self._short < _SUSPICIOUS * self._long
        slot = self._next(self._policy.drafter.cached.masked_fill(fresh, 0))
        if slot is None or not (rows := self._policy.drafter.cache_rows(slot)):
            return None
        held = int(self._policy.drafter.cached[slot])
        count = held if suspicious else min(held, _PAIRS)
        tokens, features = self._store.tokens[slot, : count + 1], self._policy.features(slot, slice(count))
        replayed = self._probe(tokens, features, slot).cache_rows(0)
        assert replayed is not None
        for row, again in zip(rows, replayed, strict=True):
            first, second = (part[:count].reshape(count, -1).float() for part in (row, again))
            off = (first - second).norm(dim=1) > _ROUNDING * second.norm(dim=1)
            if bool(off.any()) or not bool(first.isfinite().all()):
                where = int(off.nonzero()[0]) if bool(off.any()) else 0
                return Fault("cache", f"slot {slot}'s cache differs from a replay of its text from pair {where} on")
        return None

    def _next(self, lengths: Tensor) -> int | None:
        """Return the slot whose turn it is among the occupied ones with so many pairs."""
        slots = [slot for slot in self._store.occupied.tolist() if int(lengths[slot]) >= _FEWEST]
        return slots[self._turn // EVERY % len(slots)] if slots else None

    def _made_up(self) -> tuple[Tensor, Tensor]:
        """Return pairs of no text, the same each time: tokens ``[n + 1]`` and features ``[n, F]``.

        They are kept as long as the version drafts, which no user's text may be.
        """
        generator, features = torch.Generator().manual_seed(0), self._policy.features(0, slice(0))
        tokens = torch.randint(self._policy.drafter.vocab_size, (_PAIRS + 1,), generator=generator)
        noise = torch.randn(_PAIRS, features.shape[-1], generator=generator)
        return tokens.to(features.device), noise.to(features.device, features.dtype)
