"""The training half of a run as it is built: objectives, optimizers, checks of what arrives, sockets, and a resume."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict

from aurora_rl.cli import assembly, spec
from aurora_rl.cli.config import Config
from aurora_rl.cli.errors import ConfigError
from aurora_rl.cli.learner import build_learner, steps_depend_on
from aurora_rl.collectors.dataset import TrajectoryDataset
from aurora_rl.envs import SampleAndMatch
from aurora_rl.policies import Eagle3Drafter, TargetParts
from aurora_rl.policies.formats.files import save_drafter
from aurora_rl.storage import CheckpointError
from aurora_rl.telemetry.log import MetricsLog
from aurora_rl.testing import tiny_target, tiny_trajectory
from aurora_rl.trajectories import rule_code


@contextlib.contextmanager
def learner(config: Config, folder: Path) -> Iterator[object]:
    built = build_learner(spec.resolve(config), MetricsLog(folder / "metrics.jsonl", "learner"), folder)
    try:
        yield built
    finally:
        built.close()


def test_a_learner_of_several_objectives(configured: Callable[..., Config], tmp_path: Path) -> None:
    config = configured(
        "objectives=[{name: imitation, steps: 2}, {name: acceptance_reward, weight: 0.5}]",
        *("drafter.mode=sampled", "drafter.name=eagle3", f"learner.recording={tmp_path / 'stream'}"),
    )
    with learner(config, tmp_path) as built:
        assert [o.name for o in built._loss.objectives] == ["imitation", "acceptance_reward"]
        built._collector._on_trajectory(TensorDict({"request": torch.tensor(3)}))  # type: ignore[attr-defined]
    assert [int(t["request"]) for t in TrajectoryDataset(tmp_path / "stream")] == [3]


class OwnRule(SampleAndMatch):  # type: ignore[misc]  # a third party may derive where the library does not
    """A verification rule of a third party."""


def test_a_learner_refuses_trajectories_of_rules_that_it_cannot_replay(
    configured: Callable[..., Config], tmp_path: Path
) -> None:
    drafter = Eagle3Drafter.from_target(TargetParts.of(tiny_target()), draft_vocab=torch.arange(16))
    trajectory = tiny_trajectory(drafter.double())
    with learner(configured(f"rule={__name__}:OwnRule"), tmp_path) as built, pytest.MonkeyPatch.context() as patch:
        patch.setattr("aurora_rl.cli.learner.validate", lambda *_, **__: None)  # the tiny one is of another model
        validate = built._collector._validate
        for code in (rule_code(f"{__name__}:OwnRule"), rule_code("greedy")):
            trajectory["sampling", "rule"] = torch.tensor(code)
            validate(trajectory)
        for name, message in (
            ("rejection", "'rejection' is not replayable"),
            ("unheard", "is not known here; set"),
        ):
            trajectory["sampling", "rule"] = torch.tensor(rule_code(name))
            with pytest.raises(ValueError, match=message):
                validate(trajectory)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_of_the_target_a_learner_keeps_a_copy_of_the_head(
    configured: Callable[..., Config], tmp_path: Path, dtype: str
) -> None:
    config = configured(f"dtype={dtype}")
    with learner(config, tmp_path) as built:
        weight = built._loss.objectives[0].head.weight
    # Under autocast the product is in bfloat16 anyway.
    assert weight.dtype == getattr(torch, dtype)
    assert weight.untyped_storage().nbytes() == weight.nbytes
    assert torch.equal(weight, assembly.load(spec.resolve(config)).parts.head.weight)


def test_new_weights_go_to_a_share_of_the_engines_first_if_that_is_set(
    configured: Callable[..., Config], tmp_path: Path
) -> None:
    with learner(configured(), tmp_path) as built:
        assert built._canary is None
    with learner(configured("canary.engines=0.25", "canary.requests=4", "canary.margin=0.1"), tmp_path) as built:
        rules = built._canary._rules
    assert (rules.share, rules.requests, rules.margin, rules.max_requests) == (0.25, 4, 0.1, 256)


def test_each_optimizer_has_its_own_rate(configured: Callable[..., Config], tmp_path: Path) -> None:
    with learner(configured("learner.muon_lr=0.03", "learner.adam_lr=0.0007"), tmp_path) as built:
        rates = {type(each).__name__: each.param_groups[0]["lr"] for each in built._optimizers}
    assert rates == {"Muon": 0.03, "AdamW": 0.0007}


def test_a_recording_of_other_layers_is_not_continued(configured: Callable[..., Config], tmp_path: Path) -> None:
    config = configured("drafter.name=eagle3", f"learner.recording={tmp_path / 'stream'}")
    TrajectoryDataset(tmp_path / "stream", (0, 2)).append(TensorDict({"request": torch.tensor(1)}))
    message = "learner.recording: .*stream was recorded for a drafter that reads layers 0,2, this one reads 0,1"
    with pytest.raises(ConfigError, match=message), learner(config, tmp_path):
        pass


@pytest.mark.parametrize("key", ["wire.trajectories", "wire.weights"])
def test_a_port_in_use_names_address_and_key(config: Config, ports: list[str], tmp_path: Path, key: str) -> None:
    address = ports[key == "wire.weights"]
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", int(address.rpartition(":")[2])))
        holder.listen()
        with (
            pytest.raises(ConfigError, match=f"{address} is in use; stop the process .*, or set {key} to another"),
            learner(config, tmp_path),
        ):
            pass
    with learner(config, tmp_path):  # what was opened before the error is closed again
        pass


def test_a_learner_resumes(configured: Callable[..., Config], tmp_path: Path) -> None:
    with learner(configured(), tmp_path) as first:
        first.seen, first.steps, first.version = 40, 30, 2  # type: ignore[attr-defined]
        first.save()  # type: ignore[attr-defined]
    resume = f"learner.resume={tmp_path / 'learner'}"
    with learner(configured(resume), tmp_path) as second:
        assert (second.seen, second.steps, second.version) == (40, 30, 3)  # type: ignore[attr-defined]
    config = configured(resume, "drafter.vocab_size=32")
    with pytest.raises(CheckpointError, match="tensor 'lm_heads.0.weight'"), learner(config, tmp_path):
        pass


@pytest.mark.parametrize(
    ("pair", "keys"),
    [
        ("objectives=[{name: imitation, decay: 0.5}]", ["objectives"]),
        ("dtype=bfloat16", ["dtype"]),
        ("drafter.name=eagle3", ["drafter.name"]),
        ("drafter.options={num_layers: 3}", ["drafter.options"]),
        ("learner.parallel=fsdp", ["learner.parallel"]),
        ("learner.muon_lr=0.1", ["learner.muon_lr"]),
        ("learner.adam_lr=0.1", ["learner.adam_lr"]),
        ("run_dir=elsewhere", []),
        ("wire.weights=tcp://127.0.0.1:7000", []),
        ("learner.threads=2", []),
    ],
)
def test_ranks_compare_what_their_steps_depend_on(
    configured: Callable[..., Config], pair: str, keys: list[str]
) -> None:
    before, after = (steps_depend_on(spec.resolve(configured(*pairs))) for pairs in ([], [pair]))
    assert [key for key in before if before[key] != after[key]] == keys


def test_a_learner_of_an_embedded_engine_is_met_whatever_its_draft_vocabulary_became(
    configured: Callable[..., Config], tmp_path: Path
) -> None:
    """A learner that is started again starts from the drafter that is served, and an engine may have started before."""

    def met(*pairs: str, vocab: range) -> str:
        run = spec.resolve(configured("drafter.name=eagle3", *pairs))
        parts = assembly.load_alone(run)
        drafter = Eagle3Drafter.from_target(parts, draft_vocab=torch.tensor(vocab), feature_layers=(1, 2))
        save_drafter(drafter, tmp_path / "drafter")
        config = configured("drafter.name=eagle3", f"drafter.path={tmp_path / 'drafter'}", *pairs)
        with learner(config, tmp_path) as built:
            return built._collector._handshake.draft_map_checksum

    assert met(vocab=range(16)) == met(vocab=range(1, 17)) == "16 rows" != met(vocab=range(15))
    fixed = met("engine.name=sglang", vocab=range(16))
    assert fixed != met("engine.name=sglang", vocab=range(1, 17)) and fixed != "16 rows"
