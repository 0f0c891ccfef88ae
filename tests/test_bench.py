"""`aurora-rl bench objectives` on a tiny stream: curves on what is still to come, resumed run by run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from aurora_rl import build
from aurora_rl.bench import VARIANTS, mean_curves
from aurora_rl.cli import main
from aurora_rl.config import load_config
from aurora_rl.envs import Request, SamplingParams
from aurora_rl.policies import Eagle3Drafter
from aurora_rl.policies.formats import save_drafter
from aurora_rl.recordings import Recording, record

PAIRS = ["dtype=float32", "device=cpu", "drafter.vocab_size=64", "drafter.name=eagle3", "learner.replay=1"]


@pytest.fixture(scope="module")
def streams(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Twelve requests, drafted by top-k and sampled."""
    folders = {}
    for mode in ("topk", "sampled"):
        folders[mode] = tmp_path_factory.mktemp(mode) / mode
        config = load_config(overrides=[f"model={tiny_folder}", f"drafter.mode={mode}", *PAIRS])
        target = build.load(config)
        drafter = build.drafter(config, target, [])
        assert isinstance(drafter, Eagle3Drafter)
        save_drafter(drafter, folders[mode].with_name("drafter-day0"))
        requests = [Request(i, torch.randint(250, (5,)), 8, SamplingParams(1.0, seed=i)) for i in range(12)]
        record(target.model, drafter, requests, Recording(folders[mode]), shape=build.shape(config))
    return folders


def bench(folder: Path, stream: Path, out: Path, *more: str) -> int:
    common = ["bench", "objectives", "--recording", str(stream), "--out", str(out), "--every", "4", "--ahead", "4"]
    return main([*common, *more, f"model={folder}", *PAIRS])


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
        assert result["objectives"] == VARIANTS[name]
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


def test_what_cannot_be_measured_is_an_error(
    tiny_folder: Path, streams: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more, message in (
        (["--variants", "forward_lk"], "unknown 'forward_lk'; there are forward_kl"),
        (["--every", "8", "--ahead", "5"], "has 12 trajectories; at least 13 are needed"),
        (["--every", "6"], "--every 6 must be a multiple of learner.batch_size=4"),
        (["--variants", "policy_gradient"], "serve with drafter.mode=sampled"),
    ):
        assert bench(tiny_folder, streams["topk"], tmp_path, *more) == 2
        assert message in capsys.readouterr().err


def test_mean_and_spread_over_seeds() -> None:
    runs = [{"recording": "r", "variant": "v", "curves": {"topk": [[0, 1.0], [4, a]]}} for a in (1.2, 1.5, 1.8)]
    ((key, curve),) = mean_curves(runs).items()
    assert key == ("r", "topk", "v") and curve[0] == (0, 1.0, 0.0)
    assert curve[1][0] == 4 and curve[1][1:] == pytest.approx((1.5, 0.6))
