"""Turn the rounds of a remote engine into packed trajectories. Nothing here knows one engine."""

from __future__ import annotations

import hashlib
import logging
import math
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor

from aurora_kernels.trees import reorder_depth_first
from aurora_rl.envs.remote.feature_store import FeatureStore
from aurora_rl.envs.remote.recorded_totals import RecordedTotals
from aurora_rl.sampling_params import SamplingParams
from aurora_rl.tenants import MAX_DELETIONS
from aurora_rl.trajectories import make_trajectory
from aurora_rl.trajectory_parts import part_is_due

logger = logging.getLogger(__name__)

_ROTATION = 1 << 30  # range of the hash by which a share of the requests is chosen

TargetRows = dict[str, Tensor]
"""What is known of the target's distribution at some positions: "hidden", or "topk_ids", "topk_log_probs" and
"tail_log_prob", each with the positions first."""


@dataclass(slots=True)
class EngineRound:
    """One round of one request, as the engine has it; ``n`` nodes, the root before them."""

    anchor: Tensor  # position of the root, [] int64
    tokens: Tensor  # of the root and of each node, [n + 1]
    first_child: Tensor  # its place, -1 if there is none, [n + 1]
    next_sibling: Tensor  # its place, -1 if there is none, [n + 1]
    path: Tensor  # places of the root and the accepted nodes, in order, [d]; those after `path_length` are ignored
    path_length: Tensor  # number of accepted nodes and the root, []
    joint_log_probs: Tensor | None  # the drafter's, of each node's whole path, [n]; None if it kept none
    features: Tensor  # at the root and at each node, [n + 1, F]
    target: TargetRows  # at the root and each node
    policy_version: int  # of the weights that drafted
    ready: Callable[[], None]  # called before anything is read: it waits for copies that are still on their way

    @property
    def nbytes(self) -> int:
        """Bytes of features and target rows, which are nearly all."""
        return sum(t.nbytes for t in (self.features, *self.target.values()))


@dataclass(slots=True)
class _Record:
    prompt: Tensor
    cached: int  # tokens of the prompt that the engine had in its prefix cache
    cache_version: int
    sampling_params: SamplingParams
    tenant: str | None
    name: str  # the client's id
    began: float  # monotonic seconds, as are the others here
    ended: float = math.inf
    features: list[Tensor] = field(default_factory=list)
    first: TargetRows | None = None
    rounds: list[EngineRound] = field(default_factory=list)
    nbytes: int = 0
    dropped: bool = False
    most: int = 0  # tokens that the rounds may have delivered, by the shapes of their paths: values may be on their way
    before_last: tuple[int, int] = (0, 0)  # rounds before the last pass, and the most tokens of those
    asked: bool = False  # whether the thread has been asked for a part and has not answered
    # What follows is written by the thread alone.
    part_first: int = field(init=False)  # place where the part begins that is written now
    part_began: float = field(init=False)
    excess: int = field(init=False)  # difference of `most` and the text's length, where the thread last read both
    totals: RecordedTotals = RecordedTotals()  # over the parts that were emitted
    prefix: Tensor | None = None  # features of the cached tokens, once they are found

    def __post_init__(self) -> None:
        self.part_first, self.part_began = len(self.prompt), self.began
        self.excess = -len(self.prompt) - 1  # the first token comes from prefill


class _Due(NamedTuple):
    """A part that may be due: what is written up to the root of a round."""

    record: _Record
    round: int  # place of that round
    most: int  # tokens that the rounds before it may have delivered
    time: float


class _Ended(NamedTuple):
    """A request that has ended."""

    record: _Record
    completion: list[int]
    terminated: bool


