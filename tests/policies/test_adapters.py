"""Adapters in one pass with others are the drafters that their weights, merged, are alone; in serving and training."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from drafters import perturbed
from tensordict import TensorDict
from torch import Tensor

from aurora_rl.envs import Completion, Request, SamplingParams, SpecDecodeEnv, TransformersEngine
from aurora_rl.objectives import ImitationLoss
from aurora_rl.policies import (
    Drafter,
    DrafterPolicy,
    Eagle3Drafter,
    EagleDrafter,
    MedusaDrafter,
    Proposal,
    TargetParts,
    TreeShape,
    recurrent,
)
from aurora_rl.policies.adapters import (
    MAX_BYTES,
    AdaptedLinear,
    Adapters,
    adapted_layers,
    add_adapters,
    check_size,
    merge_adapter,
)
from aurora_rl.prefix_cache import PrefixCache
from aurora_rl.serving.watchdog import EVERY, Fault, Watchdog
from aurora_rl.testing import tiny_target, tiny_trajectory
from aurora_rl.training.gate import replay
from aurora_rl.training.optimizers import drafter_optimizers
from aurora_rl.training.steps import train_step
from aurora_rl.trajectories import adapter_code, pack, unpack, validate
from aurora_rl.tree_index import TreeIndex

KINDS = [Eagle3Drafter, EagleDrafter]
NAMES = ("acme", "globex")
TENANTS = ["globex", None, "acme", "initech", "globex"]  # of five requests; nobody has an adapter of initech
SHAPE = TreeShape(3, 2, 6)


@functools.cache
def started(kind: type[Drafter], *, learned: bool = True) -> Drafter:
    """A drafter with adapters; those that have learned differ from it and from each other."""
    torch.manual_seed(0)
    parts = TargetParts.of(tiny_target())
    drafter = perturbed(kind.from_target(parts, draft_vocab=torch.arange(0, 32, 2)).double())
    add_adapters(drafter, NAMES, rank=3)
    if learned:
        for layer in adapted_layers(drafter).values():
            torch.nn.init.normal_(layer.lora_B, std=0.5)
    return drafter


def adapted(kind: type[Drafter], **options: Any) -> Drafter:
    return copy.deepcopy(started(kind, **options))


@functools.cache
def recorded(kind: type[Drafter]) -> tuple[TensorDict, ...]:
    plain = merge_adapter(started(kind))
    sizes = [(4, 6), (2, 3), (9, 5), (5, 8), (3, 4)]
    found = []
    for number, (tenant, (prompt, new)) in enumerate(zip(TENANTS, sizes, strict=True)):
        trajectory = tiny_trajectory(plain, prompt_length=prompt, max_new_tokens=new, shape=SHAPE, request=number)
        if tenant is not None:
            trajectory["sequence", "adapter"] = torch.tensor(adapter_code(tenant))
        found.append(trajectory)
    return tuple(found)


def alone(drafter: Drafter, tenant: str | None) -> Drafter:
    """The drafter that a tenant's requests are drafted by, as one without adapters."""
    return merge_adapter(drafter, tenant if tenant in NAMES else None)


def filled(drafter: Drafter, trajectories: list[TensorDict] | tuple[TensorDict, ...], places: Tensor) -> Tensor:
    """Extend all slots by all of their trajectories' pairs in two calls, each slot with its adapter."""
    lengths = torch.tensor([len(t["sequence", "tokens"]) - 1 for t in trajectories])
    slots, width = torch.arange(len(lengths)), int(lengths.max())
    drafter.allocate(len(lengths), width + 1)
    drafter.slot_adapters = places
    tokens = torch.zeros(len(lengths), width + 1, dtype=torch.int64)
    features = torch.zeros(len(lengths), width, trajectories[0]["sequence", "features"].shape[1]).double()
    for slot, trajectory in enumerate(trajectories):
        tokens[slot, : lengths[slot] + 1] = trajectory["sequence", "tokens"]
        features[slot, : lengths[slot]] = trajectory["sequence", "features"]
    drafter.extend(slots, tokens, features, torch.ones_like(lengths))
    drafter.extend(slots, tokens[:, 1:], features[:, 1:], lengths - 1)
    return slots


def same(got: Proposal, row: int, expected: Proposal) -> None:
    assert torch.equal(got.tokens[row], expected.tokens[0])
    torch.testing.assert_close(got.log_probs[row], expected.log_probs[0], rtol=0, atol=1e-6)  # they are float32


