"""The metrics that Prometheus scrapes: counts of the run's events, and how long clients wait.

Names follow Prometheus' rules. Where vLLM has the same metric, it has vLLM's name with our prefix. The reference in the
documentation is generated from :data:`METRICS`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from prometheus_client import CollectorRegistry, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector
from typing_extensions import override

import aurora_rl
from aurora_rl.telemetry.history import staleness

PREFIX = "aurora_"
_BUCKETS = [float(f"{digit}e{exponent}") for exponent in range(-4, 3) for digit in (1, 2, 3, 5)]


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        kind: Its type.
        meaning: What it says.
        label: Name of its label; empty if it has none.
        values: Values of the label that are known before; counters begin at 0 for them.
    """

    kind: Literal["counter", "gauge", "histogram"]
    meaning: str
    label: str = ""
    values: tuple[str, ...] = ()


METRICS: dict[str, Metric] = {
    # Clients' requests.
    "num_requests_running": Metric("gauge", "Requests in slots."),
    "num_requests_waiting": Metric("gauge", "Requests that wait for a slot."),
    "time_to_first_token_seconds": Metric(
        "histogram", "Time from a request's arrival in the queue to its first token."
    ),
    "inter_token_latency_seconds": Metric(
        "histogram", "Time between two deliveries to one request; a delivery is a token and its accepted drafts."
    ),
    "request_time_per_output_token_seconds": Metric(
        "histogram", "Time per token after the first delivery, once per completed request."
    ),
    "e2e_request_latency_seconds": Metric("histogram", "Time from a request's arrival in the queue to its end."),
    "request_queue_time_seconds": Metric("histogram", "Time that a request waited for a slot."),
    "request_failures_total": Metric(
        "counter",
        "HTTP requests for completions that were refused or failed, by the code of the error.",
        "code",
        ("queue_full", "timeout", "shutting_down", "engine_dead"),
    ),
    "requests_cancelled_total": Metric(
        "counter", "Requests in slots or in the queue whose client left, or whose time ran out."
    ),
    "prefix_cache_queries_total": Metric("counter", "Prompt tokens that were looked for in the prefix cache."),
    "prefix_cache_hits_total": Metric("counter", "Prompt tokens that were found in the prefix cache."),
    # Completed requests, whoever asked.
    "request_success_total": Metric(
        "counter", "Completed requests by why they ended.", "finished_reason", ("stop", "length")
    ),
    "prompt_tokens_total": Metric("counter", "Prompt tokens of completed requests."),
    "generation_tokens_total": Metric("counter", "Tokens delivered to completed requests."),
    # Speculation.
    "spec_decode_num_drafts_total": Metric("counter", "Rounds of completed requests that had a draft."),
    "spec_decode_num_draft_tokens_total": Metric("counter", "Tokens drafted for completed requests."),
    "spec_decode_num_accepted_tokens_total": Metric("counter", "Drafted tokens that were accepted."),
    "spec_decode_num_accepted_tokens_per_pos_total": Metric(
        "counter", "Accepted drafted tokens by their place in the path, from 0 on.", "position", ("0",)
    ),
    "speculative_rounds_total": Metric("counter", "Rounds of completed requests for which drafts were asked for."),
    "speculative_tokens_total": Metric(
        "counter", "Tokens that these rounds delivered; over the rounds it is the acceptance length."
    ),
    "rounds_total": Metric(
        "counter", "Rounds by what they drafted.", "drafted", ("tree", "chain", "ngrams", "plain", "baseline")
    ),
    "acceptance_length": Metric(
        "gauge", "Tokens per speculative round over the last tenth of the requests: eight at least, half at most."
    ),
    "speedup": Metric("gauge", "Speculative over plain throughput; absent if it was not measured or too shortly."),
    "tokens_per_second": Metric(
        "gauge",
        "Throughput over the last quarter of the requests, where it was measured.",
        "decoding",
        ("baseline", "speculative"),
    ),
    "draft_depth": Metric("gauge", "Depth of the trees that are drafted; 0 is plain decoding."),
    "drafter_version": Metric("gauge", "Version of the weights that draft."),
    "drafter_faults_total": Metric("counter", "Requests that went on without the drafter because it failed."),
    "watchdog_faults_total": Metric(
        "counter",
        "Faults that checks of the serving drafter found, by their cause; see the event `watchdog`.",
        "cause",
        ("corrupted", "stale", "mismatched", "cache", "dead"),
    ),
    "swap_duration_seconds": Metric("histogram", "Time for which serving stood still at a swap of weights."),
    "swap_failures_total": Metric("counter", "Weights that the drafter could not load."),
    "canary_version": Metric("gauge", "Version of the weights that are on trial; absent if none are."),
    "canary_verdicts_total": Metric(
        "counter", "Trials of new weights by how they ended.", "verdict", ("promoted", "rolled_back")
    ),
    # Learning.
    "learner_up": Metric(
        "gauge",
        "1 while the process of the server's learner runs, also while it starts again, and does not refuse what is "
        "served; absent without one.",
    ),
    "learner_restarts_total": Metric("counter", "Learners that were started again after their death."),
    "learner_steps_total": Metric("counter", "Optimizer steps."),
    "learner_skipped_steps_total": Metric("counter", "Steps left out, as their loss or gradient was not finite."),
    "learner_loss": Metric("gauge", "Loss of the last step."),
    "learner_requests_seen_total": Metric("counter", "Requests that were learned from."),
    "learner_waiting_requests": Metric(
        "gauge", "Requests that had arrived and were not learned from at the last step."
    ),
    "learner_version": Metric("gauge", "Version of the weights that the learner published last."),
    "drafter_staleness": Metric("gauge", "Versions that were published after the one that drafts."),
    "gate_decisions_total": Metric(
        "counter", "Candidates by what the gate decided.", "decision", ("published", "refused")
    ),
    "trajectory_queue_length": Metric("gauge", "Trajectories that wait to be sent to the learner."),
    "trajectories_dropped_total": Metric(
        "counter",
        "Trajectories that were lost; `dropped` of the event `status` says what the reasons are.",
        "reason",
        (
            "no_learner",
            "slow_learner",
            "not_encodable",
            "too_large",
            "expired",
            "malformed",
            "handshake",
            "invalid",
            "buffer_full",
            "quarantined",
            "learner_died",
        ),
    ),
    "engine_trajectories_total": Metric(
        "counter",
        "Trajectories that arrived at the server's learner, by engine; of all but the last 64 together.",
        "engine",
    ),
    "engine_trajectories_dropped_total": Metric(
        "counter", "Trajectories that the server's learner dropped, by engine, whatever the reason.", "engine"
    ),
    "engine_staleness": Metric(
        "gauge", "Versions that were published after the one that drafted an engine's newest trajectory.", "engine"
    ),
    "build_info": Metric("gauge", "1, with the version of the package.", "version"),
}
"""Every metric by its name after ``aurora_``."""


