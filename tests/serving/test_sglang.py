"""The server of a run on SGLang, against an engine whose answers are known."""

import threading
import time

import pytest
import torch
from transformers import AutoTokenizer

from aurora_rl.envs import Request, SamplingParams
from aurora_rl.envs.sglang.client import SGLangCompletion, SGLangError
from aurora_rl.envs.sglang.plugin_server import PluginError
from aurora_rl.serving.requests import RequestQueue
from aurora_rl.serving.sglang import SGLangServer
from aurora_rl.telemetry.log import MetricsLog, MetricsReader
from aurora_rl.workload.traffic import Prompt


class Engine:
    """Answers every request with five tokens in three rounds; swaps when it is told to."""

    def __init__(self):
        self.flying = self.most = 0
        self.lock = threading.Lock()
        self.stop_tokens = None
        self.swaps = []
        self.attached, self.reachable, self.closed = 0, True, False

    def attach(self):
        self.attached += 1
        return self.status()

    def generate(self, request, *, stop_tokens):
        self.stop_tokens = stop_tokens
        with self.lock:
            self.flying += 1
            self.most = max(self.most, self.flying)
        time.sleep(0.02)
        with self.lock:
            self.flying -= 1
        if request.id == 3:
            raise SGLangError("gone")
        return SGLangCompletion(request, torch.arange(5), True, 3, {0: 2, 1: 1}, [len(self.swaps)], 9)

    def detach(self):
        if not self.reachable:
            raise PluginError("no answer")
        self.attached = 0

    def close(self):
        self.closed = True

    def status(self):
        if not self.reachable:
            raise PluginError("no answer")
        return {
            "attached": self.attached > 0,
            "swaps": len(self.swaps),
            "swap_ms": self.swaps[-2:],
            "version": len(self.swaps),
            "dropped": 7,
        }


@pytest.fixture
def run(tmp_path):
    engine, failed = Engine(), []
    queue = [Request(n, torch.tensor([1, 2]), SamplingParams(max_tokens=5)) for n in range(8)]
    server = SGLangServer(
        engine,
        engine.attach,
        lambda: queue.pop(0) if queue else None,
        slots=3,
        depth=4,
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
    assert server.stats.finished == [(4, 3)] * 7
    assert {event["domain"] for event in events("request")} == {f"domain {n}" for n in range(8) if n != 3}
    assert events("request")[0]["accepted"] == {"0": 2, "1": 1}
    assert (events("request")[0]["prompt_tokens"], events("request")[0]["drafted_tokens"]) == (2, 9)
    summary = server.stats.summary(failed=len(failed), dropped=server.dropped, duration_s=1.0)
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
        sampling=SamplingParams(max_tokens=10),
    )
    engine = Engine()
    server = SGLangServer(
        engine,
        engine.attach,
        source,
        slots=2,
        depth=4,
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
    assert server.dropped == 7, "what was known stays"
    engine.reachable, engine.attached, engine.swaps = True, 0, []
    server.watch()
    engine.swaps.append(5.0)
    server.watch()
    assert engine.attached == 1 and len(events("attached")) == 2
    assert server.stats.swap_ms == [1.0, 2.0, 5.0]


@pytest.mark.parametrize("reachable", [True, False])
def test_the_end_detaches_and_ends_the_engine(run, reachable):
    engine, server, _, _ = run
    engine.reachable = reachable
    server.close()
    assert engine.closed and bool(engine.attached) != reachable


def test_the_drafter_that_the_learner_published_last_is_kept(run, tmp_path):
    engine, _, _, _ = run
    published = tmp_path / "learner" / "drafter"
    server = SGLangServer(
        engine,
        engine.attach,
        lambda: None,
        slots=1,
        depth=4,
        stop_tokens=[9],
        log=MetricsLog(tmp_path / "metrics.jsonl", "server"),
        note=lambda completion: "",
        on_refused=lambda request, reason: None,
        published=published,
    )
    server.save_drafter(tmp_path / "drafter")
    assert not (tmp_path / "drafter").exists()
    published.mkdir(parents=True)
    (published / "config.json").write_text("{}")
    server.save_drafter(tmp_path / "drafter")
    assert (tmp_path / "drafter" / "config.json").read_text() == "{}"
    server.close()
