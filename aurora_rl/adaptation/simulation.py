"""An arm on a recorded stream: the real learner in this process, fed in the order in which requests were served."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from aurora_rl.adaptation.metrics import StreamCounts
from aurora_rl.adaptation.recorded_stream import Parts
from aurora_rl.policies.drafter import Drafter
from aurora_rl.policies.lookup import EarlierAnswers
from aurora_rl.policies.merging import Chances
from aurora_rl.policies.tree_shape import TreeShape
from aurora_rl.telemetry.engine_counts import EngineCounts
from aurora_rl.training.gate import replay
from aurora_rl.training.learner import Learner
from aurora_rl.training.offline import Trajectories

_AT_ONCE = 16  # requests replayed together where none depends on another, while no weights change
_SAVED_EVERY = 40  # requests


class LocalWire:
    """Both ends of the wire of a learner in this process: its collector and its publisher.

    Attributes:
        waiting: Trajectories that the learner has not taken.
        newest: The newest weights and their version; None once they are taken.
    """

    handshake_error: str | None = None
    error: str | None = None
    refused = 0  # nobody connects
    overtaken = False
    served: tuple[()] = ()  # published weights are taken

    def __init__(self) -> None:
        self.waiting: list[TensorDictBase] = []
        self.rejections, self.engines = Counter[str](), EngineCounts()
        self.next_version = 1
        self.newest: tuple[int, dict[str, Tensor]] | None = None

    def poll(self, timeout_s: float = 0.0) -> list[TensorDictBase]:
        """Take all that wait; nobody else could bring more meanwhile."""
        taken, self.waiting = self.waiting, []
        return taken

    def take_deletions(self) -> dict[str, float]:
        """Return none: nobody asks for any."""
        return {}

    def publish(self, version: int, tensors: Mapping[str, Tensor], /) -> None:
        """Keep weights to be taken."""
        self.newest, self.next_version = (version, dict(tensors)), version + 1

    def rejected_by(self, version: int) -> dict[str, str]:
        """Return none: what is published is taken."""
        return {}

    def withdraw(self, version: int) -> bool:
        """Return False: what is published is served."""
        return False

    def close(self) -> None:
        """Forget what waits and what was published."""
        self.waiting.clear()
        self.newest = None

    shutdown = close


@dataclass(slots=True)
class ArmRun:
    """Result of an arm on a stream, request by request.

    Attributes:
        tokens: Committed tokens.
        rounds: Rounds that they would have taken.
        version: Version of the weights that drafted; 0 is the first.
        steps: Optimizer steps that the learner had taken when the request ended.
        learner_seconds: CPU time of the learner, its gate included.
    """

    tokens: list[int] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    version: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    learner_seconds: float = field(default=0.0, compare=False)

    @property
    def counts(self) -> StreamCounts:
        """Tokens and rounds."""
        return StreamCounts(self.tokens, self.rounds)


def simulate(
    stream: Trajectories | Parts,
    serving: Drafter,
    shape: TreeShape,
    *,
    learner: Learner | None = None,
    wire: LocalWire | None = None,
    earlier: EarlierAnswers | None = None,
    by_part: bool = True,
    pace: float = math.inf,
    num_slots: int = 1,
    points: Collection[int] = (),
    keep: Callable[[int, dict[str, Tensor]], None] = lambda request, weights: None,
    tell: Callable[[int, ArmRun], None] = lambda done, run: None,
    save: Callable[[dict[str, Any]], None] = lambda state: None,
    state: Mapping[str, Any] | None = None,
) -> ArmRun:
    """Serve a stream with an arm, exactly in what its drafts would have had accepted.

    The text of a request does not depend on the drafter (see :func:`~aurora_rl.training.gate.replay`), so that one
    recording serves every arm. The learner gets each request as it ends, takes its steps before the next request ends,
    and swaps as it would live.

    Args:
        stream: Recorded requests, in order, or their parts, which then are served and learned from as requests are.
        serving: Drafter as it is served.
        shape: Trees that it drafts.
        learner: Learner on ``wire``; None leaves the drafter as it is.
        wire: Where the learner takes trajectories from and puts weights.
        earlier: Answers in which lookup searches, at first empty.
        by_part: Whether the learner gets each part as it ends, or requests that have ended.
        pace: Optimizer steps that the learner takes in the time of what it gets. What it does not use is lost.
        num_slots: Requests that are decoded at the same time, hence do not find each other's answers.
        points: Numbers of served requests after which the weights are kept.
        keep: Called with such a number and the weights that serve then.
        tell: Called now and then with the number of requests done, and the run so far.
        save: Called every 40 requests with what is needed to go on from there, to be written at once.
        state: What ``save`` got, if the arm goes on; all other arguments are as at its start.
    """
    run, version, owed, chances = ArmRun(), 0, 0.0, Chances()
    if state is not None:
        run, version, owed = ArmRun(**state["run"]), state["version"], state["owed"]
        torch.set_rng_state(state["random"])
        chances.load_state_dict(state["chances"])
        if learner is not None:
            learner.load_state_dict(state["learner"])
            serving.install(state["learner"]["serving"])
        if earlier is not None:
            add_answers(earlier, stream, 0, len(run.tokens))
    saved = len(run.tokens)
    pending: list[TensorDictBase] = []

    def flush() -> None:
        if not pending:
            return
        first = len(run.tokens)
        replayed = replay(serving, pending, shape, earlier, chances)
        run.tokens += replayed.tokens.tolist()
        run.rounds += replayed.rounds.tolist()
        pending.clear()
        if earlier is not None:
            add_answers(earlier, stream, first, len(run.tokens))

    for done in range(saved + 1, len(stream) + 1):
        trajectory = stream[done - 1]
        pending.append(trajectory)
        run.version.append(version)
        lesson = trajectory if by_part else _ended(stream, done - 1)
        if learner is not None and lesson is not None:
            assert wire is not None, "a learner needs its wire"
            wire.waiting.append(lesson)
            began = time.process_time()
            owed = _learn(learner, owed + pace)
            run.learner_seconds += time.process_time() - began
            if wire.newest is not None:
                flush()
                (version, weights), wire.newest = wire.newest, None
                serving.install(weights)
        run.steps.append(0 if learner is None else learner.steps)
        if len(pending) >= (_AT_ONCE if earlier is None else num_slots) or done in points:
            flush()
            tell(done, run)
        if done in points:
            keep(done, serving.published())
        if done - saved >= _SAVED_EVERY and not pending:  # a flush of its own would change what lookup finds
            saved, learned = done, None if learner is None else learner.state_dict()
            save(
                dict(
                    run=asdict(run), version=version, owed=owed, random=torch.get_rng_state(), learner=learned,
                    chances=chances.state_dict(),
                )
            )  # fmt: skip
    flush()
    tell(len(stream), run)
    return run


def _learn(learner: Learner, owed: float) -> float:
    """Let a learner take so many optimizer steps if it has use for them; return what is owed on."""
    while owed >= 1:
        before = learner.steps + learner.skipped
        if not learner.step(wait_s=0.0):
            return 0.0
        owed -= learner.steps + learner.skipped - before
    return owed


def _ended(stream: Trajectories | Parts, index: int) -> TensorDictBase | None:
    return stream.ended(index) if isinstance(stream, Parts) else stream[index]


def add_answers(earlier: EarlierAnswers, stream: Trajectories | Parts, first: int, end: int) -> None:
    """Add the answers to the requests of a stream that end from place ``first`` to before ``end``."""
    for place in range(first, end):
        if (request := _ended(stream, place)) is not None:
            sequence = request["sequence"]
            earlier.add(sequence["tokens"][int(sequence["prompt_length"]) :].numpy())
