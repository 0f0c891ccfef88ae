"""Two tenants of one server: with salts, each is served as if the other's requests had never come."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracle_server import DEPTH, VOCAB, Serving, eagle

from aurora_rl.envs import Completion, Request, SamplingParams
from aurora_rl.policies import TreeShape
from aurora_rl.policies.lookup import EarlierAnswers
from aurora_rl.prefix_cache import PrefixCache

TURNS = 4


class Tenants:
    """Tenants who hold the same conversation, each turn after the answer to the turn before it.

    Attributes:
        done: Completions by tenant and turn.
        hits: Tokens that were found in the engine's prefix cache, and rows that were found in the drafter's.
    """

    def __init__(
        self, folder: Path, *salts: str | None, slots: int = 1, names: tuple[str | None, ...] = (None,) * 4
    ) -> None:
        self._salts, self._names, self.done = salts, names, {}  # type: ignore[var-annotated]
        self._serving = serving = Serving(folder, [], eagle(), slots=slots, note=self._completed)
        serving.queue = [self._turn(tenant, 0, torch.tensor([3, 7, 1, 4])) for tenant in range(len(salts))]
        serving.engine.prefix_cache, serving.policy.prefix_cache = rows = PrefixCache(1000), PrefixCache(1000)
        serving.policy.earlier = EarlierAnswers(1000)
        serving.policy.shape = TreeShape(DEPTH, lookup=2)
        serving.run()
        serving.check_texts()  # of plain decoding
        self.hits = tuple(each.hits for each in rows)

    def _turn(self, tenant: int, turn: int, history: torch.Tensor) -> Request:
        words = torch.randint(VOCAB, (2,), generator=torch.Generator().manual_seed(turn))
        sampling = SamplingParams(max_tokens=10)
        salt, name = self._salts[tenant], self._names[tenant]
        return Request(10 * tenant + turn, torch.cat([history, words]), sampling, cache_salt=salt, tenant=name)

    def _completed(self, completion: Completion) -> str:
        tenant, turn = divmod(completion.request.id, 10)
        self.done[tenant, turn] = completion
        if turn + 1 < TURNS:
            history = torch.cat([completion.request.prompt, completion.tokens])
            self._serving.queue.append(self._turn(tenant, turn + 1, history))
        return ""


def same(first: Completion, second: Completion) -> bool:
    """Whether a turn was served alike: tokens read again, rounds, drafts and what was accepted of them."""
    served = first.trajectory, second.trajectory
    keys = [key for key in served[0].keys(include_nested=True, leaves_only=True) if key != "request"]
    pairs = [tuple(trajectory[key].double() for trajectory in served) for key in keys]
    return first.cached_tokens == second.cached_tokens and all(
        left.shape == right.shape and torch.allclose(left, right) for left, right in pairs
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Tenants:
    return Tenants(tmp_path_factory.mktemp("alone"), "a")


@pytest.mark.parametrize(
    ("slots", "salts", "names"),
    [(1, ("b", "a", None), (None, None, None)), (2, ("a", "a", None), ("x", None, "y"))],
)
def test_a_tenant_finds_nothing_of_tenants_with_another_salt_or_name_or_none(
    tmp_path: Path, alone: Tenants, slots: int, salts: tuple[str | None, ...], names: tuple[str | None, ...]
) -> None:
    tenants = Tenants(tmp_path, *salts, slots=slots, names=names)
    for (tenant, turn), completion in tenants.done.items():
        assert same(completion, alone.done[0, turn]), (tenant, turn)
    assert len(tenants.done) == 3 * TURNS and tenants.hits == tuple(3 * hits for hits in alone.hits)


def test_what_a_tenant_finds_is_its_own(alone: Tenants) -> None:
    turns = [alone.done[0, turn] for turn in range(TURNS)]
    # All of the turn before it but the last token, which no pass has read.
    assert [each.cached_tokens for each in turns] == [0, *(len(each.request.prompt) + 9 for each in turns[:-1])]
    assert min(alone.hits) > 50 and all(bool(each.trajectory["nodes", "log_probs"].isneginf().any()) for each in turns)


def test_tenants_of_one_salt_find_what_the_others_left(tmp_path: Path, alone: Tenants) -> None:
    """And so do those without a salt: the tests above could fail."""
    tenants = Tenants(tmp_path, "a", "a", None, None)
    for tenant in (1, 3):
        first = tenants.done[tenant, 0]
        assert first.cached_tokens == len(first.request.prompt) - 1
        drafts = [(tenants.done[tenant, turn], alone.done[0, turn]) for turn in range(TURNS)]
        nodes = [tuple(each.trajectory["nodes", "tokens"].tolist() for each in pair) for pair in drafts]
        assert sum(left != right for left, right in nodes) >= 2
    assert all(hits > 4 * own for hits, own in zip(tenants.hits, alone.hits, strict=True))
