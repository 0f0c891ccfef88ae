"""A server on a tiny target, and a drafter that knows the texts which that target will say."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from scripted_drafter import ScriptedDrafter
from tensordict import TensorDict
from torch import Tensor

from aurora_rl.collectors.handshake import Handshake
from aurora_rl.envs import Completion, Request, SamplingParams, SpecDecodeEnv, TransformersEngine
from aurora_rl.policies import Drafter, DrafterPolicy, Proposal, TargetParts, TreeShape
from aurora_rl.policies.eagle3 import Eagle3Drafter
from aurora_rl.policies.tree_controller import TreeController
from aurora_rl.serving.server import InferenceServer
from aurora_rl.telemetry.log import MetricsLog, MetricsReader
from aurora_rl.telemetry.rates import BaselineWindows
from aurora_rl.testing import tiny_target

VOCAB = 8
LAYERS = (0, 1)
DEPTH = 3
LOCAL = "tcp://127.0.0.1:*"
HANDSHAKE = Handshake(1, "config", "head", LAYERS, "", "eagle3")


# ---- requests, their texts, and a drafter that knows them -------------------------------------------------------


def requests(count: int, budget: int = 24, length: int = 5) -> list[Request]:
    generator = torch.Generator().manual_seed(1)
    sampling = SamplingParams(max_tokens=budget)
    return [Request(i, torch.randint(0, VOCAB, (length + i % 3,), generator=generator), sampling) for i in range(count)]


@functools.cache
def model():
    return tiny_target(vocab_size=VOCAB)


@functools.cache
def text(prompt: tuple[int, ...], count: int) -> list[int]:
    """The target's own greedy continuation."""
    tokens = torch.tensor(prompt)[None]
    mask = torch.ones_like(tokens)
    out = model().generate(tokens, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0)
    return out[0, len(prompt) :].tolist()


def truth(request: Request) -> list[int]:
    return text(tuple(request.prompt.tolist()), request.sampling_params.max_tokens)


class Oracle(ScriptedDrafter):
    """Proposes what the target is going to say, and may sleep over it."""

    vocab_size = VOCAB

    def __init__(self, known: Sequence[Request], nap: float = 0.0) -> None:
        super().__init__()
        self.feature_layers, self.nap = LAYERS, nap
        self.draft_vocab = torch.arange(VOCAB)
        # Beyond the budget too: what is drafted there is cut, not wrong.
        self._texts = [
            r.prompt.tolist() + text(tuple(r.prompt.tolist()), r.sampling_params.max_tokens + DEPTH + 1) for r in known
        ]

    def propose(self, slots: Tensor, shape: TreeShape, generator: torch.Generator | None = None) -> Proposal:
        time.sleep(self.nap)
        rows = []
        for slot in slots.tolist():
            held = self._held[slot]  # all tokens but the first, which is in no pair
            (known,) = {tuple(t) for t in self._texts if t[1 : 1 + len(held)] == held}
            rows.append(known[1 + len(held) :][: shape.depth])
        tokens = torch.tensor(rows)
        return Proposal(tokens, torch.arange(-1, shape.depth - 1).expand_as(tokens), torch.zeros(tokens.shape))


class Wrong(Oracle):
    """Proposes what the target is not going to say."""

    def propose(self, slots: Tensor, shape: TreeShape, generator: torch.Generator | None = None) -> Proposal:
        right = super().propose(slots, shape, generator)
        return right._replace(tokens=(right.tokens + 1) % VOCAB)


def eagle(seed: int = 0) -> Eagle3Drafter:
    torch.manual_seed(seed)
    drafter = Eagle3Drafter.from_target(TargetParts.of(model()), draft_vocab=torch.arange(6), feature_layers=LAYERS)
    drafter = drafter.double().eval().requires_grad_(False)
    for parameter in drafter.parameters():
        if parameter.ndim == 2:
            parameter.normal_(std=0.4)
    return drafter


# ---- a server on a tiny target ----------------------------------------------------------------------------------


