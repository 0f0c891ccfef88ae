"""`aurora-rl flywheel` on a real SGLang server that is there already."""

import json

import pytest
from sglang_requests import other_weights

from aurora_rl.envs.remote.client import free_ports
from aurora_rl.policies.formats.files import load_drafter

pytestmark = pytest.mark.sglang


def command(forks, chain, sglang_models, tmp_path, *pairs):
    """Run the command to its end; return its status and what it printed."""
    traffic = tmp_path / "traffic.jsonl"
    texts = [f"{number} times {number + 1}?" for number in range(24)]
    traffic.write_text("".join(json.dumps({"messages": [{"role": "user", "content": t}]}) + "\n" for t in texts))
    trajectories, weights = free_ports(2)
    words = [
        *("flywheel", "engine.name=sglang", "drafter.name=eagle3"),
        *(
            f"engine.url={chain.url}",
            f"engine.plugin_address={chain.plugin_address}",
            "engine.slots=4",
            "engine.max_length=480",
        ),
        *(f"model={sglang_models / 'target'}", f"drafter.path={sglang_models / 'eagle3'}", "dtype=float32"),
        *("drafter.depth=3", "drafter.width=1", "drafter.num_nodes=3", f"traffic.path={traffic}"),
        *("max_new_tokens=24", "learner.publish_every=4", "learner.replay=1", "gate.requests=2", "gate.margin=10"),
        *(f"wire.trajectories=tcp://127.0.0.1:{trajectories}", f"wire.weights=tcp://127.0.0.1:{weights}"),
        *("http.port=0", f"run_dir={tmp_path / 'run'}", *pairs),
    ]
    with open(tmp_path / "out", "wb") as out, open(tmp_path / "errors", "wb") as errors:
        status = forks.start(words, out, errors).wait(200)
    return status, (tmp_path / "out").read_text(), (tmp_path / "errors").read_text()


def test_the_flywheel_serves_and_learns_on_a_server_that_is_there(
    forks, chain, sglang_models, parts, learner, handshake, tmp_path
):
    status, out, errors = command(forks, chain, sglang_models, tmp_path)
    assert status == 0, out + errors
    assert "live page at http://127.0.0.1:" in out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["requests"] == 24 and summary["failed"] == 0 and summary["dropped_trajectories"] == 0
    assert summary["acceptance_length"]["first"] > 1 and summary["tokens_per_second"]["speculative"] > 0
    assert summary["speedup"] is None and summary["tokens_per_second"]["baseline"] is None
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(event["event"] == "request" for event in events) == 24
    assert any(event["event"] == "train" for event in events)  # how much more depends on the machine
    load_drafter(tmp_path / "run" / "drafter", parts)
    assert not chain.status()["attached"], "the server goes on without the run"
    chain.attach(handshake=handshake, trajectories=learner.trajectories, weights=learner.weights)
    learner.publish(1, other_weights(load_drafter(sglang_models / "eagle3", parts), 0))
    chain.detach()


def test_a_temperature_is_refused_before_anything_is_served(forks, chain, sglang_models, tmp_path):
    status, _, errors = command(forks, chain, sglang_models, tmp_path, "temperature=0.7")
    assert status == 2
    assert "temperature=0.7: on a CPU SGLang verifies by argmax; set temperature=0" in errors
    assert not chain.status()["attached"]