@pytest.mark.parametrize("kind", KINDS)
def test_slots_with_different_adapters_draft_as_each_does_alone(kind: type[Drafter]) -> None:
    drafter, trajectories = adapted(kind), recorded(kind)
    assert drafter.adapters is not None
    slots = filled(drafter, trajectories, drafter.adapters.places(drafter.adapters.codes(TENANTS)))
    together, states = drafter.propose(slots, SHAPE), drafter._state.clone()  # type: ignore[attr-defined]
    for slot, (trajectory, tenant) in enumerate(zip(trajectories, TENANTS, strict=True)):
        plain = alone(drafter, tenant)
        filled(plain, [trajectory], torch.tensor([-1]))
        same(together, slot, plain.propose(torch.tensor([0]), SHAPE))
        torch.testing.assert_close(states[slot], plain._state[0], rtol=0, atol=1e-11)  # type: ignore[attr-defined]
    some = torch.tensor([2, 0])  # another order, without those that have none
    for row, slot in enumerate(some.tolist()):
        got = drafter.propose(some, SHAPE)
        assert torch.equal(got.tokens[row], together.tokens[slot])
    assert len({tuple(map(tuple, alone(drafter, t).fc.weight.tolist())) for t in (None, *NAMES)}) == 3  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", KINDS)
