"""The inference server: honest figures, swaps between rounds, and nothing that makes serving wait or fail."""

from __future__ import annotations

import functools
import itertools
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from aurora_rl.collectors.codec import checksum
from aurora_rl.collectors.hello import Hello
from aurora_rl.collectors.sink import TrajectorySink
from aurora_rl.collectors.sockets import bind, open_socket
from aurora_rl.collectors.weight_sync import WeightPublisher, WeightReceiver
from aurora_rl.envs import Completion, Request, SpecDecodeEnv, TransformersEngine
from aurora_rl.metrics import MetricsLog, MetricsReader
from aurora_rl.policies import Drafter, DrafterPolicy, HybridDrafter, Proposal, TargetParts, TreeShape
from aurora_rl.policies.eagle3 import Eagle3Drafter
from aurora_rl.policies.shape import ShapeController
from aurora_rl.server import DrafterFault, InferenceServer, _outcomes, measure_rounds
from aurora_rl.testing import tiny_target
from aurora_rl.throughput import ControlWindows, Round
from aurora_rl.trajectories import TrajectoryRecorder

VOCAB = 8
LAYERS = (0, 1)
DEPTH = 3
LOCAL = "tcp://127.0.0.1:*"
HELLO = Hello(1, "config", "head", LAYERS, "", "eagle3")


# ---- requests, their texts, and a drafter that knows them -------------------------------------------------------


def requests(count: int, budget: int = 24, length: int = 5) -> list[Request]:
    generator = torch.Generator().manual_seed(1)
    return [Request(i, torch.randint(0, VOCAB, (length + i % 3,), generator=generator), budget) for i in range(count)]


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
    return text(tuple(request.prompt.tolist()), request.max_new_tokens)


class Oracle(Drafter):
    """Proposes what the target is going to say, and may sleep over it."""

    vocab_size = VOCAB

    def __init__(self, known: Sequence[Request], nap: float = 0.0) -> None:
        super().__init__()
        self.feature_layers, self.nap = LAYERS, nap
        self.draft_vocab = torch.arange(VOCAB)
        # Beyond the budget too: what is drafted there is cut, not wrong.
        self._texts = [r.prompt.tolist() + text(tuple(r.prompt.tolist()), r.max_new_tokens + DEPTH + 1) for r in known]

    @classmethod
    def from_target(cls, parts: TargetParts, **options: object) -> Oracle:
        raise NotImplementedError

    def allocate(self, num_slots: int, max_length: int) -> None:
        self.cached = torch.zeros(num_slots, dtype=torch.int64)
        self._held: list[list[int]] = [[] for _ in range(num_slots)]

    def extend(self, slots: Tensor, tokens: Tensor, features: Tensor, num_new: Tensor) -> None:
        for slot, row, count in zip(slots.tolist(), tokens.tolist(), num_new.tolist(), strict=True):
            self._held[slot] = self._held[slot][: int(self.cached[slot])] + row[1 : count + 1]
        self.cached[slots] += num_new

    def propose(self, slots: Tensor, shape: TreeShape, generator: torch.Generator | None = None) -> Proposal:
        time.sleep(self.nap)
        rows = []
        for slot in slots.tolist():
            held = self._held[slot]  # all tokens but the first, which is in no pair
            (known,) = {tuple(t) for t in self._texts if t[1 : 1 + len(held)] == held}
            rows.append(known[1 + len(held) :][: shape.depth])
        tokens = torch.tensor(rows)
        return Proposal(tokens, torch.arange(-1, shape.depth - 1).expand_as(tokens), torch.zeros(tokens.shape))

    def unroll(self, batch: TensorDictBase, steps: int):
        raise NotImplementedError

    def context_logits(self, batch: TensorDictBase, wanted: Tensor) -> Tensor:
        raise NotImplementedError

    def published(self) -> dict[str, Tensor]:
        return {}

    def stage(self, weights: dict[str, Tensor]) -> Callable[[], None]:
        raise NotImplementedError


class Wrong(Oracle):
    """Proposes what the target is not going to say."""

    def propose(self, slots: Tensor, shape: TreeShape, generator: torch.Generator | None = None) -> Proposal:
        right = super().propose(slots, shape, generator)
        return right._replace(tokens=(right.tokens + 1) % VOCAB)


def eagle(seed: int = 0) -> Eagle3Drafter:
    torch.manual_seed(seed)
    made = Eagle3Drafter.from_target(TargetParts.of(model()), draft_vocab=torch.arange(6), feature_layers=LAYERS)
    made = made.double().eval().requires_grad_(False)
    for parameter in made.parameters():
        if parameter.ndim == 2:
            parameter.normal_(std=0.4)
    return made


# ---- a server on a tiny target ----------------------------------------------------------------------------------


class Plain(ControlWindows):
    """Never speculates."""

    def __init__(self) -> None:
        super().__init__(1.0, 1)

    @property
    def speculate(self) -> bool:
        return False


NO_WINDOWS = functools.partial(ControlWindows, 0.0, 32)


