"""A tenant's data is deleted from every store of a server, and nobody else's."""

from __future__ import annotations

from pathlib import Path

import torch
from oracle_server import DEPTH, Serving, eagle
from tensordict import TensorDictBase

from aurora_rl.envs import Request, SamplingParams
from aurora_rl.policies import TreeShape
from aurora_rl.policies.lookup import EarlierAnswers
from aurora_rl.prefix_cache import PrefixCache


class Sink:
    """What waits for a learner, by tenant."""

    connected = False

    def __init__(self) -> None:
        self.waiting: list[str | None] = []

    def extend(self, trajectory: TensorDictBase, tenant: str | None = None, seconds: float | None = None) -> None:
        self.waiting.append(tenant)

    def delete(self, tenant: str) -> int:
        before, self.waiting = len(self.waiting), [each for each in self.waiting if each != tenant]
        return before - len(self.waiting)

    def close(self, timeout: float) -> None:
        """Nothing is open."""


def asked(first: int, *tenants: str | None) -> list[Request]:
    """The same request of each."""
    prompt, sampling = torch.tensor([3, 7, 1, 4, 2, 6]), SamplingParams(max_tokens=8)
    return [Request(first + index, prompt, sampling, tenant=tenant) for index, tenant in enumerate(tenants)]


def test_nothing_of_a_deleted_tenant_is_found_again_and_all_of_others_is(tmp_path: Path) -> None:
    sink = Sink()
    serving = Serving(tmp_path, asked(0, "a", "b", None), eagle(), slots=1, sink=sink, second_drafter=eagle())
    policy, server = serving.policy, serving.server
    serving.engine.prefix_cache, policy.prefix_cache = PrefixCache(1000), PrefixCache(1000)
    policy.earlier, policy.shape = EarlierAnswers(1000), TreeShape(DEPTH, lookup=2)
    serving.run()
    assert sink.waiting == ["a", "b", None]
    deleted = server.delete("a")
    assert (deleted.prefixes, deleted.answers, deleted.trajectories, deleted.learner) == (1, 1, 1, "absent")
    sink.connected = True
    again = server.delete("a")
    assert (again.prefixes, again.answers, again.trajectories, again.learner) == (0, 0, 0, "told")
    assert sink.waiting == ["b", None] and len(policy.earlier.tokens("b@")) == len(policy.earlier.tokens()) == 9

    hits = policy.prefix_cache.hits
    serving.queue = asked(10, "a")
    serving.run()
    assert (serving.completions[-1].cached_tokens, policy.prefix_cache.hits) == (0, hits)
    serving.queue = asked(20, "b", "a")
    serving.run()
    # All but the last token of the prompt, which is no prefix, and of "a" what it left since.
    assert [each.cached_tokens for each in serving.completions[-2:]] == [5, 5] and policy.prefix_cache.hits > hits
    serving.check_texts()

    # The drafter's rows of the last request are kept only when the next one comes; not after a deletion.
    assert server.delete("a").prefixes == 1
    serving.queue = asked(30, None)
    serving.run()
    hits = policy.prefix_cache.hits
    serving.queue = asked(40, "a")
    serving.run()
    assert policy.prefix_cache.hits == hits
