"""The server of a run on SGLang, against an engine whose answers are known."""

import threading
import time
from dataclasses import asdict

import pytest
import torch
from transformers import AutoTokenizer

from aurora_rl.envs import Request, SamplingParams
from aurora_rl.envs.remote.client import EngineCompletion, EngineError
from aurora_rl.envs.remote.plugin_server import PluginError
from aurora_rl.envs.remote.recorded_totals import RecordedTotals
from aurora_rl.serving import attached as attached_module
from aurora_rl.serving.attached import AttachedServer, DrivenServer
from aurora_rl.serving.requests import RequestQueue
from aurora_rl.telemetry.log import MetricsLog, MetricsReader
from aurora_rl.workload.traffic import Prompt


class Engine:
    """Answers every request with five tokens in three rounds; swaps, and serves others, when it is told to."""

    engine = "SGLang"

    def __init__(self):
        self.flying = self.most = 0
        self.lock = threading.Lock()
        self.stop_tokens = None
        self.attached, self.reachable, self.closed, self.attaches = False, True, False, 0
        self.starting = False  # a server that answers, but cannot be attached to yet
        self.restart()

    def restart(self):
        self.swaps, self.session, self.attached, self.faults = [], "", False, []
        self.served = asdict(RecordedTotals())

    def attach(self):
        if self.starting:
            raise PluginError("not yet")
        self.attaches, self.attached = self.attaches + 1, True
        self.session = f"session {self.attaches}"
        return self.status()

    def serve_others(self, requests, tokens, accepted):
        """As JSON has it, where keys are text."""
        sums, rounds = dict(self.served["accepted"]), sum(accepted.values())
        drafted = sum((count + 1) * times for count, times in accepted.items())
        for count, times in accepted.items():
            sums[str(count)] = sums.get(str(count), 0) + times
        new = {"requests": requests, "tokens": tokens, "speculative_tokens": drafted, "speculative_rounds": rounds}
        new = {name: self.served[name] + number for name, number in new.items()}
        self.served = {**self.served, **new, "accepted": sums}

    def generate(self, request, *, stop_tokens):
        self.stop_tokens = stop_tokens
        with self.lock:
            self.flying += 1
            self.most = max(self.most, self.flying)
        time.sleep(0.02)
        with self.lock:
            self.flying -= 1
        if request.id == 3:
            raise EngineError("gone")
        return EngineCompletion(request, torch.arange(5), True, 3, {0: 2, 1: 1}, [len(self.swaps)], 9)

    def detach(self):
        if not self.reachable:
            raise PluginError("no answer")
        self.attached = False
        return self.status()

    def close(self):
        self.closed = True

    def status(self):
        if not self.reachable:
            raise PluginError("no answer")
        return {
            "attached": self.attached,
            "session": self.session,
            "depth": 4,
            "width": 1,
            "slots": 2,
            "served": self.served,
            "swaps": len(self.swaps),
            "swap_ms": self.swaps[-2:],
            "faults": self.faults,
            "version": len(self.swaps),
            "drops": {"no_learner": 4, "slow_learner": 3},
            "sent": 5,
        }


@pytest.fixture
def run(tmp_path):
    engine, failed = Engine(), []
    queue = [Request(n, torch.tensor([1, 2]), SamplingParams(max_tokens=5)) for n in range(8)]
    server = DrivenServer(
        engine,
        engine.attach,
        lambda: queue.pop(0) if queue else None,
        num_slots=3,
        stop_tokens=[9],
        log=MetricsLog(tmp_path / "metrics.jsonl", "server"),
        note=lambda completion: f"domain {completion.request.id}",
        on_refused=lambda request, reason: failed.append((request.id, reason)),
    )
    yield (
        engine,
        server,
        failed,
        lambda kind: [event for event in MetricsReader(tmp_path / "metrics.jsonl") if event["event"] == kind],
    )
    server.close()


