"""Faults of a drafter that lies in memory as SGLang's does: each is named, and mended where copies can mend it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aurora_rl.envs.remote.session import Session
from aurora_rl.envs.sglang.watchdog import DrafterWatchdog
from aurora_rl.policies.faults import EVERY, difference


class Drafter(nn.Module):
    """Three tensors of its own, the target's embedding, and a rotary table."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.embedding = embedding
        self.fc, self.qkv, self.head = (nn.Linear(6, 6, bias=False) for _ in range(3))
        self.register_buffer("cos_sin_cache", torch.randn(32, 4))


class Pool:
    """The drafter's cache of one layer."""

    start_layer, layer_num = 0, 1

    def __init__(self) -> None:
        self.keys, self.values = torch.randn(64, 2, 4), torch.randn(64, 2, 4)

    def get_kv_buffer(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.keys, self.values


class Learner:
    """What the learner hears."""

    def __init__(self) -> None:
        self.rejected: list[tuple[int, str]] = []
        self.acknowledged: list[tuple[int, str]] = []

    def reject(self, version: int, reason: str) -> None:
        self.rejected.append((version, reason))

    def acknowledge(self, version: int, digest: str, milliseconds: float) -> None:
        self.acknowledged.append((version, digest))


class World:
    def __init__(self) -> None:
        torch.manual_seed(0)
        embedding = nn.Embedding(8, 6)
        self.target = nn.Module()
        self.target.embedding = embedding
        self.target.model = SimpleNamespace(layers_to_capture=[2, 4])
        self.drafter, self.pool, self.versions = Drafter(embedding), Pool(), list[str]()
        runner = SimpleNamespace(model=self.drafter, token_to_kv_pool=self.pool, device="cpu")
        self.worker = SimpleNamespace(draft_runner=runner, hot_token_id=torch.arange(4))
        self.running = SimpleNamespace(reqs=list[Any]())
        self.learner = Learner()
        self.session = Session.__new__(Session)  # of its own parts alone, no sockets
        self.session.version, self.session.receiver, self.session.flush_due = 0, self.learner, False
        self.session.faults, self.session._digests = [], {}
        self.watchdog = DrafterWatchdog(
            SimpleNamespace(
                draft_worker=SimpleNamespace(draft_worker=self.worker),
                tp_worker=SimpleNamespace(model_runner=SimpleNamespace(model=self.target)),
                running_batch=self.running,
                req_to_token_pool=SimpleNamespace(req_to_token=torch.arange(64).view(2, 32)),
                weight_updater=SimpleNamespace(record_weight_version_after_update=self.versions.append),
            ),
            self.session,
        )
        self.rounds = 0

    def begin(self, rid: str, slot: int, prompt: int = 9) -> Any:
        request = SimpleNamespace(
            rid=rid, origin_input_ids=list(range(prompt)), output_ids=[1], retraction_count=0,
            kv=SimpleNamespace(req_pool_idx=slot), finished=lambda: False,
        )  # fmt: skip
        self.running.reqs.append(request)
        return request

    def run(self, rounds: int, logits: tuple[Tensor, ...] = (torch.zeros(1, 4),)) -> list[tuple[str, str]]:
        """The faults of so many rounds, by cause and action."""
        known = len(self.session.faults)
        for _ in range(rounds):
            self.rounds += 1
            self.watchdog.forget()
            if self.watchdog.due(self.rounds):
                self.watchdog.check(self.rounds, logits)
        return [(fault["cause"], fault["action"]) for fault in self.session.faults[known:]]

    def load(self, version: int) -> dict[str, Tensor]:
        """Other weights, as a swap puts them in place; what they are."""
        with torch.no_grad():
            for layer in (self.drafter.fc, self.drafter.qkv, self.drafter.head):
                layer.weight.normal_()
        self.session.version = version
        self.session.acknowledge(version, self.weights(), 1.0)
        self.watchdog.loaded()
        return self.weights()

    def weights(self) -> dict[str, Tensor]:
        return {name: getattr(self.drafter, name).weight.detach().clone() for name in ("fc", "qkv", "head")}


@pytest.fixture
def world() -> World:
    return World()


def same(weights: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return all(torch.equal(weights[name], others[name]) for name in weights)


@pytest.mark.parametrize("tensor", ["fc", "qkv", "head"])
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda weight: weight.zero_(), "is all zero"),  # after a memory resume
        (lambda weight: weight.copy_(weight.T.clone()), "is transposed"),  # a transposed sync
        (lambda weight: weight.fill_(float("nan")), "has 36 values that are infinite or not a number"),
        (lambda weight: weight[0, 0].add_(1), "differs from what was published in 1 of 36 values"),
    ],
)
def test_a_damaged_tensor_is_named_within_36_rounds_and_loaded_again(
    world: World, tensor: str, spoil: Any, words: str
) -> None:
    before = world.weights()
    with torch.no_grad():
        spoil(getattr(world.drafter, tensor).weight)
    assert world.run(3 * EVERY) == [("corrupted", "its weights were loaded again")]
    assert world.session.faults[0]["detail"] == f"tensor '{tensor}.weight' {words}"
    assert same(world.weights(), before) and world.session.flush_due
    assert world.run(10 * EVERY) == []


