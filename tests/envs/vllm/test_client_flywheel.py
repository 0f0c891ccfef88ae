"""`aurora-rl flywheel` on a real vLLM server that is there already."""

import json

import pytest
from sglang_requests import other_weights

from aurora_rl.envs.remote.client import free_ports
from aurora_rl.policies.formats.files import load_drafter

pytestmark = pytest.mark.vllm


def test_the_flywheel_serves_and_learns_on_a_server_that_is_there(
    forks, server, vllm_models, parts, learner, handshake, tmp_path
):
    traffic = tmp_path / "traffic.jsonl"
    texts = [f"{number} times {number + 1}?" for number in range(24)]
    traffic.write_text("".join(json.dumps({"messages": [{"role": "user", "content": t}]}) + "\n" for t in texts))
    trajectories, weights = free_ports(2)
    words = [
        *("flywheel", "engine.name=vllm", "drafter.name=eagle3", "engine.slots=4", "engine.max_length=480"),
        *(f"engine.url={server.url}", f"engine.plugin_address={server.plugin_address}"),
        *(f"model={vllm_models / 'target'}", f"drafter.path={vllm_models / 'for_vllm'}", "dtype=float32"),
        *(f"traffic.path={traffic}", "max_new_tokens=24"),
        *("learner.publish_every=4", "learner.replay=1", "gate.requests=2", "gate.margin=10"),
        *(f"wire.trajectories=tcp://127.0.0.1:{trajectories}", f"wire.weights=tcp://127.0.0.1:{weights}"),
        f"run_dir={tmp_path / 'run'}",
    ]
    with open(tmp_path / "out", "wb") as out, open(tmp_path / "errors", "wb") as errors:
        status = forks.start(words, out, errors).wait(200)
    told = (tmp_path / "out").read_text() + (tmp_path / "errors").read_text()
    assert status == 0, told
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["requests"] == 24 and summary["failed"] == 0 and summary["dropped_trajectories"] == 0
    assert summary["acceptance_length"]["first"] > 1 and summary["tokens_per_second"]["speculative"] > 0
    assert summary["speedup"] is None and summary["tokens_per_second"]["baseline"] is None
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(event["event"] == "request" for event in events) == 24
    assert any(event["event"] == "train" for event in events)  # how much more depends on the machine
    load_drafter(tmp_path / "run" / "drafter", parts)
    assert not server.status()["attached"], "the server goes on without the run"
    server.attach(handshake=handshake, trajectories=learner.trajectories, weights=learner.weights)
    learner.publish(1, other_weights(load_drafter(vllm_models / "eagle3", parts), 0))
    server.detach()
