"""`aurora-rl bench objectives` on a tiny stream: curves on what is still to come, resumed run by run."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from aurora_rl.cli import assembly, spec
from aurora_rl.cli.bench_objectives import VARIANTS, _markdown, mean_curves
from aurora_rl.cli.config import load_config
from aurora_rl.cli.main import main
from aurora_rl.collectors.dataset import TrajectoryDataset
from aurora_rl.envs import Request, SamplingParams
from aurora_rl.objectives import ImitationLoss, Objective, register_objective
from aurora_rl.policies import Eagle3Drafter
from aurora_rl.policies.formats.files import save_drafter
from aurora_rl.serving.recorded_requests import record_requests
from aurora_rl.training import steps as training
from aurora_rl.trajectories import rule_code

PAIRS = ["dtype=float32", "device=cpu", "drafter.vocab_size=64", "drafter.name=eagle3", "learner.replay=1"]


@pytest.fixture(scope="module")
def streams(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Twelve requests, drafted by top-k and sampled."""
    folders = {}
    for mode in ("topk", "sampled"):
        folders[mode] = tmp_path_factory.mktemp(mode) / mode
        config = load_config(overrides=[f"model={tiny_folder}", f"drafter.mode={mode}", *PAIRS])
        run = spec.resolve(config)
        target = assembly.load(run)
        drafter = assembly.start_drafter(run, target, [])
        assert isinstance(drafter, Eagle3Drafter)
        save_drafter(drafter, folders[mode].with_name("drafter-day0"))
        params = [SamplingParams(1.0, seed=i, max_tokens=8) for i in range(12)]
        requests = [Request(i, torch.randint(250, (5,)), params[i]) for i in range(12)]
        record_requests(target.model, drafter, requests, TrajectoryDataset(folders[mode]), shape=run.tree)
    return folders


def bench(folder: Path, stream: Path, out: Path, *more: str) -> int:
    common = ["bench", "objectives", "--recording", str(stream), "--out", str(out), "--every", "4", "--ahead", "4"]
    options, pairs = ([a for a in more if ("=" in a) == pair] for pair in (False, True))
    return main([*common, *options, f"model={folder}", *PAIRS, *pairs])


