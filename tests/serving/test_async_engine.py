"""Concurrent clients of one engine: every text is plain decoding's, whoever comes, goes or fails next to it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from driven_engine import LENGTH, ClientRig, driven
from transformers import PreTrainedModel

from aurora_rl.envs import Request, SamplingParams
from aurora_rl.serving.async_engine import (
    AsyncEngine,
    EngineDeadError,
    Job,
    QueueFullError,
    RefusedError,
    ShuttingDownError,
    Update,
)
from aurora_rl.serving.server import Deleted
from aurora_rl.telemetry.prometheus import METRICS
from aurora_rl.testing import tiny_target


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return tiny_target()


class Rig(ClientRig):
    """An engine whose clients are coroutines of a test."""

    def __init__(self, target: PreTrainedModel, folder: Path, *, max_waiting: int = 64) -> None:
        super().__init__(target, folder, decode=lambda tokens: " ".join(map(str, tokens)), max_waiting=max_waiting)

    def run(self, scenario: Any) -> Any:
        """Run a coroutine next to the thread that drives the rounds."""

        async def timed() -> Any:
            with driven(self.clients, self.server):
                return await asyncio.wait_for(scenario, 60)

        return asyncio.run(timed())

    async def complete(self, prompt: list[int], sampling: SamplingParams, **options: bool) -> list[Update]:
        jobs = [Job(torch.tensor(prompt), sampling, **options)]
        return [update async for _, update in self.clients.generate(jobs)]


@pytest.fixture
def rig(target: PreTrainedModel, tmp_path: Path) -> Iterator[Rig]:
    yield Rig(target, tmp_path)


def plain(target: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    """Greedy decoding without a cache."""
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            tokens.append(int(target(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def tokens_of(updates: list[Update]) -> list[int]:
    return [token for update in updates for token in update.tokens]


def test_each_client_gets_plain_decodings_text_in_pieces(rig: Rig, target: PreTrainedModel) -> None:
    prompts = [[3, 4, 5], [6], [7, 8], [9, 10, 11, 12], [13]]

    async def all_of_them() -> list[list[Update]]:
        return await asyncio.gather(*(rig.complete(p, SamplingParams(max_tokens=24)) for p in prompts))

    results = rig.run(all_of_them())
    for prompt, updates in zip(prompts, results, strict=True):
        completion = updates[-1].completion
        assert completion is not None
        assert tokens_of(updates) == completion.tokens.tolist() == plain(target, prompt, 24)
        assert len(updates) > 2  # in pieces
    assert sorted(rig.learned) == [0, 1, 2, 3, 4]


def test_a_client_that_leaves_frees_its_slot_within_a_round(rig: Rig, target: PreTrainedModel) -> None:
    async def leave_and_stay() -> list[int]:
        leaving = rig.clients.generate([Job(torch.tensor([3]), SamplingParams(max_tokens=400))])
        staying = asyncio.create_task(rig.complete([4, 5], SamplingParams(max_tokens=40)))
        await anext(leaving)
        assert rig.clients.num_running >= 1
        await leaving.aclose()
        updates = await staying
        while rig.clients.num_running:
            await asyncio.sleep(0.01)
        return tokens_of(updates)

    assert rig.run(leave_and_stay()) == plain(target, [4, 5], 40)
    assert rig.learned == [1]  # nothing is learned of what nobody read
    assert rig.env.engine.store.occupied.tolist() == []


def test_the_only_client_leaves_and_the_next_is_served(rig: Rig, target: PreTrainedModel) -> None:
    async def one_after_the_next() -> list[int]:
        first = rig.clients.generate([Job(torch.tensor([3]), SamplingParams(max_tokens=400))])
        await anext(first)
        await first.aclose()
        return tokens_of(await rig.complete([4, 5], SamplingParams(max_tokens=20)))

    assert rig.run(one_after_the_next()) == plain(target, [4, 5], 20)


def test_a_request_without_speculation_gets_the_same_text_and_no_drafts(rig: Rig, target: PreTrainedModel) -> None:
    async def both() -> list[list[Update]]:
        sampling = SamplingParams(max_tokens=24)
        return [await rig.complete([3, 4], sampling, speculative=False), await rig.complete([3, 4], sampling)]

    without, with_drafts = rig.run(both())
    assert tokens_of(without) == tokens_of(with_drafts) == plain(target, [3, 4], 24)
    last, drafted = without[-1].completion, with_drafts[-1].completion
    assert last is not None and last.drafts.num_drafted == 0 and last.acceptance_length is None
    assert drafted is not None and drafted.drafts.num_drafted > 0


def test_a_request_may_keep_out_of_learning(rig: Rig) -> None:
    async def two() -> None:
        await rig.complete([3], SamplingParams(max_tokens=4), learn=False)
        await rig.complete([4], SamplingParams(max_tokens=4))

    rig.run(two())
    assert rig.learned == [1]


def test_log_probabilities_are_the_targets(rig: Rig, target: PreTrainedModel) -> None:
    sampling = SamplingParams(max_tokens=12, logprobs=3, temperature=0.8, top_k=5, seed=7)

    async def ask() -> list[Update]:
        return await rig.complete([3, 4], sampling)

    updates = rig.run(ask())
    tokens = tokens_of(updates)
    logprobs = [each for update in updates for each in update.logprobs or []]
    with torch.inference_mode():
        expected = target(torch.tensor([[3, 4, *tokens]])).logits[0, 1:-1].log_softmax(-1)
    for row, token, found in zip(expected, tokens, logprobs, strict=True):
        assert found.logprob == pytest.approx(float(row[token]), abs=1e-4)
        values, ids = row.topk(3)
        assert [token for token, _ in found.top] == ids.tolist()
        assert [value for _, value in found.top] == pytest.approx(values.tolist(), abs=1e-4)
    completion = updates[-1].completion
    assert completion is not None and completion.logprobs == logprobs


def test_a_request_that_cannot_be_served_fails_alone(rig: Rig, target: PreTrainedModel) -> None:
    async def one_bad() -> list[Any]:
        return await asyncio.gather(
            rig.complete([3], SamplingParams(max_tokens=8)),
            rig.complete([999], SamplingParams(max_tokens=8)),
            rig.complete([4], SamplingParams(max_tokens=LENGTH)),
            rig.complete([5], SamplingParams(max_tokens=8)),
            return_exceptions=True,
        )

    good, outside, too_long, last = rig.run(one_bad())
    assert tokens_of(good) == plain(target, [3], 8) and tokens_of(last) == plain(target, [5], 8)
    assert isinstance(outside, RefusedError) and "must lie in 0..31" in str(outside)
    assert isinstance(too_long, RefusedError) and "exceed the context of 512" in str(too_long)
    assert not str(too_long).startswith("request")  # the client does not know our numbers


def test_a_full_queue_says_so_and_what_waits_is_served(target: PreTrainedModel, tmp_path: Path) -> None:
    rig = Rig(target, tmp_path, max_waiting=1)

    async def flood() -> list[Any]:
        sampling = SamplingParams(max_tokens=64)
        return await asyncio.gather(*(rig.complete([3], sampling) for _ in range(12)), return_exceptions=True)

    results = rig.run(flood())
    full = [each for each in results if isinstance(each, QueueFullError)]
    served = [each for each in results if isinstance(each, list)]
    assert full and served and len(full) + len(served) == 12
    assert "http.max_waiting" in str(full[0])


def test_jobs_that_are_asked_together_are_all_taken_or_none(rig: Rig, target: PreTrainedModel) -> None:
    jobs = [Job(torch.tensor([3 + place]), SamplingParams(max_tokens=8 + place)) for place in range(5)]

    async def together(count: int) -> dict[int, list[Update]]:
        found: dict[int, list[Update]] = {}
        async for index, update in rig.clients.generate(jobs[:count]):
            found.setdefault(index, []).append(update)
        return found

    async def three_times() -> None:
        found = await together(5)
        assert {index: tokens_of(updates) for index, updates in found.items()} == {
            place: plain(target, [3 + place], 8 + place) for place in range(5)
        }
        rig.clients._max_waiting = 4
        with pytest.raises(QueueFullError):
            await together(5)
        assert (rig.clients.num_waiting, rig.clients.num_open, rig.clients.cancelled) == (0, 0, 0)
        assert len(await together(4)) == 4

    rig.run(three_times())


def test_waiting_requests_are_served_in_the_order_they_came(rig: Rig) -> None:
    began: list[int] = []

    async def note(prompt: int) -> None:
        async for _ in rig.clients.generate([Job(torch.tensor([prompt]), SamplingParams(max_tokens=6))]):
            if prompt not in began:
                began.append(prompt)

    async def many() -> None:
        await asyncio.gather(*(note(prompt) for prompt in range(3, 11)))

    rig.run(many())
    # Two slots at a time: no request begins before one that came two places earlier.
    assert all(abs(began.index(prompt) - (prompt - 3)) <= 1 for prompt in range(3, 11))


def test_an_engine_that_fails_tells_every_client(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> None:
        raise RuntimeError("out of memory")

    async def ask_after_it_broke() -> list[Any]:
        monkeypatch.setattr(rig.env.engine, "verify", broken)
        results = await asyncio.gather(
            *(rig.complete([3], SamplingParams(max_tokens=8)) for _ in range(3)), return_exceptions=True
        )
        with pytest.raises(EngineDeadError):
            await rig.complete([3], SamplingParams(max_tokens=8))
        return results

    results = rig.run(ask_after_it_broke())
    assert all(isinstance(each, EngineDeadError) and "out of memory" in str(each) for each in results)
    assert not rig.clients.alive


def test_an_engine_that_closes_completes_what_it_has(rig: Rig) -> None:
    async def close_in_the_middle() -> int:
        running = rig.clients.generate([Job(torch.tensor([3]), SamplingParams(max_tokens=24))])
        tokens = len((await anext(running))[1].tokens)
        rig.clients.close()
        assert not rig.clients.alive and rig.clients.num_open == 1
        with pytest.raises(ShuttingDownError, match="the server is shutting down"):
            await rig.complete([3], SamplingParams(max_tokens=8))
        return tokens + sum([len(update.tokens) async for _, update in running])

    assert rig.run(close_in_the_middle()) == 24 and rig.clients.num_open == 0


def test_a_deletion_that_fails_tells_who_asked_for_it(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(tenant: str) -> Any:
        raise OSError("the sink is closed")

    monkeypatch.setattr(rig.server, "delete", broken)
    with pytest.raises(EngineDeadError, match="the sink is closed"):
        rig.run(asyncio.wait_for(rig.clients.delete("a"), 10))
    assert not rig.clients.alive


def test_a_deletion_is_open_until_its_requests_have_ended_and_it_is_done(rig: Rig) -> None:
    """So a server that shuts down carries it out, as it completes the requests: here, round by round."""
    rig.clients.attach(rig.server)

    async def close_with_both() -> Any:
        prompt, sampling = torch.tensor([3]), SamplingParams(max_tokens=24)
        answer = asyncio.ensure_future(_all(rig.clients.generate([Job(prompt, sampling, tenant="a")])))
        await asyncio.sleep(0)
        deletion = asyncio.ensure_future(rig.clients.delete("a"))
        await asyncio.sleep(0)
        rig.clients.close()
        while rig.clients.num_open:
            assert not rig.deleted
            rig.clients.step()
        return len(await answer), await asyncio.wait_for(deletion, 10)

    updates, deleted = asyncio.run(close_with_both())
    assert updates > 1 and deleted.learner == "told" and rig.deleted == ["a"] and not rig.learned


async def _all(updates: AsyncIterator[tuple[int, Update]]) -> list[Update]:
    return [update async for _, update in updates]


def test_an_engine_that_closes_begins_no_more_of_its_workload() -> None:
    waiting = iter(Request(number, torch.tensor([3]), SamplingParams(max_tokens=4)) for number in range(9))
    workload: Any = waiting.__next__
    engine = AsyncEngine(max_waiting=1, workload=workload, first_id=9)
    first = engine()
    assert first is not None and first.id == 0
    engine.close()
    assert engine() is None and next(waiting).id == 1


@pytest.mark.parametrize("ends", [False, True], ids=["done", "refused"])
@pytest.mark.parametrize("leaves", [False, True], ids=["waits", "left"])
def test_a_deletion_is_done_or_refused_for_whoever_is_there_no_more(
    ends: bool, leaves: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The client left, or its event loop is closed: the thread that drives the rounds goes on without a word."""
    deleted: list[str] = []

    def delete(tenant: str) -> Deleted:
        deleted.append(tenant)
        return Deleted(prefixes=0, answers=0, trajectories=0, learner="told")

    engine, loop = AsyncEngine(max_waiting=1), asyncio.new_event_loop()
    server: Any = SimpleNamespace(env=SimpleNamespace(), step=lambda: False, delete=delete)
    engine.attach(server)
    asked = loop.create_task(engine.delete("a"))
    loop.run_until_complete(asyncio.sleep(0))
    if leaves:
        asked.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        assert asked.cancelled()
    loop.close()
    if ends:
        engine.end()
    engine.step()
    assert deleted == ([] if ends else ["a"]) and caplog.records == []