def test_slots_without_an_adapter_are_those_of_the_shared_drafter_to_the_bit(kind: type[Drafter]) -> None:
    drafter, trajectories = adapted(kind), recorded(kind)
    plain, places = merge_adapter(drafter), torch.tensor([1, -1, 0, -1, 1])
    mixed = drafter.propose(filled(drafter, trajectories, places), SHAPE)
    shared = plain.propose(filled(plain, trajectories, torch.full((5,), -1)), SHAPE)
    for slot in (1, 3):
        assert torch.equal(mixed.log_probs[slot], shared.log_probs[slot])
        assert torch.equal(drafter._cache[0][slot], plain._cache[0][slot])  # type: ignore[attr-defined]
    assert not torch.equal(mixed.log_probs[0], shared.log_probs[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_by_rows_learns_what_the_whole_pass_does(kind: type[Drafter], monkeypatch: pytest.MonkeyPatch) -> None:
    drafter, batch = adapted(kind), pack(recorded(kind))
    loss, found = ImitationLoss(drafter, TargetParts.of(tiny_target()).head, steps=3), []
    for most in (2**25, 1):  # attention scores that may be kept: then the layer is called again in the backward pass
        monkeypatch.setitem(recurrent._SCORES, "cpu", most)
        drafter.zero_grad()
        loss(batch)["loss_imitation"].backward()
        found.append({name: each.grad.clone() for name, each in drafter.named_parameters() if each.grad is not None})
    whole, by_rows = found
    assert whole.keys() == by_rows.keys() and sum("lora_B" in name for name in whole) > 4
    for name, expected in whole.items():
        torch.testing.assert_close(by_rows[name], expected, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_requests_of_a_batch_learn_as_each_does_alone(kind: type[Drafter]) -> None:
    drafter, trajectories = adapted(kind), recorded(kind)
    batch = pack(trajectories)
    trees = TreeIndex.of(batch)
    wanted = torch.ones(len(trees.depth), dtype=torch.bool)
    contexts, unroll, scores = (
        drafter.context_logits(batch, trees, wanted),
        drafter.unroll(batch, 3),
        drafter.score(batch),
    )
    of_context, first, nodes = trees.request, 0, batch["nodes", "request_offset"].tolist()
    for number, (trajectory, tenant) in enumerate(zip(trajectories, TENANTS, strict=True)):
        plain, single = alone(drafter, tenant), pack([trajectory])
        index = TreeIndex.of(single)
        expected = plain.context_logits(single, index, torch.ones(len(index.depth), dtype=torch.bool))
        torch.testing.assert_close(contexts[of_context == number], expected + 0, rtol=0, atol=1e-11)
        count = int(batch["sequence", "offset"].diff()[number] - batch["sequence", "prompt_length"][number])
        for got, expected in zip(unroll.logits, plain.unroll(single, 3).logits, strict=True):
            torch.testing.assert_close(got[first : first + count], expected + 0, rtol=0, atol=1e-11)
        torch.testing.assert_close(scores[nodes[number] : nodes[number + 1]], plain.score(single), rtol=0, atol=1e-11)
        first += count


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_is_the_shared_drafter(kind: type[Drafter]) -> None:
    drafter, trajectories = adapted(kind, learned=False), recorded(kind)
    assert torch.equal(drafter.score(pack(trajectories)), merge_adapter(drafter).score(pack(trajectories)))
    for name in NAMES:
        weights = merge_adapter(drafter, name).published()
        assert all(torch.equal(tensor, weights[key]) for key, tensor in merge_adapter(drafter).published().items())


def loss_of(drafter: Drafter, batch: TensorDict) -> Tensor:
    objective = ImitationLoss(drafter, TargetParts.of(tiny_target()).head)
    return objective(batch)["loss_imitation"]


def test_gradients_are_those_of_finite_differences_and_stay_in_their_adapter() -> None:
    drafter, trajectories = adapted(Eagle3Drafter), recorded(Eagle3Drafter)
    layers = adapted_layers(drafter)
    batch = pack([trajectories[0], trajectories[1], trajectories[4]])  # two of globex, one of nobody
    loss_of(drafter, batch).backward()
    generator = torch.Generator().manual_seed(0)
    for path, layer in layers.items():
        for matrix in (layer.lora_A, layer.lora_B):
            assert matrix.grad is not None
            assert torch.count_nonzero(matrix.grad[0]) == 0, f"{path}: globex teaches acme"
            assert torch.count_nonzero(matrix.grad[1]), f"{path}: globex does not learn"
            direction = torch.randn(matrix.shape, generator=generator, dtype=torch.float64)
            with torch.no_grad():
                differences = []
                for sign in (1, -1):
                    matrix += sign * 1e-6 * direction
                    differences.append(float(loss_of(drafter, batch)))
                    matrix -= sign * 1e-6 * direction
            expected = (differences[0] - differences[1]) / 2e-6
            assert float((matrix.grad * direction).sum()) == pytest.approx(expected, rel=1e-5, abs=1e-8), path
        assert layer.base.weight.grad is not None and torch.count_nonzero(layer.base.weight.grad)


def test_an_adapter_without_traffic_stays_the_shared_drafter_as_another_learns() -> None:
    drafter, trajectories = adapted(Eagle3Drafter, learned=False), recorded(Eagle3Drafter)
    loss = ImitationLoss(drafter, TargetParts.of(tiny_target()).head)
    optimizers = drafter_optimizers(drafter)
    for _ in range(2):
        train_step(loss, optimizers, pack(trajectories[:2]), autocast=False)  # of globex and of nobody
    for layer in adapted_layers(drafter).values():
        assert torch.count_nonzero(layer.lora_B[0]) == 0 and torch.count_nonzero(layer.lora_B[1])


# ---- trajectories and replay ----------------------------------------------------------------------------------------


def test_a_batch_says_whose_each_request_is_and_old_ones_say_nothing() -> None:
    trajectories = recorded(Eagle3Drafter)
    codes = [0 if tenant is None else adapter_code(tenant) for tenant in TENANTS]
    batch = pack(trajectories)
    assert batch["sequence", "adapter"].tolist() == codes
    assert pack(unpack(batch))["sequence", "adapter"].tolist() == codes
    assert ("sequence", "adapter") not in pack(trajectories[1:2]).keys(True)
    for trajectory in trajectories:
        validate(trajectory, vocab_size=32, feature_size=32, hidden_size=16)
    wrong = trajectories[0].clone()
    wrong["sequence", "adapter"] = torch.tensor(0.5)
    with pytest.raises(ValueError, match="sequence.adapter has dtype"):
        validate(wrong, vocab_size=32, feature_size=32, hidden_size=16)


def test_the_gate_replays_each_request_with_its_adapter() -> None:
    drafter, trajectories = adapted(Eagle3Drafter), list(recorded(Eagle3Drafter))
    together = replay(drafter, trajectories, SHAPE)
    for number, tenant in enumerate(TENANTS):
        assert (
            replay(alone(drafter, tenant), trajectories[number : number + 1], SHAPE).rounds == together.rounds[number]
        )


# ---- serving --------------------------------------------------------------------------------------------------------


class Server:
    """Requests of tenants, one after the other or at once, drafted for by one policy."""

    def __init__(self, drafter: Drafter, slots: int = 1, reuse: int = 0) -> None:
        self.engine = TransformersEngine(
            tiny_target(), num_slots=slots, max_length=64, feature_layers=drafter.feature_layers
        )
        self.policy = DrafterPolicy(copy.deepcopy(drafter), self.engine.store, num_nodes=6, shape=SHAPE)
        self.policy.prefix_cache = PrefixCache(reuse) if reuse else None

    def serve(self, tenants: list[str | None], prompt: Tensor, tokens: int = 8) -> list[TensorDict]:
        """Trajectories of the prompt, asked once for each tenant."""
        waiting = [
            Request(number, prompt, SamplingParams(max_tokens=tokens), tenant=tenant)
            for number, tenant in enumerate(tenants)
        ]
        done: list[Completion] = []
        env = SpecDecodeEnv(
            self.engine, lambda: waiting.pop(0) if waiting else None, num_nodes=6, on_completion=done.append
        )
        td = env.reset()
        while env.num_active:
            _, td = env.step_and_maybe_reset(self.policy(td))
        trajectories = {c.request.id: c.trajectory for c in done}
        return [trajectories[number] for number in range(len(tenants))]  # type: ignore[misc]


PROMPT = torch.tensor([3, 4, 5, 6, 7, 8, 9])


@pytest.mark.parametrize("slots", [1, 3])
def test_served_texts_do_not_change_and_drafts_are_the_tenants(slots: int) -> None:
    drafter = adapted(Eagle3Drafter)
    trajectories = Server(drafter, slots).serve(TENANTS, PROMPT)
    (expected,) = Server(merge_adapter(drafter)).serve([None], PROMPT)
    for tenant, trajectory in zip(TENANTS, trajectories, strict=True):
        assert torch.equal(trajectory["sequence", "tokens"], expected["sequence", "tokens"])
        code = trajectory.get(("sequence", "adapter"), None)
        assert code == (adapter_code(tenant) if tenant in NAMES else None)
        (own,) = Server(alone(drafter, tenant)).serve([None], PROMPT)
        assert torch.equal(trajectory["nodes", "tokens"], own["nodes", "tokens"])
        scored = drafter.score(pack([trajectory]))  # training recomputes what serving recorded
        torch.testing.assert_close(scored.float(), trajectory["nodes", "log_probs"], rtol=0, atol=1e-5)


def test_rows_are_reused_within_an_adapter_and_not_across() -> None:
    """Rows that another adapter made are other rows: taken over, they would change the drafts."""
    drafter = adapted(Eagle3Drafter)
    order: list[str | None] = ["acme", "globex", None, "acme", "globex", "initech", None]
    server = Server(drafter, reuse=1000)
    kept, fresh = server.serve(order, PROMPT), Server(drafter).serve(order, PROMPT)
    assert server.policy.prefix_cache is not None and server.policy.prefix_cache.hits >= 3 * (len(PROMPT) - 1)
    for again, expected in zip(kept, fresh, strict=True):
        assert torch.equal(again["nodes", "tokens"], expected["nodes", "tokens"])
        torch.testing.assert_close(again["nodes", "log_probs"], expected["nodes", "log_probs"], rtol=0, atol=1e-6)


def test_a_swap_in_mid_request_goes_on_with_each_slots_adapter() -> None:
    drafter = adapted(Eagle3Drafter)
    better = {name: tensor * 1.5 if "lora" in name else tensor for name, tensor in drafter.published().items()}
    server = Server(drafter, slots=3)
    turn = iter(range(100))
    draft = server.policy.forward

    def swapping(tensordict: Any) -> Any:
        if next(turn) == 2:
            server.policy.install(better, 1)
        return draft(tensordict)

    server.policy.forward = swapping  # type: ignore[method-assign]
    trajectories = server.serve(["acme", None, "globex"], PROMPT, tokens=12)
    drafter.install(better)
    for trajectory in trajectories:
        rounds = (trajectory["rounds", "policy_version"] == 1).repeat_interleave(trajectory["rounds", "offset"].diff())
        assert rounds.any() and not rounds.all()
        scored = drafter.score(pack([trajectory])).float()
        torch.testing.assert_close(scored[rounds], trajectory["nodes", "log_probs"][rounds], rtol=0, atol=1e-5)


def test_the_watchdog_replays_a_slot_with_its_adapter() -> None:
    server = Server(adapted(Eagle3Drafter), slots=2)
    watchdog, drafter, draft = Watchdog(server.policy, server.engine), server.policy.drafter, server.policy.forward
    weights = {name: tensor.clone() for name, tensor in drafter.published().items()}
    faults: dict[bool, list[Fault | None]] = {False: [], True: []}  # by whether adapters are exchanged

    def watched(tensordict: Any) -> Any:
        fresh = tensordict["is_init"].flatten()
        for exchanged in [] if fresh.any() else [False, True]:
            drafter.slot_adapters = drafter.slot_adapters.flip(0) if exchanged else drafter.slot_adapters
            faults[exchanged] += [watchdog.check(weights, {}, fresh) for _ in range(EVERY)]
        return draft(tensordict)

    server.policy.forward = watched  # type: ignore[method-assign]
    server.serve(["acme", "globex"], torch.arange(24), tokens=8)
    assert len(faults[False]) > EVERY and set(faults[False]) == {None}
    assert {fault.cause for fault in faults[True] if fault is not None} == {"cache"}


# ---- forms, names and sizes -----------------------------------------------------------------------------------------


def test_a_layer_of_whole_and_of_mixed_passes_is_one_function() -> None:
    layer = AdaptedLinear(torch.nn.Linear(4, 3), count=2, rank=2).double()
    assert torch.equal(layer(torch.ones(2, 1, 4).double()), layer.base(torch.ones(2, 1, 4).double()))
    assert torch.equal(layer.merged(None).bias, layer.base.bias)


def test_half_precision_serves_packed_layers_with_adapters() -> None:
    """The layers under adapters take the form that a CPU multiplies fastest, as those of other drafters do."""
    drafter = adapted(Eagle3Drafter)
    trajectories = Server(drafter.serving_copy(torch.bfloat16)).serve(["acme", None], PROMPT)
    assert torch.equal(trajectories[0]["sequence", "tokens"], trajectories[1]["sequence", "tokens"])


def test_what_an_adapter_begins_with_follows_from_its_name() -> None:
    first, second = (
        Eagle3Drafter.from_target(TargetParts.of(tiny_target()), draft_vocab=torch.arange(8)) for _ in "ab"
    )
    add_adapters(first, ["acme", "globex"], rank=2)
    add_adapters(second, ["globex"], rank=2)
    assert torch.equal(adapted_layers(first)["fc"].lora_A[1], adapted_layers(second)["fc"].lora_A[0])
    assert not torch.equal(adapted_layers(first)["fc"].lora_A[0], adapted_layers(first)["fc"].lora_A[1])
    assert "lm_head" not in adapted_layers(first)


def test_what_is_done_to_a_merged_drafter_leaves_the_one_with_adapters_as_it_is() -> None:
    drafter = adapted(Eagle3Drafter)
    before, plain = {name: value.clone() for name, value in drafter.published().items()}, merge_adapter(drafter, "acme")
    plain.float().install(
        {name: torch.zeros_like(tensor) for name, tensor in plain.published().items()}
        | {"d2t": torch.zeros(16, dtype=torch.int64)}
    )
    assert plain.draft_vocab.tolist() == list(range(16)) and not torch.count_nonzero(plain.fc.weight)
    assert all(torch.equal(tensor, before[name]) for name, tensor in drafter.published().items())
    assert drafter.draft_vocab.tolist() == list(range(0, 32, 2))


def test_a_merged_layer_has_a_bias_of_its_own() -> None:
    layer = AdaptedLinear(torch.nn.Linear(4, 6), count=2, rank=2)
    plain = layer.merged(1)
    assert torch.equal(plain.bias, layer.base.bias)
    plain.to(torch.bfloat16).requires_grad_(False)
    assert layer.base.bias.dtype == torch.float32 and layer.base.bias.requires_grad


@pytest.mark.parametrize(
    ("names", "rank", "message"),
    [
        (("acme", "acme"), 2, "names of adapters must differ, got acme, acme"),
        (("a/b",), 2, "the tenant is 'a/b'"),
        (("..",), 2, "cannot be called '..'"),
        (("acme",), 0, "rank of an adapter must be at least 1, got 0"),
    ],
)
def test_names_and_ranks_are_checked(names: tuple[str, ...], rank: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Adapters(names, rank)


def test_a_drafter_that_takes_none_says_so() -> None:
    medusa = MedusaDrafter.from_target(TargetParts.of(tiny_target()), draft_vocab=torch.arange(16))
    with pytest.raises(ValueError, match="MedusaDrafter takes no adapters"):
        add_adapters(medusa, ["acme"], 2)
    with pytest.raises(ValueError, match="has no adapter 'acme'; it has none"):
        merge_adapter(medusa, "acme")
    assert merge_adapter(medusa) is medusa


def test_the_limit_is_that_of_the_tensors() -> None:
    drafter = adapted(Eagle3Drafter)
    of_rank_three = sum(
        (layer.lora_A[0].numel() + layer.lora_B[0].numel()) * 4 for layer in adapted_layers(drafter).values()
    )
    plain, most = merge_adapter(drafter), MAX_BYTES // (of_rank_three // 3)
    check_size(plain, most, torch.float32)
    with pytest.raises(ValueError, match=rf"rank {most + 1} has 20.0 MB in float32.*take a rank of {most} or less"):
        check_size(plain, most + 1, torch.float32)
    check_size(plain, 2 * most, torch.bfloat16)
