"""Which requests go to the learner, and leave answers to look up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracle_server import Serving, eagle
from tensordict import TensorDictBase

from aurora_rl.envs import Request, SamplingParams
from aurora_rl.policies.lookup import EarlierAnswers
from aurora_rl.serving.server import Capture


def requests(count: int, **fields: object) -> list[Request]:
    return [Request(id, torch.tensor([3, id % 5]), SamplingParams(max_tokens=3), **fields) for id in range(count)]  # type: ignore[arg-type]


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
def test_the_share_is_the_rate(rate: float) -> None:
    share = sum(map(Capture(rate), requests(4000))) / 4000
    assert abs(share - rate) <= 4 * (rate * (1 - rate) / 4000) ** 0.5  # exact at 0 and 1


def test_the_choice_is_of_the_request_and_the_seed_alone() -> None:
    capture, known = Capture(0.5, seed=7), requests(200)
    forward, backward = list(map(capture, known)), list(map(Capture(0.5, seed=7), reversed(known)))[::-1]
    assert forward == backward != list(map(Capture(0.5, seed=8), known))


class Sink:
    """Takes trajectories in place of the wire."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    def extend(self, trajectory: TensorDictBase, tenant: str | None = None, seconds: float | None = None) -> None:
        self.taken.append(int(trajectory["request"]))
        assert seconds is not None and 0 < seconds < 60

    def close(self, timeout: float) -> None:
        """Nothing is open."""


def test_what_is_not_captured_reaches_neither_learner_nor_lookup(tmp_path: Path) -> None:
    waiting = requests(12)
    for request in waiting:
        request.tenant = ("a", "b", None)[request.id % 3]
    waiting[4].learn = False
    sink, capture = Sink(), Capture(0.6, ["a"], seed=1)
    serving = Serving(tmp_path, waiting, eagle(), slots=2, sink=sink, captures=capture)
    serving.policy.earlier = answers = EarlierAnswers(1000)
    serving.run()
    serving.check_texts()
    wanted = {request.id for request in waiting if capture(request)}
    assert len(serving.completions) == 12 and set(sink.taken) == wanted
    assert 0 < len(wanted) < 7 and not wanted & {0, 3, 4, 6, 9}
    kept = [text for salt in ("a@", "b@", None) for text in answers.tokens(salt).tolist()]
    assert not len(answers.tokens("a@")) and kept.count(-1) == len(wanted)