def test_what_is_damaged_again_is_rolled_back_and_the_learner_hears_of_it(world: World) -> None:
    first = world.load(1)
    world.load(2)
    for action in ("its weights were loaded again", "rolled back to version 1"):
        with torch.no_grad():
            world.drafter.fc.weight.zero_()
        assert world.run(3 * EVERY) == [("corrupted", action)]
    assert same(world.weights(), first) and world.session.version == 1 and world.versions == ["1"]
    ((rejected, reason),) = world.learner.rejected
    assert rejected == 2 and reason == "corrupted: tensor 'fc.weight' is all zero"
    assert world.learner.acknowledged[-1] == world.learner.acknowledged[0]  # version 1, with its checksum
    # Nothing is before what the server was started on, or before what is left: it is loaded again, and told twice.
    for told in (["its weights were loaded again"], [world.session.faults[-1]["action"]], []):
        with torch.no_grad():
            world.drafter.fc.weight.zero_()
        found = [action for _, action in world.run(3 * EVERY)]
        assert len(found) == len(told) and same(world.weights(), first)


def test_the_weights_of_the_version_before_are_stale(world: World) -> None:
    old = world.load(1)
    new = world.load(2)
    with torch.no_grad():
        for name, weight in old.items():
            getattr(world.drafter, name).weight.copy_(weight)
    assert world.run(EVERY) == [("stale", "its weights were loaded again")]
    assert world.session.faults[0]["detail"] == "all tensors are those of version 1, not 2"
    assert same(world.weights(), new)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda world: world.target.model.layers_to_capture.reverse(), "the list of layers whose states it reads"),
        (lambda world: world.worker.hot_token_id.add_(1), "the draft vocabulary"),
        (lambda world: world.drafter.cos_sin_cache.mul_(2), "tensor 'cos_sin_cache'"),
        (lambda world: world.drafter.embedding.weight.data.zero_(), "tensor 'embedding.weight'"),
    ],
)
def test_what_no_weights_change_is_named_once(world: World, change: Any, what: str) -> None:
    change(world)
    assert world.run(EVERY) == [("mismatched", "SGLang drafts on with it: restart it on its drafter")]
    assert world.session.faults[0]["detail"] == f"{what} changed while it served"
    assert world.run(5 * EVERY) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.bfloat16(),  # to the dtype of the queries
        lambda table: torch.cat([table, torch.randn(32, 4)]),  # for later positions
        lambda table: torch.cat([table, torch.randn(32, 4)]).bfloat16(),
    ],
)
def test_a_rotary_table_that_sglang_casts_or_grows_is_what_it_was(world: World, change: Any) -> None:
    world.drafter.cos_sin_cache = change(world.drafter.cos_sin_cache)
    assert world.run(3 * EVERY) == []
    world.drafter.cos_sin_cache[-1] += 1  # also of the rows that were appended
    assert [cause for cause, _ in world.run(EVERY)] == ["mismatched"]
    assert world.session.faults[0]["detail"] == "tensor 'cos_sin_cache' changed while it served"
    assert world.run(3 * EVERY) == []