class TrajectoryAssembler:
    """Collect the rounds of each request; a thread of its own makes trajectories of them.

    All methods may be called on the serving path: they only append to lists and add integers.

    Args:
        emit: Called with each trajectory, the tenant of its request, None if it has none, and the seconds in which its
            completion was written: from the request's first batch or its last part on.
        max_bytes: Memory that requests on their way may hold; one that begins beyond it is served without a record.
        store_bytes: Host memory of the store of prefix features.
        part_tokens: Tokens of an answer after which what is written of it is emitted, while it goes on, see
            :mod:`aurora_rl.trajectory_parts`; None emits requests when they have ended.

    Attributes:
        counts: Number of requests that were "recorded", and of others by reason ("prefix", "memory", "incomplete",
            "deleted" and those of :meth:`drop`).
        totals: Sums over the recorded requests; each request replaces the object, so that it may be read at any time.
    """

    def __init__(
        self,
        emit: Callable[[TensorDict, str | None, float], None],
        *,
        max_bytes: int,
        store_bytes: int,
        part_tokens: int | None = None,
    ) -> None:
        self._emit, self._max_bytes, self._part_tokens = emit, max_bytes, part_tokens
        # Bytes, each number written by one thread: reserved on the serving path, released by the thread here.
        self._reserved = self._released = 0
        self._records: dict[str, _Record] = {}
        self._store = FeatureStore(store_bytes)
        self.counts: Counter[str] = Counter()
        self.totals = RecordedTotals()
        self._emitting = threading.Lock()
        self._deletions: dict[str, float] = {}  # tenant -> monotonic time of its latest deletion; latest last
        # For the thread: what to assemble, or a tenant whose texts are to be dropped; None ends it.
        self._tasks: queue.SimpleQueue[_Due | _Ended | str | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="trajectories", daemon=True)
        self._thread.start()

    def __contains__(self, rid: str) -> bool:
        return rid in self._records

    def begin(
        self,
        rid: str,
        prompt: Sequence[int],
        cached: int,
        version: int,
        sampling_params: SamplingParams,
        tenant: str | None = None,
        name: str | None = None,
    ) -> bool:
        """Take in a request, for which weights of a version draft; return False if there is no room.

        The engine has so many tokens of its prompt ``cached``, and will not run them. ``name`` is the id that the
        client gave it; None if the engine has no other.
        """
        if self._reserved - self._released > self._max_bytes:
            self.counts["memory"] += 1
            return False
        self._records[rid] = _Record(
            torch.tensor(prompt), cached, version, sampling_params, tenant, name or rid, time.monotonic()
        )
        return True

    def prompt(self, rid: str, features: Tensor, first: TargetRows | None) -> None:
        """Take in a part of a prompt by its features ``[n, F]``, the last with the target's distribution after it."""
        record = self._records[rid]
        record.features.append(features)
        record.first = first
        record.nbytes += features.nbytes
        self._reserved += features.nbytes

    def prefilled(self, rid: str) -> int:
        """Return how many tokens of a recorded request's prompt are cached or were run."""
        record = self._records[rid]
        return record.cached + sum(len(part) for part in record.features)

    def round(self, rid: str, *drafted: EngineRound) -> None:
        """Take in a pass over a recorded request: its round, or its rounds if it is decoded plainly."""
        record = self._records[rid]
        (rounds, most), record.before_last = record.before_last, (len(record.rounds), record.most)
        for each in drafted:
            record.rounds.append(each)
            record.most += len(each.path)
            record.nbytes += each.nbytes
            self._reserved += each.nbytes
        # An engine with an overlapping schedule starts a pass before it has read the last one, which may end the text.
        # What came before the last one did not end it.
        if self._part_tokens is None or record.asked or not rounds:
            return
        if part_is_due(most - record.excess, record.part_first, self._part_tokens):
            record.asked = True
            self._tasks.put(_Due(record, rounds, most, time.monotonic()))

    def drop(self, rid: str, reason: str) -> None:
        """Forget a request that cannot be learned from; parts that were emitted stay."""
        record = self._records.pop(rid)
        record.dropped = True
        self._reserved -= record.nbytes
        self.counts[reason] += 1

    def finish(self, rid: str, completion: Sequence[int], *, terminated: bool) -> None:
        """End a recorded request, with the token ids of its completion, a stop token included.

        It is ``terminated`` if the text ended by itself, not by its budget.
        """
        record = self._records.pop(rid)
        record.ended = time.monotonic()
        self._tasks.put(_Ended(record, list(completion), terminated))

    def delete(self, tenant: str) -> None:
        """Drop what is kept of a tenant's texts, and make no trajectory of its requests that have begun until now."""
        with self._emitting:  # trajectories that stay are queued before the queue is searched
            self._deletions.pop(tenant, None)
            self._deletions[tenant] = time.monotonic()
        if len(self._deletions) > MAX_DELETIONS:
            del self._deletions[next(iter(self._deletions))]
        self._tasks.put(tenant)  # the store is the thread's

    def _deleted(self, record: _Record) -> bool:
        return record.tenant is not None and record.began <= self._deletions.get(record.tenant, -math.inf)

    def close(self) -> None:
        """End, after the trajectories of requests that have ended."""
        self._tasks.put(None)
        self._thread.join(5.0)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            match task:
                case str():
                    self._store.delete(task)
                case _Due():
                    self._hand_on_part(task)
                case _Ended():
                    self._hand_on_rest(*task)

    def _hand_on_part(self, due: _Due) -> None:
        """Emit what is written of a request, if it is enough. What cannot be assembled is not asked for again."""
        record, (*rounds, root) = due.record, due.record.rounds[: due.round + 1]
        try:
            if record.dropped or self._deleted(record):
                return
            root.ready()
            length = int(root.anchor) + 1
            if part_is_due(length, record.part_first, self._part_tokens or 0):
                for each in rounds:
                    each.ready()
                written = [token for each in rounds for token in each.tokens[_path_of(each)].tolist()]
                written.append(int(root.tokens[0]))
                if len(record.prompt) + len(written) != length:  # a round is missing
                    return
                trajectory = self._assemble(record, rounds, written)
                if isinstance(trajectory, str) or record.dropped:  # meanwhile
                    return
                self._emit_of(record, trajectory, due.time)
                record.totals = record.totals.plus(RecordedTotals.of(trajectory))
                record.part_first, record.part_began = length, due.time
            record.excess = due.most - length
            record.asked = False
        except Exception:
            logger.exception("a part of a request could not be assembled")

    def _hand_on_rest(self, record: _Record, completion: list[int], terminated: bool) -> None:
        """Emit what has been written of a request since its last part, and count it."""
        try:
            trajectory = "deleted" if self._deleted(record) else self._assemble(record, record.rounds, completion)
            if self._deleted(record):  # meanwhile
                trajectory = "deleted"
        except Exception:
            logger.exception("a request's trajectory could not be assembled")
            self.counts["error"] += 1
        else:
            if isinstance(trajectory, str):
                self.counts[trajectory] += 1
            else:
                tokens, features = trajectory["sequence", "tokens"], trajectory["sequence", "features"]
                self._store.put(tokens[:-1].clone(), features, record.cache_version, record.tenant)
                self.counts["recorded"] += 1
                prompt_tokens, sums = len(record.prompt), record.totals.plus(RecordedTotals.of(trajectory))
                sums = replace(sums, requests=1, terminated=int(terminated), prompt_tokens=prompt_tokens)
                self.totals = self.totals.plus(sums)
                self._emit_of(record, trajectory, record.ended)
        finally:
            self._released += record.nbytes

    def _emit_of(self, record: _Record, trajectory: TensorDict, until: float) -> None:
        with self._emitting:
            if not self._deleted(record):
                self._emit(trajectory, record.tenant, until - record.part_began)

    def _assemble(self, record: _Record, rounds: Sequence[EngineRound], completion: list[int]) -> TensorDict | str:
        """Return the trajectory of a completion since its last part, or why there is none."""
        prompt, first = record.prompt, record.part_first
        tokens = torch.cat([prompt, torch.tensor(completion, dtype=torch.int64)])
        if record.cached and record.prefix is None:
            if (known := self._prefix(prompt[: record.cached])) is None:
                return "prefix"
            record.prefix, record.cache_version = known[0], min(record.cache_version, known[1])
        if record.first is None or len(tokens) <= first:
            return "incomplete"
        last = len(tokens) - 1
        for each in rounds:
            each.ready()
        # With overlapping schedules an engine starts one round more than the request turns out to need.
        rounds = [each for each in rounds if int(each.anchor) < last]
        paths = [_path_of(each) for each in rounds]
        features = [*record.features, *(each.features[path] for each, path in zip(rounds, paths, strict=True))]
        sequence_features = torch.cat(features if record.prefix is None else [record.prefix, *features])
        places = accumulate((len(path) for path in paths), initial=len(prompt))
        follow = all(int(each.anchor) == place for each, place in zip(rounds, places, strict=False))
        if len(sequence_features) < last or not follow or not all(map(len, paths)):
            return "incomplete"
        visited = [{k: v[path] for k, v in r.target.items()} for r, path in zip(rounds, paths, strict=True)]
        target = {k: torch.cat([part[k] for part in (record.first, *visited)]) for k in record.first}
        since = [(each, path) for each, path in zip(rounds, paths, strict=True) if int(each.anchor) >= first - 1]
        return make_trajectory(
            request=request_number(record.name),
            tokens=tokens,
            prompt_length=first,
            features=sequence_features[:last].clone(),
            target={k: rows[first - len(prompt) : len(completion)].clone() for k, rows in target.items()},
            anchors=[int(each.anchor) for each, _ in since],
            # An engine that does not always keep scores has kept none that a loss could use: they are left out then.
            trees=[_tree(each, path, last) for each, path in since],
            policy_versions=[each.policy_version for each, _ in since],
            cache_versions=[record.cache_version] * len(since),
            sampling_params=record.sampling_params,
            rule="sample_and_match",  # the law of the engines' own rules, by other noise
        )

    def _prefix(self, tokens: Tensor) -> tuple[Tensor, int] | None:
        """Find the features of a cached prefix, from an ended request or from the prompt of a running one."""
        if (known := self._store.get(tokens)) is not None:
            return known
        for record in list(self._records.values()):
            parts = list(record.features)
            if parts and not record.cached and sum(map(len, parts)) >= len(tokens):
                if torch.equal(record.prompt[: len(tokens)], tokens):
                    return torch.cat(parts)[: len(tokens)], record.cache_version
        return None


