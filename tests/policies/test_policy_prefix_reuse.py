"""Chats that resend their history: what is served and recorded is the same with and without kept rows."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from warped import warp_logits

from aurora_kernels.noise import gumbel
from aurora_rl.envs import Completion, Request, SamplingParams, SpecDecodeEnv, TransformersEngine
from aurora_rl.policies import DrafterPolicy, TargetParts, TreeShape, get_drafter
from aurora_rl.policies.drafter import Drafter
from aurora_rl.prefix_cache import PrefixCache
from aurora_rl.testing import tiny_target

TURNS, VOCAB = 5, 32
OPTIONS = {"dflash": {"block_size": 4}}


@functools.cache
def target():
    return tiny_target(dtype=torch.float32)


@functools.cache
def drafter(name: str, seed: int = 0) -> Drafter:
    """A drafter of wide random weights, which prefer other tokens with every pair that is wrong."""
    torch.manual_seed(seed)
    started = get_drafter(name).from_target(
        TargetParts.of(target()), draft_vocab=torch.arange(VOCAB), **OPTIONS.get(name, {})
    )
    for parameter in started.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.4)
    return started.eval().requires_grad_(False)


@functools.cache
def plain_text(prompt: tuple[int, ...], sampling: SamplingParams) -> list[int]:
    text = torch.tensor(prompt)[None]
    for position in range(len(prompt), len(prompt) + sampling.max_tokens):
        logits = target()(text).logits[0, -1]
        if sampling.temperature:
            noise = gumbel(torch.tensor(sampling.seed), torch.tensor(position), VOCAB)
            logits = warp_logits(logits, sampling.temperature, sampling.top_k, sampling.top_p) + noise
        text = torch.cat([text, logits.argmax()[None, None]], dim=1)
    return text[0, len(prompt) :].tolist()


@functools.cache
def engine(layers: tuple[int, ...], slots: int) -> TransformersEngine:
    return TransformersEngine(copy.deepcopy(target()), num_slots=slots, max_length=160, feature_layers=layers)


class Chats:
    """Conversations of five turns, each asked after the answer to the turn before it."""

    def __init__(
        self,
        name: str = "eagle3",
        *,
        reuse: bool,
        chats: int = 1,
        slots: int = 1,
        temperature: float = 0.0,
        max_tokens: int = 10_000,
    ) -> None:
        self.engine = engine(drafter(name).feature_layers, slots)
        self.engine.prefix_cache = None
        self.policy = DrafterPolicy(
            copy.deepcopy(drafter(name)), self.engine.store, num_nodes=6, shape=TreeShape(3, 2, 6, lookup=2)
        )
        self.kept = PrefixCache(max_tokens)
        if reuse:
            self.engine.prefix_cache, self.policy.prefix_cache = self.kept, PrefixCache(max_tokens)
        for slot in self.engine.store.occupied.tolist():
            self.engine.release(slot)  # of a test that failed
        self.temperature, self.done = temperature, {}  # type: ignore[var-annotated]
        self.queue = [self.turn(chat, 0, torch.tensor([chat + 3, 7])) for chat in range(chats)]
        self.env = SpecDecodeEnv(
            self.engine, lambda: self.queue.pop(0) if self.queue else None, num_nodes=6, stop_tokens=(24,),
            on_completion=self.completed,
        )  # fmt: skip
        self.env._prefill.chunk = 1000  # or with kept rows a prompt would be read in fewer rounds
        self.rounds = 0

    def turn(self, chat: int, number: int, history: Tensor) -> Request:
        """A user's words after the history; the second chat asks shorter questions and gets longer answers."""
        id = 10 * chat + number
        words = torch.randint(6, VOCAB, (9 - 4 * chat + number,), generator=torch.Generator().manual_seed(id))
        sampling = SamplingParams(self.temperature, seed=id, max_tokens=6 + 3 * chat)
        return Request(id, torch.cat([history, words]), sampling)

    def completed(self, completion: Completion) -> None:
        request, self.done[completion.request.id] = completion.request, completion
        chat, number = divmod(request.id, 10)
        if number + 1 < TURNS:
            self.queue.append(self.turn(chat, number + 1, torch.cat([request.prompt, completion.tokens])))

    def run(self, before_round: Callable[[Chats, TensorDictBase], TensorDictBase] | None = None) -> Chats:
        td = self.env.reset()
        while self.env.num_active:
            if before_round is not None:
                td = before_round(self, td)
            td = self.env.step_and_maybe_reset(self.policy(td))[1]
            self.rounds += 1
        return self

    @property
    def hits(self) -> int:
        return self.kept.hits


def check_equal(found: TensorDict, expected: TensorDict) -> None:
    """Two trajectories: the same rounds, tokens, trees and versions, and float32 that differs by rounding.

    Log-probabilities by more, as the drafter's wide weights make more of what its features differ by, most at the less
    likely of its candidates.
    """
    for key in found.keys(include_nested=True, leaves_only=True):
        first, second = found[key], expected[key]
        if first.is_floating_point():
            atol = 3e-4 if key == ("nodes", "log_probs") else 1e-5
            torch.testing.assert_close(first, second, rtol=1e-5, atol=atol)
        else:
            assert torch.equal(first, second), key


def check_runs(with_rows: Chats, without: Chats) -> None:
    assert sorted(with_rows.done) == sorted(without.done)
    for id, completion in with_rows.done.items():
        check_equal(completion.trajectory, without.done[id].trajectory)
        said = plain_text(tuple(completion.request.prompt.tolist()), completion.request.sampling_params)
        assert completion.tokens.tolist() == said[: len(completion.tokens)]