def test_curves_table_and_plot_and_only_missing_runs_are_made(
    tiny_folder: Path, streams: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [name for name in VARIANTS if name != "policy_gradient"]
    assert bench(tiny_folder, streams["topk"], tmp_path, "--variants", ",".join(names)) == 0
    for name in names:
        result = json.loads((tmp_path / f"topk-{name}-0.json").read_text())
        assert list(result["curves"]) == ["topk"]
        assert [seen for seen, _ in result["curves"]["topk"]] == [0, 4, 8]
        assert all(1 <= acceptance <= 5 for _, acceptance in result["curves"]["topk"])
        assert result["settings"]["objectives"] == VARIANTS[name] and result["skipped"] == 0
    assert (tmp_path / "curves.png").stat().st_size > 1000
    assert len((tmp_path / "table.md").read_text().splitlines()) == 2 + len(names)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    capsys.readouterr()
    assert bench(tiny_folder, streams["topk"], tmp_path, "--variants", "forward_kl", "--seeds", "2") == 0
    assert "forward_kl seed 1" in (out := capsys.readouterr().out) and "seed 0" not in out
    assert all(path.stat().st_mtime_ns == at for path, at in written.items())
    assert "| topk | topk | forward_kl | 2 |" in (tmp_path / "table.md").read_text()
    # A sampled stream is evaluated by both modes, and the policy gradient learns from it with its draft vocabulary.
    more = ("--variants", "policy_gradient", f"drafter.path={streams['sampled'].with_name('drafter-day0')}")
    assert bench(tiny_folder, streams["sampled"], tmp_path, *more, "drafter.mode=sampled") == 0
    curves = json.loads((tmp_path / "sampled-policy_gradient-0.json").read_text())["curves"]
    assert set(curves) == {"topk", "sampled"} and curves["topk"] != curves["sampled"]


def test_a_result_of_other_settings_is_not_taken_for_this_runs(
    tiny_folder: Path, streams: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(tiny_folder, streams["topk"], tmp_path, "--variants", "configured") == 0
    path = tmp_path / "topk-configured-0.json"
    written = path.read_bytes()
    altered = tmp_path / "other" / "topk"
    shutil.copytree(streams["topk"], altered)
    (altered / "000003.safetensors").write_bytes((altered / "000004.safetensors").read_bytes())
    for stream, more, difference in (
        (streams["topk"], ["drafter.depth=1"], "drafter.depth=4, and this run has drafter.depth=1"),
        (streams["topk"], ["learner.replay=3", "drafter.width=2"], "drafter.width=4, and this run has drafter.width=2"),
        (streams["topk"], ["learner.adam_lr=0.1"], "learner.adam_lr=0.0005, and this run has learner.adam_lr=0.1"),
        (streams["topk"], ["--ahead", "5"], "--ahead=4, and this run has --ahead=5"),
        (streams["topk"], ["--every", "8"], "--every=4, and this run has --every=8"),
        (streams["topk"], ["--limit", "11"], "--limit=12, and this run has --limit=11"),
        (streams["topk"], ["objectives=[{name: imitation,steps: 2}]"], 'objectives=[{"name": "imitation"}], and this'),
        (altered, [], "checksum of the recording="),
    ):
        assert bench(tiny_folder, stream, tmp_path, "--variants", "configured", *more) == 2
        error = capsys.readouterr().err
        assert f"{path} was made with {difference}" in error and "name another folder by --out" in error
    assert path.read_bytes() == written
    # What changes no curve is no difference, nor is what a result of before there were settings does not say.
    same = ("--variants", "configured", "drafter.adaptive=false", "learner.max_skipped=3")
    assert bench(tiny_folder, streams["topk"], tmp_path, *same) == 0
    older = json.loads(written)
    del older["settings"], older["skipped"]
    path.write_text(json.dumps(older))
    capsys.readouterr()
    assert bench(tiny_folder, streams["topk"], tmp_path, *same, "drafter.depth=1") == 0
    assert f"{path} does not say its settings" in capsys.readouterr().out


def test_objectives_of_the_configuration_are_a_variant(
    tiny_folder: Path, streams: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    @register_objective("doubled_imitation")
    class Doubled(ImitationLoss):
        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **settings)
            losses.append(self)

    losses: list[Objective] = []
    pairs = ("objectives=[{name: doubled_imitation,steps: 1}]",)
    assert bench(tiny_folder, streams["topk"], tmp_path, "--variants", "forward_kl, configured", *pairs) == 0
    assert isinstance(losses[-1].drafter, Eagle3Drafter)
    result = json.loads((tmp_path / "topk-configured-0.json").read_text())
    assert result["settings"]["objectives"] == [{"name": "doubled_imitation", "steps": 1}]
    assert "| topk | topk | configured | 1 |" in (tmp_path / "table.md").read_text()
    capsys.readouterr()
    assert bench(tiny_folder, streams["topk"], tmp_path, "--variants", "lk", "objectives=[{name: discard}]") == 2
    error = capsys.readouterr().err
    assert "no variant learns by objectives=[{'name': 'discard'}]; add 'configured' to --variants" in error


def test_learning_is_what_moves_the_curve(tiny_folder: Path, tmp_path: Path) -> None:
    # One greedy text again and again: what is learned of it holds for the next.
    common = ["drafter.vocab_size=300", "learner.replay=8"]
    config = load_config(overrides=[f"model={tiny_folder}", *PAIRS, *common])
    run = spec.resolve(config)
    target = assembly.load(run)
    requests = [Request(i, torch.arange(250, 255), SamplingParams(max_tokens=16)) for i in range(12)]
    record_requests(
        target.model,
        assembly.start_drafter(run, target, []),
        requests,
        TrajectoryDataset(tmp_path / "stream"),
        shape=run.tree,
    )

    def curve(out: str, *pairs: str) -> list[float]:
        folder = tmp_path / out
        assert bench(tiny_folder, tmp_path / "stream", folder, "--variants", "forward_kl", *common, *pairs) == 0
        curves = json.loads((folder / "stream-forward_kl-0.json").read_text())["curves"]
        return [acceptance for _, acceptance in curves["topk"]]

    before, _, after = curve("learned", "learner.adam_lr=3e-3")
    assert after > before + 0.3  # 1.07 before, 1.6 after
    assert curve("still", "learner.muon_lr=0", "learner.adam_lr=0") == [before] * 3


def test_skipped_steps_are_counted_and_too_many_end_the_run(
    tiny_folder: Path, streams: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    step, bad, taken = training.train_step, {1, 2}, itertools.count()

    def flawed(*args: Any, **options: Any) -> Any:
        if next(taken) in bad:
            raise FloatingPointError("loss is nan")
        return step(*args, **options)

    monkeypatch.setattr(training, "train_step", flawed)
    for name, text in (("summary.json", "{}"), ("a-list-0.json", "[1]"), ("not-json-0.json", "x")):  # of something else
        (tmp_path / name).write_text(text)
    assert bench(tiny_folder, streams["topk"], tmp_path) == 0
    assert len((tmp_path / "table.md").read_text().splitlines()) == 4
    assert json.loads((tmp_path / "topk-forward_kl-0.json").read_text())["skipped"] == 2
    taken = itertools.count()
    assert bench(tiny_folder, streams["topk"], tmp_path / "strict", "learner.max_skipped=1") == 2
    assert "loss is nan" in capsys.readouterr().err and not list((tmp_path / "strict").glob("*.json"))


def test_what_cannot_be_measured_is_an_error(
    tiny_folder: Path, streams: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    assert bench(tiny_folder, streams["topk"], tmp_path, "--variants", "policy_gradient") == 2
    assert "serve with drafter.mode=sampled" in capsys.readouterr().err
    rejected = TrajectoryDataset(tmp_path / "rejected")
    for trajectory in TrajectoryDataset(streams["topk"]):
        rejected.append(trajectory.set(("sampling", "rule"), torch.tensor(rule_code("rejection"))))
    assert bench(tiny_folder, rejected.folder, tmp_path) == 2
    assert f"--recording {rejected.folder}: the rule 'rejection' is not replayable: " in capsys.readouterr().err
    monkeypatch.setattr(assembly, "load", lambda config: pytest.fail("nothing is loaded for these"))
    for more, message in (
        (["--variants", "forward_lk"], "unknown 'forward_lk'; there are forward_kl"),
        (["--every", "8", "--ahead", "5"], "has 12 trajectories; at least 13 are needed"),
        (["--every", "6"], "--every 6 must be a multiple of learner.batch_size=4"),
        (["--every", "0"], "--every must be at least 1, got 0"),
        (["--every", "-4"], "--every must be at least 1, got -4"),
        (["--ahead", "0"], "--ahead must be at least 1, got 0"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--limit", "0"], "--limit must be at least 1, got 0"),
        (["--variants", "configured", "objectives=[{name: imitatoin}]"], "no objective is called 'imitatoin'"),
    ):
        assert bench(tiny_folder, streams["topk"], tmp_path, *more) == 2
        assert message in capsys.readouterr().err


def test_results_of_before_there_were_settings_are_read() -> None:
    folder = Path(__file__).parents[2] / "benchmarks" / "results" / "objectives"
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    assert results and _markdown(results) == (folder / "table.md").read_text()


def test_mean_and_spread_over_seeds() -> None:
    runs = [{"recording": "r", "variant": "v", "curves": {"topk": [[0, 1.0], [4, a]]}} for a in (1.2, 1.5, 1.8)]
    ((key, curve),) = mean_curves(runs).items()
    assert key == ("r", "topk", "v") and curve[0] == (0, 1.0, 0.0)
    assert curve[1][0] == 4 and curve[1][1:] == pytest.approx((1.5, 0.6))
