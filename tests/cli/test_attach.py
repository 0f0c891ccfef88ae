"""`aurora-rl sglang` and `vllm`: one-shot commands on a plugin's socket; what is missing. `attach` runs elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from aurora_rl.cli import main as cli
from aurora_rl.envs.remote import plugin_server
from aurora_rl.envs.remote.plugin_server import PluginError, PluginServer


@pytest.fixture
def asked() -> list[str]:
    return []


@pytest.fixture
def plugin(asked: list[str]) -> Iterator[str]:
    """The address of a plugin that answers with what it was asked, and refuses the second time."""

    def answer(kind: str, fields: dict[str, Any]) -> dict[str, Any]:
        asked.append(kind)
        if len(asked) > 1:
            raise PluginError("not again")
        return {"kind": kind, "served": {"acceptance_length": 2.5}}

    server = PluginServer("tcp://127.0.0.1:*", answer)
    yield server.address
    server.close()


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
@pytest.mark.parametrize("kind", ["status", "detach"])
def test_the_status_is_printed_as_json(
    engine: str, kind: str, plugin: str, asked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([engine, kind, f"engine.plugin_address={plugin}"]) == 0
    assert json.loads(capsys.readouterr().out) == {"kind": kind, "served": {"acceptance_length": 2.5}}
    assert cli.main([engine, kind, f"engine.plugin_address={plugin}"]) == 1
    assert capsys.readouterr() == ("", "aurora-rl: not again\n")
    assert asked == [kind, kind]


def test_a_plugin_that_does_not_answer_is_status_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(plugin_server.ask.__kwdefaults__, "timeout", 0.1)
    assert cli.main(["sglang", "status", "engine.plugin_address=tcp://127.0.0.1:9"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("aurora-rl: no answer at tcp://127.0.0.1:9 within 0 s") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["status"], "engine.plugin_address is missing: set it to the value of AURORA_RL_SGLANG"),
        (
            ["status", "engine.plugin_address=there"],
            "engine.plugin_address must be tcp://host:port, ipc://path or null",
        ),
        (["attach"], "engine.plugin_address is missing"),
        (["attach", "engine.plugin_address=tcp://127.0.0.1:9"], "engine.url is missing: set it to SGLang's own"),
        (
            ["attach", "engine.plugin_address=tcp://127.0.0.1:9", "engine.url=http://127.0.0.1:9"],
            "set drafter.path to the drafter that it serves",
        ),
        (
            ["attach", "engine.plugin_address=tcp://127.0.0.1:9", "engine.url=http://127.0.0.1:9", "drafter.path=d"],
            "engine.plugin_address: no answer at tcp://127.0.0.1:9",
        ),
    ],
)
def test_what_is_missing_is_named_before_anything_is_loaded(
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    monkeypatch.setitem(plugin_server.ask.__kwdefaults__, "timeout", 0.1)
    folder = tmp_path_factory.mktemp("none")
    monkeypatch.chdir(folder)
    assert cli.main(["sglang", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("aurora-rl: ") and message in error and error.count("\n") == 1
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "port"),
    [([], None), (["http.port=8123"], 8123), (["--config", "run.yaml"], 8124), (["http.port=null"], None)],
)
def test_attach_opens_a_front_only_where_a_port_is_set(
    words: list[str],
    port: int | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("http: {port: 8124}")
    assert cli.main(["sglang", "attach", "--print-config", *words]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["http"]["port"] == port


def test_what_vllm_lacks_is_named_by_its_own_name(capsys: pytest.CaptureFixture[str]) -> None:
    address = "engine.plugin_address=tcp://127.0.0.1:9"
    for words, message in (
        (["status"], "set it to the value of AURORA_RL_VLLM in vLLM's environment"),
        (["attach", address], "engine.url is missing: set it to vLLM's own"),
        (["attach", address, "engine.url=http://127.0.0.1:9", "drafter.path=d", "http.port=0"], "no front before vLLM"),
    ):
        assert cli.main(["vllm", *words]) == 2
        assert message in capsys.readouterr().err
