"""A long answer is handed to the learner in parts while it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from oracle_server import Oracle, Serving, requests
from tensordict import TensorDict, TensorDictBase

from aurora_rl.envs import Request
from aurora_rl.serving.server import Capture
from aurora_rl.trajectories import pack, validate


class Sink:
    """Keeps what a learner would get."""

    def __init__(self) -> None:
        self.taken: list[tuple[TensorDictBase, str | None, float | None]] = []

    def extend(self, trajectory: TensorDictBase, tenant: str | None = None, seconds: float | None = None) -> None:
        self.taken.append((trajectory, tenant, seconds))

    def of(self, request: int) -> list[TensorDictBase]:
        return [trajectory for trajectory, *_ in self.taken if int(trajectory["request"]) == request]


def served(folder: Path, waiting: list[Request], part_tokens: int | None, **options: Any) -> tuple[Sink, Serving]:
    sink = Sink()
    serving = Serving(folder, waiting, Oracle(waiting), slots=2, sink=sink, part_tokens=part_tokens, **options)
    serving.run()
    serving.check_texts()
    return sink, serving


def test_parts_come_while_the_request_goes_on_and_make_it_up(tmp_path: Path) -> None:
    waiting = requests(3, budget=40)
    waiting[0].tenant = "a"
    (whole, _), (parts, serving) = served(tmp_path / "w", waiting, None), served(tmp_path / "p", waiting, 10)
    assert [len(whole.of(number)) for number in range(3)] == [1, 1, 1]
    for number in range(3):
        (expected,), got = whole.of(number), parts.of(number)
        # A round delivers four tokens: 12, 12 and 12 of 40, and 4 are left.
        prompt = len(waiting[number].prompt)
        assert [len(each["sequence", "tokens"]) - prompt for each in got] == [12, 24, 36, 40]
        assert [int(each["sequence", "prompt_length"]) - prompt for each in got] == [0, 12, 24, 36]
        for each in got:
            validate(each, vocab_size=8, feature_size=32, hidden_size=16)
        assert torch.equal(torch.cat([each["sequence", "hidden"] for each in got]), expected["sequence", "hidden"])
        for part, key in (("rounds", "anchor"), ("nodes", "tokens"), ("nodes", "parents"), ("nodes", "hidden")):
            assert torch.equal(torch.cat([each[part, key] for each in got]), expected[part, key])
        assert torch.equal(got[-1]["sequence", "features"], expected["sequence", "features"])
    pack([trajectory for trajectory, *_ in parts.taken])
    assert {tenant for trajectory, tenant, _ in parts.taken if int(trajectory["request"]) == 0} == {"a"}
    assert all(seconds is not None and seconds > 0 for *_, seconds in parts.taken)
    # The first parts come before the first request has ended.
    assert [int(trajectory["request"]) for trajectory, *_ in parts.taken[:2]] == [0, 1]
    assert not any(map(len, (serving.server._asked, serving.server._first, serving.server._began)))


def test_statistics_and_the_completion_are_of_the_whole_request(tmp_path: Path) -> None:
    waiting = requests(3, budget=40)
    (_, without), (_, with_parts) = served(tmp_path / "w", waiting, None), served(tmp_path / "p", waiting, 10)
    assert list(with_parts.server.stats.finished) == list(without.server.stats.finished) == [(40, 10)] * 3
    events = [
        [{key: v for key, v in event.items() if key not in ("time", "seconds")} for event in each.events("request")]
        for each in (without, with_parts)
    ]
    assert len(events[0]) == 3 and events[0] == events[1]
    for a, b in zip(without.completions, with_parts.completions, strict=True):
        assert isinstance(a.trajectory, TensorDict) and isinstance(b.trajectory, TensorDict)
        assert torch.equal(a.trajectory["rounds", "anchor"], b.trajectory["rounds", "anchor"])


def test_no_part_of_a_request_that_is_not_captured_is_handed_on(tmp_path: Path) -> None:
    waiting = requests(4, budget=40)
    waiting[0].learn, waiting[1].counted, waiting[2].tenant = False, False, "a"
    sink, _ = served(tmp_path, waiting, 10, captures=Capture(opt_out=["a"]))
    assert [len(sink.of(number)) for number in range(4)] == [0, 0, 0, 4]


@pytest.mark.parametrize("part_tokens", [None, 10])
def test_a_cancelled_request_has_only_the_parts_that_were_written(tmp_path: Path, part_tokens: int | None) -> None:
    waiting, sink = requests(1, budget=40), Sink()
    serving = Serving(tmp_path, waiting, Oracle(waiting), sink=sink, part_tokens=part_tokens)
    for _ in range(5):
        serving.server.step()
    serving.server.cancel(0)
    serving.queue = [Request(1, waiting[0].prompt, waiting[0].sampling_params)]  # the slot's record begins anew
    serving.run()
    assert len(sink.of(0)) == (0 if part_tokens is None else 1)
    assert len(sink.of(1)) == (1 if part_tokens is None else 4)
    assert not any(map(len, (serving.server._asked, serving.server._first, serving.server._began)))
