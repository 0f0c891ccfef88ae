"""No text of a request is anywhere in a run's folder, in its logs or in its metrics, but where docs/privacy.md says."""

from __future__ import annotations

import json
import os
import signal
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from processes import wait
from run_events import events
from transformers import AutoTokenizer

from aurora_rl.cli import main as cli
from aurora_rl.serving.http.server import HttpServer

MARK = "Xylophone quokka vjzq-8731 wombat fjord"
LEARNING = (
    *("drafter.adaptive=false", "baseline.share=0.2", "baseline.window=4", "canary.share=0", "telemetry.logger=csv"),
    *("learner.batch_size=2", "learner.publish_every=2", "gate.requests=2", "gate.margin=9"),
)


def forms(texts: Sequence[str], ids: Sequence[int]) -> list[bytes]:
    """Return what a file with one of the texts, or with these tokens, would have in it."""
    numbers = [struct.pack(f"<{len(ids)}{size}", *ids) for size in "hiqfd"]
    written = [mark.join(map(str, ids)).encode() for mark in (", ", ",", " ", "\n")]
    return [*numbers, *written, *(text.encode(code) for text in texts for code in ("utf-8", "utf-16-le", "utf-32-le"))]


def found(folder: Path, looked_for: Sequence[bytes]) -> set[str]:
    """Return the files below a folder that have any of it."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"metrics.jsonl", "learner.log", "progress.json", "model.safetensors"} <= {path.name for path in files}
    return {str(path.relative_to(folder)) for path in files if any(each in path.read_bytes() for each in looked_for)}


def marked_tokens(model: Path) -> list[int]:
    """Return the tokens of the middle of the mark, which stand in any text around it alike."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(MARK[10:28], add_special_tokens=False)["input_ids"][2:-2]
    assert len(ids) >= 4
    return list(ids)


def test_a_server_leaves_no_text_but_in_a_recording(
    arguments: list[str],
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run, urls, start = tmp_path / "run", [], HttpServer.start
    monkeypatch.setattr(HttpServer, "start", lambda server, app: (start(server, app), urls.append(server.url)))

    def ask() -> tuple[list[str], list[str]]:
        """Ask until weights were learned and swapped in, refused requests among them, and delete a tenant's data."""
        try:
            wait(lambda: urls)
            answers: list[str] = []
            with httpx.Client(base_url=urls[0], timeout=60) as client:
                while not (events(run, "swap") and events(run, "checkpoint")):
                    assert len(answers) < 500
                    chat = [{"role": "user", "content": f"{MARK} {len(answers)}"}]
                    headers = {"X-Aurora-Tenant": "ab"[len(answers) % 2]}
                    body = {"messages": chat, "max_tokens": 12, "ignore_eos": True}
                    answer = client.post("/v1/chat/completions", json=body, headers=headers).json()
                    answers.append(answer["choices"][0]["message"]["content"])
                refused = [{"prompt": MARK * 40}, {"prompt": "a", MARK: 1}, {"prompt": "a", "stop": [MARK] * 17}]
                assert [client.post("/v1/completions", json=body).status_code for body in refused] == [400] * 3
                assert client.delete("/tenant_data", headers={"X-Aurora-Tenant": "a"}).json()["learner"] == "told"
                wait(lambda: events(run, "deleted"))
                told = [client.get(path).text for path in ("/metrics", "/history", "/server_info", "/")]
            return answers, told
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    pairs = [*LEARNING, "http.port=0", f"learner.recording={run / 'stream'}"]
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask)
        assert cli.main(["serve", *arguments, *pairs]) == 0
        answers, told = asked.result()

    varied = [answer for answer in answers if len(set(answer)) > 5]  # no accident
    looked_for = forms([MARK, *varied], marked_tokens(tiny_folder))
    recorded = found(run, looked_for)
    assert recorded == {str(path.relative_to(run)) for path in (run / "stream").iterdir()} and recorded
    (deleted,) = events(run, "deleted")
    assert deleted["trajectories"] >= len(answers) // 2 - 3
    assert not any(each in text.encode() for each in looked_for for text in (*told, *capfd.readouterr()))


def test_zero_retention_leaves_no_text_at_all(
    arguments: list[str], tiny_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = [{"messages": [{"role": "user", "content": f"{MARK} {number}"}]} for number in range(24)]
    lines[3]["messages"][0]["content"] = MARK * 40  # too long to be served
    lines[5]["max_tokens"] = 12  # type: ignore[assignment]
    (tmp_path / "traffic.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run, pairs = tmp_path / "run", [f"traffic.path={tmp_path / 'traffic.jsonl'}", "privacy.zero_retention=true"]
    assert cli.main(["flywheel", *arguments, *LEARNING, *pairs]) == 0
    (over,) = events(run, "learner_done")
    assert over["seen"] == 2 * len(events(run, "train")) >= 2 and len(events(run, "failed")) == 1
    assert not (run / "answers.jsonl").exists()
    looked_for = forms([MARK], marked_tokens(tiny_folder))
    assert found(run, looked_for) == set()
    assert not any(each in text.encode() for each in looked_for for text in capfd.readouterr())
