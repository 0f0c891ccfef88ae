"""The three commands of docs/sglang.md, from nothing to a drafter that learns from what clients ask SGLang."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from forked_commands import Forks
from loopback_ports import free_ports
from processes import wait
from run_events import events
from sglang_requests import environment, requests

from aurora_rl.cli import main as cli
from aurora_rl.envs.sglang.client import CPU_ARGUMENTS, CPU_VARIABLES, SGLangClient, SGLangError

pytestmark = [pytest.mark.sglang, pytest.mark.usefixtures("signal_handlers")]

PAGE = (Path(__file__).parents[3] / "docs" / "sglang.md").read_text()
INIT, LAUNCH, ATTACH = re.search(r"```bash\n(.*?)```", PAGE, re.DOTALL)[1].replace("\\\n", " ").splitlines()
QUICK = [
    *("learner.publish_every=4", "learner.batch_size=2", "learner.replay=1", "learner.nice=0"),
    *("gate.requests=2", "gate.margin=10"),
]


class Deployment:
    """SGLang on a day-0 drafter, both by the commands of the page, on ports that are free."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.folder = folder
        port, plugin_port = free_ports(2)
        self._names = {"30000": str(port), "5560": str(plugin_port)}
        self._names |= {"Qwen/Qwen3-8B": str(model), "DRAFTER": str(folder / "drafter")}
        _, init = self.words(INIT)
        # The context of the test's model is shorter than the usual length of a request.
        assert cli.main([*init, "engine.max_length=480", "drafter.vocab_size=256", "dtype=float32"]) == 0
        self.url, self.plugin_address = f"http://127.0.0.1:{port}", f"tcp://127.0.0.1:{plugin_port}"
        self.launch()

    def launch(self) -> None:
        variables, launch = self.words(LAUNCH)
        arguments = [*CPU_ARGUMENTS, "--device=cpu", "--dtype=float32", "--skip-server-warmup"]
        arguments += ["--max-total-tokens=4096", "--max-running-requests=4", "--log-level=warning"]
        arguments += ["--port", self._names["30000"]]
        log = self.folder / "sglang.log"
        with open(log, "a") as output:
            process = subprocess.Popen(
                [sys.executable, *launch, *arguments],
                cwd=self.folder,
                env={**os.environ, **environment(), **CPU_VARIABLES, **variables},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.engine = SGLangClient(self.url, self.plugin_address, process=process, log=log)
        self.engine.wait_ready(200)

    def words(self, command: str) -> tuple[dict[str, str], list[str]]:
        """The environment of a command and its words, without the program."""
        words = shlex.split(re.sub("|".join(self._names), lambda found: self._names[found[0]], command))
        variables = [word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word)]
        return dict(variables), words[len(variables) + 1 :]

    def pairs(self, name: str) -> list[str]:
        """What a run in the folder `name` is told in addition."""
        trajectories, weights = free_ports(2)
        wire = [f"wire.trajectories=tcp://127.0.0.1:{trajectories}", f"wire.weights=tcp://127.0.0.1:{weights}"]
        return [*wire, *QUICK, f"run_dir={self.folder / name}"]


class Attached:
    """`aurora-rl sglang attach`, running; its folder is `attach`."""

    def __init__(self, deployment: Deployment, forks: Forks) -> None:
        _, words = deployment.words(ATTACH)
        self.folder, self._log = deployment.folder / "attach", deployment.folder / "attach.log"
        with open(self._log, "wb") as log:
            self.process = forks.start([*words, *deployment.pairs("attach")], log, log, cwd=deployment.folder)

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()  # where a test failed; its learner ends with it
        self.process.wait()

    @property
    def text(self) -> str:
        return self._log.read_text()

    def events(self, kind: str) -> list[dict[str, Any]]:
        return events(self.folder, kind)

    def wait_for(self, condition: Callable[[], object]) -> None:
        def happened() -> object:
            assert self.process.poll() is None, self.text
            return condition()

        wait(happened, 120)


def counted(folder: Path) -> int:
    return sum(event["requests"] for event in events(folder, "requests"))


@pytest.fixture(scope="module")
def deployment(launch: Any, sglang_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    running = Deployment(sglang_models / "target", tmp_path_factory.mktemp("deployment"))
    yield running
    running.engine.close()


class Clients:
    """What was asked of an OpenAI API, eight at a time, and the sums of the answers."""

    def __init__(self, url: str) -> None:
        self.api = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)
        self.texts: list[str] = []
        self.tokens = 0

    def chat(self, number: int, **options: Any) -> Any:
        messages: Any = [{"role": "user", "content": f"{number} times {number + 1}?"}]
        options = {"max_tokens": 24, "temperature": 0, **options}
        return self.api.chat.completions.create(model="default", messages=messages, **options)

    def ask(self) -> None:
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(self.chat, range(len(self.texts), len(self.texts) + 8)))
        self.texts += [answer.choices[0].message.content for answer in answers]
        self.tokens += sum(answer.usage.completion_tokens for answer in answers)


