"""Trials of new weights on a server: who drafts, what is decided, what the learner hears; every text stays right."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracle_server import DEPTH, Inbox, Oracle, Serving, Wrong, eagle, requests
from safetensors.torch import load_file
from torch import Tensor

from aurora_rl.collectors.codec import checksum
from aurora_rl.policies import DrafterPolicy, TreeShape
from aurora_rl.policies.tree_controller import TreeController
from aurora_rl.serving.canary import RoundTrialRules
from aurora_rl.serving.versions import Versions
from aurora_rl.telemetry.rates import BaselineWindows
from aurora_rl.training.served_weights import drafts_agreed

RULES = RoundTrialRules(window=4, margin=0.05)


OWN = {"own": torch.zeros(1)}


class Loads:
    """Takes any weights, and is what it was."""

    def published(self) -> dict[str, Tensor]:
        return OWN

    def stage(self, weights: dict[str, Tensor]) -> Callable[[], None]:
        return lambda: None


class Right(Loads, Oracle):
    """Proposes what the target is going to say."""


class Constant(Loads, Wrong):
    """A sabotaged drafter: nothing that it proposes is accepted."""


def tried(folder: Path, first: Oracle, second: Oracle, inbox: Inbox, **options: object) -> Serving:
    return Serving(folder, [], first, second_drafter=second, receiver=inbox, trial_rules=RULES, **options)


def test_a_sabotaged_version_is_rolled_back_and_costs_a_bounded_number_of_rounds(tmp_path: Path) -> None:
    known, inbox = requests(5), Inbox()
    serving = tried(tmp_path, Right(known), Constant(known), inbox, slots=2)
    serving.run_until(lambda: len(serving.completions) >= 4, known)
    inbox.waiting.append((1, {}))  # the sabotage, at a known request
    serving.run_until(lambda: bool(inbox.rejected), known)
    serving.run_until(lambda: len(serving.server.stats.finished) >= 40, known)
    serving.queue.clear()
    serving.run()
    serving.check_texts()

    (verdict,) = serving.events("verdict")
    assert (verdict["version"], verdict["against"], verdict["promote"]) == (1, 0, False)
    # Less than all four where the budget of a request cuts the last round.
    assert verdict["acceptance_length"]["old"] > DEPTH and verdict["acceptance_length"]["new"] == 1
    assert verdict["reason"].startswith("acceptance length")
    assert inbox.rejected == [(1, f"rolled back after {verdict['rounds']} rounds: {verdict['reason']}")]
    assert inbox.acknowledged == [] and serving.events("swap") == [] and serving.server.stats.versions == [0]
    # At most 11 pairs of windows of 4 rounds, half of them by the bad drafter. In any 880 rounds, a twentieth.
    assert verdict["rounds"] <= 11 * 2 * RULES.window
    bad = sum(int((c.trajectory["rounds", "policy_version"] == 1).sum()) for c in serving.completions)
    assert 0 < bad <= 2 * 11 * RULES.window  # of two slots
    assert serving.policy is serving.server.policy and serving.policy.version == 0


def test_good_weights_are_promoted_and_acknowledged_and_the_next_are_tried_against_them(tmp_path: Path) -> None:
    known, inbox = requests(5), Inbox((1, {}))
    first, second = Constant(known), Right(known)
    serving = tried(tmp_path, first, second, inbox, slots=2)
    serving.run_until(lambda: bool(inbox.acknowledged), known)
    (verdict,), (swap,) = serving.events("verdict"), serving.events("swap")
    assert verdict["promote"] and swap["version"] == 1 and serving.server.stats.versions == [0, 1]
    assert inbox.acknowledged == [(1, checksum(OWN))] and inbox.rejected == []
    assert serving.server.policy.drafter is second
    inbox.waiting.append((2, {"own": torch.ones(1)}))  # by the drafter of nothing, which is free now
    serving.run_until(lambda: bool(inbox.rejected), known)
    assert serving.server.stats.versions == [0, 1] and serving.server.policy.drafter is second
    serving.queue.clear()
    serving.run()
    serving.check_texts()
    assert [event["against"] for event in serving.events("trial")] == [0, 1]


def test_what_was_rolled_back_is_refused_when_it_comes_again(tmp_path: Path) -> None:
    known, inbox = requests(5), Inbox((1, {}))
    serving = tried(tmp_path, Right(known), Constant(known), inbox)
    serving.run_until(lambda: bool(inbox.rejected), known)
    inbox.waiting.append((2, {}))
    serving.run_until(lambda: len(inbox.rejected) == 2, known)
    assert inbox.rejected[1] == (2, inbox.rejected[0][1]) and len(serving.events("trial")) == 1
    (event,) = serving.events("swap_failed")
    assert event["version"] == 2 and event["reason"].startswith("rolled back after")


@pytest.mark.parametrize("earlier", [[], [(1, {})]])
def test_weights_that_are_served_get_their_number_without_a_trial(tmp_path: Path, earlier: list) -> None:
    known, inbox = requests(5), Inbox(*earlier)
    serving = tried(tmp_path, Constant(known), Right(known), inbox, slots=2)
    serving.run_until(lambda: len(inbox.acknowledged) == len(earlier), known)
    again = {} if earlier else OWN
    inbox.waiting.append((7, again))  # as of a learner that goes on from its training state
    serving.run_until(lambda: len(inbox.acknowledged) > len(earlier), known)
    assert inbox.acknowledged[-1] == (7, checksum(OWN)) and inbox.rejected == []
    assert serving.server.stats.version == serving.server.policy.version == 7
    assert len(serving.events("trial")) == len(earlier)
    serving.queue.clear()
    serving.run()
    serving.check_texts()


def test_weights_that_are_rolled_back_while_they_are_staged_do_not_serve(tmp_path: Path) -> None:
    known, inbox = requests(5), Inbox((1, {"own": torch.ones(1)}))
    versions, may_end = tried(tmp_path, Right(known), Constant(known), inbox).server.versions, threading.Event()
    staged = versions._background.submit(may_end.wait, 10)  # so that it waits for the one thread
    versions.take()
    assert versions._staged is not None
    may_end.set()
    assert staged.result(10)
    versions._staged[1].result(10)
    versions._rolled_back[checksum({"own": torch.ones(1)})] = "the watchdog found it corrupted"
    versions.take()
    assert inbox.rejected == [(1, "the watchdog found it corrupted")]
    assert [policy.version for policy in versions.policies] == [0, 0]


def test_each_version_drafts_with_its_own_weights_and_its_own_cache(tmp_path: Path) -> None:
    """What a policy records while windows take turns is what its weights would have drafted, for every request."""
    known, weights = requests(5), eagle(1).published()
    inbox = Inbox((1, weights))
    serving = Serving(
        tmp_path,
        [],
        eagle(0),
        second_drafter=eagle(0),
        receiver=inbox,
        trial_rules=RoundTrialRules(window=3, max_rounds=60),
        slots=3,
    )
    serving.run_until(lambda: bool(inbox.acknowledged or inbox.rejected), known)
    serving.queue.clear()
    serving.run()
    serving.check_texts()
    versions = [set(c.trajectory["rounds", "policy_version"].tolist()) for c in serving.completions]
    assert {0, 1} in versions
    for completion in serving.completions:
        trajectory = completion.trajectory
        assert torch.equal(trajectory["rounds", "cache_version"], trajectory["rounds", "policy_version"])
    mixed = [
        c.trajectory for c in serving.completions if len(set(c.trajectory["rounds", "policy_version"].tolist())) > 1
    ]
    for version in (0, 1):
        drafted, agreed = drafts_agreed(eagle(version), mixed, version)
        assert drafted == agreed > 10


def test_each_version_has_measurements_of_its_own(tmp_path: Path) -> None:
    """A useless version on trial does not teach the controller of the served one to draft less."""
    known, inbox = requests(5), Inbox((1, {}))
    controller = TreeController({1: {TreeShape(0): 1.0, TreeShape(DEPTH): 1.1}})
    serving = tried(tmp_path, Right(known), Constant(known), inbox, controller=controller)
    serving.run_until(lambda: bool(inbox.rejected), known)
    assert serving.server.versions.controller is controller
    assert controller.acceptance(TreeShape(DEPTH))[0] > 0.9
    rounds = len(serving.server.stats.rounds)
    serving.run_until(lambda: len(serving.server.stats.rounds) >= rounds + 24, known)
    assert sum(r.tokens for r in serving.server.stats.rounds[-24:]) > 24 * DEPTH


def test_baseline_windows_are_no_part_of_a_trial(tmp_path: Path) -> None:
    known, inbox = requests(5), Inbox((1, {}))
    serving = tried(tmp_path, Right(known), Constant(known), inbox, windows=BaselineWindows(0.5, 2, seed=1))
    serving.run_until(lambda: bool(inbox.rejected), known)
    (verdict,) = serving.events("verdict")
    assert verdict["acceptance_length"]["old"] > DEPTH and verdict["acceptance_length"]["new"] == 1


def test_what_is_on_trial_is_not_saved(tmp_path: Path) -> None:
    known, inbox = requests(5), Inbox((1, eagle(1).published()))
    serving = Serving(tmp_path, [], eagle(0), second_drafter=eagle(0), receiver=inbox, trial_rules=RULES)
    serving.run_until(lambda: serving.server.policy.version == 1, known)
    serving.server.save_drafter(tmp_path / "drafter")
    saved, served = load_file(tmp_path / "drafter" / "model.safetensors"), eagle(0).published()
    assert torch.equal(saved["lm_head.weight"], served["lm_head.weight"])


def test_a_canary_without_a_second_policy_is_refused(tmp_path: Path) -> None:
    serving = Serving(tmp_path, [], eagle())
    policy: DrafterPolicy = serving.policy
    with pytest.raises(ValueError, match="a trial needs a second policy"):
        Versions(policy, log=None, stats=serving.server.stats, trial_rules=RoundTrialRules())  # type: ignore[arg-type]


def test_only_published_weights_are_a_version_of_a_server(tmp_path: Path) -> None:
    versions = tried(tmp_path, Right(requests(5)), Constant(requests(5)), Inbox()).server.versions
    assert [policy.notices_writes for policy in versions.policies] == [False, False]
