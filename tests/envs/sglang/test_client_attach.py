"""The three commands of docs/sglang.md, from nothing to a drafter that learns from what clients ask SGLang."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from processes import wait
from sglang_requests import environment

from aurora_rl.cli import main as cli
from aurora_rl.envs.sglang.client import CPU_ARGUMENTS, CPU_VARIABLES, SGLangClient, free_ports
from aurora_rl.telemetry.log import MetricsReader

pytestmark = pytest.mark.sglang

PAGE = (Path(__file__).parents[3] / "docs" / "sglang.md").read_text()
INIT, LAUNCH, ATTACH = re.search(r"```bash\n(.*?)```", PAGE, re.DOTALL)[1].replace("\\\n", " ").splitlines()
QUICK = [
    *("learner.publish_every=4", "learner.batch_size=2", "learner.replay=1", "learner.nice=0"),
    *("gate.requests=2", "gate.margin=10"),
]


@pytest.fixture(autouse=True)
def _signal_handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Deployment:
    """SGLang on a day-0 drafter, both by the commands of the page, on ports that are free."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.folder = folder
        port, plugin_port = free_ports(2)
        self._ports = {"30000": str(port), "5560": str(plugin_port)}
        self._names = {"Qwen/Qwen3-8B": str(model), "DRAFTER": str(folder / "drafter")}
        _, init = self.words(INIT)
        # The context of the test's model is shorter than the usual length of a request.
        assert cli.main([*init, "engine.max_length=480", "drafter.vocab_size=256", "dtype=float32"]) == 0
        variables, launch = self.words(LAUNCH)
        arguments = [*CPU_ARGUMENTS, "--device=cpu", "--dtype=float32", "--skip-server-warmup", f"--port={port}"]
        arguments += ["--max-total-tokens=4096", "--max-running-requests=4", "--log-level=warning"]
        with open(folder / "sglang.log", "w") as log:
            process = subprocess.Popen(
                [sys.executable, *launch, *arguments],
                cwd=folder,
                env={**os.environ, **environment(), **CPU_VARIABLES, **variables},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.plugin_address = f"tcp://127.0.0.1:{plugin_port}"
        self.engine = SGLangClient(
            f"http://127.0.0.1:{port}", self.plugin_address, process=process, log=folder / "sglang.log"
        )
        self.engine.wait_ready(200)

    def words(self, command: str) -> tuple[dict[str, str], list[str]]:
        """The environment of a command and its words, without the program."""
        for name, value in (self._ports | self._names).items():
            command = command.replace(name, value)
        words = shlex.split(command)
        variables = [word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word)]
        return dict(variables), words[len(variables) + 1 :]

    def start(self, words: list[str], name: str, *pairs: str) -> Run:
        trajectories, weights = free_ports(2)
        wire = [f"wire.trajectories=tcp://127.0.0.1:{trajectories}", f"wire.weights=tcp://127.0.0.1:{weights}"]
        return Run([*words, *wire, *QUICK, f"run_dir={self.folder / name}", *pairs], self.folder, name)