def request_number(rid: str) -> int:
    """Return the number of a request in trajectories: its id if that is a number, else a digest of it.

    >>> request_number("17")
    17
    """
    if rid.isdecimal() and int(rid) < 2**62:
        return int(rid)
    return int.from_bytes(hashlib.blake2b(rid.encode(), digest_size=8).digest()) >> 2


def captured(rid: str, share: float) -> bool:
    """Return whether a request is among the ``share`` that is captured: the same whenever the same id comes.

    >>> captured("17", 1.0), captured("17", 0.0)
    (True, False)
    """
    return request_number(rid) * 2654435761 % _ROTATION < share * _ROTATION


def parents_of(first_child: Sequence[int], next_sibling: Sequence[int]) -> list[int]:
    """Return the parents of a tree's nodes, −1 for the root, by links to later places; −2 if no link leads to a node.

    >>> parents_of([1, 3, -1, -1, -1], [-1, 2, -1, -1, -1])  # root with children 1 and 2; 3 below 1; 4 below none
    [-1, -1, 0, -2]
    """
    parent = [0] + [-1] * (len(first_child) - 1)
    for node, (child, sibling) in enumerate(zip(first_child, next_sibling, strict=True)):
        if parent[node] >= 0 and child >= 0:
            parent[child] = node
        if parent[node] >= 0 and sibling >= 0:
            parent[sibling] = parent[node]
    return [above - 1 for above in parent[1:]]


