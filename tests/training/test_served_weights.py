import pytest
import torch

from aurora_rl.policies import Eagle3Drafter, MedusaDrafter, TargetParts, TreeShape
from aurora_rl.telemetry.log import MetricsLog, MetricsReader
from aurora_rl.testing import tiny_target, tiny_trajectory
from aurora_rl.training.served_weights import StartCheck, drafts_agreed


def drafter_of(kind, seed=0):
    parts = TargetParts.of(tiny_target())
    torch.manual_seed(seed)
    drafter = kind.from_target(parts, draft_vocab=torch.arange(0, 32, 2)).double()
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return drafter


@pytest.mark.parametrize("shape", [TreeShape(3, 1), TreeShape(2, 3, 5)])
@pytest.mark.parametrize("kind", [Eagle3Drafter, MedusaDrafter])
def test_every_draft_agrees_with_the_weights_that_made_it_and_few_with_others(kind, shape):
    drafter = drafter_of(kind)
    trajectories = [tiny_trajectory(drafter, shape=shape, request=r, max_new_tokens=24) for r in range(3)]
    drafted, agreed = drafts_agreed(drafter, trajectories, version=0)
    assert drafted == agreed > 20
    drafted, agreed = drafts_agreed(drafter_of(kind, seed=1), trajectories, version=0)
    assert agreed < 0.6 * drafted


def test_only_rounds_of_the_version_count():
    drafter = drafter_of(Eagle3Drafter)
    trajectory = tiny_trajectory(drafter, max_new_tokens=24)
    rounds = trajectory["rounds"]
    rounds["policy_version"][2:] = 5
    assert drafts_agreed(drafter, [trajectory], version=5)[0] == len(rounds["anchor"]) - 2
    assert drafts_agreed(drafter, [trajectory], version=0)[0] == 2
    assert drafts_agreed(drafter, [trajectory], version=3) == (0, 0)


def test_what_lookup_added_is_no_draft_of_the_weights():
    drafter = drafter_of(Eagle3Drafter)
    trajectory = tiny_trajectory(drafter, shape=TreeShape(2, 1), max_new_tokens=16)
    before = drafts_agreed(drafter, [trajectory], version=0)
    first = trajectory["nodes", "parents"] < 0
    trajectory["nodes", "log_probs"] = torch.where(first, -torch.inf, trajectory["nodes", "log_probs"])
    assert before[0] > 0 and drafts_agreed(drafter, [trajectory], version=0) == (0, 0)


def test_an_engine_that_keeps_no_scores_is_compared_too():
    drafter = drafter_of(Eagle3Drafter)
    trajectory = tiny_trajectory(drafter, max_new_tokens=16)
    whole = drafts_agreed(drafter, [trajectory], version=0)
    assert drafts_agreed(drafter, [trajectory.exclude(("nodes", "log_probs"))], version=0) == whole


def test_a_peer_that_makes_up_checksums_does_not_fill_the_log(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", "learner")
    check = StartCheck({"w": torch.zeros(2)}, log)
    for number in range(200):
        check.check([("peer", 1, f"{number:032d}")])
    told = [event for event in MetricsReader(log.path) if event["event"] == "gate_against"]
    assert len(told) == 64 and not any(event["same"] for event in told)