class Serving:
    def __init__(
        self,
        folder: Path,
        waiting: Sequence[Request],
        drafter: Drafter,
        *,
        slots: int = 1,
        windows: ControlWindows | None = None,
        note: Callable[[Completion], str] | None = None,
        depth: int = DEPTH,
        **options: object,
    ) -> None:
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
            on_completion=lambda completion: self.server.completed(completion),
        )
        self._path = folder / "metrics.jsonl"
        log = MetricsLog(self._path, "serve")
        self.server = InferenceServer(
            env, self.policy, windows=windows or NO_WINDOWS(), log=log, note=self._completed, **options
        )

    def _completed(self, completion: Completion) -> str:
        self.completions.append(completion)
        return self._note(completion) if self._note else "tiny"

    def run(self) -> InferenceServer:
        while self.server.step():
            pass
        return self.server

    def events(self, kind: str) -> list[dict]:
        return [event for event in MetricsReader(self._path).new() if event["event"] == kind]

    def check_texts(self) -> None:
        for completion in self.completions:
            assert completion.tokens.tolist() == truth(completion.request)


# ---- the figures ------------------------------------------------------------------------------------------------


def test_an_oracle_is_accepted_to_its_depth(tmp_path: Path) -> None:
    waiting = requests(5)
    serving = Serving(tmp_path, waiting, Oracle(waiting), slots=2)
    server = serving.run()
    serving.check_texts()
    # 24 tokens are six rounds of three drafted tokens and the bonus token.
    assert server.finished == [(24, 6)] * 5 and server.acceptance(0, 5) == DEPTH + 1
    assert all(r.speculative for r in server.rounds) and sum(r.tokens for r in server.rounds) == 5 * 24
    assert [r.request for r in server.rounds][:7] == [0] * 6 + [2]
    assert {r.occupied for r in server.rounds[:12]} == {2} and {r.occupied for r in server.rounds[12:]} == {1}
    event = serving.events("request")[0]
    expected = {
        "request": 0, "domain": "tiny", "tokens": 24, "terminated": False, "speculative_tokens": 24,
        "speculative_rounds": 6, "accepted": {"3": 6}, "versions": [0], "depth": 3,
    }  # fmt: skip
    assert {key: event[key] for key in expected} == expected
    summary = server.summary(failed=2, duration_s=1.5)
    assert summary["acceptance_length"] == {"first": 4.0, "last": 4.0}
    assert summary["speedup"] is None and summary["tokens_per_second"]["control"] is None  # no plain round was measured


def test_a_drafter_that_sleeps_shows_a_speedup_below_one(tmp_path: Path) -> None:
    waiting = requests(6)
    serving = Serving(tmp_path, waiting[:1], Oracle(waiting), windows=Plain())
    plain = [r.seconds for r in serving.run().rounds if not r.speculative]
    nap = max(20 * statistics.median(plain), 0.15)  # the least: far above what a busy machine adds to a round
    # The seed places the first window after 25 ms.
    serving = Serving(tmp_path, waiting, Oracle(waiting, nap), windows=ControlWindows(0.5, window=8, seed=31))
    server = serving.run()
    serving.check_texts()
    assert server.acceptance(0, 6) >= 2
    measured = server.rates()
    assert measured.control is not None and measured.speculative is not None
    # By acceptance alone it would be 2 or more.
    assert measured.speedup < 1


def test_windows_hold_for_whole_rounds_of_all_slots(tmp_path: Path) -> None:
    waiting = requests(6)
    # Naps, so that the run is long enough for the first window on any machine.
    serving = Serving(tmp_path, waiting, Oracle(waiting, 0.01), slots=3, windows=ControlWindows(0.5, 5, seed=31))
    server = serving.run()
    serving.check_texts()
    plain = [r for r in server.rounds if not r.speculative]
    assert plain and all(r.tokens == r.occupied for r in plain)  # every slot, one token each
    assert sum(r.tokens for r in server.rounds) == 6 * 24
    # Plain rounds are no rounds of the acceptance length.
    assert all(tokens <= 4 * rounds for tokens, rounds in server.finished)
    assert sum(tokens for tokens, _ in server.finished) == 6 * 24 - sum(r.tokens for r in plain)


