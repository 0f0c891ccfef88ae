"""DrafterPolicy keeps the drafter's cache as long as the store, whatever made it fall back."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.envs import SerialEnv
from transformers import PreTrainedModel

from aurora_rl.envs import Request, SamplingParams, SpecDecodeEnv, TransformersEngine
from aurora_rl.policies import DrafterPolicy, Eagle3Drafter, Proposal, TargetParts, TreeShape
from aurora_rl.policies.policy import not_finite
from aurora_rl.policies.row_budget import RowBudget
from aurora_rl.testing import tiny_target

SHAPE = TreeShape(3, 2, 6)


class Serving:
    """A tiny target on three slots; each call of ``round`` serves one round."""

    def __init__(self, prompts: list[int], new_tokens: int = 40, dtype: torch.dtype = torch.float64) -> None:
        target = tiny_target(dtype=dtype)
        torch.manual_seed(0)
        self.drafter = Eagle3Drafter.from_target(TargetParts.of(target), draft_vocab=torch.arange(20)).to(dtype)
        self.engine = TransformersEngine(
            target, num_slots=3, max_length=120, feature_layers=self.drafter.feature_layers
        )
        self.queue = [
            Request(i, torch.arange(n) % 32, SamplingParams(max_tokens=new_tokens)) for i, n in enumerate(prompts)
        ]
        self.env = SpecDecodeEnv(self.engine, lambda: self.queue.pop(0) if self.queue else None, num_nodes=6)
        self.policy = DrafterPolicy(copy.deepcopy(self.drafter), self.engine.store, num_nodes=6, shape=SHAPE)
        self.td = self.env.reset()

    def round(self) -> TensorDict:
        done, self.td = self.env.step_and_maybe_reset(self.policy(self.td))
        return done

    def fresh(self) -> TensorDict:
        """What a policy with an empty cache and the same weights drafts now."""
        drafter = copy.deepcopy(self.drafter)
        drafter.install(self.policy.drafter.published())
        policy = DrafterPolicy(drafter, self.engine.store, num_nodes=6, shape=self.policy.shape)
        return policy.draft(torch.ones(3, 1, dtype=torch.bool))  # new to it, so that it reads them whole

    def assert_up_to_date(self) -> None:
        got, expected = self.policy.draft(self.td["is_init"]), self.fresh()
        for key in ("tokens", "parents", "mask"):
            assert torch.equal(got[key], expected[key]), key
        torch.testing.assert_close(got["log_probs"], expected["log_probs"], atol=1e-5, rtol=0)
        assert got["mask"].any()

    def moved(self) -> dict[str, Tensor]:
        return {
            name: t + 0.1 * torch.randn_like(t) if t.is_floating_point() else t
            for name, t in self.policy.drafter.published().items()
        }


def test_the_cache_is_up_to_date_after_every_speculative_round() -> None:
    serving = Serving([4, 1, 9], new_tokens=12)
    for _ in range(4):
        serving.round()
        serving.assert_up_to_date()


@pytest.mark.parametrize("plain", [1, 3, 35])
def test_the_cache_catches_up_after_plain_windows(plain: int) -> None:
    serving = Serving([4, 1, 9], new_tokens=60)
    serving.round()
    serving.policy.speculate = False
    for _ in range(plain):
        done = serving.round()
        assert not done["draft", "mask"].any()
        assert (done["next", "reward"] == 1).all()
    serving.policy.speculate = True
    serving.assert_up_to_date()


def test_long_prompts_are_read_together_with_short_ones() -> None:
    serving = Serving([70, 3, 50])
    serving.assert_up_to_date()
    assert serving.policy.drafter.cached.tolist() == [69, 2, 49]


def test_a_new_request_starts_from_nothing() -> None:
    serving = Serving([4, 2, 9, 5, 6], new_tokens=3)
    while serving.queue:
        serving.round()
    serving.assert_up_to_date()
    occupied = serving.engine.store.occupied
    assert torch.equal(serving.policy.drafter.cached[occupied], serving.engine.store.lengths[occupied] - 1)


def test_nothing_is_drafted_where_nothing_can_be() -> None:
    serving = Serving([1, 5])  # one token: no feature before it; and an idle slot
    done = serving.round()
    assert done["draft", "mask"].any(1).tolist() == [False, True, False]
    assert (done["draft", "parents"][~done["draft", "mask"]] == -1).all()
    assert serving.round()["draft", "mask"].any(1).tolist() == [True, True, False]


# In bfloat16 linear layers are packed on some CPUs, and a swap has to pack the new weights.
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_swap_rebuilds_the_caches(dtype: torch.dtype) -> None:
    serving = Serving([4, 2, 9], dtype=dtype)
    serving.round()
    before = serving.policy.draft(torch.zeros(3, 1, dtype=torch.bool))["log_probs"].clone()
    serving.policy.install(serving.moved(), version=3)
    assert serving.policy.drafter.cached.tolist() == [0, 0, 0]
    serving.assert_up_to_date()
    assert not torch.allclose(serving.policy.draft(torch.zeros(3, 1, dtype=torch.bool))["log_probs"], before)
    done = serving.round()
    assert done["policy_version"].tolist() == done["cache_version"].tolist() == [3, 3, 3]


def test_versions_agree_in_plain_rounds_after_a_swap_that_rebuilds() -> None:
    serving = Serving([4, 2, 9])
    serving.round()
    serving.policy.install(serving.moved(), version=3)
    serving.policy.speculate = False
    done = serving.round()
    assert done["policy_version"].tolist() == done["cache_version"].tolist() == [3, 3, 3]


def test_without_a_rebuild_the_cache_keeps_its_oldest_version() -> None:
    serving = Serving([4, 2, 9, 5], new_tokens=4)
    serving.policy.rebuild_on_install = False
    serving.round()
    held = serving.policy.drafter.cached.clone()
    serving.policy.install(serving.moved(), version=1)
    assert torch.equal(serving.policy.drafter.cached, held)
    serving.policy.install(serving.moved(), version=2)
    versions: dict[int, set[tuple[int, int]]] = {}
    while serving.env.num_active:
        running = [serving.env._active[s].request.id if s in serving.env._active else None for s in range(3)]
        done = serving.round()
        for slot, request in enumerate(running):
            if request is not None:
                pair = int(done["policy_version"][slot]), int(done["cache_version"][slot])
                versions.setdefault(request, set()).add(pair)
    # Requests 0 to 2 have rows of version 0 to their end; request 3 entered a slot after the swaps.
    assert versions == {0: {(2, 0)}, 1: {(2, 0)}, 2: {(2, 0)}, 3: {(2, 2)}}


def test_refused_weights_change_nothing() -> None:
    serving = Serving([4, 2, 9])
    serving.round()
    held, weights = serving.policy.drafter.cached.clone(), serving.moved()
    del weights["norm.weight"]
    with pytest.raises(ValueError, match="'norm.weight' .* is missing"):
        serving.policy.install(weights, version=7)
    assert serving.policy.version == 0
    assert torch.equal(serving.policy.drafter.cached, held)
    serving.assert_up_to_date()


def test_the_shape_may_change_within_num_nodes() -> None:
    serving = Serving([4, 2, 9])
    serving.policy.shape = TreeShape(2)
    assert serving.round()["draft", "mask"].sum(1).tolist() == [2, 2, 2]
    serving.policy.shape = TreeShape(0)
    assert not serving.round()["draft", "mask"].any()
    with pytest.raises(ValueError, match="a tree of 7 nodes does not fit the policy's num_nodes=6"):
        serving.policy.shape = TreeShape(7)
    assert serving.policy.shape == TreeShape(0)


def test_nodes_that_do_not_earn_their_rows_are_left_out() -> None:
    serving = Serving([4, 7, 9])
    serving.round()
    init = serving.td["is_init"]
    whole = serving.policy.draft(init)
    stated = whole["log_probs"].exp().double().numpy()
    of = serving.policy.merger.chances().of
    joint = torch.tensor(np.stack([of(row, np.full(row.shape, np.nan)) for row in stated]))
    for node in range(1, 6):
        parent = whole["parents"][:, node]
        above = joint.gather(1, parent.clamp(min=0)[:, None])[:, 0]
        joint[:, node] *= torch.where(parent >= 0, above, 1.0)
    chances = joint[whole["mask"]].sort().values
    least = float(chances[8:10].mean())
    serving.policy.min_path_probability = least
    kept = serving.policy.draft(init)
    for slot in range(3):
        nodes = whole["mask"][slot] & (joint[slot] >= least)
        assert kept["tokens"][slot][kept["mask"][slot]].tolist() == whole["tokens"][slot][nodes].tolist()
        torch.testing.assert_close(kept["log_probs"][slot][kept["mask"][slot]], whole["log_probs"][slot][nodes])
    assert 0 < int(kept["mask"].sum()) < int(whole["mask"].sum())
    # Nodes that were drawn stay, or the law of the text would depend on what was drawn.
    serving.policy.shape = TreeShape(3, 2, 6, mode="sampled")
    serving.policy.min_path_probability = 1.0
    assert serving.policy.draft(init)["mask"].all()


@pytest.mark.parametrize("mode", ["sampled", "sampled_without_replacement"])
def test_sampled_drafts_carry_the_law_that_they_were_drawn_from(mode: str) -> None:
    serving = Serving([4, 2, 9])
    policy = DrafterPolicy(
        copy.deepcopy(serving.drafter), serving.engine.store, num_nodes=6, shape=TreeShape(3, 2, mode=mode),
        vocab_size=32, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    draft = policy.draft(torch.zeros(3, 1, dtype=torch.bool))
    assert draft["mask"].all() and draft["parents"].tolist() == [[-1, -1, 0, 1, 2, 3]] * 3
    torch.testing.assert_close(draft["q"].sum(-1), torch.ones(3, 6))
    assert not draft["q"][:, :, 20:].any()  # tokens that the drafter has no row for
    of_token = draft["q"].gather(-1, draft["tokens"][:, :, None])[:, :, 0]
    torch.testing.assert_close(of_token.log(), draft["log_probs"])
    again = policy.draft(torch.zeros(3, 1, dtype=torch.bool))
    assert not torch.equal(again["tokens"], draft["tokens"])  # it explores


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda q: None, r"q is None, not \(3, 6, 20\), in mode sampled"),
        (lambda q: q[:, :1], r"q is \(3, 1, 20\), not \(3, 6, 20\)"),
        (lambda q: q * 0.5, "q has a row that is no distribution"),
        (lambda q: q * torch.nan, "q has a row that is no distribution"),
    ],
)
def test_a_distribution_that_verification_cannot_use_is_the_drafters_fault(
    spoil: Callable[[Tensor], Tensor | None], message: str
) -> None:
    serving, faults = Serving([4, 2, 9]), []
    drafter = copy.deepcopy(serving.drafter)
    policy = DrafterPolicy(
        drafter, serving.engine.store, num_nodes=6, shape=TreeShape(3, 2, mode="sampled"), vocab_size=32
    )
    propose = drafter.propose

    def spoiled(*args: Any) -> Proposal:
        proposal = propose(*args)
        return proposal._replace(q=spoil(proposal.q))

    drafter.propose = spoiled
    with pytest.raises(ValueError, match=message):
        policy.draft(torch.zeros(3, 1, dtype=torch.bool))
    policy.on_fault = lambda slot, fault: faults.append(slot)
    assert not policy.draft(torch.zeros(3, 1, dtype=torch.bool))["mask"].any() and faults == [0, 1, 2]


# ---- long texts -----------------------------------------------------------------------------------------------------


def with_rows(serving: Serving, rows: int, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Let the drafter read so many rows of long texts a round, whatever time they take; returns those of each round."""
    monkeypatch.setattr(RowBudget, "begin", lambda budget, waits: (read.append([]), rows)[1])
    monkeypatch.setattr(RowBudget, "spent", lambda budget, rows, seconds: None)
    serving.policy._budget.rows, drafter = rows, serving.policy.drafter
    read: list[list[int]] = []
    extend = drafter.extend

    def noted(slots: Tensor, tokens: Tensor, features: Tensor, num_new: Tensor) -> None:
        read[-1].append(int(num_new.max()))
        extend(slots, tokens, features, num_new)

    drafter.extend = noted
    return read