def test_three_commands_learn_from_what_clients_ask_sglang(
    deployment: Deployment, forks: Forks, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [f"engine.plugin_address={deployment.plugin_address}"]
    with Attached(deployment, forks) as run:
        run.wait_for(lambda: run.events("attached") and run.events("learner_ready"))
        clients = Clients(f"{deployment.url}/v1")
        while not run.events("swap"):
            assert len(clients.texts) < 400 and run.process.poll() is None, run.text
            clients.ask()
        asked = len(clients.texts)
        run.wait_for(lambda: counted(run.folder) == asked)

        capsys.readouterr()
        assert cli.main(["sglang", "status", *command]) == 0
        told = json.loads(capsys.readouterr().out)
        served = told["served"]
        assert (told["attached"], told["skipped"], told["recorded"], served["requests"]) == (True, {}, asked, asked)
        assert told["swaps"] >= 1 and told["version"] >= 1
        # The first token of a completion comes from prefill, and a round brings one more than it accepts.
        assert (served["tokens"], served["speculative_tokens"]) == (clients.tokens, clients.tokens - asked)
        assert sum(served["accepted"].values()) == served["speculative_rounds"]
        assert served["acceptance_length"] == served["speculative_tokens"] / served["speculative_rounds"]

        # SGLang is restarted, on the day-0 drafter: it is attached to again, and gets what was learned.
        deployment.engine.close()
        (lost,) = requests(4)
        with pytest.raises(SGLangError, match="does not answer"):
            deployment.engine.generate(lost, timeout=5)
        deployment.launch()
        status = deployment.engine.status
        run.wait_for(lambda: len(run.events("attached")) == 2 and status()["version"] >= told["version"])
        clients.ask()
        run.wait_for(lambda: counted(run.folder) == asked + 8)
        assert status()["recorded"] == 8

        capsys.readouterr()
        assert cli.main(["sglang", "detach", *command]) == 0
        assert json.loads(capsys.readouterr().out)["attached"] is False
        assert run.process.wait(60) == 0, run.text
        assert "somebody else detached the learner" in run.text
        assert clients.chat(0).choices[0].message.content == clients.texts[0]  # it serves on, and says the same
        assert not status()["attached"]

    summary = json.loads((run.folder / "summary.json").read_text())
    assert (summary["requests"], summary["failed"], summary["domains"]) == (asked + 8, 0, {})
    assert summary["swaps"] == len(run.events("swap")) >= 2 and summary["speedup"] is None
    assert summary["acceptance_length"]["last"] >= 1
    assert any(event["requests"] == asked + 8 and event["acceptance_length"] for event in run.events("status"))
    assert (run.folder / "report.png").exists() and (run.folder / "drafter" / "config.json").exists()


def test_our_front_passes_clients_on_to_sglang(deployment: Deployment) -> None:
    (port,), (_, words) = free_ports(1), deployment.words(ATTACH)
    command = ["serve", *words[2:], "engine.name=sglang", f"http.port={port}", "learner.spawn=false"]
    clients, folder = Clients(f"http://127.0.0.1:{port}/v1"), deployment.folder / "serve"

    def listens() -> bool:
        try:
            return bool(clients.api.models.list().data)
        except openai.APIConnectionError:
            return False

    def ask() -> None:
        try:
            wait(listens)
            answer = clients.chat(7)
            whole, tokens = answer.choices[0].message.content, answer.usage.completion_tokens
            pieces = list(clients.chat(7, stream=True))
            assert all(piece.choices for piece in pieces)  # none that the client did not ask for
            assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole
            for told in (answer.metrics, pieces[-1].metrics):
                block = told["speculative_decoding"]
                steps, accepted = block["num_spec_steps"], block["num_accepted_draft_tokens"]
                assert block["num_spec_tokens"] == 3 and block["num_draft_tokens"] == 3 * steps > 0
                # The first token comes from prefill, and the last pass may accept more than is wanted.
                assert tokens <= 1 + steps + accepted <= tokens + 3
                assert told["drafter_version"] == 0
            assert deployment.engine.status()["slots"] == 4
            assert clients.chat(7, extra_body={"learn": False}).choices[0].message.content == whole
            with pytest.raises(openai.BadRequestError, match="speculative=false is not supported"):
                clients.chat(7, extra_body={"speculative": False})
            # SGLang would ignore the one, and its own words on the other are in no form of OpenAI's.
            with pytest.raises(openai.BadRequestError, match="did you mean 'temperature'") as refused:
                clients.chat(7, extra_body={"temprature": 1})
            assert (refused.value.param, refused.value.code) == ("temprature", "unknown_field")
            with pytest.raises(
                openai.BadRequestError, match="Error code: 400 - {'error': {'message': 'temperature must"
            ):
                clients.chat(7, temperature=-1)
            assert clients.chat(7, seed=1, user="me", extra_body={"metadata": {"a": "b"}}).usage.completion_tokens
            short = {"max_completion_tokens": 3, "learn": False}  # the one name of the budget that SGLang has not here
            answer = clients.api.completions.create(model="default", prompt="7", temperature=0, extra_body=short)
            assert answer.usage.completion_tokens == 3
            wait(lambda: counted(folder) == 3)
            delivered = f"aurora_generation_tokens_total {float(3 * tokens)}\n"
            url = f"http://127.0.0.1:{port}/metrics"
            wait(lambda: delivered in httpx.get(url).text)
            for sample in ("e2e_request_latency_seconds_count 5.0", "request_time_per_output_token_seconds_count 1.0"):
                assert f"aurora_{sample}\n" in httpx.get(url).text
            assert deployment.engine.status()["skipped"] == {"opt_out": 2}
        finally:
            if not ended.is_set():  # else the signal would end the tests
                os.kill(os.getpid(), signal.SIGTERM)

    ended = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask)
        status = cli.main([*command, *deployment.pairs("serve"), "engine.threads=1"])
        ended.set()
        assert status == 0
        asked.result()
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["requests"], summary["swaps"]) == (3, 0) and summary["acceptance_length"]["last"] >= 1
    assert not deployment.engine.status()["attached"]