@pytest.mark.parametrize("where", ["note", "cut", "round"])
def test_recording_is_charged_to_speculation(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nap, count = 0.02, 3
    if where != "note":
        recording = getattr(TrajectoryRecorder, where)

        def slow(*args: object) -> object:
            time.sleep(nap)
            return recording(*args)

        monkeypatch.setattr(TrajectoryRecorder, where, slow)
    waiting = requests(count, budget=8)
    serving = Serving(
        tmp_path, waiting, Oracle(waiting), windows=Plain(),
        note=(lambda completion: time.sleep(nap) or "tiny") if where == "note" else None,
    )  # fmt: skip
    began = time.perf_counter()
    server = serving.run()
    wall = time.perf_counter() - began
    plain = [r for r in server.rounds if not r.speculative]
    charged = [r for r in server.rounds if r.speculative]
    assert sum(r.tokens for r in plain) == count * 8 and all(r.tokens == 0 for r in charged)
    seconds = sum(r.seconds for r in charged)
    assert seconds >= nap * count * (8 if where == "round" else 1)
    # And to it alone: a second that both were charged would make these more than there were.
    assert sum(r.seconds for r in plain) + seconds <= wall


def test_prefill_is_charged_to_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nap, forward = 0.05, TransformersEngine._forward

    def slow(self: TransformersEngine, slots: Tensor, tokens: Tensor, *args: Tensor) -> tuple[Tensor, Tensor]:
        if tokens.shape[1] > DEPTH + 1:  # longer than any tree
            time.sleep(nap)
        return forward(self, slots, tokens, *args)

    monkeypatch.setattr(TransformersEngine, "_forward", slow)
    waiting = requests(5, budget=4, length=12)
    serving = Serving(tmp_path, waiting, Oracle(waiting), windows=Plain())
    began = time.perf_counter()
    server = serving.run()
    wall = time.perf_counter() - began
    assert serving.engine.prefill_seconds >= 5 * nap
    assert sum(r.seconds for r in server.rounds) <= wall - serving.engine.prefill_seconds


def test_summary(tmp_path: Path) -> None:
    server = Serving(tmp_path, [], eagle()).server
    assert server.summary(failed=0, duration_s=0.0) == {
        "requests": 0, "failed": 0, "swaps": 0, "swap_ms": {"p50": None, "max": None},
        "acceptance_length": {"first": None, "last": None},
        "tokens_per_second": {"control": None, "speculative": None}, "speedup": None,
        "dropped_trajectories": 0, "drafter_faults": 0,
        "duration_s": 0.0, "versions_served": [0],
    }  # fmt: skip
    # Twenty requests: a tenth is two of them, and the last quarter begins after fifteen.
    server.finished = [(3, 2), (6, 4), *[(100, 1)] * 16, (8, 3), (7, 2)]
    server.rounds = [
        Round(True, 1, 900, 1.0, 0), Round(False, 1, 1, 1.0, 14),
        Round(True, 1, 6, 2.0, 15), Round(False, 1, 2, 1.0, 19),
    ]  # fmt: skip
    server.swap_ms, server.versions = [4.0, 2.0, 9.0], [0, 1, 2, 5]
    assert server.summary(failed=3, duration_s=7.5) == {
        "requests": 20, "failed": 3, "swaps": 3, "swap_ms": {"p50": 4.0, "max": 9.0},
        "acceptance_length": {"first": 9 / 6, "last": 15 / 5},
        "tokens_per_second": {"control": 2.0, "speculative": 3.0}, "speedup": 1.5,
        "dropped_trajectories": 0, "drafter_faults": 0,
        "duration_s": 7.5, "versions_served": [0, 1, 2, 5],
    }  # fmt: skip


# ---- rounds and requests ----------------------------------------------------------------------------------------


def test_serving_rests_and_resumes(tmp_path: Path) -> None:
    waiting = requests(4, budget=6)
    serving = Serving(tmp_path, [], Oracle(waiting), slots=2)
    server = serving.server
    assert not server.step() and not server.step() and server.rounds == []
    serving.queue.append(waiting[0])
    assert server.step() and server.rounds[-1].occupied == 1
    serving.queue += waiting[1:3]  # the idle slot takes the next at once, in the middle of the first
    assert server.step() and server.step() and max(r.occupied for r in server.rounds) == 2
    serving.run()
    assert not server.step()
    serving.queue.append(waiting[3])
    serving.run()
    assert [c.request.id for c in serving.completions] == [0, 1, 2, 3]
    serving.check_texts()


def test_requests_that_come_of_completions(tmp_path: Path) -> None:
    # As the further turns of a conversation do: the queue is empty until the moment in which a request ends.
    waiting = requests(3, budget=6)
    later = waiting[1:]
    serving = Serving(
        tmp_path, waiting[:1], Oracle(waiting), note=lambda c: serving.queue.extend(later[:1]) or later.clear() or ""
    )
    later = later[:1]
    serving.run()
    assert [c.request.id for c in serving.completions] == [0, 1]
    serving.check_texts()


class OnTime(ShapeController):
    """Chains whose rounds take the given seconds by depth, whatever the clock says."""

    def __init__(self, *by_depth: float) -> None:
        super().__init__({1: {TreeShape(d): seconds for d, seconds in enumerate(by_depth)}})

    def observe(self, shape: TreeShape, occupied: int, seconds: float, *outcomes: Any) -> None:
        super().observe(shape, occupied, self._costs[1][shape], *outcomes)


def test_the_draft_lengthens_to_what_pays(tmp_path: Path) -> None:
    # 22 tokens end inside a path of three: five rounds of four tokens, and two drafted ones.
    waiting = requests(12, budget=22)
    shapes = OnTime(1.0, 1.3, 1.4, 1.5)
    serving = Serving(tmp_path, waiting, Oracle(waiting), slots=2, depth=1, shapes=shapes)
    server = serving.run()
    serving.check_texts()
    # By the first guess it does not pay: a probe of depth 1 finds that it does.
    (event,) = serving.events("shape")
    assert (event["depth"], event["width"], event["nodes"], event["occupied"]) == (3, 1, 3, 2)
    # The oracle is always right, and an end inside a path is no mistake: every trial of these depths was a hit.
    for hits, trials in shapes._likeliest:
        assert trials == pytest.approx(hits) and trials > 8
    assert server.finished[-2:] == [(22, 6)] * 2 and server.depth == 3


def test_a_useless_drafter_is_left_out_and_the_text_stays(tmp_path: Path) -> None:
    waiting = requests(12, budget=40)
    serving = Serving(tmp_path, waiting, Wrong(waiting), slots=2, shapes=OnTime(1.0, 1.5, 2.0, 2.5))
    server = serving.run()
    serving.check_texts()
    assert 0 in [event["depth"] for event in serving.events("shape")]
    drafted = [int((c.trajectory["rounds", "offset"].diff() > 0).sum()) for c in serving.completions]
    # A probe of 24 drafts at first; what it lost, half a round at each, forbids another for longer than this run.
    assert sum(drafted) == drafted[0] + drafted[1] == 24
    # What is not drafted for is the policy's doing, and no control window.
    assert all(r.speculative for r in server.rounds) and server.finished[-1] == (0, 0) and server.depth == 0
    assert serving.events("request")[-1]["accepted"] == {}


def test_control_windows_tell_the_controller_what_plain_decoding_takes(tmp_path: Path) -> None:
    waiting, shapes = requests(4, budget=40), ShapeController({1: {TreeShape(0): 1e-3, TreeShape(1): 1e-3}})
    serving = Serving(tmp_path, waiting, Oracle(waiting), depth=1, windows=Plain(), shapes=shapes)
    serving.run()
    assert shapes._since == float("inf") and shapes._pace[0] != 1.0  # rounds were seen, and none of them drafted


def test_siblings_and_ends_of_trees_are_told_apart(tmp_path: Path) -> None:
    done = TensorDict(
        {
            "draft": {
                # 0 and 1 are children of the root, 1 the likelier; 2 is a child of 0.
                "parents": torch.tensor([[-1, -1, 0]] * 6),
                "log_probs": torch.tensor([[-2.0, -1.0, -torch.inf]] * 6),
                "mask": torch.tensor([[True] * 3] * 5 + [[False] * 3]),
            },
            "next": {
                "verifier": {
                    "accepted": torch.tensor([[0, 0, 0], [1, 0, 0], [1, 0, 1], [0, 1, 0], [1, 0, 0], [0, 0, 0]]).bool(),
                    "bonus_token": torch.tensor([5, 5, 5, 5, -1, 5]),
                }
            },
        },
        batch_size=[6],
    )
    assert _outcomes(done, torch.ones(6, dtype=torch.bool)) == [
        ["refused"], ["sibling", "refused"], ["sibling", "likeliest", "undrafted"], ["likeliest", "undrafted"],
        ["sibling"],
    ]  # fmt: skip
    assert _outcomes(done, torch.arange(6) % 3 == 1) == [["sibling", "refused"], ["sibling"]]
    # Of n-grams alone, whose log-probabilities are all alike, the first of siblings is the likelier.
    done["draft", "log_probs"].fill_(-torch.inf)
    assert _outcomes(done, torch.arange(6) == 2) == [["likeliest", "likeliest", "undrafted"]]
    assert _outcomes(done, torch.arange(6) == 3) == [["sibling", "undrafted"]]


def test_what_lookup_finds_below_the_drafters_tree_is_no_trial_of_a_deeper_one(tmp_path: Path) -> None:
    waiting = requests(12, budget=22)
    none, short, long = (TreeShape(d, 1, 3) for d in range(3))
    shapes = ShapeController({1: {none: 1e3, short: 1.0, long: 1e6}})  # one depth pays, and no other
    serving = Serving(tmp_path, waiting, HybridDrafter(Oracle(waiting)), slots=2, depth=1, shapes=shapes)
    serving.run()
    serving.check_texts()
    accepted = {int(count) for event in serving.events("request") for count in event["accepted"]}
    assert max(accepted) == 2  # the texts do repeat themselves
    assert shapes._likeliest[0][1] > 8 and shapes._likeliest[1] == [0.0, 0.0]
    # Yet these tokens are delivered, and count for drafting against no speculation.
    assert shapes._below > 0 and shapes._tokens(short) > 1 + shapes.acceptance(short)[0]


class Broken(Oracle):
    """An oracle whose trees for one request are malformed in some way, from its third round on."""

    def __init__(self, known: Sequence[Request], bad: int, how: str) -> None:
        super().__init__(known)
        self._bad, self._how, self._rounds = known[bad].prompt.tolist(), how, 0

    def propose(self, slots: Tensor, shape: TreeShape, generator: torch.Generator | None = None) -> Proposal:
        proposal = super().propose(slots, shape, generator)
        for row, slot in enumerate(slots.tolist()):
            if self._held[slot][: len(self._bad) - 1] == self._bad[1:]:
                self._rounds += 1
                if self._rounds > 2:
                    return self._spoiled(proposal, row)
        return proposal

    def forget(self, slots: Tensor) -> None:
        if self._how.endswith("cannot forget") and self._rounds > 2:
            raise RuntimeError("cannot forget")
        super().forget(slots)

    def _spoiled(self, proposal: Proposal, row: int) -> Proposal:
        tokens, parents = proposal.tokens.clone(), proposal.parents.clone()
        if self._how == "cycle":
            parents[row, :2] = torch.tensor([1, 0])
        elif self._how == "late parent":
            parents[row, 1] = 2
        elif self._how == "twins":
            tokens[row, :2], parents[row, :2] = 7, -1
        elif self._how == "token":
            tokens[row, 1] = VOCAB
        elif self._how == "hole":
            mask = torch.ones_like(tokens, dtype=torch.bool)
            mask[row, 0] = False
            return proposal._replace(mask=mask)
        elif self._how in ("raises", "raises, and cannot forget"):
            raise RuntimeError("no more ideas")
        elif self._how == "mask of another shape":
            return proposal._replace(mask=torch.ones(1, 1, dtype=torch.bool))
        elif self._how == "mask of numbers":
            return proposal._replace(mask=torch.ones(tokens.shape))
        elif self._how == "tokens that are no integers":
            return proposal._replace(tokens=tokens.double())
        elif self._how in ("not a number", "above 0"):
            log_probs = proposal.log_probs.clone()
            log_probs[row, 1] = float("nan") if self._how == "not a number" else 0.5
            return proposal._replace(log_probs=log_probs)
        elif self._how == "no tensors":
            return proposal._replace(parents=None)
        elif self._how == "too many":
            return Proposal(*(torch.cat([part, part], 1) for part in proposal[:3]))
        return proposal._replace(tokens=tokens, parents=parents)


FAULTS = {
    "cycle": "malformed tree: node 0 has parent 1, which is no earlier node",
    "late parent": "malformed tree: node 1 has parent 2, which is no earlier node",
    "twins": "malformed tree: nodes 0 and 1 are siblings with the same token 7",
    "token": f"malformed tree: node 1 has token {VOCAB}, outside the target's vocabulary of {VOCAB}",
    "hole": "malformed tree: node 1 has parent 0, which is masked out",
    "raises": "RuntimeError('no more ideas')",
    "too many": "tokens, parents, log_probs and mask are [(1, 6), (1, 6), (1, 6), (1, 6)], not [1, 0..3]",
    "mask of another shape": "tokens, parents, log_probs and mask are [(1, 3), (1, 3), (1, 3), (1, 1)], not [1, 0..3]",
    "mask of numbers": "torch.int64, torch.int64, torch.float32, torch.float32, not int64, int64, bool and float",
    "tokens that are no integers": "torch.float64, torch.int64, torch.bool, torch.float32, not int64",
    "not a number": "a log-probability is above 0 or not a number",
    "above 0": "a log-probability is above 0 or not a number",
    "no tensors": "AttributeError(",
}


@pytest.mark.parametrize("how", FAULTS)
def test_a_broken_drafter_is_named_and_its_request_served_without_it(tmp_path: Path, how: str) -> None:
    waiting = requests(6, budget=22)
    serving = Serving(tmp_path, waiting, Broken(waiting, 1, how), slots=2)
    server = serving.run()
    serving.check_texts()
    (fault,) = serving.events("drafter_fault")  # of whoever shared the round, none
    assert fault["request"] == 1 and fault["fault"].startswith("Broken failed: ") and FAULTS[how] in fault["fault"]
    assert server.drafter_faults == server.summary(failed=0, duration_s=1.0)["drafter_faults"] == 1
    rounds = {event["request"]: event["speculative_rounds"] for event in serving.events("request")}
    # The oracle needs six rounds for these texts; of the broken request's only the first two were drafted for.
    assert rounds.pop(1) == 2 and set(rounds.values()) == {6}


class Guess(Broken):
    """Its drafts from the text are the right next token and a wrong one, or fail too."""

    min_depth = DEPTH
    calls = 0

    def propose(self, slots: Tensor, shape: TreeShape, generator: torch.Generator | None = None) -> Proposal:
        assert not shape.free
        return super().propose(slots, shape, generator)

    def from_text(self, text: Sequence[int], shape: TreeShape) -> Proposal:
        self.calls += 1
        if self._how == "twins":
            return Proposal(torch.tensor([[7, 7]]), torch.tensor([[-1, -1]]), torch.zeros(1, 2))
        (known,) = {tuple(t) for t in self._texts if t[: len(text)] == list(text)}
        right, behind = known[len(text) : len(text) + 2]
        tokens = torch.tensor([[right, (behind + 1) % VOCAB]])
        return Proposal(tokens, torch.tensor([[-1, 0]]), torch.full((1, 2), -torch.inf))


@pytest.mark.parametrize("how", ["raises", "cycle"])
def test_a_request_that_the_drafter_fails_goes_on_with_its_drafts_from_the_text(tmp_path: Path, how: str) -> None:
    waiting = requests(6, budget=22)
    serving = Serving(tmp_path, waiting, Guess(waiting, 1, how), slots=2)
    server = serving.run()
    serving.check_texts()
    (fault,) = serving.events("drafter_fault")
    assert fault["request"] == 1 and FAULTS[how] in fault["fault"] and server.drafter_faults == 1
    accepted = {event["request"]: event["accepted"] for event in serving.events("request")}
    # The prefill delivers a token, two rounds of the oracle four each, then every round the right token and the bonus.
    assert accepted.pop(1) == {"1": 7, "3": 2}
    assert all("1" not in rounds for rounds in accepted.values())


@pytest.mark.parametrize("free", [False, True])
def test_a_hybrid_whose_learned_half_raises_serves_n_grams(tmp_path: Path, free: bool) -> None:
    waiting, hybrid = requests(6, budget=40), HybridDrafter(eagle())
    called = []

    def raises(*args: object) -> None:
        called.append(args)
        raise RuntimeError("no more ideas")

    hybrid.learned.propose = hybrid.learned.extend = raises
    serving = Serving(tmp_path, waiting, hybrid, slots=2)
    serving.policy.shape = TreeShape(DEPTH, 1, DEPTH, free=free)
    server = serving.run()
    serving.check_texts()
    # Alone, n-grams need nothing of the learned half; beside it, each request meets its fault once.
    faulty = [] if free else list(range(6))
    assert sorted(event["request"] for event in serving.events("drafter_fault")) == faulty
    assert server.drafter_faults == len(faulty) and bool(called) != free
    assert sum(rounds * int(accepted) for event in serving.events("request")
               for accepted, rounds in event["accepted"].items()) > 20  # fmt: skip
    # Rounds in which n-grams found nothing count in the acceptance length: drafts were asked for.
    assert all(event["speculative_tokens"] == event["tokens"] for event in serving.events("request")) or not free


class Books(OnTime):
    """Notes what it is told of each round; every shape takes the second, but for those that are to be avoided."""

    def __init__(self, *shapes: TreeShape, avoid: Sequence[TreeShape] = ()) -> None:
        ShapeController.__init__(self, {1: {shape: 10.0 if shape in avoid else 1.0 for shape in shapes}})
        self.booked: list[tuple[TreeShape, list[list[str]]]] = []

    def observe(self, shape: TreeShape, occupied: int, seconds: float, *outcomes: Any) -> None:
        super().observe(shape, occupied, seconds, *outcomes)
        self.booked.append((shape, outcomes[0]))


NONE = TreeShape(0)


def test_rounds_of_a_request_that_the_drafter_fails_are_booked_as_plain(tmp_path: Path) -> None:
    waiting, chain = requests(3, budget=22), TreeShape(DEPTH)
    books = Books(NONE, chain)
    serving = Serving(tmp_path, waiting, Broken(waiting, 1, "raises"), shapes=books)
    serving.run()
    serving.check_texts()
    # The oracle's six rounds; the two before the fault, and a round for each of the tokens that are left; six again.
    assert [shape for shape, _ in books.booked] == [chain] * 8 + [NONE] * 14 + [chain] * 6
    assert all(outcomes == [["likeliest"] * DEPTH] for _, outcomes in books.booked[:5])
    assert all(outcomes == [] for shape, outcomes in books.booked if shape == NONE)


def test_a_request_that_the_drafter_fails_is_no_trial_of_the_round_that_it_shares(tmp_path: Path) -> None:
    waiting, chain = requests(2, budget=22), TreeShape(DEPTH)
    books = Books(NONE, chain)
    serving = Serving(tmp_path, waiting, Broken(waiting, 1, "raises"), slots=2, shapes=books)
    serving.run()
    serving.check_texts()
    assert [(shape, len(outcomes)) for shape, outcomes in books.booked] == [
        *[(chain, 2)] * 2, *[(chain, 1)] * 4, *[(NONE, 0)] * 10,
    ]  # fmt: skip


@pytest.mark.parametrize("arm", [True, False])
def test_n_grams_of_a_request_that_the_learned_half_fails_are_no_trial_of_it(tmp_path: Path, arm: bool) -> None:
    waiting, hybrid = requests(3, budget=40), HybridDrafter(eagle())

    def raises(*args: object) -> None:
        raise RuntimeError("no more ideas")

    hybrid.learned.propose = raises
    tree, free = TreeShape(DEPTH, 2, DEPTH), TreeShape(DEPTH, 1, DEPTH, free=True)
    books = Books(NONE, tree, *[free] * arm, avoid=(NONE, free))
    serving = Serving(tmp_path, waiting, hybrid, shapes=books)
    server = serving.run()
    serving.check_texts()
    assert serving.policy.shape == tree and server.drafter_faults == 3
    assert sum(r.tokens for r in server.rounds) > len(server.rounds)  # n-grams were accepted
    assert {shape for shape, _ in books.booked} == {free if arm else NONE}
    assert books._likeliest == books._siblings == books._drafted == [[0.0, 0.0]] * DEPTH
    assert (books._free[0][0] > 0) == arm


def test_a_drafter_whose_drafts_from_the_text_fail_too_goes_silent(tmp_path: Path) -> None:
    waiting = requests(6, budget=22)
    drafter = Guess(waiting, 1, "twins")
    serving = Serving(tmp_path, waiting, drafter, slots=2)
    serving.run()
    serving.check_texts()
    faults = serving.events("drafter_fault")
    assert [event["request"] for event in faults] == [1, 1] and drafter.calls == 1
    assert {e["request"]: e["speculative_rounds"] for e in serving.events("request")}[1] == 2


def test_drafts_from_the_text_alone_let_the_cache_be_and_it_catches_up(tmp_path: Path) -> None:
    waiting = requests(2, budget=22)
    serving = Serving(tmp_path, waiting, Guess(waiting, 1, "none"), slots=2)
    serving.policy.shape = TreeShape(2, 1, 2, free=True)
    for _ in range(3):
        serving.server.step()
    assert serving.policy.drafter.cached.tolist() == [0, 0]
    assert [r.tokens for r in serving.server.rounds] == [4] * 3  # two slots, the right token and the bonus
    serving.policy.shape = TreeShape(DEPTH)
    serving.server.step()
    assert serving.server.rounds[-1].tokens == 2 * (DEPTH + 1)
    serving.run()
    serving.check_texts()


def test_finding_nothing_is_a_trial_of_drafts_from_the_text(tmp_path: Path) -> None:
    class Finds(Guess):
        def from_text(self, text: Sequence[int], shape: TreeShape) -> Proposal:
            if len(text) % 2:
                return Proposal(*torch.zeros(2, 1, 0, dtype=torch.int64), torch.zeros(1, 0))
            return super().from_text(text, shape)

    free = TreeShape(2, 1, 2, free=True)
    shapes = ShapeController({1: {TreeShape(0): 1.0, free: 1e-3}}, memory=10**9)
    waiting = requests(1, budget=22)
    serving = Serving(tmp_path, waiting, Finds(waiting, 0, "none"), shapes=shapes)
    server = serving.run()
    serving.check_texts()
    hits, trials = shapes._free[0]
    found = sum(round_.tokens == 2 for round_ in server.rounds)
    assert trials == pytest.approx(len(server.rounds)) and 0 < found < trials and hits == pytest.approx(found, abs=1)


def test_a_drafter_that_cannot_forget_loses_every_request_and_the_texts_stay(tmp_path: Path) -> None:
    waiting = requests(6, budget=22)
    serving = Serving(tmp_path, waiting, Broken(waiting, 1, "raises, and cannot forget"), slots=2)
    serving.run()
    serving.check_texts()
    faults = serving.events("drafter_fault")
    assert sorted(event["request"] for event in faults) == [0, 1, 2, 3, 4, 5]  # once each
    assert all("RuntimeError('cannot forget')" in event["fault"] for event in faults)


def test_a_drafter_that_fails_slots_together_only_loses_them_and_is_named(tmp_path: Path) -> None:
    class Alone(Oracle):
        def propose(self, slots: Tensor, shape: TreeShape, generator: torch.Generator | None = None) -> Proposal:
            if len(slots) > 1:
                raise RuntimeError("one at a time")
            return super().propose(slots, shape, generator)

    waiting = requests(2, budget=22)
    serving = Serving(tmp_path, waiting, Alone(waiting), slots=2)
    serving.run()
    serving.check_texts()
    assert [event["request"] for event in serving.events("drafter_fault")] == [0, 1]
    assert {event["speculative_rounds"] for event in serving.events("request")} == {1}


def test_without_a_server_a_drafters_own_error_comes_through(tmp_path: Path) -> None:
    waiting = requests(1, budget=22)
    serving = Serving(tmp_path, waiting, Broken(waiting, 0, "raises"))
    serving.policy.on_fault = None
    with pytest.raises(RuntimeError, match="no more ideas"):
        serving.run()


def test_a_fault_while_rounds_are_measured_leaves_the_engine_free(tmp_path: Path) -> None:
    waiting = requests(2, budget=22)
    serving = Serving(tmp_path, waiting, Broken(waiting, 1, "not a number"), slots=2)
    with pytest.raises(DrafterFault, match="Broken failed: ValueError.*not a number"):
        measure_rounds(serving.engine, serving.policy, waiting[1], [TreeShape(0), TreeShape(DEPTH)])
    assert not len(serving.engine.store.occupied) and serving.policy.shape == TreeShape(DEPTH)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyError("d2t")])