def test_slots_are_kept_filled_and_every_answer_counts(run):
    engine, server, failed, events = run
    while server.step():
        pass
    assert engine.most == 3 and engine.stop_tokens == (9,)
    assert failed == [(3, "gone")]
    assert list(server.stats.finished) == [(4, 3)] * 7
    assert {event["domain"] for event in events("request")} == {f"domain {n}" for n in range(8) if n != 3}
    assert events("request")[0]["accepted"] == {"0": 2, "1": 1}
    assert (events("request")[0]["prompt_tokens"], events("request")[0]["drafted_tokens"]) == (2, 9)
    summary = server.stats.summary(failed=len(failed), drops=server.drops, duration_s=1.0)
    assert summary["requests"] == 7 and summary["acceptance_length"] == {"first": 4 / 3, "last": 4 / 3}
    assert summary["domains"]["domain 5"] == {"requests": 1, "tokens": 5, "acceptance_length": 4 / 3}
    assert summary["speedup"] is None and summary["dropped_trajectories"] == 7
    assert sum(r.tokens for r in server.stats.rounds) == 35 and all(r.seconds > 0 for r in server.stats.rounds)


def test_a_request_without_an_answer_ends_its_conversation_and_no_other(tiny_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    turns = {"p": ["more"], "q": [], "r": [], "s": ["more", "enough"]}
    source = RequestQueue(
        [Prompt(name, "chat", ({"role": "user", "content": "Hi"},), tuple(later)) for name, later in turns.items()],
        tokenizer,
        vocab_size=len(tokenizer),
        max_length=256,
        sampling_params=SamplingParams(max_tokens=10),
    )
    engine = Engine()
    server = DrivenServer(
        engine,
        engine.attach,
        source,
        num_slots=2,
        stop_tokens=[9],
        log=MetricsLog(tmp_path / "metrics.jsonl", "server"),
        note=source.completed,
        on_refused=source.refused,
    )
    while server.step():
        pass
    server.close()
    assert source.failed == ["prompt 's', turn 1: gone"] * 3  # with the two turns that would have followed
    assert len(server.stats.finished) + len(source.failed) == source.total == 7
    assert not source._open


def test_swaps_are_told_once_each(run):
    engine, server, _, events = run
    server.watch()
    assert server.stats.swap_ms == [] and server.stats.version == 0
    engine.swaps += [1.0, 2.0]
    server.watch()
    server.watch()
    engine.swaps.append(3.0)
    server.watch()
    assert server.stats.swap_ms == [1.0, 2.0, 3.0] and server.stats.versions == [0, 2, 3]
    assert [event["ms"] for event in events("swap")] == [1.0, 2.0, 3.0]


def test_a_server_that_was_restarted_is_attached_to_again(run):
    engine, server, _, events = run
    engine.swaps += [1.0, 2.0]
    server.watch()
    engine.reachable = False
    server.watch()
    server.watch()
    assert [event["reason"] for event in events("unreachable")] == ["no answer"]
    assert (server.drops.total(), server.drops["no_learner"], server.sent) == (7, 4, 5), "what was known stays"
    engine.restart()
    engine.reachable = engine.starting = True
    server.watch()
    server.watch()
    assert (server.drops.total(), server.drops["no_learner"], server.sent) == (7, 4, 5), (
        "an attempt counts nothing twice"
    )
    engine.starting = False
    server.watch()
    assert (server.drops.total(), server.drops["no_learner"], server.sent) == (14, 8, 10), (
        "each process counts from 0, and its plugin says 7 and 4"
    )
    engine.swaps.append(5.0)
    server.watch()
    assert engine.attached and engine.attaches == 2 and len(events("attached")) == 2
    assert server.stats.swap_ms == [1.0, 2.0, 5.0]


@pytest.mark.parametrize("reachable", [True, False])
def test_the_end_detaches_and_ends_the_engine(run, reachable):
    engine, server, _, _ = run
    engine.reachable = reachable
    server.close()
    assert engine.closed and engine.attached != reachable


def test_the_drafter_that_the_learner_published_last_is_kept(run, tmp_path):
    engine, _, _, _ = run
    published = tmp_path / "learner" / "drafter"
    server = DrivenServer(
        engine,
        engine.attach,
        lambda: None,
        num_slots=1,
        stop_tokens=[9],
        log=MetricsLog(tmp_path / "metrics.jsonl", "server"),
        note=lambda completion: "",
        on_refused=lambda request, reason: None,
        published=lambda: published if published.exists() else None,
    )
    server.save_drafter(tmp_path / "drafter")
    assert not (tmp_path / "drafter").exists()
    published.mkdir(parents=True)
    (published / "config.json").write_text("{}")
    server.save_drafter(tmp_path / "drafter")
    assert (tmp_path / "drafter" / "config.json").read_text() == "{}"
    server.close()


# ---- others' requests -----------------------------------------------------------------------------------------------


@pytest.fixture
def attached(tmp_path, monkeypatch):
    monkeypatch.setattr(attached_module, "_TURN_S", 0.0)
    monkeypatch.setattr(attached_module, "_WATCH_S", 0.0)
    engine = Engine()
    server = AttachedServer(engine, engine.attach, log=MetricsLog(tmp_path / "metrics.jsonl", "server"))
    yield (
        engine,
        server,
        lambda kind: [event for event in MetricsReader(tmp_path / "metrics.jsonl") if event["event"] == kind],
    )
    server.close()


def test_what_the_plugin_recorded_is_counted_once(attached):
    engine, server, events = attached
    assert server.step() and not server.stats.finished
    engine.serve_others(2, 11, {0: 3, 2: 2})
    for _ in range(3):
        assert server.step()
    engine.serve_others(1, 4, {3: 1})
    server.step()
    assert list(server.stats.finished) == [(4, 2), (5, 3), (4, 1)]
    assert server.stats.acceptance(0, 3) == 13 / 6
    assert server.stats.drafted == {"chain": 6}
    assert server.stats.summary()["requests"] == 3
    told = [{name: event[name] for name in ("requests", "tokens", "accepted")} for event in events("requests")]
    assert told == [
        {"requests": 2, "tokens": 11, "accepted": {"0": 3, "2": 2}},
        {"requests": 1, "tokens": 4, "accepted": {"3": 1}},
    ]


def test_after_a_restart_counts_go_on_and_nothing_is_counted_twice(attached):
    engine, server, events = attached
    engine.serve_others(5, 50, {0: 10})
    server.step()
    engine.reachable = False
    assert server.step() and server.refused == "no answer"
    engine.restart()
    engine.reachable = True
    assert server.step() and server.refused is None
    engine.serve_others(2, 20, {1: 10})
    server.step()
    assert len(server.stats.finished) == 7 and server.stats.acceptance(5, 7) == 2.0
    assert len(events("attached")) == 2 and len(events("unreachable")) == 1


def test_an_attach_that_is_refused_after_a_restart_is_tried_again(attached):
    engine, server, events = attached
    engine.restart()
    attach = server._attach

    def refuse():
        raise PluginError("another draft vocabulary")

    server._attach = refuse
    assert server.step() and server.step() and server.refused == "another draft vocabulary"
    server._attach = attach
    assert server.step() and engine.attached and server.refused is None
    assert [event["reason"] for event in events("unreachable")] == ["another draft vocabulary"]


@pytest.mark.parametrize("again", [False, True])
def test_a_learner_that_somebody_else_detached_stays_so(attached, caplog, again):
    engine, server, events = attached
    engine.detach()
    if again:
        engine.attach()  # another learner
        engine.serve_others(5, 50, {0: 10})
    assert not server.step() and not server.step()
    assert server.detached and server.refused == "somebody else detached the learner from SGLang"
    assert caplog.text.count("somebody else detached") == 1
    server.close()
    assert engine.attached == again and not server.stats.finished


def test_the_end_counts_what_was_recorded_at_the_last_moment(attached, monkeypatch):
    engine, server, _ = attached
    detach = engine.detach

    def detach_late():
        engine.serve_others(1, 4, {3: 1})
        return detach()

    monkeypatch.setattr(engine, "detach", detach_late)
    server.close()
    assert list(server.stats.finished) == [(4, 1)] and engine.closed


def test_each_fault_that_the_plugin_finds_is_told_once(run):
    engine, server, *_ = run
    fault = {"version": 0, "cause": "stale", "detail": "all tensors", "action": "its weights were loaded again"}
    engine.faults = [{"number": 1, **fault}]
    server.watch()
    server.watch()
    engine.faults.append({"number": 2, **fault, "cause": "cache"})
    server.watch()
    events = [event for event in MetricsReader(server._log.path) if event["event"] == "watchdog"]
    assert [(event["cause"], event["requests"]) for event in events] == [("stale", 0), ("cache", 0)]
    assert {name: events[0][name] for name in fault} == fault
