"""A run on an engine of another process: what a server that runs already decides, and what is told of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aurora_rl.cli import assembly, remote, spec
from aurora_rl.cli.config import load_config, to_yaml
from aurora_rl.cli.errors import ConfigError
from aurora_rl.cli.remote import remote_server, served_config
from aurora_rl.envs.remote import plugin_server
from aurora_rl.envs.remote.plugin_server import PluginError, PluginServer
from aurora_rl.envs.sglang.client import SGLangClient, SGLangError, reserved_context
from aurora_rl.telemetry.log import MetricsLog

SERVED = {
    "seen": {},
    "device": "cpu",
    "model": "org/model",
    "dtype": "float16",
    "depth": 3,
    "width": 2,
    "num_nodes": 5,
    "context": 4096,
}


@pytest.fixture
def attaching() -> Iterator[list[str]]:
    """Pairs of a run on an SGLang whose plugin answers with what it serves."""
    plugin = PluginServer("tcp://127.0.0.1:*", lambda kind, fields: SERVED)
    yield ["engine.name=sglang", "engine.url=http://127.0.0.1:9", f"engine.plugin_address={plugin.address}"]
    plugin.close()


def attaching_run(pairs: list[str]) -> spec.RunSpec:
    """A run on a server that is there, whose drafter is started here."""
    run = spec.resolve(load_config(overrides=[*pairs, "drafter.feature_layers=[1,2]", "drafter.path=d"]))
    return replace(run, config=replace(run.config, drafter=replace(run.config.drafter, path=None)))


def test_what_a_running_server_decides_is_taken_from_it(attaching: list[str]) -> None:
    asked = load_config(overrides=[*attaching, "drafter.path=d", "drafter.name=eagle3", "drafter.depth=7"])
    before = to_yaml(asked)
    config = served_config(asked)
    assert (config.model, config.dtype, config.engine.max_length) == ("org/model", "float16", 4096 - 12)
    tree = config.drafter
    assert (tree.depth, tree.width, tree.num_nodes, tree.name, tree.path) == (3, 2, 5, "eagle3", "d")
    assert to_yaml(asked) == before  # the caller's stays as it is


def test_a_model_and_a_dtype_that_are_named_stay(attaching: list[str]) -> None:
    overrides = [*attaching, "drafter.path=d", "model=my/copy", "dtype=bfloat16"]
    config = served_config(load_config(overrides=overrides))
    assert (config.model, config.dtype) == ("my/copy", "bfloat16")


def test_a_plugin_that_does_not_answer_is_named_with_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plugin_server.ask.__kwdefaults__, "timeout", 0.1)
    nowhere = ["engine.name=sglang", "engine.url=http://127.0.0.1:9", "engine.plugin_address=tcp://127.0.0.1:9"]
    with pytest.raises(ConfigError, match="engine.plugin_address: no answer at tcp://127.0.0.1:9"):
        served_config(load_config(overrides=[*nowhere, "drafter.path=d"]))


@pytest.mark.parametrize(("context", "length"), [(4096, 1024), (1000, 1000 - reserved_context(3, 2, 5))])
def test_a_server_that_is_launched_here_has_a_length_that_fits_the_model(
    context: int, length: int, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: dict[str, Any] = {}
    monkeypatch.setattr(SGLangClient, "launch", lambda model, **settings: launched.update(settings))
    pairs = [f"model={tiny_folder}", "dtype=float32", "device=cpu", "drafter.vocab_size=64", "drafter.name=eagle3"]
    pairs += ["engine.name=sglang", "drafter.feature_layers=[1,2]", "drafter.width=2", "drafter.num_nodes=5"]
    run = spec.resolve(load_config(overrides=[*pairs, "drafter.depth=3"]))
    drafter = assembly.start_drafter(run, assembly.load(run), [])
    remote._launch(run, drafter, context, tmp_path)
    assert launched["max_length"] == length
    longer = replace(run, config=replace(run.config, engine=replace(run.config.engine, max_length=context)))
    with pytest.raises(
        SGLangError, match=f"engine.max_length={context} and the drafts exceed .*; set engine.max_length="
    ):
        remote._launch(longer, drafter, context, tmp_path)


def test_settings_that_keep_clients_requests_from_the_records_are_told(
    tiny_folder: Path, tmp_path: Path, attaching: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(tiny_folder, tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "repetition_penalty": 1.1}))
    pairs = [f"model={tmp_path}/model", "dtype=float32", "device=cpu", "drafter.vocab_size=64", "drafter.name=eagle3"]
    run = attaching_run([*attaching, *pairs])
    target = assembly.load(run)
    drafter, log = assembly.start_drafter(run, target, []), MetricsLog(tmp_path / "metrics.jsonl", "test")
    with pytest.raises(ConfigError, match="engine.name=sglang: "):  # nobody is there to attach to
        remote_server(run, target, None, drafter, log, tmp_path)
    assert "sets repetition_penalty=1.1; requests that SGLang serves with that are not recorded" in caplog.text


def test_the_plugin_is_told_what_to_capture(
    tiny_folder: Path, tmp_path: Path, attaching: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, Any] = {}

    def attach(client: SGLangClient, **fields: Any) -> None:
        told.update(fields)
        raise PluginError("that is all")

    monkeypatch.setattr(SGLangClient, "attach", attach)
    small = [f"model={tiny_folder}", "dtype=float32", "device=cpu", "drafter.vocab_size=64", "drafter.name=eagle3"]
    run = attaching_run([*attaching, *small, "engine.part_tokens=8", "engine.capture_rate=0.5"])
    target = assembly.load(run)
    drafter, log = assembly.start_drafter(run, target, []), MetricsLog(tmp_path / "metrics.jsonl", "test")
    with pytest.raises(ConfigError, match="that is all"):
        remote_server(run, target, None, drafter, log, tmp_path)
    assert (told["part_tokens"], told["capture_rate"]) == (8, 0.5)


@pytest.mark.parametrize(
    ("engine", "pairs", "refusal"),
    [
        ("sglang", ["temperature=0.7"], "temperature=0.7: on a CPU SGLang verifies by argmax; set temperature=0, or"),
        (
            "vllm",
            ["temperature=0.7", "top_k=5"],
            "top_k=5: on a CPU vLLM's sampler ends the server .*; set top_k=0, or",
        ),
        (
            "vllm",
            ["temperature=0.7", "min_p=0.1"],
            "min_p=0.1: vLLM does not apply it when it verifies drafts; set min_p=0, or",
        ),
    ],
)
def test_what_cannot_be_sampled_is_refused_before_anything_is_asked(
    engine: str, pairs: list[str], refusal: str, tiny_folder: Path, tmp_path: Path, attaching: list[str]
) -> None:
    small = [f"model={tiny_folder}", "dtype=float32", "device=cpu", "engine.max_length=256"]
    small += ["drafter.vocab_size=64", "drafter.name=eagle3"]
    run = attaching_run([*attaching, *small, *pairs, f"engine.name={engine}"])
    target = assembly.load(run)
    drafter, log = assembly.start_drafter(run, target, []), MetricsLog(tmp_path / "metrics.jsonl", "test")
    requests = assembly.request_queue(run, target, [])
    with pytest.raises(ConfigError, match=f"^engine.name={engine}: {refusal} engine.name=transformers$"):
        remote_server(run, target, requests, drafter, log, tmp_path)