def _path_of(drafted: EngineRound) -> Tensor:
    """Return the places of a round's root and accepted nodes, whose copies have arrived."""
    return drafted.path[: int(drafted.path_length)].long()


def _tree(drafted: EngineRound, path: Tensor, last: int) -> dict[str, Tensor]:
    """Return the nodes of a round, depth-first. Acceptance ends at the text's last token, at place ``last``."""
    above = torch.tensor(parents_of(drafted.first_child.tolist(), drafted.next_sibling.tolist()), dtype=torch.int64)
    # Where a child is certain it ties with its parent, and SGLang may keep it alone: no walk gets there.
    kept = (above >= -1).nonzero().flatten()
    place = torch.full((len(above) + 1,), -1)  # one slot more, for the root: -1 indexes it
    place[kept] = torch.arange(len(kept))
    order, parents = reorder_depth_first(place[above[kept]])
    order = kept[order]
    accepted = torch.zeros(len(above), dtype=torch.bool)
    accepted[path[1 : last - int(drafted.anchor) + 1] - 1] = True
    nodes = {
        "tokens": drafted.tokens[1:][order].long(),
        "parents": parents,
        "accepted": accepted[order],
        **{key: rows[1:][order] for key, rows in drafted.target.items()},
    }
    if (joint := drafted.joint_log_probs) is not None:
        of_parent = torch.where(above < 0, 0.0, joint[above])
        nodes["log_probs"] = (joint - of_parent).float()[order]
    return nodes