class Exporter(Collector):
    """Counts for Prometheus.

    Attributes:
        registry: Registry of this exporter alone, so that a process may have several.

    Example:
        >>> exporter = Exporter()
        >>> exporter.follow({"event": "swap", "version": 3, "ms": 2.0})
        >>> exporter.registry.get_sample_value("aurora_drafter_version")
        3
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        # Written by one thread each: that which follows the events, or that of the HTTP server.
        self._numbers: dict[str, dict[str, float]] = {
            name: dict.fromkeys(metric.values if metric.label else ("",), 0.0) if metric.kind == "counter" else {}
            for name, metric in METRICS.items()
            if metric.kind != "histogram"
        }
        self._times = {
            name: Histogram(PREFIX + name, metric.meaning, buckets=_BUCKETS, registry=self.registry)
            for name, metric in METRICS.items()
            if metric.kind == "histogram"
        }
        self._trials: dict[str, int | None] = {}  # versions on trial, by the event that a trial began with
        self._waits: dict[str, tuple[float, int]] = {}  # since they were last asked for
        self._set("build_info", 1, aurora_rl.__version__)
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

    def follow(self, event: Mapping[str, Any]) -> None:
        """Count an event of the run's log."""
        match event["event"]:
            case "request" | "requests":
                self._requests(event)
            case "status":
                self._status(event)
            case "swap":
                self._times["swap_duration_seconds"].observe(event["ms"] / 1e3)
                self._set("drafter_version", event["version"])
            case "swap_failed":
                self._add("swap_failures_total")
            case "trial" | "engine_trial":
                self._trial(event["event"], event["version"])
            case "learner_ready":  # one that starts anew goes on with no trial
                self._trial("engine_trial", None)
            case "verdict" | "engine_verdict":
                self._trial(event["event"].replace("verdict", "trial"), None)
                self._add("canary_verdicts_total", 1, "promoted" if event["promote"] else "rolled_back")
            case "watchdog":
                if event["version"] == self._trials.get("trial"):
                    self._trial("trial", None)
                self._add("watchdog_faults_total", 1, event["cause"])
            case "drafter_fault":
                self._add("drafter_faults_total")
            case "train":
                self._add("learner_steps_total")
                self._add("learner_requests_seen_total", event["new"])
                self._set("learner_loss", event["loss"])
                self._set("learner_waiting_requests", event["waiting"])
            case "step_skipped":
                self._add("learner_skipped_steps_total")
            case "gate":
                self._add("gate_decisions_total", 1, "published" if event["publish"] else "refused")
                self._set("learner_version", event["version"])
            case "checkpoint":
                self._set("learner_version", event["version"])
            case "engines":
                self._engines(event["engines"])
            case "learner_died":
                self._set("learner_up", 0)
            case "learner_restarted":
                self._add("learner_restarts_total")
                self._set("learner_up", 1)
        published, drafts = (self._numbers[f"{name}_version"].get("") for name in ("learner", "drafter"))
        self._set("drafter_staleness", staleness(published, drafts))

    def _requests(self, event: Mapping[str, Any]) -> None:
        terminated = int(event["terminated"])  # a truth value for one request, a number for several
        self._add("request_success_total", terminated, "stop")
        self._add("request_success_total", event.get("requests", 1) - terminated, "length")
        self._add("prompt_tokens_total", event["prompt_tokens"])
        self._add("generation_tokens_total", event["tokens"])
        self._add("speculative_rounds_total", event["speculative_rounds"])
        self._add("speculative_tokens_total", event["speculative_tokens"])
        self._add("spec_decode_num_draft_tokens_total", event["drafted_tokens"])
        for accepted, rounds in event["accepted"].items():
            self._add("spec_decode_num_drafts_total", rounds)
            self._add("spec_decode_num_accepted_tokens_total", int(accepted) * rounds)
            for position in range(int(accepted)):
                self._add("spec_decode_num_accepted_tokens_per_pos_total", rounds, str(position))

    def _trial(self, trial: str, version: int | None) -> None:
        self._trials[trial] = version
        here, at_engines = self._trials.get("trial"), self._trials.get("engine_trial")
        self._set("canary_version", at_engines if here is None else here)

    def _engines(self, engines: Mapping[str, Mapping[str, Any]]) -> None:
        # In the place of all that was said before: an engine may be among the others now.
        self._numbers["engine_trajectories_total"] = {name: of["trajectories"] for name, of in engines.items()}
        self._numbers["engine_trajectories_dropped_total"] = {
            name: sum(of["drops"].values()) for name, of in engines.items()
        }
        self._numbers["engine_staleness"] = {
            name: of["staleness"] for name, of in engines.items() if of["staleness"] is not None
        }

    def _status(self, event: Mapping[str, Any]) -> None:
        for drafted, rounds in event["drafted"].items():
            self._add("rounds_total", rounds, drafted)
        self._set("acceptance_length", event["acceptance_length"])
        self._set("speedup", event["speedup"])
        for decoding, rate in event["tokens_per_second"].items():
            self._set("tokens_per_second", rate, decoding)
        self._set("draft_depth", event["depth"])
        self._set("drafter_version", event["version"])
        self._set("trajectory_queue_length", event["queue"])
        for reason, dropped in event["dropped"].items():
            self._set("trajectories_dropped_total", dropped, reason)
        learner = event["learner"]  # otherwise of another server, or of nobody
        up = 1 if learner == "running" else None if learner.startswith(("any at", "none")) else 0  # refusals are 0, too
        self._set("learner_up", up)

    def observe(self, wait: str, seconds: float) -> None:
        """Note how long a client has waited, for the metric ``wait`` without its unit."""
        self._times[f"{wait}_seconds"].observe(seconds)
        before, count = self._waits.get(wait, (0.0, 0))
        self._waits[wait] = before + seconds, count + 1

    def mean_waits(self) -> dict[str, float]:
        """Return the mean of each wait in seconds, over those that were noted since the last call."""
        waits, self._waits = self._waits, {}
        return {wait: round(seconds / count, 6) for wait, (seconds, count) in waits.items()}

    def failed(self, code: str) -> None:
        """Count a request that was answered by an error of this code."""
        self._add("request_failures_total", 1, code)

    def expose(self, counts: Mapping[str, float | None]) -> bytes:
        """Return all metrics in Prometheus' text format.

        Args:
            counts: Numbers of this moment, by name; None leaves a metric without a sample.
        """
        for name, number in counts.items():
            self._set(name, number)
        return generate_latest(self.registry)

    @override
    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        for name, numbers in self._numbers.items():
            metric = METRICS[name]
            kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            family = kind(PREFIX + name, metric.meaning, labels=[metric.label] if metric.label else [])
            for value, number in list(numbers.items()):  # copied in one operation: the other thread may add some
                family.add_metric([value] if metric.label else [], number)
            yield family

    def _add(self, name: str, number: float = 1, value: str = "") -> None:
        numbers = self._numbers[name]
        numbers[value] = numbers.get(value, 0.0) + number

    def _set(self, name: str, number: float | None, value: str = "") -> None:
        """Set a number; None leaves its sample out."""
        if number is None:
            self._numbers[name].pop(value, None)
        else:
            self._numbers[name][value] = number