def test_a_long_prompt_is_read_in_parts_and_gets_no_draft_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    serving = Serving([4, 2], new_tokens=90)
    read = with_rows(serving, 40, monkeypatch)
    serving.queue.append(Request(2, torch.arange(90) % 32, SamplingParams(max_tokens=20)))
    while int(serving.engine.store.lengths[2]) < 90:
        serving.round()
    slot, read[:] = 2, []
    drafted = []
    for _ in range(4):
        done = serving.round()
        drafted.append(bool(done["draft", "mask"][slot].any()))
        assert bool(serving.policy.drafted[slot]) == drafted[-1]
        assert bool(done["draft", "mask"][:2].any(1).all())  # nobody else goes without
    assert [max(parts) for parts in read[:3]] == [40, 40, 11]  # 89 pairs of the prompt, and one of each plain round
    assert drafted == [False, False, True, True]
    serving.assert_up_to_date()


def test_caches_are_rebuilt_in_parts_after_a_swap_the_shortest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    serving = Serving([70, 3, 50])
    serving.round()
    read = with_rows(serving, 40, monkeypatch)
    serving.policy.install(serving.moved(), version=3)
    drafted = [serving.round()["draft", "mask"].any(1).tolist() for _ in range(5)]
    assert all(sum(count for count in parts if count > 32) <= 40 for parts in read), read
    assert [first for first, *_ in drafted] == [False] * 2 + [True] * 3
    assert [second for _, second, _ in drafted] == [True] * 5
    assert [third for *_, third in drafted] == [False] + [True] * 4
    serving.assert_up_to_date()  # what was read in parts drafts as what was read whole