class Inbox:
    """In place of a receiver: brings the weights that are put into it, and keeps what is answered."""

    error = None

    def __init__(self, *waiting: tuple[int, dict[str, Tensor]]) -> None:
        self.waiting = list(waiting)
        self.acknowledged: list[tuple[int, str]] = []
        self.rejected: list[tuple[int, str]] = []

    def latest(self) -> tuple[int, TensorDict] | None:
        if not self.waiting:
            return None
        version, weights = self.waiting.pop(0)
        return version, TensorDict(weights, batch_size=[])

    def acknowledge(self, version: int, checksum: str, swap_ms: float) -> None:
        self.acknowledged.append((version, checksum))

    def reject(self, version: int, reason: str) -> None:
        self.rejected.append((version, reason))

    def close(self) -> None:
        """Nothing is open."""


class Plain(BaselineWindows):
    """Never speculates."""

    def __init__(self) -> None:
        super().__init__(1.0, 1)

    @property
    def speculate(self) -> bool:
        return False


NO_WINDOWS = functools.partial(BaselineWindows, 0.0, 32)


def endless(known: Sequence[Request]) -> Iterator[Request]:
    """The requests again and again, numbered on."""
    for number in itertools.count():
        request = known[number % len(known)]
        yield Request(number, request.prompt, request.sampling_params)


class Serving:
    def __init__(
        self,
        folder: Path,
        waiting: Sequence[Request],
        drafter: Drafter,
        *,
        slots: int = 1,
        windows: BaselineWindows | None = None,
        note: Callable[[Completion], str] | None = None,
        depth: int = DEPTH,
        second_drafter: Drafter | None = None,
        second_version: int = 0,
        **options: object,
    ) -> None:
        # Not by SpeculativeDecoder: no copy of the drafter serves, as tests look into it, and there may be two.
        self.queue = list(waiting)
        self.completions: list[Completion] = []
        self._note = note
        self.engine = TransformersEngine(
            tiny_target(vocab_size=VOCAB), num_slots=slots, max_length=64, feature_layers=LAYERS
        )
        self.policy = DrafterPolicy(drafter, self.engine.store, num_nodes=DEPTH, shape=TreeShape(depth))
        env = SpecDecodeEnv(
            self.engine,
            lambda: self.queue.pop(0) if self.queue else None,
            num_nodes=DEPTH,
        )
        if second_drafter is not None:
            options["second_policy"] = DrafterPolicy(
                second_drafter, self.engine.store, num_nodes=DEPTH, shape=TreeShape(depth), version=second_version
            )
        log = MetricsLog(folder / "metrics.jsonl", "serve")
        self._reader, self._events = MetricsReader(log.path), list[dict]()
        self.server = InferenceServer(
            env, self.policy, windows=windows or NO_WINDOWS(), log=log, note=self._completed, **options
        )
        self.server.stats.rounds = []  # each by itself, not the sums

    def _completed(self, completion: Completion) -> str:
        self.completions.append(completion)
        return self._note(completion) if self._note else "tiny"

    def run(self) -> InferenceServer:
        while self.server.step():
            pass
        return self.server

    def run_until(self, done: Callable[[], bool], known: Sequence[Request], most: int = 5000) -> int:
        """Serve these requests again and again, and return after how many rounds what is waited for has happened."""
        source = endless(known)
        for number in range(most):
            if done():
                return number
            while len(self.queue) < 2 * self.engine.num_slots:
                self.queue.append(next(source))
            assert self.server.step()
        raise AssertionError(f"it did not happen in {most} rounds")

    def events(self, kind: str) -> list[dict]:
        self._events += self._reader
        return [event for event in self._events if event["event"] == kind]

    def check_texts(self) -> None:
        for completion in self.completions:
            assert completion.tokens.tolist() == truth(completion.request)


class OnTime(TreeController):
    """Chains whose rounds take the given seconds by depth, whatever the clock says."""

    def __init__(self, *by_depth: float) -> None:
        super().__init__({1: {TreeShape(d): seconds for d, seconds in enumerate(by_depth)}})

    def observe(self, shape: TreeShape, occupied: int, seconds: float, *outcomes: Any) -> None:
        super().observe(shape, occupied, self._costs[1][shape], *outcomes)
