"""What the serving half of a run does with a model's generation config."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from learner_loops import HANDSHAKE, day0
from torch import Tensor

from aurora_rl.cli import assembly, spec
from aurora_rl.cli.config import load_config
from aurora_rl.cli.config.canary import compared
from aurora_rl.cli.embedded import _wire, embedded_server
from aurora_rl.cli.errors import ConfigError
from aurora_rl.cli.remote import remote_server
from aurora_rl.envs import Completion, SampleAndMatch, TransformersEngine
from aurora_rl.envs.verification.rules import Verdict
from aurora_rl.policies import MedusaDrafter
from aurora_rl.serving.server import InferenceServer
from aurora_rl.telemetry.log import MetricsLog, MetricsReader

BUDGET = 24
Serve = Callable[..., tuple[list[list[int]], list[list[int]]]]


@pytest.fixture
def serve(tiny_folder: Path, tmp_path: Path) -> Serve:
    """Serves three prompts with fields in generation_config.json; the texts, and those of `generate`."""

    def serve_three(fields: dict[str, Any], *pairs: str) -> tuple[list[list[int]], list[list[int]]]:
        folder = tmp_path / "model"
        shutil.copytree(tiny_folder, folder)
        path = folder / "generation_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
        config = load_config(
            overrides=[
                *(f"model={folder}", "device=cpu", "dtype=float32", "drafter.name=ngram", "drafter.depth=3"),
                *("engine.slots=2", "engine.max_length=256", "traffic.requests=3", "drafter.adaptive=false"),
                *(
                    f"max_new_tokens={BUDGET}",
                    f"wire.trajectories=ipc://{tmp_path}/t",
                    f"wire.weights=ipc://{tmp_path}/w",
                ),
                *pairs,
            ]
        )
        run = spec.resolve(config)
        target = assembly.load(run)
        requests = assembly.request_queue(run, target, assembly.traffic(config))
        drafter, model, done = assembly.start_drafter(run, target, []), copy.deepcopy(target.model), []

        def keep(completion: Completion) -> str:
            done.append(completion)
            return "domain"

        log = MetricsLog(tmp_path / "metrics.jsonl", "test")
        requests.completed = keep  # type: ignore[method-assign]
        if config.engine.remote:
            remote_server(run, target, requests, drafter, log, tmp_path)
        server = embedded_server(run, target, requests, requests.first_prompts(1)[0], drafter, log)
        try:
            while server.step():
                pass
        finally:
            server.close()
        done.sort(key=lambda completion: completion.request.id)
        generated = [
            model.generate(
                c.request.prompt[None],
                attention_mask=c.request.prompt[None] * 0 + 1,
                max_new_tokens=BUDGET,
                do_sample=False,
                pad_token_id=0,
            )[0, len(c.request.prompt) :].tolist()
            for c in done
        ]
        return [completion.tokens.tolist() for completion in done], generated

    return serve_three


PENALTY = {"repetition_penalty": 1.5, "min_new_tokens": 5}


def test_the_models_generation_config_is_served(serve: Serve) -> None:
    texts, generated = serve(PENALTY)
    assert len(texts) == 3 and texts == generated


def test_ignore_serves_raw_logits(serve: Serve) -> None:
    texts, generated = serve(PENALTY, "generation_config=ignore")
    assert len(texts) == 3 and texts != generated


def test_float16_is_served(serve: Serve) -> None:
    texts, generated = serve({}, "dtype=float16", "drafter.name=eagle3", "drafter.vocab_size=64")
    assert [len(text) for text in texts] == [len(text) for text in generated] and all(texts)
    assert texts[0][:4] == generated[0][:4]  # further on, near-ties may fall the other way


@pytest.mark.parametrize("kept", [8192, 0])
def test_prompts_that_begin_alike_are_counted(serve: Serve, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    servers, close = [], InferenceServer.close
    monkeypatch.setattr(InferenceServer, "close", lambda self: (servers.append(self), close(self)))
    pairs = ("engine.slots=1", "drafter.name=eagle3", "drafter.vocab_size=64", f"engine.prefix_cache_tokens={kept}")
    texts, generated = serve({}, *pairs)
    (server,) = servers
    assert texts == generated
    # All begin with the token of the user's role.
    assert (server.prefix_cache_hits >= 2) if kept else (server.prefix_cache_hits == 0)
    assert (server.prefix_cache_queries > server.prefix_cache_hits) if kept else (server.prefix_cache_queries == 0)
    assert (server.policy.prefix_cache is not None) == bool(kept)


@pytest.mark.parametrize(
    ("fields", "pairs", "wrong"),
    [
        ({"guidance_scale": 2.0}, [], r"model=\S+: .* sets guidance_scale=2.0, .*generation_config=ignore"),
        ({"typical_p": 0.9}, ["temperature=0.5"], r"model=\S+: temperature 0.5 with typical_p=0.9 of the model's"),
        (
            {"repetition_penalty": 1.1, "top_p": 0.8},
            ["engine.name=sglang", "drafter.name=eagle3", "drafter.feature_layers=[1,2]"],
            r"model=\S+: its generation config sets repetition_penalty=1.1, and SGLang .*generation_config=ignore",
        ),
        (
            {"repetition_penalty": 1.1},
            ["engine.name=vllm", "drafter.name=eagle3"],
            r"model=\S+: its generation config sets repetition_penalty=1.1, and vLLM .*generation_config=ignore",
        ),
    ],
)
def test_what_cannot_be_served_is_refused_before_it_starts(
    serve: Serve, fields: dict[str, Any], pairs: list[str], wrong: str
) -> None:
    with pytest.raises(ConfigError, match=wrong):
        serve(fields, *pairs)


class CountingEngine(TransformersEngine):
    """An engine of a third party."""

    passes = 0

    def verify(self, *round_: Any) -> Tensor:
        CountingEngine.passes += 1
        return super().verify(*round_)


class CountingRule(SampleAndMatch):  # type: ignore[misc]  # a third party may derive where the library does not
    """A verification rule of a third party."""

    rounds = 0

    def verify(self, *tensors: Any) -> Verdict:
        CountingRule.rounds += 1
        return super().verify(*tensors)


def test_an_engine_and_a_rule_by_their_import_paths(serve: Serve) -> None:
    texts, generated = serve({}, f"engine.name={__name__}:CountingEngine", f"rule={__name__}:CountingRule")
    assert texts == generated
    assert CountingEngine.passes >= CountingRule.rounds > 3


def test_a_compared_drafter_that_fails_while_it_is_timed_is_named_by_its_version(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*args: object) -> None:
        raise RuntimeError("no ideas at all")

    monkeypatch.setattr(MedusaDrafter, "propose", fails)
    model = [f"model={tiny_folder}", "device=cpu", "dtype=float32", "drafter.vocab_size=64"]
    small = ["engine.slots=1", "engine.max_length=256", "traffic.requests=1", "max_new_tokens=8", "drafter.depth=1"]
    config = load_config(overrides=["compare=[ngram,medusa]", "drafter.lookup=0", *model, *small])
    first, second = map(spec.resolve, compared(config))
    target = assembly.load(first)
    requests = assembly.request_queue(first, target, assembly.traffic(config))
    drafter, second_drafter = (assembly.start_drafter(each, target, []) for each in (first, second))
    log, usual = MetricsLog(tmp_path / "metrics.jsonl", "test"), requests.first_prompts(1)[0]
    embedded_server(first, target, requests, usual, drafter, log, (second, second_drafter)).close()
    (fault,) = (event for event in MetricsReader(log.path) if event["event"] == "drafter_fault")
    assert (fault["request"], fault["version"]) == (None, 1) and "no ideas at all" in fault["fault"]
    assert "in the turns of version 1 every request is served without the drafter: " in caplog.text


def test_an_engine_has_one_name_for_trajectories_and_for_weights(tmp_path: Path) -> None:
    config = load_config(overrides=[f"wire.trajectories=ipc://{tmp_path}/t", f"wire.weights=ipc://{tmp_path}/w"])
    sink, receiver = _wire(config, HANDSHAKE, day0())
    assert sink._meta["engine"] == receiver.name
    sink.close()
    receiver.close()