def test_lookup_drafts_for_a_slot_whose_text_is_not_read_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    serving = Serving([70, 3, 50])
    serving.round()
    serving.policy.shape = TreeShape(3, 1, 6, lookup=3)
    with_rows(serving, 40, monkeypatch)
    serving.policy.install(serving.moved(), version=3)
    serving.round()
    assert serving.policy.drafted.tolist() == [False, True, False]
    assert serving.policy.looked_up.tolist() == [True, False, True]


def test_a_drafter_that_fails_is_found_among_slots_that_are_not_read_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    serving, faults = Serving([70, 3, 50]), []
    serving.policy.on_fault = lambda slot, fault: faults.append(slot)
    serving.round()
    with_rows(serving, 40, monkeypatch)
    serving.policy.install(serving.moved(), version=3)
    propose = serving.policy.drafter.propose

    def fails(slots: Tensor, *args: Any) -> Proposal:
        if 1 in slots.tolist():
            raise RuntimeError("no ideas")
        return propose(slots, *args)

    serving.policy.drafter.propose = fails
    serving.round()
    assert faults == [1] and serving.policy.drafted.tolist() == [True, False, True]


# ---- environments ---------------------------------------------------------------------------------------------------


def test_a_policy_of_another_environment_is_named_at_the_first_round() -> None:
    serving, second = Serving([5, 7, 3]), Serving([5, 4, 3])
    message = (
        r"slots stand at positions \[4, 6, 2\], those of the policy's store at \[4, 3, 2\]: a policy drafts for the one"
    )
    with pytest.raises(ValueError, match=message):
        second.policy(serving.td)
    second.env.close()
    serving.round()


