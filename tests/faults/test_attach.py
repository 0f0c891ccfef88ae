"""`aurora-rl learn` and `aurora-rl sglang attach learner.spawn=false`, by the commands of docs/production.md.

SGLang is a stand-in here: its lane runs the real one.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from processes import wait
from recorded_sglang import TOKENS, RecordedSGLang

from aurora_rl.cli import main as cli

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("signal_handlers")]

PAGE = (Path(__file__).parents[2] / "docs" / "production.md").read_text().replace("\\\n", " ")
KEYS, INIT, LEARN, ATTACH = (
    next(line for line in PAGE.splitlines() if line.startswith(f"aurora-rl {command}"))
    for command in ("keys", "drafter init", "learn", "sglang attach")
)


def words(command: str, names: dict[str, str]) -> list[str]:
    """The words of a command on the page after `aurora-rl`, with names of this test in the place of the page's."""
    return shlex.split(re.sub("|".join(map(re.escape, names)), lambda found: names[found[0]], command))[1:]


@pytest.fixture
def sglang(tiny_folder: Path, tmp_path: Path) -> Iterator[RecordedSGLang]:
    init = words(INIT, {"DRAFTER": str(tmp_path / "drafter"), "Qwen/Qwen3-8B": str(tiny_folder)})
    small = ["drafter.feature_layers=[1,2]", "drafter.vocab_size=64", "engine.max_length=256", "dtype=float32"]
    assert cli.main([*init, *small]) == 0
    assert cli.main(words(KEYS, {"KEYS": str(tmp_path / "keys")})) == 0
    stand_in = RecordedSGLang(tiny_folder, tmp_path / "drafter", str(tmp_path / "keys"))
    yield stand_in
    stand_in.close()


def test_a_learner_elsewhere_learns_from_an_sglang_that_is_attached_to_it(
    sglang: RecordedSGLang, start: Callable[..., Any], arguments: list[str], tiny_folder: Path, tmp_path: Path
) -> None:
    wire = dict(pair.split("=") for pair in arguments if pair.startswith("wire."))
    names = {
        "DRAFTER": str(tmp_path / "drafter"), "Qwen/Qwen3-8B": str(tiny_folder), "dtype=bfloat16": "dtype=float32",
        "tcp://0.0.0.0:5557": wire["wire.trajectories"], "tcp://0.0.0.0:5558": wire["wire.weights"],
        "tcp://learner:5557": wire["wire.trajectories"], "tcp://learner:5558": wire["wire.weights"],
        "wire.keys=KEYS": f"wire.keys={tmp_path / 'keys'}",
        "tcp://127.0.0.1:5560": sglang.plugin_address, "http://127.0.0.1:30000": sglang.url,
    }  # fmt: skip
    front_keys = ["http.port=0", "max_new_tokens=null"]  # SGLang chooses the budget of its clients
    learner, attached = start(*words(LEARN, names)), start("sglang attach", *words(ATTACH, names)[2:], *front_keys)
    attached.wait_for("attached")
    wait(lambda: re.search(r"listening at (\S+)", attached.text))
    front = re.search(r"listening at (\S+)/v1", attached.text)[1]  # type: ignore[index]

    asked = 0
    while not attached.events("swap"):
        assert attached.process.poll() is None and learner.process.poll() is None, attached.text + learner.text
        assert httpx.post(f"{front}/v1/completions", json={"prompt": "a"}, timeout=30).status_code == 200
        asked += 1
        wait(lambda: sglang.session is not None and not sglang.session.sink.queued)
    published = {event["version"] for event in learner.wait_for("gate") if event["publish"]}
    assert attached.events("swap")[0]["version"] in published  # the next may have come before the first was swapped
    assert learner.events("learner_ready") and learner.events("train") and not attached.events("learner_ready")

    def metrics() -> str:
        return httpx.get(f"{front}/metrics", timeout=30).text

    wait(lambda: f"aurora_generation_tokens_total {float(asked * TOKENS)}\n" in metrics())
    assert f"aurora_e2e_request_latency_seconds_count {float(asked)}\n" in metrics()
    assert "aurora_num_requests_running 0.0\n" in metrics()

    attached.interrupt()
    assert attached.ended() == 0, attached.text
    assert sglang.session is None and attached.summary["requests"] == asked
    status = attached.events("status")[-1]
    assert (status["dropped"], status["learner"]) == ({}, f"any at {wire['wire.weights']}")
    assert status["running"] == 0 and "e2e_request_latency" in attached.events("status")[0]["waits"]
    learner.interrupt()
    assert learner.ended() == 0, learner.text