def test_weights_that_a_drafter_fails_to_stage_are_rejected(tmp_path: Path, error: Exception) -> None:
    class Receiver:
        rejected: list[tuple[int, str]] = []
        waiting = [(1, TensorDict(eagle(1).published(), batch_size=[]))]

        def latest(self) -> tuple[int, TensorDict] | None:
            return self.waiting.pop() if self.waiting else None

        def reject(self, version: int, reason: str) -> None:
            self.rejected.append((version, reason))

    class Fails(Oracle):
        def stage(self, weights: dict[str, Tensor]) -> Callable[[], None]:
            raise error

    receiver, waiting = Receiver(), requests(3)
    serving = Serving(tmp_path, waiting, Fails(waiting), receiver=receiver)
    serving.run()
    serving.check_texts()
    assert receiver.rejected == [(1, repr(error))]
    assert [event["reason"] for event in serving.events("swap_failed")] == [repr(error)]


def test_measure_rounds_leaves_no_trace(tmp_path: Path) -> None:
    waiting = requests(3)
    serving = Serving(tmp_path, waiting, eagle(), slots=3)
    shapes = ShapeController.candidates(TreeShape(DEPTH))
    costs = measure_rounds(serving.engine, serving.policy, waiting[2], shapes, repeats=2)
    assert sorted(costs) == [1, 2, 3] and all(list(by_shape) == shapes for by_shape in costs.values())
    for count, by_shape in costs.items():
        seconds = [by_shape[shape] for shape in shapes]
        assert 0 < seconds[0] and seconds == sorted(seconds)  # nothing that does more is cheaper
        assert count == 1 or by_shape[shapes[1]] >= costs[count - 1][shapes[1]]
    assert serving.policy.shape == TreeShape(DEPTH)
    assert serving.engine.store.lengths.tolist() == [0, 0, 0] and serving.engine.prefill_seconds == 0
    fresh = Serving(tmp_path / "fresh", waiting, eagle(), slots=3)
    # The same drafts as a server that measured nothing, hence the same acceptance.
    assert serving.run().finished == fresh.run().finished
    serving.check_texts()


