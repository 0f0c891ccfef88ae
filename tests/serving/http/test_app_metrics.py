"""`/metrics` of the real server: counts are those of the requests that were made."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from processes import wait
from prometheus_client.parser import text_string_to_metric_families

from aurora_rl.prefix_cache import PrefixCache
from aurora_rl.telemetry.log import MetricsReader

Samples = dict[tuple[str, str], float]
LONG = {"prompt": "Once", "max_tokens": 400, "stop": ["never there"], "stream": True}


@pytest.fixture
def scrape(rig: Any, tmp_path: Any) -> Callable[[], Samples]:
    """Samples by name and value of their label, without what the other tests have left."""
    assert rig.idle()
    reader = MetricsReader(rig.log.path, from_now=True)

    def read() -> Samples:
        for event in reader:  # as the loop of `aurora-rl serve` has the exporter follow them
            rig.metrics.follow(event)
        answer = httpx.get(f"{rig.url}/metrics")
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain; version=")
        return {
            (sample.name.removeprefix("aurora_"), next(iter(sample.labels.values()), "")): sample.value
            for family in text_string_to_metric_families(answer.text)
            for sample in family.samples
        }

    before = read()
    gauges = ("num_requests_running", "num_requests_waiting")
    return lambda: {key: value - before.get(key, 0) * (key[0] not in gauges) for key, value in read().items()}


def test_counts_are_those_of_the_requests(rig: Any, scrape: Callable[[], Samples]) -> None:
    bodies = [
        {"prompt": "Once upon", "max_tokens": 9, "stop": ["never there"]},
        {"prompt": "Once", "max_tokens": 5, "n": 2, "seed": 1, "temperature": 1.0, "stop": ["never there"]},
        {"prompt": "Once", "max_tokens": 12, "speculative": False},
    ]
    answers = [httpx.post(f"{rig.url}/v1/completions", json=body, timeout=30).json() for body in bodies]
    usages, choices = [answer["usage"] for answer in answers], [c for answer in answers for c in answer["choices"]]
    drafts = [answer["metrics"]["speculative_decoding"] for answer in answers if "metrics" in answer]
    assert rig.idle()
    found = scrape()
    for reason in ("stop", "length"):
        expected = sum(choice["finish_reason"] == reason for choice in choices)
        assert found["request_success_total", reason] == expected
    assert found["generation_tokens_total", ""] == sum(usage["completion_tokens"] for usage in usages)
    prompts = [usage["prompt_tokens"] for usage in usages]
    assert found["prompt_tokens_total", ""] == prompts[0] + 2 * prompts[1] + prompts[2]
    assert found["spec_decode_num_drafts_total", ""] == sum(each["num_spec_steps"] for each in drafts) > 0
    assert found["spec_decode_num_draft_tokens_total", ""] == sum(each["num_draft_tokens"] for each in drafts)
    accepted = sum(each["num_accepted_draft_tokens"] for each in drafts)
    assert found["spec_decode_num_accepted_tokens_total", ""] == accepted
    histograms = [each["acceptance_histogram"] for each in drafts]
    for position in range(3):
        beyond = sum(sum(histogram[position + 1 :]) for histogram in histograms)
        name = "spec_decode_num_accepted_tokens_per_pos_total"
        assert found.get((name, str(position)), 0) == beyond
    for kind in ("time_to_first_token", "e2e_request_latency", "request_queue_time"):
        assert found[f"{kind}_seconds_count", ""] == len(choices)
    assert 0 < found["time_to_first_token_seconds_sum", ""] < found["e2e_request_latency_seconds_sum", ""] < 60
    assert 0 <= found["request_queue_time_seconds_sum", ""] <= found["time_to_first_token_seconds_sum", ""]
    assert found["inter_token_latency_seconds_count", ""] > len(choices)
    assert found["num_requests_running", ""] == found["num_requests_waiting", ""] == 0
    assert found["requests_cancelled_total", ""] == 0


def test_a_stream_runs_while_it_is_read_and_is_cancelled_when_it_is_left(
    rig: Any, scrape: Callable[[], Samples], monkeypatch: pytest.MonkeyPatch
) -> None:
    verify = rig.env.engine.verify

    def slowly(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.02)
        return verify(*args, **kwargs)

    monkeypatch.setattr(rig.env.engine, "verify", slowly)
    with httpx.stream("POST", f"{rig.url}/v1/completions", json=LONG, timeout=30) as stream:
        lines = stream.iter_lines()  # kept: the connection is closed with it
        assert next(lines).startswith("data: ")
        running = scrape()
        assert (running["num_requests_running", ""], running["num_requests_waiting", ""]) == (1, 0)
        assert running["time_to_first_token_seconds_count", ""] == 1
        assert running["e2e_request_latency_seconds_count", ""] == 0
    assert rig.idle()
    wait(lambda: scrape()["requests_cancelled_total", ""] == 1)
    found = scrape()
    assert found["num_requests_running", ""] == found["request_success_total", "length"] == 0


def test_failures_are_counted_by_their_code(rig: Any, scrape: Callable[[], Samples]) -> None:
    url = f"{rig.url}/v1/completions"
    assert httpx.post(url, json={"prompt": "a", "no_such_field": 1}).status_code == 400
    assert httpx.post(url, content=b"{", headers={"Content-Type": "application/json"}).status_code == 400
    assert httpx.post(url, json={"prompt": "a", "n": 9}).status_code == 400
    late = rig.serve(timeout=0.01)
    assert httpx.post(f"{late}/v1/completions", json={**LONG, "stream": False}, timeout=30).status_code == 504
    assert rig.idle()
    found = scrape()
    assert found["request_failures_total", "unknown_field"] == found["request_failures_total", "invalid_json"] == 1
    assert found["request_failures_total", "timeout"] == 1


def test_what_the_prefix_cache_was_asked_and_had_is_counted(
    rig: Any, scrape: Callable[[], Samples], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rig.env.engine, "prefix_cache", PrefixCache(1024))
    before = scrape()
    assert before["prefix_cache_queries_total", ""] == before["prefix_cache_hits_total", ""] == 0
    prompt = list(range(10, 50))
    for _ in range(2):
        body = {"prompt": prompt, "max_tokens": 2}
        assert httpx.post(f"{rig.url}/v1/completions", json=body, timeout=30).status_code == 200
        assert rig.idle()
    found = scrape()
    assert found["prefix_cache_queries_total", ""] == 2 * 39  # but for the last token, which no pass has read
    assert found["prefix_cache_hits_total", ""] == 39


def test_a_server_with_keys_wants_one_for_metrics(rig: Any) -> None:
    url = rig.serve(api_keys=["key"])
    assert httpx.get(f"{url}/metrics").status_code == 401
    assert "aurora_" in httpx.get(f"{url}/metrics", headers={"Authorization": "Bearer key"}).text


def test_a_deep_health_check_is_no_request(rig: Any, scrape: Callable[[], Samples]) -> None:
    assert httpx.get(f"{rig.url}/health_generate", timeout=30).status_code == 200
    assert rig.idle()
    assert {
        name for (name, _), value in scrape().items() if value and not name.startswith(("process_", "python_"))
    } == set()