def test_waits_are_observed_and_requests_counted(rig: Rig) -> None:
    waits: list[str] = []

    def observe(wait: str, seconds: float) -> None:
        assert 0 <= seconds < 60
        waits.append(wait)

    async def two_and_one_that_leaves() -> dict[str, float]:
        sampling = SamplingParams(max_tokens=24)
        await asyncio.gather(*(rig.complete([3, 4], sampling) for _ in range(2)))
        leaving = rig.clients.generate([Job(torch.tensor([3]), SamplingParams(max_tokens=400))])
        await anext(leaving)
        running = rig.clients.counts()
        await leaving.aclose()
        await rig.complete([3], sampling, counted=False)
        unseen = rig.clients.generate([Job(torch.tensor([3]), SamplingParams(max_tokens=400), counted=False)])
        await anext(unseen)
        await unseen.aclose()
        return running

    rig.clients.observe = observe
    running = rig.run(two_and_one_that_leaves())
    counts = Counter(waits)
    assert counts["request_queue_time"] == counts["time_to_first_token"] == 3
    assert counts["e2e_request_latency"] == counts["request_time_per_output_token"] == 2
    assert counts["inter_token_latency"] >= 2 * 24 / 5
    assert running["num_requests_running"] == 1 and running["requests_cancelled_total"] == 0
    assert rig.clients.counts()["requests_cancelled_total"] == 1
    assert running.keys() <= METRICS.keys()
