"""A target and a drafter, wired: every request is decoded once, by rounds, with drafts and without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList

from aurora_rl.envs import Completion, Request, SamplingParams, TransformersEngine
from aurora_rl.policies import Drafter, Eagle3Drafter, TargetParts, TreeShape
from aurora_rl.policies import decoder as decoders
from aurora_rl.policies.decoder import SpeculativeDecoder
from aurora_rl.testing import tiny_target

REQUESTS = [Request(i, torch.arange(3 + i), SamplingParams(1.0, seed=i, max_tokens=10)) for i in range(5)]


def decode(
    drafter: Drafter | None, requests: object = REQUESTS, **settings: object
) -> tuple[dict[int, Completion], int]:
    done: list[Completion] = []
    settings = {"shape": TreeShape(3), "max_length": 32, "num_slots": 2, **settings}
    decoder = SpeculativeDecoder(tiny_target(), drafter, requests, on_completion=done.append, **settings)
    delivered = sum(int(step["next", "reward"].sum()) for step in decoder.rounds())
    assert delivered == sum(len(completion.tokens) for completion in done)
    return {completion.request.id: completion for completion in done}, len(done)


@pytest.fixture(scope="module")
def drafter() -> Drafter:
    return Eagle3Drafter.from_target(TargetParts.of(tiny_target()), draft_vocab=torch.arange(32))


@pytest.mark.parametrize("source", [iter, lambda requests: lambda left=list(requests): left.pop(0) if left else None])
@pytest.mark.parametrize("shape", [TreeShape(3, 2), TreeShape(2, 2, mode="sampled"), TreeShape(0)])
def test_requests_are_served_as_without_a_drafter(
    drafter: Drafter, source: Callable[[list[Request]], object], shape: TreeShape
) -> None:
    plain, count = decode(None)
    drafted, again = decode(drafter, source(REQUESTS), shape=shape)
    assert count == again == 5 and drafter.training and next(drafter.parameters()).dtype == torch.float32
    for id, completion in plain.items():
        assert torch.equal(completion.tokens, drafted[id].tokens) and completion.acceptance_length is None
        assert (drafted[id].acceptance_length is None) == (shape.depth == 0)
        assert plain[id].trajectory["rounds", "offset"].diff().sum() == 0


def test_a_rule_that_needs_the_drafter_s_law_has_it(drafter: Drafter) -> None:
    settings = {"rule": "rejection", "shape": TreeShape(3, mode="sampled")}
    first, _ = decode(drafter, **settings)
    again, _ = decode(drafter, **settings, seed=0)
    other_seeds = [decode(drafter, **settings, seed=seed)[0] for seed in range(1, 4)]
    nodes = {id: completion.trajectory["nodes", "tokens"].tolist() for id, completion in first.items()}
    assert nodes == {id: completion.trajectory["nodes", "tokens"].tolist() for id, completion in again.items()}
    assert any(each[0].trajectory["nodes", "tokens"].tolist() != nodes[0] for each in other_seeds)


class OwnEngine(TransformersEngine):
    """An engine of a third party."""


def test_the_engine_may_be_another(drafter: Drafter) -> None:
    settings = {"shape": TreeShape(3), "max_length": 32}
    assert type(SpeculativeDecoder(tiny_target(), drafter, [], **settings).engine) is TransformersEngine
    assert type(SpeculativeDecoder(tiny_target(), drafter, [], engine=OwnEngine, **settings).engine) is OwnEngine


def test_it_times_what_it_will_serve_and_leaves_out_nodes_that_do_not_pay(
    drafter: Drafter, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def measured(*of: Any, processors: object, repeats: int) -> dict[int, dict[TreeShape, float]]:
        _, _, asked["request"], asked["shapes"] = of
        asked["processors"] = processors
        return {2: {shape: 1.0 + 0.1 * shape.num_nodes for shape in asked["shapes"]}}

    def processors(request: Request) -> LogitsProcessorList:
        return LogitsProcessorList()

    monkeypatch.setattr(decoders, "measure_rounds", measured)
    settings = {"shape": TreeShape(3, 2, lookup=2), "max_length": 32, "num_slots": 2, "processors": processors}
    decoder = SpeculativeDecoder(tiny_target(), drafter, REQUESTS, **settings)
    decoder.adapt(REQUESTS[0])
    assert asked["request"] is REQUESTS[0] and asked["processors"] is processors
    depths: Sequence[tuple[int, bool]] = [(shape.depth, shape.lookup_only) for shape in asked["shapes"]]
    assert [depth for depth, alone in depths if not alone] == [0, 3] and sum(alone for _, alone in depths) == 2
    assert decoder.policy is not None
    assert any(decoder.policy.min_path_probability > 0 for _ in decoder.rounds())