def test_several_environments_have_a_policy_each() -> None:
    """Under SerialEnv, as docs/extending.md has it: each text is what its environment says alone."""
    target = tiny_target()
    drafter = Eagle3Drafter.from_target(TargetParts.of(target), draft_vocab=torch.arange(20)).double()
    engines = [
        TransformersEngine(tiny_target(), num_slots=2, max_length=40, feature_layers=drafter.feature_layers)
        for _ in range(2)
    ]
    policies = [
        DrafterPolicy(copy.deepcopy(drafter), engine.store, num_nodes=6, shape=SHAPE, version=i)
        for i, engine in enumerate(engines)
    ]
    done: list[dict[int, list[int]]] = [{}, {}]

    def environment(number: int) -> SpecDecodeEnv:
        queue = [Request(i, torch.arange(3 + i + number) % 32, SamplingParams(max_tokens=9)) for i in range(3)]
        return SpecDecodeEnv(
            engines[number],
            lambda: queue.pop(0) if queue else None,
            num_nodes=6,
            on_completion=lambda c: done[number].update({c.request.id: c.tokens.tolist()}),
        )

    env = SerialEnv(2, [functools.partial(environment, number) for number in range(2)])
    rollout = env.rollout(
        20,
        lambda td: torch.stack([policy(part) for policy, part in zip(policies, td.unbind(0), strict=True)]),
        break_when_any_done=False,
    )
    assert rollout["policy_version"][:, 0].tolist() == [[0] * 20, [1] * 20]
    assert bool(rollout["draft", "mask"].any(-1).any(-1).all())  # every slot was drafted for
    for number, texts in enumerate(done):
        assert texts == {i: said_by(target, torch.arange(3 + i + number) % 32, 9) for i in range(3)}
    with pytest.raises(
        ValueError, match=r"is_init is \[2, 2, 1\] and not \[2, 1\], a row .* docs/extending.md, several"
    ):
        policies[0](env.reset())
    env.close()


