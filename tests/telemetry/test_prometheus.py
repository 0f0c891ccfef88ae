"""What is exported for Prometheus: sums over events, by hand, and names by Prometheus' rules."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import Any, get_args

import pytest
from prometheus_client.parser import text_string_to_metric_families

import aurora_rl
from aurora_rl.serving.request_times import Wait
from aurora_rl.telemetry.events import EVENTS
from aurora_rl.telemetry.prometheus import METRICS, Exporter


def event(name: str, **fields: Any) -> dict[str, Any]:
    """An event with some of its fields, all of which the table of events has."""
    assert fields.keys() <= EVENTS[name].fields.keys()
    return {"event": name, **fields}


def request(**fields: Any) -> dict[str, Any]:
    usual = {
        "prompt_tokens": 0, "tokens": 0, "terminated": True, "speculative_tokens": 0, "speculative_rounds": 0,
        "drafted_tokens": 0, "accepted": {},
    }  # fmt: skip
    return event("request", **{**usual, **fields})


def status(**fields: Any) -> dict[str, Any]:
    usual = {
        "version": 0, "acceptance_length": None, "tokens_per_second": {"baseline": None, "speculative": None},
        "speedup": None, "drafted": {}, "depth": 3, "queue": 0, "dropped": {}, "learner": "running",
    }  # fmt: skip
    return event("status", **{**usual, **fields})


def sample(exporter: Exporter, name: str, **labels: str) -> float | None:
    return exporter.registry.get_sample_value(f"aurora_{name}", labels)


def test_staleness_is_what_was_published_after_the_version_that_drafts() -> None:
    exporter = Exporter()
    exporter.follow(event("checkpoint", version=3))
    assert sample(exporter, "drafter_staleness") is None  # nothing is known of the drafter yet
    exporter.follow(status(version=1))
    assert sample(exporter, "drafter_staleness") == 2
    exporter.follow(event("swap", version=3, ms=1.0))
    assert sample(exporter, "drafter_staleness") == 0
    exporter.follow(event("swap", version=4, ms=1.0))  # the learner tells its version after it is served
    assert sample(exporter, "drafter_staleness") == 0


def test_completed_requests_are_summed() -> None:
    exporter = Exporter()
    for each in [
        request(
            prompt_tokens=5,
            tokens=10,
            speculative_tokens=9,
            speculative_rounds=4,
            drafted_tokens=12,
            accepted={"0": 1, "1": 1, "3": 2},
        ),  # fmt: skip
        request(prompt_tokens=7, tokens=20, terminated=False, drafted_tokens=3, accepted={"2": 1}),
        request(tokens=1, terminated=False),
    ]:
        exporter.follow(each)
    assert sample(exporter, "request_success_total", finished_reason="stop") == 1
    assert sample(exporter, "request_success_total", finished_reason="length") == 2
    assert sample(exporter, "prompt_tokens_total") == 12 and sample(exporter, "generation_tokens_total") == 31
    assert sample(exporter, "speculative_tokens_total") == 9 and sample(exporter, "speculative_rounds_total") == 4
    assert sample(exporter, "spec_decode_num_drafts_total") == 4 + 1
    assert sample(exporter, "spec_decode_num_draft_tokens_total") == 15
    assert sample(exporter, "spec_decode_num_accepted_tokens_total") == 1 + 6 + 2
    by_position = [
        sample(exporter, "spec_decode_num_accepted_tokens_per_pos_total", position=str(position))
        for position in range(4)
    ]
    assert by_position == [1 + 2 + 1, 2 + 1, 2, None]


def test_requests_of_which_only_sums_are_known_are_counted_alike() -> None:
    exporter = Exporter()
    sums = {"prompt_tokens": 12, "tokens": 31, "speculative_tokens": 9, "speculative_rounds": 4, "drafted_tokens": 15}
    exporter.follow({"event": "requests", "requests": 3, "terminated": 1, "accepted": {"0": 1, "2": 3}, **sums})
    assert sample(exporter, "request_success_total", finished_reason="stop") == 1
    assert sample(exporter, "request_success_total", finished_reason="length") == 2
    assert sample(exporter, "prompt_tokens_total") == 12 and sample(exporter, "generation_tokens_total") == 31
    assert sample(exporter, "spec_decode_num_drafts_total") == 4
    assert sample(exporter, "spec_decode_num_accepted_tokens_per_pos_total", position="1") == 3


def test_swaps_faults_and_learning_are_counted() -> None:
    exporter = Exporter()
    train = {"loss": 2.5, "new": 4, "waiting": 9}
    for each in [
        event("swap", version=3, ms=0.4),
        event("swap", version=5, ms=20.0),
        event("swap_failed", version=6, reason="x"),
        event("drafter_fault", request=1, version=5, fault="x"),
        event("train", **train),
        event("train", **{**train, "loss": 1.5, "new": 0, "waiting": 2}),
        event("step_skipped", reason="loss is nan", steps=2, skipped=1),
        event("gate", publish=True, version=1),
        event("gate", publish=False, version=1),
        event("gate", publish=False, version=1),
        event("checkpoint", steps=2, version=2),
        event("trial", version=6),
        event("verdict", version=6, promote=False),
        event("watchdog", version=1, cause="stale"),
        event("trial", version=7),
    ]:
        exporter.follow(each)
    assert sample(exporter, "swap_duration_seconds_count") == 2
    assert sample(exporter, "swap_duration_seconds_sum") == pytest.approx(0.0204)
    assert sample(exporter, "swap_duration_seconds_bucket", le="0.0005") == 1
    assert sample(exporter, "drafter_version") == 5 and sample(exporter, "swap_failures_total") == 1
    assert sample(exporter, "drafter_faults_total") == 1
    assert sample(exporter, "learner_steps_total") == 2 and sample(exporter, "learner_skipped_steps_total") == 1
    assert sample(exporter, "learner_requests_seen_total") == 4 and sample(exporter, "learner_waiting_requests") == 2
    assert sample(exporter, "learner_loss") == 1.5
    assert sample(exporter, "gate_decisions_total", decision="published") == 1
    assert sample(exporter, "gate_decisions_total", decision="refused") == 2
    assert sample(exporter, "learner_version") == 2
    assert sample(exporter, "canary_verdicts_total", verdict="rolled_back") == 1
    assert sample(exporter, "canary_verdicts_total", verdict="promoted") == 0
    assert sample(exporter, "canary_version") == 7
    assert sample(exporter, "watchdog_faults_total", cause="stale") == 1
    assert sample(exporter, "watchdog_faults_total", cause="dead") == 0
    exporter.follow(event("verdict", version=7, promote=True))
    assert sample(exporter, "canary_verdicts_total", verdict="promoted") == 1
    assert sample(exporter, "canary_version") is None
    exporter.follow(event("engine_trial", version=8))
    exporter.follow(event("engine_verdict", version=8, promote=True))
    assert sample(exporter, "canary_verdicts_total", verdict="promoted") == 2
    for each, shown in (
        (event("engine_trial", version=9), 9),
        (event("trial", version=10), 10),
        (event("verdict", version=10, promote=True), 9),
        (event("trial", version=11), 11),
        (event("learner_ready"), 11),  # whose trial at engines has ended
        (event("verdict", version=11, promote=True), None),
    ):
        exporter.follow(each)
        assert sample(exporter, "canary_version") == shown


def test_what_was_not_measured_has_no_sample() -> None:
    exporter = Exporter()
    unmeasured = ["acceptance_length", "speedup", "drafter_version", "learner_up", "learner_loss"]
    assert [sample(exporter, name) for name in unmeasured] == [None] * len(unmeasured)
    exporter.follow(status())
    assert sample(exporter, "speedup") is None and sample(exporter, "tokens_per_second", decoding="baseline") is None
    rates = {"baseline": 10.0, "speculative": 15.0}
    exporter.follow(status(speedup=1.5, acceptance_length=2.25, tokens_per_second=rates, version=4, depth=0))
    assert sample(exporter, "speedup") == 1.5 and sample(exporter, "acceptance_length") == 2.25
    assert sample(exporter, "tokens_per_second", decoding="speculative") == 15.0
    assert sample(exporter, "drafter_version") == 4 and sample(exporter, "draft_depth") == 0
    exporter.follow(status(tokens_per_second={"baseline": None, "speculative": 15.0}))
    assert sample(exporter, "speedup") is None and sample(exporter, "tokens_per_second", decoding="baseline") is None
    assert b"NaN" not in exporter.expose({})


def test_rounds_add_up_and_what_a_status_counts_itself_does_not() -> None:
    exporter = Exporter()
    exporter.follow(status(drafted={"tree": 3, "baseline": 1}, queue=4, dropped={"no_learner": 2, "malformed": 1}))
    exporter.follow(status(drafted={"tree": 2}, queue=1, dropped={"no_learner": 5, "malformed": 7}))
    assert sample(exporter, "rounds_total", drafted="tree") == 5
    assert sample(exporter, "rounds_total", drafted="baseline") == 1
    assert sample(exporter, "rounds_total", drafted="ngrams") == 0
    assert sample(exporter, "trajectory_queue_length") == 1
    for reason, dropped in (("no_learner", 5), ("malformed", 7), ("slow_learner", 0), ("learner_died", 0)):
        assert sample(exporter, "trajectories_dropped_total", reason=reason) == dropped


def test_a_learner_is_up_or_down_or_somebody_elses() -> None:
    exporter, up = Exporter(), []
    for each in [
        status(),
        event("learner_died", reason="died with status -9"),
        event("learner_restarted", restarts=1, resumed=True),
        status(learner="died with status -9, serving goes on; see learner.log"),
        status(learner="any at tcp://127.0.0.1:5556"),
    ]:
        exporter.follow(each)
        up.append(sample(exporter, "learner_up"))
    assert up == [1, 0, 1, 0, None]
    assert sample(exporter, "learner_restarts_total") == 1


def test_waits_failures_and_numbers_of_the_moment() -> None:
    exporter = Exporter()
    for wait in get_args(Wait):
        exporter.observe(wait, 0.25)
        assert sample(exporter, f"{wait}_seconds_count") == 1 and sample(exporter, f"{wait}_seconds_sum") == 0.25
    for code in ("timeout", "queue_full", "timeout"):
        exporter.failed(code)
    assert sample(exporter, "request_failures_total", code="timeout") == 2
    exporter.expose({"num_requests_running": 2, "requests_cancelled_total": 3})
    assert sample(exporter, "num_requests_running") == 2 and sample(exporter, "requests_cancelled_total") == 3


def test_mean_waits_are_of_the_time_since_they_were_last_asked_for() -> None:
    exporter = Exporter()
    for seconds in (0.25, 0.75):
        exporter.observe("time_to_first_token", seconds)
    exporter.observe("e2e_request_latency", 2.0)
    assert exporter.mean_waits() == {"time_to_first_token": 0.5, "e2e_request_latency": 2.0}
    exporter.observe("time_to_first_token", 1.0)
    assert exporter.mean_waits() == {"time_to_first_token": 1.0} and exporter.mean_waits() == {}
    assert sample(exporter, "time_to_first_token_seconds_count") == 3


def test_two_exporters_of_a_process_count_for_themselves() -> None:
    first, second = Exporter(), Exporter()
    first.follow(request(tokens=3))
    assert sample(first, "generation_tokens_total") == 3 and sample(second, "generation_tokens_total") == 0


def test_events_that_say_nothing_for_prometheus_are_left_out() -> None:
    exporter = Exporter()
    before = exporter.expose({}).split(b"process_")[0]
    exporter.follow(event("costs", round_ms={}))
    exporter.follow({"event": "of a later version"})
    assert exporter.expose({}).split(b"process_")[0] == before


def full() -> bytes:
    """The text of an exporter that has seen everything."""
    exporter = Exporter()
    for each in (
        request(tokens=3, accepted={"2": 1}), event("swap", version=1, ms=1.0), event("gate", publish=True, version=1),
        event("train", loss=1.0, new=1, waiting=1), event("trial", version=2),
        status(speedup=1.5, acceptance_length=2.0, tokens_per_second={"baseline": 1.0, "speculative": 1.5}),
        event("engines", engines={"a": {"trajectories": 1, "version": 1, "staleness": 0, "drops": {"invalid": 1}}}),
    ):  # fmt: skip
        exporter.follow(each)
    exporter.failed("timeout")
    for wait in get_args(Wait):
        exporter.observe(wait, 0.25)
    return exporter.expose({"num_requests_running": 0, "num_requests_waiting": 0})


def test_the_text_has_every_metric_with_its_type_and_help() -> None:
    text = full().decode()
    families = {family.name: family for family in text_string_to_metric_families(text) if "aurora" in family.name}
    for name, metric in METRICS.items():
        family = families[f"aurora_{name}".removesuffix("_total")]
        assert (family.type, family.documentation) == (metric.kind, metric.meaning)
        assert family.samples, name
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        assert labels == ({metric.label} if metric.label else set()), name
        assert metric.values == () or {s.labels[metric.label] for s in family.samples} >= set(metric.values)
    exported = {name.removesuffix("_created") for name in families}
    assert exported == {f"aurora_{name}".removesuffix("_total") for name in METRICS}
    assert f'aurora_build_info{{version="{aurora_rl.__version__}"}} 1.0' in text
    assert "process_resident_memory_bytes" in text


def test_names_follow_prometheus_rules() -> None:
    for name, metric in METRICS.items():
        assert re.fullmatch(r"[a-z][a-z0-9_]*", name)
        assert name.endswith("_total") == (metric.kind == "counter"), name
        assert name.endswith("_seconds") == (metric.kind == "histogram"), name
        assert not re.search(r"_(ms|milliseconds|minutes|kilobytes|percent)(_|$)", name), name
        assert metric.meaning.endswith("."), name


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_finds_nothing() -> None:
    done = subprocess.run(["promtool", "check", "metrics"], input=full(), capture_output=True, timeout=60)
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")


def test_figures_by_engine_are_those_of_the_last_event_alone() -> None:
    exporter = Exporter()
    figures = {"trajectories": 5, "version": 3, "staleness": 2, "drops": {"invalid": 1, "buffer_full": 2}}
    exporter.follow(event("engines", engines={"a": figures, "b": {**figures, "version": None, "staleness": None}}))
    assert sample(exporter, "engine_trajectories_total", engine="a") == 5
    assert sample(exporter, "engine_trajectories_dropped_total", engine="b") == 3
    assert sample(exporter, "engine_staleness", engine="a") == 2
    assert sample(exporter, "engine_staleness", engine="b") is None
    exporter.follow(event("engines", engines={"(others)": figures}))  # whatever names peers make up
    assert sample(exporter, "engine_trajectories_total", engine="a") is None
