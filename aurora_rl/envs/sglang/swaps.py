"""Swaps of the drafter's weights in SGLang's scheduler, on one rank or on all ranks of a server together.

The first rank receives weights from the learner. It sends them to the others in parts, one between two batches. Once
each has all of them, and has found that they are the learner's, every rank loads its shard between the same two
batches. The weights serve if every rank says that it holds its shard. Otherwise all put the tensors back that were
there before.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from aurora_rl.collectors.codec import OWN_LIMITS, as_tensors, checksum, decode, encode
from aurora_rl.envs.remote.checks import weights_fault
from aurora_rl.envs.remote.plugin_server import PluginError
from aurora_rl.envs.remote.session import Follower, Session, SwapError
from aurora_rl.envs.sglang import ENGINE
from aurora_rl.envs.sglang.ranks import EngineRanks, EngineRanksLostError, Order
from aurora_rl.envs.sglang.watchdog import DrafterWatchdog
from aurora_rl.envs.sglang.weights import draft_vocab, swap_weights
from aurora_rl.policies.faults import Fault

logger = logging.getLogger(__name__)

PART = 1 << 24
"""Bytes of weights that go to the other ranks between two batches while requests run."""
_WAIT_S = 60.0


@dataclass(slots=True)
class _Weights:
    """Weights that have come: tensors by name, what is wrong with them, and with several ranks what they compare."""

    tensors: dict[str, Tensor]
    fault: str = ""
    checksum: str = ""


@dataclass(slots=True)
class _Swap:
    """A version on its way: its bytes, how many all ranks have, and the weights once a thread has them ready."""

    number: int
    payload: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    passed: int = 0
    weights: Future[_Weights] = field(default_factory=Future)


@dataclass(slots=True)
class _Head:
    """The target's output head on its way to the first rank: the whole, and how many rows of each rank were asked."""

    whole: Tensor
    passed: int = 0
    arrived: Future[Tensor] = field(default_factory=Future)