def expected_hits(chats: Chats) -> int:
    """Each turn finds the rows of the turn before it, of all but the last token, which no pass has read."""
    texts = {id: len(done.request.prompt) + len(done.tokens) for id, done in chats.done.items()}
    return sum(texts[id - 1] - 1 for id in texts if id % 10)


@pytest.mark.parametrize("name", ["eagle3", "eagle", "medusa", "dflash", "standalone", "ngram"])
def test_a_chat_of_five_turns(name: str) -> None:
    with_rows, without = (Chats(name, reuse=reuse).run() for reuse in (True, False))
    check_runs(with_rows, without)
    assert len(with_rows.done) == TURNS and with_rows.hits == expected_hits(with_rows) > 100
    assert with_rows.kept.queries == sum(len(d.request.prompt) - 1 for d in with_rows.done.values())
    rows = with_rows.policy.prefix_cache
    # The drafter has not read what the last round delivered; n-grams have no rows.
    assert with_rows.hits - 4 * TURNS <= rows.hits <= with_rows.hits if name != "ngram" else rows.hits == 0
    assert any(done.terminated for done in with_rows.done.values())


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_two_chats_on_two_slots(temperature: float) -> None:
    with_rows, without = (
        Chats(reuse=reuse, chats=2, slots=2, temperature=temperature).run() for reuse in (True, False)
    )
    check_runs(with_rows, without)
    assert len(with_rows.done) == 2 * TURNS and with_rows.hits >= expected_hits(with_rows)
    texts = {tuple(done.tokens.tolist()) for done in with_rows.done.values()}
    assert len(texts) > TURNS


def test_eviction() -> None:
    """Three chats on one slot take turns, and there is room for two."""
    with_rows, without = (Chats(reuse=reuse, chats=3, max_tokens=90).run() for reuse in (True, False))
    check_runs(with_rows, without)
    assert 0 < with_rows.hits < expected_hits(with_rows)
    assert with_rows.kept.num_tokens <= 90


def swapped(reuse: bool, rebuild: bool) -> Chats:
    """Two chats whose drafter gets other weights in the middle of their requests."""
    weights = drafter("eagle3", seed=1).published()

    def swapping(chats: Chats, td: TensorDictBase) -> TensorDictBase:
        chats.policy.rebuild_on_install = rebuild
        if len(chats.done) == 3 and chats.policy.version == 0:
            chats.policy.install(weights, 1)
        return td

    return Chats(reuse=reuse, chats=2, slots=2).run(swapping)


@pytest.mark.parametrize("rebuild", [True, False])
def test_rows_of_weights_that_were_replaced_are_not_used(rebuild: bool) -> None:
    with_rows, without = (swapped(reuse, rebuild) for reuse in (True, False))
    check_runs(with_rows, without)
    versions = {int(v) for done in with_rows.done.values() for v in done.trajectory["rounds", "cache_version"]}
    assert versions == {0, 1}
    assert 0 < with_rows.policy.prefix_cache.hits < with_rows.hits


def _reset(chats: Chats, td: TensorDictBase, slot: int) -> TensorDictBase:
    mask = torch.zeros(chats.engine.num_slots, 1, dtype=torch.bool)
    mask[slot] = True
    return chats.env.reset(td.set("_reset", mask))


def with_drops(reuse: bool) -> tuple[Chats, int]:
    """Requests that are dropped in mid-text, and before the drafter sees them in a slot with rows of another."""
    chats, dropped = Chats(reuse=reuse, slots=2, chats=2), [0]
    chats.queue[0].sampling_params = SamplingParams(max_tokens=40)
    chats.env.on_completion = lambda completion: chats.done.update({completion.request.id: completion})

    def dropping(chats: Chats, td: TensorDictBase) -> TensorDictBase:
        if chats.rounds == 3 and not dropped[0]:
            store, words, budget = chats.engine.store, torch.tensor([4, 8, 15, 16, 23]), SamplingParams(max_tokens=9)
            text = store.tokens[0, : int(store.lengths[0])].clone()
            dropped[0] = len(text)
            chats.queue = [
                Request(40, words, budget),
                Request(50, torch.cat([text, torch.tensor([8, 9])]), budget),
                Request(60, torch.cat([words, torch.tensor([30, 11])]), budget),
            ]
            td = _reset(chats, td, 0)
        elif chats.rounds == 4:  # its prompt has been read in the round before
            td = _reset(chats, td, 0)
        return td

    return chats.run(dropping), dropped[0]


def test_requests_that_are_dropped_leave_good_rows() -> None:
    (with_rows, dropped), (without, _) = (with_drops(reuse) for reuse in (True, False))
    check_runs(with_rows, without)
    assert sorted(with_rows.done) == [10, 50, 60] and dropped > 11
    assert with_rows.hits == dropped - 1 + 4


# ---- mutants: the checks above must be able to fail -----------------------------------------------------------------


def _the_last_token_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def release(self: TransformersEngine, slot: int) -> None:
        length = int(self.store.lengths[slot])
        self.prefix_cache.save(self.store.tokens[slot, :length], self._rows(slot))
        self.store.release(slot)

    monkeypatch.setattr(TransformersEngine, "release", release)


def _a_pair_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: DrafterPolicy, cache: PrefixCache, empty: Tensor) -> None:
        for slot in empty.tolist():
            text = self._store.tokens[slot, : int(self._store.lengths[slot]) - 1]
            self.drafter.cached[slot] = cache.load(text, self.drafter.cache_rows(slot))

    monkeypatch.setattr(DrafterPolicy, "_load_rows", load)


def _rows_of_old_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrefixCache, "clear", lambda self: None)


@pytest.mark.parametrize("mutate", [_the_last_token_too, _a_pair_too_many, _rows_of_old_weights])
def test_mutants_are_caught(mutate: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    without = swapped(False, True)
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        check_runs(swapped(True, True), without)
