"""The benchmarks fit the library that they measure, and count rightly what they time."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from benchmark_scripts import SCRIPTS, imported
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from aurora_rl import SamplingParams
from aurora_rl.envs import Completion
from aurora_rl.models.loading import load_target
from aurora_rl.serving.http.server import HttpServer
from aurora_rl.serving.requests import RequestQueue
from aurora_rl.workload.traffic import Prompt, generate_traffic


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_imports_what_is_there(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    imported(script, monkeypatch)


def test_prompts_become_greedy_requests(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common, (model, tokenizer) = (
        imported("common", monkeypatch),
        load_target(tiny_folder, dtype=torch.float32, device="cpu"),
    )
    monkeypatch.setattr(sys, "argv", ["script.py", "--limit", "3", "--max-new-tokens", "5", "--device", "cpu"])
    options = common.parse(common.arguments(None))
    requests = common.request_queue(options, common.prompts(options), model, tokenizer)
    usual = common.usual_request(options, requests)
    served = list(iter(requests, None))
    assert [r.id for r in served] == [0, 1, 2]
    assert all((r.sampling_params.temperature, r.sampling_params.max_tokens) == (0, 5) for r in [usual, *served])


# ---- the clients of benchmarks/serving.py ------------------------------------------------------------------------


@pytest.fixture
def http_load(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return imported("http_load", monkeypatch)


class Parrot:
    """A server that says three pieces of two tokens, 20 ms apart, unless it is asked to fail.

    `most` is the most requests that it had at a time.
    """

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.running = self.most = 0

    async def answer(self, request: Request) -> Response:
        (message,) = (await request.json())["messages"]
        self.asked.append(message["content"])
        if message["content"] == "full":
            return JSONResponse({"error": {"message": "too many"}}, 429)
        return StreamingResponse(self.pieces(message["content"]), media_type="text/event-stream")

    async def pieces(self, content: str) -> AsyncIterator[str]:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            yield event({"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
            for _ in range(3):
                await asyncio.sleep(0.02)
                yield event({"choices": [{"delta": {"content": "a b "}, "finish_reason": None}]})
                if content == "break":
                    yield event({"error": {"message": "broken"}})
                    return
            yield event({"choices": [{"delta": {}, "finish_reason": "length"}]})
            if content != "mute":
                drafts = {"num_spec_steps": 2, "num_accepted_draft_tokens": 3}
                usage = {"usage": {"completion_tokens": 6}, "metrics": {"speculative_decoding": drafts}}
                yield event({"choices": [], **usage})
            yield "data: [DONE]\n\n"
        finally:
            self.running -= 1


def event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"


@pytest.fixture
def parrot() -> Iterator[tuple[Parrot, str]]:
    parrot, server = Parrot(), HttpServer("127.0.0.1", 0)
    server.start(Starlette(routes=[Route("/v1/chat/completions", parrot.answer, methods=["POST"])]))
    yield parrot, server.url
    server.stop()


def chats(*contents: str) -> list[Prompt]:
    return [Prompt(content, "", ({"role": "user", "content": content},)) for content in contents]


def test_a_closed_loop_keeps_so_many_requests_in_flight(http_load: ModuleType, parrot: tuple[Parrot, str]) -> None:
    server, url = parrot
    asked = [str(number) for number in range(8)]
    answers = asyncio.run(http_load.Load(url, 6).closed_loop(chats(*asked), 3))
    assert sorted(server.asked) == asked and server.most == 3
    assert all(answer.complete and answer.text == "a b " * 3 and len(answer.pieces) == 3 for answer in answers)


def test_an_open_loop_waits_for_nobody(http_load: ModuleType, parrot: tuple[Parrot, str]) -> None:
    server, url = parrot
    answers = asyncio.run(http_load.Load(url, 6).open_loop(chats(*"abcde"), [0.0, 0.01, 0.02, 0.03, 0.2]))
    assert server.most >= 3
    starts = [answer.began - answers[0].began for answer in answers]
    assert starts == sorted(starts) and 0.19 < starts[-1] < 1


def test_a_cell_counts_what_failed_apart(http_load: ModuleType, parrot: tuple[Parrot, str]) -> None:
    asked = chats("a", "full", "break", "mute")
    answers = asyncio.run(http_load.Load(parrot[1], 6).closed_loop(asked, 1))
    cell = http_load.summary(answers, lambda text: len(text.split()))
    assert (cell["completed"], cell["rejected_429"], cell["failed"]) == (2, 1, 1)
    assert cell["errors"] == ["{'message': 'broken'}"]
    assert cell["output_tokens"] == 6 + 6  # by the server's word, and counted
    assert cell["tokens_per_second"] == pytest.approx(12 / cell["seconds"], rel=0.01)
    assert cell["acceptance_length"] == 1 + 3 / 2
    assert 20 <= cell["ttft_ms"]["p50"] < cell["latency_ms"]["p50"]
    assert 20 <= cell["itl_ms"]["p50"] + 5
    assert cell["tpot_ms"]["p50"] == pytest.approx(cell["itl_ms"]["p50"] * 2 / 5, rel=0.5)


def test_a_server_that_is_not_there_is_no_answer(http_load: ModuleType) -> None:
    server = HttpServer("127.0.0.1", 0)  # the port is taken, and closed again
    server.stop()
    (answer,) = asyncio.run(http_load.Load(server.url, 6).closed_loop(chats("a"), 1))
    cell = http_load.summary([answer], len)
    assert (cell["completed"], cell["failed"], cell["ttft_ms"]) == (0, 1, None) and answer.error is not None


def test_arrivals_are_poisson_s(http_load: ModuleType) -> None:
    arrivals = torch.tensor(http_load.poisson_arrivals(4.0, 4000))
    gaps = arrivals.diff(prepend=torch.zeros(1))
    assert (gaps > 0).all()
    assert float(gaps.mean()) == pytest.approx(1 / 4, rel=0.05)
    assert float(gaps.std()) == pytest.approx(1 / 4, rel=0.05)  # as an exponential's is
    assert http_load.poisson_arrivals(4.0, 3) == http_load.poisson_arrivals(4.0, 4000)[:3]


@pytest.mark.stress
def test_the_front_is_compared_with_its_engine(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    front, common = imported("http_front", monkeypatch), importlib.import_module("common")
    monkeypatch.setattr(sys, "argv", ["script.py", "--limit", "5", "--max-new-tokens", "4", "--device", "cpu"])
    options = common.parse(common.arguments(None))
    options.model, options.slots, options.front_clients, options.turns = str(tiny_folder), 2, [2], 1
    options.overrides = ["engine.max_length=256"]
    figures = front.measure(options, common.prompts(options), tmp_path)["clients"][2]
    assert all(figures["tokens_per_second"].values()) and figures["turns"] == [figures["cost"]] and figures["cost"] < 1
    assert all(figures["busy"]["tokens_per_second"].values())
    assert 0 < figures["cpu_of_threads"]["http"]["http"] < 1


# ---- what learning costs the server ------------------------------------------------------------------------------


def test_a_round_with_a_swap_and_those_after_it_are_compared_with_those_before(monkeypatch: pytest.MonkeyPatch) -> None:
    presence = imported("presence", monkeypatch)
    seconds = {8: 0.25, **dict.fromkeys(range(9, 16), 0.15625)}
    steps = [presence.Step(t / 4, t / 4 + seconds.get(t, 0.125), 1, 1, int(t >= 8)) for t in range(16)]
    found = presence.around_swaps([steps], slots=1)
    assert (found["swaps"], found["round_with_swap"], found["within_one_round"]) == (1, [2.0], True)
    assert found["rounds_after"]["cost"] == pytest.approx(0.2) and not found["rounds_after"]["within_goal"]
    assert presence.around_swaps([steps[:10]], slots=1) == {"swaps": 0}  # less than a second is left after it
    assert presence.around_swaps([steps], slots=2) == {"swaps": 0}  # no round has all slots occupied


@pytest.mark.stress
def test_recording_is_compared_with_none(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    presence, common = imported("presence", monkeypatch), importlib.import_module("common")
    monkeypatch.setattr(sys, "argv", ["script.py", "--limit", "2", "--max-new-tokens", "4", "--device", "cpu"])
    options = common.parse(common.arguments(None))
    options.model, options.drafter, options.slots, options.turns = str(tiny_folder), "medusa", 2, 1
    figures = presence.recording(options)
    assert figures["trajectories"] == {"sent": 4, "taken": 4}  # the unmeasured turn's too; unrecorded turns have none
    assert len(figures["throughput"]["pairs"]) == 1


# ---- the front against its engine --------------------------------------------------------------------------------


def test_the_interval_of_a_median_is_that_of_the_sign_test(monkeypatch: pytest.MonkeyPatch) -> None:
    interval = imported("common", monkeypatch).median_interval
    assert interval(range(5)) is None
    assert interval([3, 1, 2, 6, 5, 4]) == (1, 6)
    assert interval(range(1, 11)) == (2, 9)  # 97.9%; from 3 to 8 it were 89%
    assert interval(range(1, 21)) == (6, 15)


def test_a_cost_is_the_share_that_the_front_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = imported("http_front", monkeypatch).compare([100.0, 110.0, 90.0], [98.0, 99.0, 90.0])
    assert figures["cost"] == pytest.approx(0.02) and figures["within_goal"]
    assert figures["turns"] == pytest.approx([0.02, 0.1, 0.0])


def test_the_queue_has_no_more_requests_in_flight_than_clients(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, tokenizer = load_target(tiny_folder, dtype=torch.float32, device="cpu")
    queue = RequestQueue(
        generate_traffic(5), tokenizer, vocab_size=300, max_length=1024, sampling_params=SamplingParams(max_tokens=4)
    )
    workload = imported("http_front", monkeypatch).Workload()
    assert workload() is None
    workload.begin(queue, 2)
    running, served = [workload(), workload()], []
    assert None not in running and workload() is None
    while running:
        request = running.pop(0)
        served.append(request.id)
        workload.completed(Completion(request, torch.arange(4), terminated=False))
        running += [each for each in [workload()] if each is not None]
        assert workload() is None
    assert served == list(range(5)) and workload.tokens == 20


# ---- the failures of benchmarks/soak.py ---------------------------------------------------------------------------

CLEAN: dict[str, Any] = {
    "answers": {"equal": 9},
    "growth_mib": 3.0,
    "before": {"descriptors": 20},
    "after": {"descriptors": 20, "running": 0, "waiting": 0},
    "strangers": {"vanish": {"200": 5}, "send_too_much": {"413": 2}},
    "strangers_that_broke": [],
}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, None),
        ({"answers": {"equal": 9, "different": 1}}, "1 answers different"),
        ({"answers": {"equal": 9, "failed": 2}}, "2 answers failed"),
        ({"answers": {}}, "no answer was compared"),
        ({"growth_mib": 33.0}, "memory grew by 33 MiB, more than 32"),
        ({"after": {"descriptors": 23, "running": 0, "waiting": 0}}, "23 descriptors are open, and 20 were"),
        ({"after": {"descriptors": 20, "running": 1, "waiting": 0}}, "1 requests are running"),
        ({"strangers": {"send_too_much": {"413": 2, "200": 1}}}, "send_too_much: 1 times 200"),
        ({"strangers_that_broke": ["KeyError('a')"]}, "a stranger broke: KeyError('a')"),
    ],
)
def test_a_soak_tells_what_leaked(change: dict[str, Any], told: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert imported("soak", monkeypatch).failures_of({**CLEAN, **change}) == ([] if told is None else [told])


def test_growth_is_that_after_the_first_quarter(monkeypatch: pytest.MonkeyPatch) -> None:
    growth = imported("soak", monkeypatch).growth
    warm_up = [{"seconds": float(s), "rss_mib": 1000.0 + min(s, 10) * 20} for s in range(0, 41)]
    assert growth(warm_up) == pytest.approx(0.0, abs=1e-6)
    leak = [{"seconds": float(s), "rss_mib": 1000.0 + s} for s in range(0, 41)]
    assert growth(leak) == pytest.approx(30.0)


# ---- benchmarks/kernels.py ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", ["forward_kl", "cross_entropy"])
def test_all_ways_to_compute_a_loss_agree(divergence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = imported("kernels", monkeypatch)
    cell = kernels.Cell(divergence, 40, 96)
    problem, absent = kernels.problem(cell, 8, "float32"), kernels.left_out(cell, compiling=False)  # takes a minute
    ways = {way: kernels.measure(way, problem, 2) for way in kernels.WAYS if way not in absent}
    assert kernels.agree(ways, 1e-4) and all(way["ms"] > 0 for way in ways.values())
    assert sum(len(way["found"]) == 3 for way in ways.values()) == (4 if divergence == "cross_entropy" else 3)
    ways["naive"]["found"][2] += 0.01
    assert not kernels.agree(ways, 1e-4)


def test_a_run_of_the_kernels_goes_on_where_another_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels, path = imported("kernels", monkeypatch), tmp_path / "kernels.partial.jsonl"
    cell, asked = kernels.Cell("forward_kl", 4, 8), []

    def measuring(way: str, found: dict[str, Any] | None) -> dict[str, Any] | None:
        journal = kernels.Journal(path, {"threads": 2})  # of a process of its own
        return journal.take(cell, way, lambda: asked.append(way) or found)

    assert measuring("naive", {"ms": 3.0}) == measuring("naive", {"ms": 4.0}) == {"ms": 3.0}
    assert measuring("products in chunks", None) is None  # there was no memory for it, and there may be now
    assert measuring("products in chunks", {"ms": 1.0}) == {"ms": 1.0}
    assert asked == ["naive", "products in chunks", "products in chunks"]
    with pytest.raises(SystemExit, match="of a run with {'threads': 2}, and this one has {'threads': 1}; delete it"):
        kernels.Journal(path, {"threads": 1})


def test_the_table_of_the_kernels_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = imported("kernels", monkeypatch)

    def in_this_process(way: str, cell: Any, options: Any) -> dict[str, Any]:
        # A process of its own takes seconds to start, and only keeps the peak of memory apart.
        return kernels.measure(way, kernels.problem(cell, options.width, options.dtype), 2)

    monkeypatch.setattr(kernels, "in_process", in_this_process)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    command = ["kernels.py", "--rows=40", "--vocabs=96", "--divergences=cross_entropy", "--width=8", "--no-compile"]
    monkeypatch.setattr(sys, "argv", [*command, f"--out={tmp_path}"])
    kernels.main()
    (cell,) = json.loads((tmp_path / "kernels.json").read_text())["cells"]
    assert cell["agree"] and {"two_head_loss", "naive", "linear_cross_entropy"} <= set(cell["ways"])
    assert cell["summary"]["best_peer"] in ("naive", "linear_cross_entropy")
    assert not list(tmp_path.glob("*.partial.jsonl"))


def test_a_cell_is_judged_by_its_best_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = imported("kernels", monkeypatch)
    times = {
        "products in chunks": 10,
        "products of all rows": 8,
        "two_head_loss": 9,
        "naive": 18,
        "compiled chunks": 27,
    }
    ways = {name: {"ms": float(ms), "peak_mib": 2.0 * ms} for name, ms in times.items()}
    says = {"over_products": 1.12, "best_peer": "naive", "faster_than_best_peer": 2.0, "share_of_naive_peak": 0.5}
    assert kernels.summary(ways) == says
    none = {**says, "best_peer": None, "faster_than_best_peer": None, "share_of_naive_peak": None}
    assert kernels.summary({name: way for name, way in ways.items() if name not in kernels.PEERS}) == none
    cell = {"divergence": "forward_kl", "rows": 4, "vocab": 8, "ways": ways, "summary": none}
    assert kernels.table([cell]).splitlines()[-1] == "| forward_kl | 4 | 8 | 9.0 | 1.12 |  |  | 18.0 |  |"


# ---- benchmarks/fleet.py and benchmarks/scaling.py ---------------------------------------------------------------


@pytest.mark.stress
def test_a_fleet_is_measured_in_all_its_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = imported("fleet", monkeypatch)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    options = argparse.Namespace(
        idle_seconds=0.1, flood_seconds=0.3, paced_seconds=1.0, rate=40.0, publications=2, weights_mb=0.1
    )

    def in_thread(target: Any, *arguments: Any) -> None:
        threading.Thread(target=target, args=arguments, daemon=True).start()  # a process takes seconds to start

    found = fleet.cell(options, "replay", 2, start=in_thread)
    assert found["flood"]["trajectories_per_second"] > 0 and found["flood"]["shares"]["least"] > 0.1
    assert found["paced"]["learned_per_second"] > 0 and found["paced"]["rss_mib"] > 100
    assert found["publish"]["until_swapped"]["publications"] == 2
    assert found["publish"]["until_swapped"]["last_engine_ms"]["p50"] > 0
    assert found["dropped_by_engines"] == {}


def test_an_engine_of_the_fleet_that_decodes_is_learned_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = imported("fleet", monkeypatch)
    learner = fleet.LearnerEnd(fleet.TINY, str(tmp_path))
    engine = fleet.DecodeEngine(0, learner.wire, str(tmp_path))
    try:
        deadline = time.monotonic() + 60
        while learner._learner.seen < 4:
            assert time.monotonic() < deadline
            engine.turn(1)
            learner._learner.step(wait_s=0.0)
    finally:
        engine.close()
        learner.close()


def test_swaps_are_timed_until_the_last_engine_has_the_version_or_a_newer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    published = {1: 10.0, 2: 20.0, 3: 30.0}
    engines = [[(1, 10.5), (2, 20.1)], [(2, 20.2)]]  # the second skipped version 1, and nobody has loaded 3
    assert imported("fleet", monkeypatch).swap_times(published, engines) == {
        "publications": 2,
        "not_loaded_at_the_end": 1,
        "engine_ms": {"p50": 350.0, "max": 10200.0},
        "last_engine_ms": {"p50": 5200.0, "max": 10200.0},
    }


def test_what_breaks_first_follows_from_the_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    simulation = imported("fleet_simulation", monkeypatch)
    costs = simulation.Costs(
        trajectory=1e-3, byte=0.0, engine=0.0, published_byte=1e-9, base_mib=1000.0, engine_mib=1.0, swap=0.1
    )
    load = simulation.Load("", 100.0, 10, 1000.0, 1.0, 1e7, 2.0, 1e9)  # ten trajectories a second and engine
    figures = simulation.simulate(50, costs, load, seconds=60.0)
    assert figures["cores"] == pytest.approx(0.5 + 50 * 1e-2 / 2, rel=0.1) and figures["dropped"] == 0
    found = simulation.studied(costs, load, seconds=120.0)["breaks_at"]
    assert found["engines are refused"] == simulation.CONNECTIONS + 1
    # One core: 100 engines' trajectories, or 66 with what the publications take.
    assert 60 < found["over 1% of the trajectories are dropped"] < 105


def test_the_arithmetic_of_scale_is_that_of_the_layout_and_of_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    scaling = imported("scaling", monkeypatch)
    (large, _), flops = scaling.MODELS, scaling.counted_flops()
    features = 2 * 3 * large.hidden + 8  # bfloat16 of three layers, and the token
    assert scaling.bytes_of(large, "hidden")["per_prompt_token"] == features
    assert scaling.bytes_of(large, "hidden")["per_completion_token"] > features + 2 * large.hidden
    assert scaling.bytes_of(large, "topk")["per_completion_token"] < features + 3000
    assert flops["counted_over_formula"] == pytest.approx(1, abs=0.1)