class Run:
    """A command of this library that runs."""

    def __init__(self, words: list[str], folder: Path, name: str) -> None:
        self.folder, self._log = folder / name, folder / f"{name}.log"
        with open(self._log, "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "aurora_rl.cli.main", *words],
                cwd=folder,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @property
    def text(self) -> str:
        return self._log.read_text()

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in MetricsReader(self.folder / "metrics.jsonl") if event["event"] == kind]

    def wait_for(self, condition: Callable[[], object]) -> None:
        def happened() -> object:
            assert self.process.poll() is None, self.text
            return condition()

        wait(happened, 120)

    def ended(self) -> dict[str, Any]:
        """The summary of a run that has ended well."""
        assert self.process.wait(60) == 0, self.text
        return json.loads((self.folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def deployment(launch: Any, sglang_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    running = Deployment(sglang_models / "target", tmp_path_factory.mktemp("deployment"))
    yield running
    running.engine.close()


def chat(api: openai.OpenAI, number: int, **options: Any) -> Any:
    messages: Any = [{"role": "user", "content": f"{number} times {number + 1}?"}]
    options = {"max_tokens": 24, "temperature": 0, **options}
    return api.chat.completions.create(model="default", messages=messages, **options)


def test_three_commands_learn_from_what_clients_ask_sglang(
    deployment: Deployment, capsys: pytest.CaptureFixture[str]
) -> None:
    _, words = deployment.words(ATTACH)
    run, tokens = deployment.start(words, "attach"), 0
    run.wait_for(lambda: run.events("attached") and run.events("learner_ready"))
    status = deployment.engine.status
    with (
        openai.OpenAI(base_url=f"{deployment.engine.url}/v1", api_key="none", max_retries=0, timeout=60) as api,
        ThreadPoolExecutor(4) as pool,
    ):
        texts: list[str] = []
        while not status()["swaps"]:
            assert len(texts) < 400 and run.process.poll() is None, run.text
            answers = list(pool.map(lambda number: chat(api, number), range(len(texts), len(texts) + 8)))
            texts += [answer.choices[0].message.content for answer in answers]
            tokens += sum(answer.usage.completion_tokens for answer in answers)
        asked = len(texts)
        run.wait_for(lambda: sum(event["requests"] for event in run.events("requests")) == asked)
        run.wait_for(lambda: run.events("swap"))

        command = [f"engine.plugin_address={deployment.plugin_address}"]
        capsys.readouterr()
        assert cli.main(["sglang", "status", *command]) == 0
        told = json.loads(capsys.readouterr().out)
        served = told["served"]
        assert (told["attached"], told["skipped"], told["recorded"], served["requests"]) == (True, {}, asked, asked)
        assert told["swaps"] >= 1 and told["version"] >= 1
        assert served["tokens"] == tokens
        # The first token of a completion comes from prefill, and a round brings one more than it accepts.
        assert served["speculative_tokens"] == tokens - asked
        rounds = {int(count): times for count, times in served["accepted"].items()}
        assert sum(rounds.values()) == served["speculative_rounds"]
        assert served["acceptance_length"] == served["speculative_tokens"] / served["speculative_rounds"]

        assert cli.main(["sglang", "detach", *command]) == 0
        assert json.loads(capsys.readouterr().out)["attached"] is False
        summary = run.ended()
        assert "somebody else detached the learner" in run.text
        assert chat(api, 0).choices[0].message.content == texts[0]
        assert not status()["attached"]
    assert (summary["requests"], summary["failed"], summary["domains"]) == (asked, 0, {})
    assert summary["swaps"] == len(run.events("swap")) >= 1 and summary["speedup"] is None
    assert summary["acceptance_length"]["last"] >= 1
    assert sum(event["speculative_rounds"] for event in run.events("requests")) == served["speculative_rounds"]
    assert any(event["requests"] == asked and event["acceptance_length"] for event in run.events("status"))
    assert (run.folder / "report.png").exists() and (run.folder / "drafter" / "config.json").exists()


def test_our_front_passes_clients_on_to_sglang(deployment: Deployment) -> None:
    _, words = deployment.words(ATTACH)
    pairs = ["engine.name=sglang", "http.port=0", "learner.spawn=false"]
    run = deployment.start(["serve", *words[2:]], "serve", *pairs)
    run.wait_for(lambda: "listening at" in run.text)
    url = re.search(r"listening at (\S+)", run.text)[1]
    status = deployment.engine.status
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as api:
        whole = chat(api, 7)
        pieces = list(chat(api, 7, stream=True))
        text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
        assert text == whole.choices[0].message.content
        assert chat(api, 7, extra_body={"learn": False}).choices[0].message.content == text
        run.wait_for(lambda: status()["recorded"] == 2)
        assert status()["skipped"] == {"opt_out": 1}
        with pytest.raises(openai.BadRequestError, match="speculative=false is not supported"):
            chat(api, 7, extra_body={"speculative": False})
        run.wait_for(lambda: sum(event["requests"] for event in run.events("requests")) == 2)
    run.process.send_signal(signal.SIGTERM)
    summary = run.ended()
    assert (summary["requests"], summary["swaps"]) == (2, 0) and summary["acceptance_length"]["last"] >= 1
    assert not status()["attached"]
