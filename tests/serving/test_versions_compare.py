"""Two drafters on the same traffic: they draft in turns from the first round on, and one of them drafts on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracle_server import DEPTH, HANDSHAKE, Oracle, Serving, Wrong, eagle, requests
from torch import nn

from aurora_rl.cli.history import versions
from aurora_rl.policies import Drafter, DrafterPolicy, TreeShape
from aurora_rl.policies.tree_controller import TreeController
from aurora_rl.serving.canary import RoundTrialRules
from aurora_rl.telemetry.history import RunHistory
from aurora_rl.telemetry.prometheus import Exporter

RULES = RoundTrialRules(window=4)


def compared(folder: Path, first: Drafter, second: Drafter, **options: object) -> Serving:
    usual = {"second_version": 1, "trial_rules": RULES}
    return Serving(folder, [], first, second_drafter=second, **{**usual, **options})


@pytest.mark.parametrize("better", [0, 1])
def test_the_better_of_two_drafters_drafts_on(tmp_path: Path, better: int) -> None:
    known = requests(5)
    drafters = [Wrong(known), Oracle(known)]
    first, second = drafters[::-1] if better == 0 else drafters
    serving = compared(tmp_path, first, second)
    serving.run_until(lambda: bool(serving.events("verdict")), known)
    (trial,), (verdict,) = serving.events("trial"), serving.events("verdict")
    assert (trial["version"], trial["against"], trial["requests"]) == (1, 0, 0)
    assert verdict["promote"] == bool(better) and set(verdict["evidence"]) == {"acceptance_length", "tokens_per_second"}
    lengths = verdict["acceptance_length"]
    assert lengths["old" if better == 0 else "new"] > DEPTH and lengths["new" if better == 0 else "old"] == 1
    decided = len(serving.server.stats.rounds)
    serving.run_until(lambda: len(serving.server.stats.rounds) >= decided + 30, known)
    assert sum(r.tokens for r in serving.server.stats.rounds[decided:]) > 30 * DEPTH
    assert serving.server.policy.version == better == serving.server.stats.version
    serving.queue.clear()
    serving.run()
    serving.check_texts()
    assert len(serving.events("trial")) == 1  # and nothing is tried after it


def test_each_drafter_has_a_controller_and_a_shape_of_its_own(tmp_path: Path) -> None:
    known = requests(5)
    costs = ({TreeShape(0): 1.0, TreeShape(DEPTH): 1.1}, {TreeShape(0): 1.0, TreeShape(1): 1.1})
    first, second = (TreeController({1: each}) for each in costs)
    serving = compared(tmp_path, Oracle(known), Oracle(known), controller=first, second_controller=second)
    depths: dict[int, set[int]] = {0: set(), 1: set()}

    def noted() -> bool:
        depths[serving.server.policy.version].add(serving.server.depth)
        return bool(serving.events("verdict"))

    serving.run_until(noted, known)
    assert max(depths[0]) == DEPTH and max(depths[1] - {DEPTH}) == 1
    assert serving.events("verdict")[0]["acceptance_length"]["new"] <= 2


def test_a_damaged_drafter_is_never_mended_by_the_weights_of_the_other(tmp_path: Path) -> None:
    """Once the second drafts alone, the first's weights are gone: they would be another drafter's."""
    known, second = requests(5), eagle(1)
    serving = compared(tmp_path, eagle(0), second, watched=True, trial_rules=RoundTrialRules(window=4, max_rounds=8))
    serving.run_until(lambda: bool(serving.events("verdict")), known)
    assert serving.events("verdict")[0]["promote"] and not serving.events("watchdog")
    for _ in range(2):  # loaded again the first time, and left out the second
        weight = next(p for p in second.parameters() if p.ndim == 2)
        nn.init.zeros_(weight)
        found = len(serving.events("watchdog"))
        serving.run_until(lambda found=found: len(serving.events("watchdog")) > found, known, most=60)
    assert [event["action"] for event in serving.events("watchdog")] == [
        "its weights were loaded again",
        "its drafts are left out until new weights come",
    ]


def test_a_policy_reads_the_layers_of_its_own_drafter(tmp_path: Path) -> None:
    drafter = eagle()
    serving = Serving(tmp_path, requests(1), drafter)
    serving.server.step()
    store = serving.engine.store
    store.features.normal_()
    assert torch.equal(serving.policy.features(0, slice(4)), store.features[0, :4])
    width = store.features.shape[-1] // 2  # of the two layers that the store has, 0 and 1
    for layers, own in (((1,), store.features[0, :4, width:]), ((), store.features[0, :4, :0])):
        drafter.feature_layers = layers
        policy = DrafterPolicy(drafter, store, num_nodes=DEPTH, shape=TreeShape(DEPTH), layers=HANDSHAKE.feature_layers)
        assert torch.equal(policy.features(0, slice(4)), own)
        rows = torch.tensor([[0]])
        assert torch.equal(policy.features(rows, torch.arange(4)[None]), own[None])


def test_a_comparison_shows_in_the_history_the_metrics_and_the_page() -> None:
    begun = [
        {"event": "compare", "drafters": ["runs/a/drafter", "ngram"]},
        {"event": "trial", "version": 1, "against": 0, "requests": 0},
    ]
    found = versions(begun)
    assert [found[number].published for number in (0, 1)] == ["compared: runs/a/drafter", "compared: ngram"]
    assert found[1].outcome == "on trial against version 0"
    history, exporter = RunHistory(), Exporter()
    for event in begun:
        history.follow(event)
        exporter.follow(event)
    assert history.on_trial == 1 and exporter.registry.get_sample_value("aurora_canary_version") == 1
    fault = {"event": "watchdog", "version": 1, "cause": "dead", "detail": "", "action": "", "requests": 3, "time": 1.0}
    history.follow(fault)  # it ends the trial without a verdict
    exporter.follow(fault)
    assert history.on_trial is None and exporter.registry.get_sample_value("aurora_canary_version") is None
