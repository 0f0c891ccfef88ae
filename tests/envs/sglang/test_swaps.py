"""Swaps on one rank, and on two processes of our plugin that a scheduler's broadcast keeps in step."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forked_commands import Forks
from rank_processes import ended, start_ranks
from tensordict import TensorDict

from aurora_rl.envs.remote.plugin_server import PluginError
from aurora_rl.envs.sglang.ranks import EngineRanks
from aurora_rl.envs.sglang.swaps import Swaps

PROGRAM = str(Path(__file__).parents[2] / "support" / "sglang_ranks.py")


def play(forks: Forks, folder: Path, name: str) -> tuple[list[int], dict[str, Any]]:
    """The exit statuses of two ranks, and what the first found."""
    statuses, outputs = ended(start_ranks(forks, folder, [PROGRAM, name, str(folder)]), folder)
    found = folder / f"{name}.json"
    assert found.exists(), "\n".join(outputs)
    told = json.loads(found.read_text())
    assert "failed" not in told, (told, outputs)
    return statuses, told


@pytest.fixture(scope="module")
def ran(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two ranks found that swapped, failed, and swapped again."""
    statuses, found = play(forks, tmp_path_factory.mktemp("ranks"), "swaps")
    assert statuses == [0, 0]
    return found


def test_a_head_that_is_cut_over_ranks_is_compared_as_a_whole(ran: dict[str, Any]) -> None:
    assert "the target's output head differs" in ran["another head"] and ran["attach"] == ""


def test_every_rank_loads_its_shard_and_reports_the_same_checksum(ran: dict[str, Any]) -> None:
    assert ran["start"] and ran["idle"] == ["", True] and ran["status"] == 2
    first, second = ran["reports"]
    assert (first["rank"], second["rank"], first["version"], second["version"]) == (0, 1, 1, 1)
    assert len(first["checksum"]) == 32 and first["checksum"] == second["checksum"]
    # The prefix cache, which is the same on all ranks, is emptied on all of them; SGLang is told the version.
    assert ran["all"][0] == ran["all"][1] and ran["all"][0]["versions"] == ["1"] and ran["all"][0]["flushes"] >= 1


def test_while_requests_run_a_part_goes_between_two_batches_and_the_cache_stays(ran: dict[str, Any]) -> None:
    assert ran["busy"] == ["", True]
    assert len(ran["parts"]) > 10 and set(ran["parts"][:-1]) == {1}
    assert not ran["flushed while busy"] and ran["flushed when idle"]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("garbled", "rank 1 of 2: 'fc.weight' in SGLang's drafter is not what was loaded"),
        ("raised", "rank 1 of 2: AssertionError: param_data.shape differs"),
        ("garbled on the first", "rank 0 of 2: 'fc.weight' in SGLang's drafter is not what was loaded"),
        ("transport", "rank 1 of 2: SwapError: received checksum "),
    ],
)
def test_where_one_rank_fails_all_keep_the_version_before_and_the_learner_hears_which(
    ran: dict[str, Any], fault: str, reason: str
) -> None:
    told, unchanged, version = ran[fault]
    assert told.startswith(reason) and unchanged and version == 2


def test_after_failures_a_good_version_is_served(ran: dict[str, Any]) -> None:
    assert ran["after"] == ["", True, ran["serves"]]


def test_what_is_damaged_on_one_rank_is_mended_or_rolled_back_on_all(ran: dict[str, Any]) -> None:
    for name, action, held in (
        ("mended", "its weights were loaded again", [True, False]),
        ("rolled back", "rolled back to version 2", [False, True]),
    ):
        found, fault = ran[name]
        assert found and fault["cause"] == "corrupted" and fault["action"] == action
        assert fault["detail"] == "rank 1 of 2: tensor 'model.layers.0.mlp.down_proj.weight' is all zero"
        assert ran[f"{name} to"] == held
    assert ran["rejected"][1].startswith("corrupted: rank 1 of 2: tensor")
    assert ran["told"][0]["versions"] == ran["told"][1]["versions"] == ["1", "2", str(ran["serves"]), "2"]


def test_another_learner_may_attach_after_the_first(ran: dict[str, Any]) -> None:
    assert ran["detached"] and ran["again"] == ["", "", True]


def test_a_rank_without_the_plugin_is_named(forks: Forks, tmp_path: Path) -> None:
    statuses, found = play(forks, tmp_path, "unregistered")
    assert statuses == [0, 0]
    assert found["refused"].startswith("the plugin does not run on rank 1 of 2; start SGLang with AURORA_RL_SGLANG")


@pytest.mark.parametrize("kind", ["stay_away", "die"])
def test_a_rank_that_does_not_come_is_an_error_and_no_deadlock(forks: Forks, tmp_path: Path, kind: str) -> None:
    _, found = play(forks, tmp_path, kind)
    assert found["attach"] == found["first"] == ""
    assert found["rejected"].startswith("rank 0 of 2: the others did not come within 1 s, or one has ended (")
    assert found["error"].startswith("EngineRanksLostError: rank 0 of 2") and found["seconds"] < 15


# ---- one rank -------------------------------------------------------------------------------------------------------


class Session(SimpleNamespace):
    """The learner's weights, and what it hears."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__(version=0, flush_due=False, rejected=[])
        self.receiver = SimpleNamespace(
            latest=lambda: (3, TensorDict(weights)),
            reject=lambda number, reason: self.rejected.append((number, reason)),
        )


@pytest.fixture
def scheduler() -> SimpleNamespace:
    worker = SimpleNamespace(
        hot_token_id=torch.tensor([0, 2]), draft_runner=SimpleNamespace(model=SimpleNamespace(config=None))
    )
    return SimpleNamespace(is_fully_idle=lambda: True, draft_worker=SimpleNamespace(draft_worker=worker))


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ({"fc.weight": torch.tensor([1.0, float("inf")])}, "tensor 'fc.weight' has 1 value that"),
        ({"fc.weight": torch.ones(1), "d2t": torch.tensor([0, 2])}, "the draft map 'd2t' differs from the one that"),
    ],
)
def test_weights_of_another_drafter_are_rejected_before_any_rank_hears_of_them(
    scheduler: SimpleNamespace, weights: dict[str, torch.Tensor], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(weights)
    monkeypatch.setattr("aurora_rl.envs.sglang.swaps.Session", Session)
    assert [order.kind for order in Swaps(scheduler, EngineRanks()).due(session, 0)] == ["begin"]
    ((number, told),) = session.rejected
    assert number == 3 and reason in told


def test_a_quantized_head_is_named(scheduler: SimpleNamespace) -> None:
    model = SimpleNamespace(lm_head=SimpleNamespace(qweight=torch.zeros(2)))
    scheduler.tp_worker = SimpleNamespace(model_runner=SimpleNamespace(model=model))
    with pytest.raises(PluginError, match="output head is quantized"):
        Swaps(scheduler, EngineRanks()).head()
