"""vLLM's speculative configuration for a drafter's folder, what is asked of its API, and what its answers mean."""

import http.server
import itertools
import json
import threading

import pytest
import torch

from aurora_rl.envs import Request, SamplingParams
from aurora_rl.envs.remote.plugin_server import PluginServer
from aurora_rl.envs.vllm.client import VLLMClient, VLLMError, drafter_config
from aurora_rl.policies import Eagle3Drafter, MedusaDrafter, TargetParts
from aurora_rl.policies.formats.files import save_drafter
from aurora_rl.storage import CheckpointError
from aurora_rl.testing import tiny_target

DRAFTED = {"num_spec_steps": 3, "num_draft_tokens": 9, "acceptance_histogram": [1, 0, 2, 0]}


def parts():
    return TargetParts.of(tiny_target(dtype=torch.float32))


def test_the_method_is_that_of_the_folder(tmp_path):
    drafter = Eagle3Drafter.from_target(parts(), draft_vocab=torch.tensor([2, 7, 11]), feature_layers=(1, 2))
    save_drafter(drafter, tmp_path / "drafter", "vllm")
    assert drafter_config(tmp_path / "drafter", 3) == {
        "method": "eagle3",
        "model": str(tmp_path / "drafter"),
        "num_speculative_tokens": 3,
    }


def test_a_folder_that_does_not_learn_with_vllm_is_named(tmp_path):
    save_drafter(MedusaDrafter.from_target(parts(), draft_vocab=torch.arange(32)), tmp_path / "drafter")
    with pytest.raises(CheckpointError, match="config.json is of MedusaDrafter, which does not learn with vLLM"):
        drafter_config(tmp_path / "drafter", 3)
    with pytest.raises(CheckpointError, match="nowhere is not a checkpoint"):
        drafter_config(tmp_path / "nowhere", 3)


class Answers(http.server.BaseHTTPRequestHandler):
    asked = {}

    def do_GET(self):
        self._say(200, json.dumps({"data": [{"id": "served"}]}))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked[body["request_id"]] = body
        choice = {"token_ids": body["prompt"], "finish_reason": "stop" if body["request_id"] == "0" else "length"}
        drafted = {"metrics": {"speculative_decoding": DRAFTED}} if "seed" in body else {}
        self._say(
            *((400, "too long") if body["request_id"] == "9" else (200, json.dumps({"choices": [choice], **drafted})))
        )

    def _say(self, status, text):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args):
        pass


def test_requests_and_answers():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with VLLMClient(f"http://127.0.0.1:{server.server_port}") as client:
                sampled = SamplingParams(temperature=0.5, top_k=4, top_p=0.9, seed=3, max_tokens=5, stop=("x",))
                asked = Request(0, torch.tensor([3, 4]), sampled, learn=False, tenant="t")
                first = client.generate(asked, stop_tokens=[7])
                greedy = SamplingParams(max_tokens=5, min_p=0.1, seed=-1)
                second = client.generate(Request(1, torch.tensor([5]), greedy))
                with pytest.raises(VLLMError, match="vLLM refuses /v1/completions: too long"):
                    client.generate(Request(9, torch.tensor([5])))
                with pytest.raises(VLLMError, match="request 2: speculative=false is not supported by vLLM"):
                    client.generate(Request(2, torch.tensor([5]), speculative=False))
                with pytest.raises(VLLMError, match="request 3: min_p=0.1 is not supported by vLLM, .*; leave it out"):
                    client.generate(Request(3, torch.tensor([5]), SamplingParams(temperature=0.5, min_p=0.1)))
                with pytest.raises(VLLMError, match="request 4: seed=-1 is no seed to vLLM; give any other"):
                    client.generate(Request(4, torch.tensor([5]), SamplingParams(temperature=0.5, seed=-1)))
        finally:
            server.shutdown()
            thread.join()
    body = Answers.asked["0"]
    assert body["model"] == "served" and body["prompt"] == [3, 4] and body["stop"] == ["x"]
    assert (body["temperature"], body["top_k"], body["top_p"], body["seed"]) == (0.5, 4, 0.9, 3)
    assert (body["stop_token_ids"], body["max_tokens"], body["ignore_eos"]) == ([7], 5, False)
    assert body["vllm_xargs"] == {"aurora_rl": "false"} and body["cache_salt"] == "t@"
    assert "vllm_xargs" not in Answers.asked["1"] and "cache_salt" not in Answers.asked["1"]
    assert first.tokens.tolist() == [3, 4] and first.terminated and not second.terminated
    assert (first.rounds, first.drafted, first.accepted) == (3, 9, {0: 1, 2: 2})
    assert (second.rounds, second.drafted, second.accepted, second.versions) == (0, 0, {}, [])


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_what_would_end_a_server_on_a_cpu_is_not_asked_of_it(device):
    looks = itertools.count()

    def answer(kind, fields):
        return {"device": device, "seen": dict.fromkeys(VLLMClient.watched, next(looks))}

    plugin = PluginServer("tcp://127.0.0.1:*", answer)
    try:
        with (
            http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server,
            VLLMClient(f"http://127.0.0.1:{server.server_port}", plugin.address) as client,
        ):
            thread = threading.Thread(target=server.serve_forever, args=(0.05,))
            thread.start()
            try:
                client.probe(client.status())
                asked = Request(3, torch.tensor([5]), SamplingParams(temperature=0.5, top_k=4))
                if device == "cpu":
                    with pytest.raises(
                        VLLMError, match="^request 3: top_k=4 is not supported on a CPU, .*; leave top_k"
                    ):
                        client.generate(asked)
                else:
                    client.generate(asked)
                client.generate(Request(4, torch.tensor([5]), SamplingParams(top_k=4)))  # greedy: top_k is not read
                client.generate(Request(5, torch.tensor([5]), SamplingParams(temperature=0.5, top_k=-1)))
            finally:
                server.shutdown()
                thread.join()
    finally:
        plugin.close()