def test_what_is_not_a_number_from_the_start_stays_so(world: World) -> None:
    """Memory that nothing reads may hold anything."""
    with torch.no_grad():
        world.drafter.cos_sin_cache[3:] = world.drafter.head.weight[2:] = float("nan")
    world.watchdog = DrafterWatchdog(world.watchdog._scheduler, world.session)
    assert world.run(6 * EVERY) == []


def test_a_longer_draft_vocabulary_or_list_of_layers_is_another(world: World) -> None:
    world.worker.hot_token_id = torch.arange(6)
    assert world.run(EVERY) == [("mismatched", "SGLang drafts on with it: restart it on its drafter")]
    world.target.model.layers_to_capture.append(6)
    assert world.run(EVERY) == [("mismatched", "SGLang drafts on with it: restart it on its drafter")]


def test_a_cache_that_changes_under_a_running_request_is_found_and_emptied_later(world: World) -> None:
    world.begin("a", slot=1)
    assert world.run(2 * EVERY) == []
    world.pool.values[32 + 5] = 0.0  # position 5 of slot 1
    assert world.run(EVERY) == [("cache", "its prefix cache is emptied once no request runs")]
    assert world.session.faults[0]["detail"].endswith("from position 5 on") and world.session.flush_due
    world.running.reqs.clear()
    world.run(1)
    assert not world.watchdog._rows  # they were made of a user's text


def test_places_of_other_requests_and_retracted_ones_are_no_fault(world: World) -> None:
    request = world.begin("a", slot=1)
    world.run(EVERY)
    request.retraction_count = 1  # its prompt was read again
    world.pool.keys.normal_()
    assert world.run(EVERY) == []
    world.running.reqs.clear()
    world.begin("b", slot=1)
    world.pool.keys.normal_()
    assert world.run(EVERY) == []
    world.pool.keys[32 + 8 :] = 0.0  # after its prompt
    assert world.run(EVERY) == []


def test_logits_of_which_none_is_finite_are_dead(world: World) -> None:
    logits = torch.zeros(2, 4)
    assert world.run(EVERY, (logits.index_fill(1, torch.tensor([0]), float("-inf")),)) == []
    logits[1] = float("nan")
    assert [cause for cause, _ in world.run(EVERY, (torch.zeros(2, 4), logits))] == ["dead"]


def test_no_alarm_in_10_000_rounds_with_swaps_and_other_traffic(world: World) -> None:
    for part in range(4):
        world.running.reqs.clear()
        for number in range(2):
            world.begin(f"{part}.{number}", slot=number, prompt=4 + 5 * part)
        world.pool.keys.normal_()
        assert world.run(2_500) == []
        world.load(part + 1)


def test_a_check_that_fails_is_left_out_and_the_others_go_on(world: World) -> None:
    world.begin("a", slot=1)
    del world.pool.keys
    assert world.run(EVERY) == []
    with torch.no_grad():
        world.drafter.fc.weight.zero_()
    assert world.run(3 * EVERY) == [("corrupted", "its weights were loaded again")]


def test_an_id_that_comes_again_is_another_request(world: World) -> None:
    """Clients choose ids."""
    world.begin("a", slot=1)
    world.run(EVERY)
    world.running.reqs.clear()
    world.begin("a", slot=1)
    world.pool.keys.normal_()
    assert world.run(EVERY) == []


def test_a_tensor_of_another_shape_is_named() -> None:
    assert difference(torch.zeros(4, 6), torch.zeros(6, 6)) == "has the shape [4, 6], not [6, 6]"


@pytest.mark.parametrize("when", ["at the start", "after a swap"])
def test_without_memory_for_copies_the_drafter_is_not_watched(
    world: World, when: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*arguments: object) -> Tensor:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "clone", full)
        if when == "at the start":
            world.watchdog = DrafterWatchdog(world.watchdog._scheduler, world.session)
        else:
            world.watchdog.loaded()
    with torch.no_grad():
        world.drafter.fc.weight.zero_()
    assert world.run(6 * EVERY) == [] and not world.watchdog._copies
    assert caplog.text.count("the drafter is not watched") == 1
