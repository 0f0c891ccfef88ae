"""The inference server: honest figures, swaps between rounds, and nothing that makes serving wait or fail."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from oracle_server import DEPTH, OnTime, Oracle, Plain, Serving, Wrong, eagle, requests, truth
from tensordict import TensorDict

from aurora_rl.context import TrajectoryRecorder
from aurora_rl.envs import SamplingParams
from aurora_rl.envs.forward_pass import ForwardPass, Rows
from aurora_rl.policies import TreeShape
from aurora_rl.policies.lookup import EarlierAnswers
from aurora_rl.policies.tree_controller import TreeController, _outcomes
from aurora_rl.telemetry.rates import BaselineWindows, Round, Rounds

# ---- the figures ------------------------------------------------------------------------------------------------


def test_an_oracle_is_accepted_to_its_depth(tmp_path: Path) -> None:
    waiting = requests(5)
    serving = Serving(tmp_path, waiting, Oracle(waiting), slots=2)
    server = serving.run()
    serving.check_texts()
    # 24 tokens are six rounds of three drafted tokens and the bonus token.
    assert list(server.stats.finished) == [(24, 6)] * 5 and server.stats.acceptance(0, 5) == DEPTH + 1
    assert all(r.drafted == r.occupied for r in server.stats.rounds)
    assert all(r.speculative for r in server.stats.rounds) and sum(r.tokens for r in server.stats.rounds) == 5 * 24
    assert [r.request for r in server.stats.rounds][:7] == [0] * 6 + [2]
    assert {r.occupied for r in server.stats.rounds[:12]} == {2} and {r.occupied for r in server.stats.rounds[12:]} == {
        1
    }
    event = serving.events("request")[0]
    expected = {
        "request": 0, "domain": "tiny", "tokens": 24, "terminated": False, "speculative_tokens": 24,
        "speculative_rounds": 6, "drafted_tokens": 18, "accepted": {"3": 6}, "versions": [0], "depth": 3,
    }  # fmt: skip
    assert {key: event[key] for key in expected} == expected
    summary = server.stats.summary(failed=2, duration_s=1.5)
    assert summary["acceptance_length"] == {"first": 4.0, "last": 4.0}
    assert summary["domains"] == {"tiny": {"requests": 5, "tokens": 120, "acceptance_length": 4.0}}
    assert (
        summary["speedup"] is None and summary["tokens_per_second"]["baseline"] is None
    )  # no plain round was measured


def test_answers_are_kept_for_lookup_unless_their_request_says_not_to_learn(tmp_path: Path) -> None:
    waiting = requests(4)
    waiting[1].learn = waiting[2].learn = False
    serving = Serving(tmp_path, waiting, Oracle(waiting))
    serving.policy.earlier = EarlierAnswers(1000)
    serving.run()
    serving.check_texts()
    assert serving.policy.earlier.tokens().tolist() == [*truth(waiting[0]), -1, *truth(waiting[3]), -1]


def test_what_was_answered_before_is_looked_up(tmp_path: Path) -> None:
    """The second of two equal requests finds the answer to the first, whose own text repeats nothing."""
    waiting = [replace(requests(1)[0], id=number) for number in range(2)]
    serving = Serving(tmp_path, waiting, Oracle(waiting))
    serving.policy.shape = TreeShape(DEPTH, lookup=3).without_drafter(3)
    serving.policy.earlier = EarlierAnswers(1000)
    first, second = serving.run().stats.finished
    serving.check_texts()
    assert second[1] < 0.6 * first[1]  # rounds


def test_a_drafter_that_sleeps_shows_a_speedup_below_one(tmp_path: Path) -> None:
    waiting = requests(6)
    serving = Serving(tmp_path, waiting[:1], Oracle(waiting), windows=Plain())
    plain = [r.seconds for r in serving.run().stats.rounds if not r.speculative]
    nap = max(20 * statistics.median(plain), 0.15)  # the least: far above what a busy machine adds to a round
    # The seed places the first window after 25 ms.
    serving = Serving(tmp_path, waiting, Oracle(waiting, nap), windows=BaselineWindows(0.5, window=8, seed=31))
    server = serving.run()
    serving.check_texts()
    assert server.stats.acceptance(0, 6) >= 2
    measured = server.stats.rates()
    assert measured.baseline is not None and measured.speculative is not None
    # By acceptance alone it would be 2 or more.
    assert measured.speculative < measured.baseline


def test_what_nobody_may_draft_for_is_no_measure_of_speculation(tmp_path: Path) -> None:
    waiting = requests(6)
    for request in waiting:
        request.speculative = False
    server = Serving(tmp_path, waiting, Oracle(waiting), windows=BaselineWindows(0.5, window=8, seed=31)).run()
    measured = server.stats.rates()
    assert (measured.speculative, measured.speedup) == (None, None)
    assert server.stats.drafted.keys() <= {"plain", "baseline"}


def test_what_asks_only_whether_the_server_works_is_counted_nowhere(tmp_path: Path) -> None:
    first, second = requests(2)
    probe = replace(
        first, id=7, sampling_params=SamplingParams(max_tokens=1), speculative=False, learn=False, counted=False
    )
    alone, beside = Serving(tmp_path / "a", [second], Oracle([second])), tmp_path / "b"
    serving = Serving(
        beside, [probe, second, replace(probe, id=8)], Oracle([first, second]), windows=BaselineWindows(0.0, 1)
    )
    alone.run()
    server = serving.run()
    assert [completion.request.id for completion in serving.completions] == [7, 1, 8]
    assert (
        list(server.stats.finished) == list(alone.server.stats.finished)
        and server.stats.drafted == alone.server.stats.drafted
    )
    assert [(r.tokens, r.request) for r in server.stats.rounds] == [
        (r.tokens, r.request) for r in alone.server.stats.rounds
    ]
    assert [event["request"] for event in serving.events("request")] == [1]


def test_windows_hold_for_whole_rounds_of_all_slots(tmp_path: Path) -> None:
    waiting = requests(6)
    # Naps, so that the run is long enough for the first window on any machine.
    serving = Serving(tmp_path, waiting, Oracle(waiting, 0.01), slots=3, windows=BaselineWindows(0.5, 5, seed=31))
    server = serving.run()
    serving.check_texts()
    plain = [r for r in server.stats.rounds if not r.speculative]
    assert plain and all((r.tokens, r.drafted) == (r.occupied, 0) for r in plain)  # every slot, one token each
    assert sum(r.tokens for r in server.stats.rounds) == 6 * 24
    # Plain rounds are no rounds of the acceptance length.
    assert all(tokens <= 4 * rounds for tokens, rounds in server.stats.finished)
    assert sum(tokens for tokens, _ in server.stats.finished) == 6 * 24 - sum(r.tokens for r in plain)


@pytest.mark.parametrize("where", ["note", "trajectory_from", "round"])
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
    plain = [r for r in server.stats.rounds if not r.speculative]
    charged = [r for r in server.stats.rounds if r.speculative]
    assert sum(r.tokens for r in plain) == count * 8 and all(r.tokens == 0 for r in charged)
    seconds = sum(r.seconds for r in charged)
    assert seconds >= nap * count * (8 if where == "round" else 1)
    # And to it alone: a second that both were charged would make these more than there were.
    assert sum(r.seconds for r in plain) + seconds <= wall


def test_prefill_is_charged_to_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nap, forward = 0.05, ForwardPass.__call__

    def slow(self: ForwardPass, *rows: Rows) -> list:
        if any(each.tokens.shape[1] > DEPTH + 1 for each in rows):  # longer than any tree
            time.sleep(nap)
        return forward(self, *rows)

    monkeypatch.setattr(ForwardPass, "__call__", slow)
    waiting = requests(5, budget=4, length=12)
    serving = Serving(tmp_path, waiting, Oracle(waiting), windows=Plain())
    began = time.perf_counter()
    server = serving.run()
    wall = time.perf_counter() - began
    assert serving.engine.prefill_seconds >= 5 * nap
    assert sum(r.seconds for r in server.stats.rounds) <= wall - serving.engine.prefill_seconds


def test_summary(tmp_path: Path) -> None:
    server = Serving(tmp_path, [], eagle()).server
    assert server.stats.summary(failed=0, duration_s=0.0) == {
        "requests": 0, "client_requests": 0, "failed": 0, "swaps": 0, "swap_ms": {"p50": None, "max": None},
        "acceptance_length": {"first": None, "last": None}, "domains": {},
        "tokens_per_second": {"baseline": None, "speculative": None}, "speedup": None, "baseline_rounds": 0,
        "dropped_trajectories": 0, "dropped_by_reason": {}, "drafter_faults": 0,
        "duration_s": 0.0, "versions_served": [0],
    }  # fmt: skip
    # Twenty requests: a tenth is eight of them, and the last quarter begins after fifteen.
    for tokens, rounds in [(3, 2), (6, 4), *[(100, 1)] * 16, (8, 3), (7, 2)]:
        server.stats.finished.append(tokens, rounds)
    server.stats.rounds = Rounds()
    for each in (
        Round(True, 1, 900, 1.0, 0), Round(False, 1, 1, 1.0, 14), Round(True, 1, 4, 1.5, 15),
        Round(True, 1, 2, 0.5, 15), Round(False, 1, 2, 1.0, 19, 96),
    ):  # fmt: skip
        server.stats.rounds.append(each)
    server.stats.swap_ms, server.stats.versions = [4.0, 2.0, 9.0], [0, 1, 2, 5]
    assert server.stats.summary(failed=3, duration_s=7.5) == {
        "requests": 20, "client_requests": 0, "failed": 3, "swaps": 3, "swap_ms": {"p50": 4.0, "max": 9.0},
        "acceptance_length": {"first": 609 / 12, "last": 615 / 11}, "domains": {},
        "tokens_per_second": {"baseline": 2.0, "speculative": 3.0}, "speedup": 1.5, "baseline_rounds": 96,
        "dropped_trajectories": 0, "dropped_by_reason": {}, "drafter_faults": 0,
        "duration_s": 7.5, "versions_served": [0, 1, 2, 5],
    }  # fmt: skip


# ---- rounds and requests ----------------------------------------------------------------------------------------


def test_serving_rests_and_resumes(tmp_path: Path) -> None:
    waiting = requests(4, budget=6)
    serving = Serving(tmp_path, [], Oracle(waiting), slots=2)
    server = serving.server
    assert not server.step() and not server.step() and server.stats.rounds == []
    serving.queue.append(waiting[0])
    assert server.step() and server.stats.rounds[-1].occupied == 1
    serving.queue += waiting[1:3]  # the idle slot takes the next at once, in the middle of the first
    assert server.step() and server.step() and max(r.occupied for r in server.stats.rounds) == 2
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


def test_the_draft_lengthens_to_what_pays(tmp_path: Path) -> None:
    # 22 tokens end inside a path of three: five rounds of four tokens, and two drafted ones.
    waiting = requests(12, budget=22)
    controller = OnTime(1.0, 1.3, 1.4, 1.5)
    serving = Serving(tmp_path, waiting, Oracle(waiting), slots=2, depth=1, controller=controller)
    server = serving.run()
    serving.check_texts()
    # By the first guess it does not pay: a probe of depth 1 finds that it does.
    (event,) = serving.events("shape")
    assert (event["depth"], event["width"], event["nodes"], event["occupied"]) == (3, 1, 3, 2)
    # The oracle is always right, and an end inside a path is no mistake: every trial of these depths was a hit.
    for hits, trials in controller._likeliest:
        assert trials == pytest.approx(hits) and trials > 8
    assert list(server.stats.finished)[-2:] == [(22, 6)] * 2 and server.depth == 3


def test_a_useless_drafter_is_left_out_and_the_text_stays(tmp_path: Path) -> None:
    waiting = requests(12, budget=40)
    serving = Serving(tmp_path, waiting, Wrong(waiting), slots=2, controller=OnTime(1.0, 1.5, 2.0, 2.5))
    server = serving.run()
    serving.check_texts()
    assert 0 in [event["depth"] for event in serving.events("shape")]
    drafted = [int((c.trajectory["rounds", "offset"].diff() > 0).sum()) for c in serving.completions]
    # A probe of 24 drafts at first; what it lost, half a round at each, forbids another for longer than this run.
    assert sum(drafted) == drafted[0] + drafted[1] == 24
    # What is not drafted for is the policy's doing, and no baseline window.
    assert (
        all(r.speculative for r in server.stats.rounds)
        and list(server.stats.finished)[-1] == (0, 0)
        and server.depth == 0
    )
    assert serving.events("request")[-1]["accepted"] == {}


def test_baseline_windows_tell_the_controller_what_plain_decoding_takes(tmp_path: Path) -> None:
    waiting, controller = requests(4, budget=40), TreeController({1: {TreeShape(0): 1e-3, TreeShape(1): 1e-3}})
    serving = Serving(tmp_path, waiting, Oracle(waiting), depth=1, windows=Plain(), controller=controller)
    serving.run()
    assert (
        controller._since == float("inf") and controller._pace[0] != 1.0
    )  # rounds were seen, and none of them drafted


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
        ["rejected"], ["sibling", "rejected"], ["sibling", "likeliest", "undrafted"], ["likeliest", "undrafted"],
        ["sibling"], ["undrafted"],
    ]  # fmt: skip
    assert _outcomes(done, torch.arange(6) % 3 == 1) == [["sibling", "rejected"], ["sibling"]]
    # Of lookup alone, whose log-probabilities are all alike, the first of siblings is the likelier.
    done["draft", "log_probs"].fill_(-torch.inf)
    assert _outcomes(done, torch.arange(6) == 2) == [["likeliest", "likeliest", "undrafted"]]
    assert _outcomes(done, torch.arange(6) == 3) == [["sibling", "undrafted"]]


def test_what_lookup_finds_below_the_drafters_tree_is_no_trial_of_a_deeper_one(tmp_path: Path) -> None:
    waiting = requests(12, budget=22)
    none, short, long = (TreeShape(d, 1, 3, lookup=2) for d in range(3))
    controller = TreeController({1: {none: 1e3, short: 1.0, long: 1e6}})  # one depth pays, and no other
    serving = Serving(tmp_path, waiting, Oracle(waiting), slots=2, depth=1, controller=controller)
    serving.run()
    serving.check_texts()
    accepted = {int(count) for event in serving.events("request") for count in event["accepted"]}
    assert max(accepted) == 2  # the texts do repeat themselves
    assert controller._likeliest[0][1] > 8 and controller._likeliest[1] == [0.0, 0.0]
    # Yet these tokens are delivered, and count for drafting against no speculation.
    assert controller._below > 0 and controller._tokens(short) > 1 + controller.acceptance(short)[0]