def test_measured_costs_are_those_of_undisturbed_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serving = Serving(tmp_path, waiting := requests(1), eagle(), slots=1)
    policy, shapes = serving.policy, ShapeController.candidates(TreeShape(DEPTH))
    clock, rounds, forward = [0.0], itertools.count(), policy.forward

    def timed(td: TensorDict) -> TensorDict:
        number = next(rounds)
        # A machine that slows down, holds up a round in nine, and hurries another.
        clock[0] += (1 + policy.shape.depth) * (1 + number / 200) * {4: 5.0, 6: 0.3}.get(number % 9, 1.0)
        return forward(td)

    monkeypatch.setattr(policy, "forward", timed)
    monkeypatch.setattr("aurora_rl.server.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    seconds = measure_rounds(serving.engine, policy, waiting[0], shapes)[1]
    assert [seconds[shape] / seconds[shapes[0]] for shape in shapes] == pytest.approx([1, 2, 3, 4], rel=0.05)


# ---- weights from the wire --------------------------------------------------------------------------------------


def endless(known: Sequence[Request]) -> Iterator[Request]:
    number = 0
    while True:
        request = known[number % len(known)]
        yield Request(number, request.prompt, request.max_new_tokens)
        number += 1


class Wire:
    """A publisher and a receiver over a socket, as between the two processes."""

    def __init__(self) -> None:
        self.publisher = WeightPublisher(LOCAL, hello=HELLO)
        self.receiver = WeightReceiver(self.publisher.address, hello=HELLO, heartbeat_s=0.05, name="engine")

    def close(self) -> None:
        self.receiver.close()
        self.publisher.close()


@pytest.fixture
def wire() -> Iterator[Wire]:
    made = Wire()
    yield made
    made.close()


def serve_until(serving: Serving, source: Iterator[Request], condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        while len(serving.queue) < 3:
            serving.queue.append(next(source))
        assert serving.server.step()


def test_swaps_while_requests_are_in_flight(tmp_path: Path, wire: Wire) -> None:
    source, publisher = endless(requests(5)), wire.publisher
    serving = Serving(tmp_path, [], eagle(), slots=3, receiver=wire.receiver)
    server = serving.server
    serve_until(serving, source, lambda: len(serving.completions) >= 2)
    for version in (1, 2, 3):
        publisher.publish(version, eagle(version).published())
        serve_until(serving, source, lambda version=version: publisher.wait_ack(version, 0))
    serving.queue.clear()
    serving.run()

    # Acknowledged with the checksum of what the drafter holds, which is that of what was published.
    status = publisher.engines["engine"]
    assert (status.acknowledged, status.serving, status.rejected) == (3, 3, None)
    assert checksum(serving.policy.drafter.published()) == checksum(eagle(3).published())
    assert server.versions == [0, 1, 2, 3] and len(server.swap_ms) == 3 and status.swap_ms == server.swap_ms[-1]
    assert [event["version"] for event in serving.events("swap")] == [1, 2, 3]
    # None dropped, all right: every request that was taken is among the completions.
    assert sorted(c.request.id for c in serving.completions) == list(range(len(serving.completions)))
    assert len(server.finished) == len(serving.completions) and serving.engine.store.lengths.tolist() == [0, 0, 0]
    serving.check_texts()
    # Recorded: versions rise within a request, and each swap fell into the middle of one.
    versions = [c.trajectory["rounds", "policy_version"].tolist() for c in serving.completions]
    assert all(v == sorted(v) for v in versions)
    pairs = {pair for v in versions for pair in zip(v, v[1:], strict=False) if pair[0] != pair[1]}
    assert {(0, 1), (1, 2), (2, 3)} <= pairs
    assert all(torch.equal(c.trajectory["rounds", "cache_version"], c.trajectory["rounds", "policy_version"])
               for c in serving.completions)  # fmt: skip
    assert server.summary(failed=0, duration_s=1.0)["versions_served"] == [0, 1, 2, 3]


def test_weights_of_another_shape_are_rejected_and_serving_goes_on(tmp_path: Path, wire: Wire) -> None:
    source, publisher = endless(requests(3)), wire.publisher
    serving = Serving(tmp_path, [], eagle(), slots=2, receiver=wire.receiver)
    before = checksum(serving.policy.drafter.published())
    wrong = eagle(1).published()
    wrong["lm_head.weight"] = wrong["lm_head.weight"][:-1]
    publisher.publish(1, wrong)
    serve_until(serving, source, lambda: any(s.rejected for s in publisher.engines.values()))
    version, reason = publisher.engines["engine"].rejected
    assert version == 1 and "tensor 'lm_head.weight' has shape (5, 16), this drafter needs (6, 16)" in reason
    assert serving.policy.version == 0 and checksum(serving.policy.drafter.published()) == before
    assert serving.server.swap_ms == [] and serving.server.versions == [0]
    (event,) = serving.events("swap_failed")
    assert event["version"] == 1 and event["reason"] == reason
    publisher.publish(2, eagle(2).published())  # better ones are taken
    serve_until(serving, source, lambda: publisher.wait_ack(2, 0))
    assert serving.server.versions == [0, 2]
    serving.queue.clear()
    serving.run()
    serving.check_texts()


def test_acknowledgements_keep_the_order_of_the_swaps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Receiver:
        """Two versions in neighbouring rounds."""

        waiting = [(v, TensorDict(eagle(v).published(), batch_size=[])) for v in (2, 1)]
        acknowledged: list[tuple[int, str]] = []

        def latest(self) -> tuple[int, TensorDict] | None:
            return self.waiting.pop() if self.waiting else None

        def acknowledge(self, version: int, digest: str, swap_ms: float) -> None:
            self.acknowledged.append((version, digest))

    first = threading.Event()

    def slow_at_first(tensors: dict[str, Tensor]) -> str:
        if not first.is_set():
            first.set()
            time.sleep(0.2)  # time enough to swap in the second and hash it
        return checksum(tensors)

    monkeypatch.setattr("aurora_rl.server.checksum", slow_at_first)
    receiver = Receiver()
    serving = Serving(tmp_path, [], eagle(), receiver=receiver)
    serve_until(serving, endless(requests(3)), lambda: len(receiver.acknowledged) == 2)
    # An engine that reported 2 and then 1 would be sent version 2 again.
    assert receiver.acknowledged == [(v, checksum(eagle(v).published())) for v in (1, 2)]


def test_nobody_listens(tmp_path: Path) -> None:
    # An address at which nothing is: what cannot be sent is dropped and counted, and every answer is given.
    socket, context = open_socket(0, None)
    address = bind(socket, LOCAL)
    socket.close()
    context.term()
    sink = TrajectorySink(address, hello=HELLO, capacity=2)
    receiver = WeightReceiver(address, hello=HELLO)
    waiting = requests(5)
    serving = Serving(tmp_path, waiting, Oracle(waiting), slots=2, sink=sink, receiver=receiver)
    server = serving.run()
    assert len(serving.completions) == 5 and server.summary(failed=0, duration_s=1.0)["dropped_trajectories"] == 3
    assert sink.queued == 2
    serving.check_texts()
    receiver.close()
    sink.close(timeout=0.0)
    assert server.summary(failed=0, duration_s=1.0)["dropped_trajectories"] == 5