def said_by(target: PreTrainedModel, prompt: Tensor, count: int) -> list[int]:
    text = prompt[None]
    said = target.generate(
        text, attention_mask=torch.ones_like(text), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return said[0, len(prompt) :].tolist()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float8_e4m3fn])
def test_the_first_tensor_that_is_not_finite_is_named(dtype: torch.dtype) -> None:
    fine = {"d2t": torch.arange(3), "a": torch.ones(2, 2).to(dtype)}
    assert not_finite(fine) is None
    broken = torch.tensor([1.0, float("nan")]).to(dtype)
    assert (fault := not_finite({**fine, "b": broken, "c": broken})) is not None and "tensor 'b' has 1 value " in fault


def test_weights_that_are_not_finite_are_not_staged() -> None:
    serving = Serving([5])
    weights = serving.moved()
    name = next(name for name, tensor in weights.items() if tensor.is_floating_point())
    weights[name] = weights[name] / 0
    with pytest.raises(ValueError, match=f"tensor '{name}' has .* infinite or not a number"):
        serving.policy.stage(weights, version=7)
    assert serving.policy.version == 0


def test_weights_too_large_for_the_served_dtype_are_not_staged() -> None:
    serving = Serving([5], dtype=torch.float16)
    weights = {name: t.float() if t.is_floating_point() else t for name, t in serving.drafter.published().items()}
    name = next(name for name, tensor in weights.items() if tensor.is_floating_point())
    weights[name] = torch.full_like(weights[name], 1e6)
    with pytest.raises(ValueError, match=f"tensor '{name}' has .* infinite or not a number"):
        serving.policy.stage(weights, version=7)