class Swaps:
    """The drafter of one rank: its weights are received, loaded, watched and rolled back with those of all ranks.

    Attributes:
        reports: What each of several ranks said of the weights that it loaded last: rank, version and checksum.
    """

    def __init__(self, scheduler: Any, ranks: EngineRanks) -> None:
        self._scheduler, self.ranks = scheduler, ranks
        self.reports: list[dict[str, Any]] = []
        self._decided: Session | None = None  # on the first rank: whose session the last orders were for
        self._session: Session | Follower | None = None
        self._watchdog: DrafterWatchdog | None = None
        self._swap: _Swap | None = None
        self._head: _Head | None = None
        self._logits: Sequence[Tensor] = ()
        self._lost = ""
        self._background = ThreadPoolExecutor(1, thread_name_prefix="weights")

    @property
    def _target(self) -> Any:
        return self._scheduler.tp_worker.model_runner.model

    # ---- the first rank decides -------------------------------------------------------------------------------------

    def due(self, session: Session | None, rounds: int) -> Iterator[Order]:
        """Yield what all ranks are to do before the requests of this turn; the first rank calls this each turn.

        What was yielded before an error is to be done, too. ``session`` is that of the learner that is attached now.
        SGLang has verified so many ``rounds`` so far.
        """
        if self._lost or (session is None and self._decided is None and self._head is None):
            return
        idle = self._scheduler.is_fully_idle()  # an idle scheduler may make a turn only when a request comes
        if (head := self._head) is not None:
            yield from _in_parts("head", head, len(head.whole) // self.ranks.size, head.whole[:1].nbytes, idle)
        if session is not self._decided:
            before, self._decided, self._swap = self._decided, session, None
            if before is not None:
                yield Order("end")
            if session is not None:
                yield Order("begin", {"version": session.version})
        if session is None:
            return
        if self._watchdog is not None and self._watchdog.due(rounds):
            yield Order("check", {"rounds": rounds})
        if self._swap is None and (received := session.receiver.latest()) is not None:
            self._swap = self._received(*received)
        if self._swap is not None:
            yield from self._swap_orders(session, self._swap, idle)
        # Texts in the prefix cache hold keys of older drafters. The cache can be emptied only when nobody reads it.
        if session.flush_due and idle:
            session.flush_due = False
            yield Order("flush")

    def _received(self, number: int, tree: TensorDict) -> _Swap:
        weights = dict(tree.flatten_keys(".").items())
        swap, vocab = _Swap(number), draft_vocab(self._scheduler.draft_worker.draft_worker)
        if self.ranks.size == 1:
            swap.weights.set_result(_Weights(weights, weights_fault(weights, vocab, engine=ENGINE)))
        else:
            swap.weights = self._background.submit(_pack, swap, weights, vocab)
        return swap

    def _swap_orders(self, session: Session, swap: _Swap, idle: bool) -> Iterator[Order]:
        """Yield orders to take the next part of the weights, or all while no request waits for it, and then to load."""
        if not (idle or swap.weights.done()):
            return
        try:
            fault = swap.weights.result().fault
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"
        if fault:
            self._refuse(session, swap.number, fault)
            return
        total = len(swap.payload)
        for order in _in_parts("part", swap, total, 1, idle):
            yield Order("part", {**order.fields, "version": swap.number, "total": total})
        if swap.passed == total:
            yield Order("load", {"version": swap.number})

    def head(self) -> Tensor:
        """Return the rows of the target's output head that all ranks hold together, ``[>= V, H]``, padding after them.

        Another thread than the scheduler's calls this. With several ranks their rows go to the first between batches.

        Raises:
            PluginError: The head is of a kind that cannot be compared, or the scheduler made no turns meanwhile.
        """
        layer = self._target.lm_head
        rows = getattr(layer, "weight", None)
        if rows is None:
            raise PluginError("the target's output head is quantized; serve a model whose head is not")
        if self._lost:
            raise PluginError(f"{self._lost}; restart SGLang")
        if self.ranks.size == 1 or getattr(layer, "tp_size", 1) == 1:
            return rows
        if getattr(layer, "bias", None) is not None:
            raise PluginError("a target whose output head has a bias is not supported on several GPUs; serve it on one")
        self._head = head = _Head(torch.empty(self.ranks.size * len(rows), *rows.shape[1:], dtype=rows.dtype))
        try:
            return head.arrived.result(_WAIT_S)
        except TimeoutError:
            raise PluginError(
                f"SGLang's scheduler did not bring the target's output head together within {_WAIT_S:.0f} s"
            ) from None
        finally:
            self._head = None

    # ---- all ranks carry it out -------------------------------------------------------------------------------------

    def obey(self, order: Order, logits: Sequence[Tensor]) -> None:
        """Do what the first rank has decided, at the same place between two batches as all others.

        ``logits`` are the drafter's of the last round, ``[n, Vd]`` each; empty if CUDA graphs hide them.
        """
        actions: dict[str, Callable[..., Any]] = {
            **{"begin": self._begin, "end": self._end, "check": self._check, "flush": self._scheduler.flush_cache},
            **{"part": self._take_part, "load": self._load, "head": self._give_head},
        }
        self._logits = logits
        try:
            actions[order.kind](**order.fields)
        except EngineRanksLostError as error:
            self._lost = str(error)
            if isinstance(self._session, Session) and self._swap is not None:
                self._session.receiver.reject(self._swap.number, self._lost)
            raise

    def forget(self) -> None:
        """Drop what was made of users' texts once no request runs; called each turn."""
        if self._watchdog is not None:
            self._watchdog.forget()

    def _begin(self, version: int) -> None:
        # On the first rank what it decided: the learner may have gone since.
        self.reports = []
        self._session = session = self._decided or Follower(version)
        self._watchdog = DrafterWatchdog(self._scheduler, session, self._same_fault)
        self._watch_alike(self._watchdog)

    def _end(self) -> None:
        self._session = self._watchdog = None
        if self.ranks.rank:  # the first may have begun another since it decided
            self._swap = None

    def _check(self, rounds: int) -> None:
        if self._watchdog is not None:  # all ranks have one, or none
            self._watchdog.check(rounds, self._logits)

    def _watch_alike(self, watchdog: DrafterWatchdog) -> None:
        """Watch on all ranks or on none: what one mends, all must."""
        if not all(ballot["watches"] for ballot in self.ranks.vote(watches=watchdog.watches)):
            watchdog.give_up()

    def _same_fault(self, fault: Fault | None) -> Fault | None:
        """Return the fault of the first rank that has one, so that all mend the same."""
        if self.ranks.size == 1:
            return fault
        ballots = self.ranks.vote(fault=fault.detail if fault else "", cause=fault.cause if fault else "")
        detail = self.ranks.fault_of(ballots)
        return Fault(next(each["cause"] for each in ballots if each["fault"]), detail) if detail else None

    def _give_head(self, start: int, count: int) -> None:
        rows = self._target.lm_head.weight
        parts = self.ranks.gather(rows[start : start + count])
        if (head := self._head) is None:
            return
        for rank, part in enumerate(parts):
            head.whole[rank * len(rows) + start :][:count] = part
        if start + count == len(rows):
            head.arrived.set_result(head.whole)

    # ---- weights ----------------------------------------------------------------------------------------------------

    def _take_part(self, version: int, total: int, start: int, count: int) -> None:
        if self.ranks.rank and start == 0:
            self._swap = _Swap(version)
            try:
                self._swap.payload = torch.empty(total, dtype=torch.uint8)
            except RuntimeError as error:  # it is told in the vote
                self._swap.weights.set_exception(error)
        swap = self._swap
        part = None if swap is None else swap.payload[start : start + count]
        # Whatever became of those before, this rank takes part.
        self.ranks.broadcast(torch.empty(count, dtype=torch.uint8) if part is None or len(part) < count else part)
        if self.ranks.rank and swap is not None and start + count == total and not swap.weights.done():
            swap.weights = self._background.submit(_unpack, swap.payload)

    def _load(self, version: int) -> None:
        """Load weights on all ranks, unless one does not have them yet, has a fault, or has other weights."""
        began = time.perf_counter()
        swap, weights, fault = self._swap, _Weights({}), ""
        pending = swap is not None and not (swap.weights.done() or self._scheduler.is_fully_idle())
        try:
            if swap is None or swap.number != version:
                fault = f"version {version} has not come"
            elif not pending:
                weights = swap.weights.result(_WAIT_S)
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"
        ballots = self.ranks.vote(pending=pending, fault=fault, version=version, checksum=weights.checksum)
        if any(ballot["pending"] for ballot in ballots):
            return
        fault = self.ranks.fault_of(ballots)
        for rank, ballot in enumerate(ballots):
            if not fault and ballot["checksum"] != ballots[0]["checksum"]:
                fault = f"rank {rank} of {self.ranks.size} has weights of checksum {ballot['checksum']}"
        runner = self._scheduler.draft_worker.draft_worker.draft_runner
        try:
            if fault:
                raise SwapError(fault)
            loadable = {name: tensor for name, tensor in weights.tensors.items() if name != "d2t"}
            swap_weights(self._scheduler.weight_updater, runner, loadable, self._agree)
        except SwapError as error:
            self._refuse(self._session, version, str(error))
            return
        if self.ranks.size > 1:
            told = [{name: ballot[name] for name in ("version", "checksum")} for ballot in ballots]
            self.reports = [{"rank": rank, **each} for rank, each in enumerate(told)]
        self._serve(version, weights.tensors, (time.perf_counter() - began) * 1e3)

    def _agree(self, fault: str) -> str:
        return self.ranks.fault_of(self.ranks.vote(fault=fault))

    def _serve(self, version: int, weights: dict[str, Tensor], milliseconds: float) -> None:
        """Note that a version serves now, on all ranks."""
        session, self._swap = self._session, None
        assert session is not None and self._watchdog is not None
        session.version, session.flush_due = version, True
        self._watchdog.loaded()
        self._watch_alike(self._watchdog)
        self._scheduler.weight_updater.record_weight_version_after_update(str(version))
        if self._scheduler.is_fully_idle():
            session.flush_due = False
            self._scheduler.flush_cache()
        if isinstance(session, Session):
            session.swap_ms.append(milliseconds)
            # What the engine holds was compared with these above; hashing them takes longer than the swap.
            session.background.submit(session.acknowledge, version, weights, milliseconds)

    def _refuse(self, session: Session | Follower | None, version: int, fault: str) -> None:
        self._swap = None
        if isinstance(session, Session):
            session.receiver.reject(version, fault)
        logger.warning("version %d is not served: %s", version, fault)


def _in_parts(kind: str, carried: _Swap | _Head, total: int, nbytes: int, idle: bool) -> Iterator[Order]:
    """Yield an order for the next rows or bytes that are carried, or for all of them while no request waits for it."""
    while carried.passed < total:
        start, count = carried.passed, min(max(1, PART // nbytes), total - carried.passed)
        carried.passed += count
        yield Order(kind, {"start": start, "count": count})
        if not idle:
            return


def _pack(swap: _Swap, weights: dict[str, Tensor], vocab: Tensor) -> _Weights:
    """Check weights, and write them as the bytes that the other ranks get."""
    if fault := weights_fault(weights, vocab, engine=ENGINE):
        return _Weights(weights, fault)
    digest = checksum(weights)
    parts = as_tensors(encode("weights", {"checksum": digest}, weights))
    sizes = torch.tensor([len(parts), *map(len, parts)])
    swap.payload = torch.cat([sizes.view(torch.uint8), *parts])
    return _Weights(weights, "", digest)


def _unpack(payload: Tensor) -> _Weights:
    """Read the bytes that the first rank sent, and compare the weights with their checksum."""
    count = int(payload[:8].view(torch.int64))
    sizes = payload[8 : 8 * (count + 1)].view(torch.int64).tolist()
    frames = payload[8 * (count + 1) :].split(sizes)
    message = decode([frame.numpy() for frame in frames], limits=OWN_LIMITS)
    weights = dict(message.tensors.flatten_keys(".").items())
    if (found := checksum(weights)) != message.meta["checksum"]:
        raise SwapError(f"received checksum {found}, sent {message.meta['checksum']}")
    return _Weights(weights, "", found)
