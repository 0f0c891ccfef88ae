"""Drafters that fail: they are named, their requests are served, and the figures stay what they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle_server import DEPTH, VOCAB, OnTime, Oracle, Serving, eagle, requests, truth
from tensordict import TensorDict
from torch import Tensor

from aurora_rl.envs import Request
from aurora_rl.policies import Proposal, TreeShape
from aurora_rl.policies.lookup import ngram_tree
from aurora_rl.policies.tree_controller import TreeController


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
    "not a number": "has the log-probability nan, not a number of at most 0",
    "above 0": ", not a number of at most 0",
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
    assert server.stats.drafter_faults == server.stats.summary(failed=0, duration_s=1.0)["drafter_faults"] == 1
    rounds = {event["request"]: event["speculative_rounds"] for event in serving.events("request")}
    # The oracle needs six rounds for these texts; of the broken request's only the first two were drafted for.
    assert rounds.pop(1) == 2 and set(rounds.values()) == {6}


def lookup_rounds(request: Request, held: int, shape: TreeShape) -> int:
    """Rounds that lookup alone needs from so many tokens of the completion on."""
    completion, rounds = truth(request), 0
    while held < request.sampling_params.max_tokens:
        tree, node = ngram_tree(request.prompt.tolist() + completion[:held], shape), -1
        children = set(zip(tree.parents, tree.tokens, strict=True))
        for token in completion[held:]:
            held += 1
            if (node, token) not in children:
                break
            node = list(zip(tree.parents, tree.tokens, strict=True)).index((node, token))
        rounds += 1
    return rounds


@pytest.mark.parametrize("how", ["raises", "cycle"])
def test_a_request_that_the_drafter_fails_goes_on_with_lookup(tmp_path: Path, how: str) -> None:
    waiting, shape = requests(6, budget=40), TreeShape(DEPTH, 1, DEPTH, lookup=2)
    serving = Serving(tmp_path, waiting, Broken(waiting, 1, how), slots=2)
    serving.policy.shape = shape
    server = serving.run()
    serving.check_texts()
    (fault,) = serving.events("drafter_fault")
    assert fault["request"] == 1 and FAULTS[how] in fault["fault"] and server.stats.drafter_faults == 1
    (trajectory,) = (completion.trajectory for completion in serving.completions if completion.request.id == 1)
    # Two rounds of the oracle deliver four tokens each.
    rounds = 2 + lookup_rounds(waiting[1], 8, shape.without_drafter(2))
    assert len(trajectory["rounds", "anchor"]) == rounds < 2 + 32


@pytest.mark.parametrize("alone", [False, True])
def test_a_drafter_that_raises_leaves_lookup(tmp_path: Path, alone: bool) -> None:
    waiting, drafter = requests(6, budget=40), eagle()
    called = []

    def raises(*args: object) -> None:
        called.append(args)
        raise RuntimeError("no more ideas")

    drafter.propose = drafter.extend = raises
    serving = Serving(tmp_path, waiting, drafter, slots=2)
    serving.policy.shape = TreeShape(DEPTH, 1, DEPTH, lookup=2, lookup_only=alone)
    server = serving.run()
    serving.check_texts()
    # Alone, lookup needs nothing of the drafter; together, each request meets the drafter's fault once.
    faulty = [] if alone else list(range(6))
    assert sorted(event["request"] for event in serving.events("drafter_fault")) == faulty
    assert server.stats.drafter_faults == len(faulty) and bool(called) != alone
    assert sum(rounds * int(accepted) for event in serving.events("request")
               for accepted, rounds in event["accepted"].items()) > 20  # fmt: skip
    # Rounds in which lookup found nothing count in the acceptance length: drafts were asked for.
    assert all(event["speculative_tokens"] == event["tokens"] for event in serving.events("request")) or not alone


class Books(OnTime):
    """Notes what it is told of each round; every shape takes the second, but for those that are to be avoided."""

    def __init__(self, *shapes: TreeShape, avoid: Sequence[TreeShape] = ()) -> None:
        TreeController.__init__(self, {1: {shape: 10.0 if shape in avoid else 1.0 for shape in shapes}})
        self.booked: list[tuple[TreeShape, list[list[str]]]] = []

    def observe(self, shape: TreeShape, occupied: int, seconds: float, *outcomes: Any) -> None:
        super().observe(shape, occupied, seconds, *outcomes)
        self.booked.append((shape, outcomes[0]))


NONE = TreeShape(0)


def test_rounds_of_a_request_that_the_drafter_fails_are_booked_as_plain(tmp_path: Path) -> None:
    waiting, chain = requests(3, budget=22), TreeShape(DEPTH)
    books = Books(NONE, chain)
    serving = Serving(tmp_path, waiting, Broken(waiting, 1, "raises"), controller=books)
    serving.run()
    serving.check_texts()
    # The oracle's six rounds; the two before the fault, and a round for each of the tokens that are left; six again.
    assert [shape for shape, _ in books.booked] == [chain] * 8 + [NONE] * 14 + [chain] * 6
    assert all(outcomes == [["likeliest"] * DEPTH] for _, outcomes in books.booked[:5])
    assert all(outcomes == [] for shape, outcomes in books.booked if shape == NONE)


def test_a_request_that_the_drafter_fails_is_no_trial_of_the_round_that_it_shares(tmp_path: Path) -> None:
    waiting, chain = requests(2, budget=22), TreeShape(DEPTH)
    books = Books(NONE, chain)
    serving = Serving(tmp_path, waiting, Broken(waiting, 1, "raises"), slots=2, controller=books)
    serving.run()
    serving.check_texts()
    assert [(shape, len(outcomes)) for shape, outcomes in books.booked] == [
        *[(chain, 2)] * 2, *[(chain, 1)] * 4, *[(NONE, 0)] * 10,
    ]  # fmt: skip


@pytest.mark.parametrize("arm", [True, False])
def test_lookup_for_a_request_that_the_drafter_fails_is_no_trial_of_the_drafter(tmp_path: Path, arm: bool) -> None:
    waiting, drafter = requests(3, budget=40), eagle()

    def raises(*args: object) -> None:
        raise RuntimeError("no more ideas")

    drafter.propose = raises
    tree = TreeShape(DEPTH, 2, DEPTH, lookup=2)
    alone = tree.without_drafter(2)
    books = Books(NONE, tree, *[alone] * arm, avoid=(NONE, alone))
    serving = Serving(tmp_path, waiting, drafter, controller=books)
    server = serving.run()
    serving.check_texts()
    assert serving.policy.shape == tree and server.stats.drafter_faults == 3
    assert sum(r.tokens for r in server.stats.rounds) > len(server.stats.rounds)  # lookup was accepted
    assert {shape for shape, _ in books.booked} == {alone if arm else NONE}
    chains, trees = books._drafted
    assert books._likeliest == books._siblings == chains == trees == [[0.0, 0.0]] * DEPTH
    assert bool(books._found and books._found[0][0] > 0) == arm


def test_lookup_alone_lets_the_cache_be_and_it_catches_up(tmp_path: Path) -> None:
    waiting = requests(2, budget=40)
    serving = Serving(tmp_path, waiting, Oracle(waiting), slots=2)
    serving.policy.shape = TreeShape(2, 1, 2, lookup=2, lookup_only=True)
    for _ in range(10):
        serving.server.step()
    assert serving.policy.drafter.cached.tolist() == [0, 0]
    assert sum(r.tokens for r in serving.server.stats.rounds) > 2 * 10  # it found something
    serving.policy.shape = TreeShape(DEPTH)
    serving.server.step()
    assert serving.server.stats.rounds[-1].tokens == 2 * (DEPTH + 1)
    serving.run()
    serving.check_texts()


def test_an_empty_lookup_is_a_failed_trial(tmp_path: Path) -> None:
    alone = TreeShape(2, 1, 2, lookup=2, lookup_only=True)
    controller = TreeController({1: {TreeShape(0): 1.0, alone: 1e-3}}, memory=10**9)
    waiting = requests(1, budget=40)
    serving = Serving(tmp_path, waiting, Oracle(waiting), controller=controller)
    server = serving.run()
    serving.check_texts()
    hits, trials = controller._found[0]
    found = sum(round_.tokens >= 2 for round_ in server.stats.rounds)
    assert (
        trials == pytest.approx(len(server.stats.rounds), abs=1.01)
        and 0 < found < trials
        and hits == pytest.approx(found, abs=1)
    )


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
