"""Whatever is drafted, by whatever weights and whenever they are swapped, the text is that of plain decoding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from spec_decode_worlds import (
    LAYERS,
    MANY,
    NODES,
    VOCAB,
    Policy,
    Truth,
    World,
    check,
    knowing,
    plain,
    random_drafter,
    reference,
    requests,
)
from tensordict import TensorDictBase
from torch import Tensor

from aurora_rl.envs import Completion, SamplingParams, TransformersEngine, transformers_engine
from aurora_rl.envs.exactness import UnsupportedModelError
from aurora_rl.models.kv_cache import SlotCache
from aurora_rl.policies import DrafterPolicy, TreeShape
from aurora_rl.trajectories import RULE_CODES, accepted_per_round, pack, validate

ARCHITECTURES = ("llama", "qwen3")


def check_hidden(completion: Completion, architecture: str = "llama") -> None:
    """Hidden states of the sequence and of every node, rejected ones too, against a pass over that very path."""
    t, model = completion.trajectory, reference(architecture)
    assert t is not None
    tokens, prompt = t["sequence", "tokens"], int(t["sequence", "prompt_length"])
    sequence = model(tokens[None], output_hidden_states=True).hidden_states
    torch.testing.assert_close(t["sequence", "hidden"], sequence[-1][0, prompt - 1 : -1], rtol=0, atol=1e-6)
    features = torch.cat([sequence[layer][0] for layer in LAYERS], dim=-1)
    torch.testing.assert_close(t["sequence", "features"], features[:-1], rtol=0, atol=1e-6)
    offset = t["rounds", "offset"].tolist()
    for r, anchor in enumerate(t["rounds", "anchor"].tolist()):
        nodes = {key: t["nodes", key][offset[r] : offset[r + 1]] for key in ("tokens", "parents", "hidden")}
        for i in range(offset[r + 1] - offset[r]):
            path, node = [], i
            while node >= 0:
                path.insert(0, int(nodes["tokens"][node]))
                node = int(nodes["parents"][node])
            text = torch.cat([tokens[: anchor + 1], torch.tensor(path)])
            state = model(text[None], output_hidden_states=True).hidden_states[-1][0, -1]
            torch.testing.assert_close(nodes["hidden"][i], state, rtol=0, atol=1e-6)


def accepted_counts(steps: list[TensorDictBase]) -> set[int]:
    return {int(n) for step in steps for n in step["next", "verifier", "accepted"].sum(1)}


# ---- losslessness -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("rule", ["greedy", "sample_and_match"])
def test_random_actions_never_change_the_text(architecture: str, rule: str) -> None:
    wanted = requests(*MANY)
    truths = [Truth.of(r, architecture) for r in wanted]
    world = World(wanted, architecture=architecture, rule=rule)
    steps = world.run(world.env.rand_action)
    check(world, steps, truths)
    assert {0, 1} <= accepted_counts(steps)  # not vacuous: drafts were rejected and accepted


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("chain", [True, False], ids=["chain", "tree"])
def test_long_accepted_paths(architecture: str, chain: bool) -> None:
    wanted = requests(*MANY)
    truths = [Truth.of(r, architecture) for r in wanted]
    world = World(wanted, architecture=architecture)
    steps = world.run(knowing(truths, chain=chain))
    check(world, steps, truths)
    assert {0, 1, 2, 3} <= accepted_counts(steps)
    for completion in world.completions.values():
        check_hidden(completion, architecture)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("shape", [TreeShape(3), TreeShape(3, 2, NODES)], ids=["chain", "tree"])
def test_drafter_policy(architecture: str, shape: TreeShape) -> None:
    wanted = requests(*MANY)
    truths = [Truth.of(r, architecture) for r in wanted]
    world = World(wanted, architecture=architecture)
    policy = DrafterPolicy(random_drafter(), world.engine.store, num_nodes=NODES, shape=shape)
    rounds = iter(range(10**6))

    def with_plain_windows(td: TensorDictBase) -> TensorDictBase:
        policy.speculate = next(rounds) % 7 < 4  # the cache has to catch up afterwards
        return policy(td)

    steps = world.run(with_plain_windows)
    check(world, steps, truths)
    assert 0 in accepted_counts(steps) and max(accepted_counts(steps)) == 3
    for completion in world.completions.values():
        t = completion.trajectory
        validate(t, vocab_size=VOCAB, feature_size=16 * len(LAYERS), hidden_size=16)
        served = [
            int(step["next", "verifier", "accepted"][slot].sum())
            for step in steps
            for slot in range(3)
            if int(step["next", "request"][slot]) == completion.request.id
        ]
        assert accepted_per_round(t)[0].tolist() == served


def test_broken_weights_never_change_the_text() -> None:
    wanted = requests(*MANY)
    world = World(wanted)
    drafter = random_drafter()
    policy = DrafterPolicy(drafter, world.engine.store, num_nodes=NODES, shape=TreeShape(3, 2, NODES))
    faults: list[str] = []
    policy.on_fault = lambda slot, fault: faults.append(fault)
    # As no swap would do it: the policy refuses weights that are not finite.
    policy.drafter.install({k: v if k == "d2t" else v * torch.nan for k, v in drafter.published().items()})
    check(world, world.run(policy), [Truth.of(r) for r in wanted])
    assert len(faults) == len(wanted) and all(
        "node 0 has the log-probability nan, not a number of at most 0" in f for f in faults
    )


def test_a_budget_that_fills_the_slot_and_the_widest_trees() -> None:
    # Trees are written after the context: at its end they must neither wrap nor run into the next slot.
    wanted = requests((5, 27), (30, 2), (2, 30))
    world = World(wanted, num_nodes=64, max_length=32)
    world.run(world.env.rand_action)
    assert {i: c.tokens.tolist() for i, c in world.completions.items()} == {r.id: Truth.of(r).tokens for r in wanted}


def test_a_tree_beyond_the_engines_room_is_refused() -> None:
    world = World(requests((3, 4)), slots=1, num_nodes=4)
    world.env.reset()
    chain = torch.arange(-1, 64)[None]
    with pytest.raises(ValueError, match="a tree of 65 nodes exceeds the engine's 64; lower num_nodes"):
        world.engine.verify(torch.tensor([0]), torch.zeros_like(chain), chain, torch.ones_like(chain).bool())


# ---- mutants: the checks above must be able to fail -------------------------------------------------------------


def _features_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = TransformersEngine.commit

    def mutant(self: TransformersEngine, *args: Tensor) -> Tensor:
        self._features = self._features.roll(1, dims=1)
        return commit(self, *args)

    monkeypatch.setattr(TransformersEngine, "commit", mutant)


def _keys_stay_where_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SlotCache, "move", lambda self, slots, source, target: None)


def _positions_by_column(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        transformers_engine, "depths", lambda parents: torch.arange(1, parents.shape[1] + 1).expand_as(parents)
    )


def _causal_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    def causal(parents: Tensor, valid: Tensor) -> Tensor:
        columns = parents.shape[1] + 1
        return torch.ones(len(parents), columns, columns, dtype=torch.bool).tril()

    monkeypatch.setattr(transformers_engine, "ancestor_mask", causal)


@pytest.mark.parametrize(
    ("mutate", "chains_show_it"),
    [
        (_features_off_by_one, True),
        (_keys_stay_where_they_were, False),
        (_positions_by_column, False),
        (_causal_mask, False),
    ],
)
def test_mutants_are_caught(
    mutate: Callable[[pytest.MonkeyPatch], None], chains_show_it: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = requests(*MANY)
    truths = [Truth.of(r) for r in wanted]
    worlds = {chain: World(wanted) for chain in (True, False)}
    mutate(monkeypatch)  # not before: the engine's own check refuses to be built with most of them
    for chain, world in worlds.items():
        steps = world.run(knowing(truths, chain=chain))
        if chain and not chains_show_it:  # a chain's nodes already stand where they belong: trees are what proves this
            check(world, steps, truths)
        else:
            with pytest.raises(AssertionError):
                check(world, steps, truths)


@pytest.mark.parametrize("mutate", [_keys_stay_where_they_were, _positions_by_column, _causal_mask])
def test_an_engine_that_serves_trees_wrongly_refuses_to_be_built(
    mutate: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate(monkeypatch)
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM is not served exactly"):
        World(requests((3, 4)))


# ---- sampling ---------------------------------------------------------------------------------------------------

SAMPLING = (
    SamplingParams(),
    SamplingParams(1.0, seed=3),
    SamplingParams(0.7, top_k=3, seed=4),
    SamplingParams(1.5, top_p=0.8, seed=2**40 + 5),
    SamplingParams(),
    SamplingParams(2.0, top_k=6, top_p=0.9, seed=6),
    SamplingParams(1.0, min_p=0.4, seed=-8),
)


def test_sampled_text_is_that_of_plain_sampling() -> None:
    wanted = requests(*MANY)
    for request, sampling in zip(wanted, SAMPLING, strict=True):
        request.sampling_params = replace(sampling, max_tokens=request.sampling_params.max_tokens)
    truths = [Truth.of(r) for r in wanted]
    greedy = [Truth.of(r) for r in requests(*MANY)]
    assert any(a.tokens != b.tokens for a, b in zip(truths, greedy, strict=True))
    policies: list[Callable[[World], Policy]] = [
        lambda world: plain,
        lambda world: world.env.rand_action,
        lambda world: knowing(truths, chain=True),
        lambda world: knowing(truths),
        lambda world: DrafterPolicy(
            random_drafter(), world.engine.store, num_nodes=NODES, shape=TreeShape(3, 2, NODES)
        ),
    ]
    for make in policies:
        world = World(wanted)
        check(world, world.run(make(world)), truths)
    for id, completion in world.completions.items():
        recorded, sampling = completion.trajectory["sampling"], SAMPLING[id]
        assert RULE_CODES[recorded["rule"]] == ("sample_and_match" if sampling.temperature else "greedy")
        assert (int(recorded["top_k"]), int(recorded["seed"])) == (sampling.top_k, sampling.seed or 0)
        assert float(recorded["temperature"]) == pytest.approx(sampling.temperature)
        assert float(recorded.get("min_p", torch.tensor(0.0))) == pytest.approx(sampling.min_p)


# ---- swaps in mid-request ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rebuild", [True, False], ids=["rebuild", "keep"])
def test_hot_swaps(rebuild: bool) -> None:
    wanted = requests(*MANY)
    truths = [Truth.of(r) for r in wanted]
    # Other weights and another draft vocabulary at each version.
    weights = [
        random_drafter(seed, vocab).published()
        for seed, vocab in enumerate([(0, 1, 2, 3, 5, 7), (0, 2, 3, 4, 5, 6), (1, 2, 3, 4, 6, 7)])
    ]
    world = World(wanted)
    drafter = random_drafter()
    policy = DrafterPolicy(drafter, world.engine.store, num_nodes=NODES, shape=TreeShape(3, 2, NODES))
    policy.rebuild_on_install = rebuild
    policy.install(weights[0], 0)
    served: list[int] = []

    def swapping(td: TensorDictBase) -> TensorDictBase:
        if served and len(served) % 3 == 0:
            policy.install(weights[(policy.version + 1) % 3], policy.version + 1)
        served.append(policy.version)
        return policy(td)

    steps = world.run(swapping)
    check(world, steps, truths)

    rounds: dict[int, list[int]] = {r.id: [] for r in wanted}
    for version, step in zip(served, steps, strict=True):
        for request in step["next", "request"].tolist():
            if request >= 0:
                rounds[request].append(version)
    assert max(len(set(versions)) for versions in rounds.values()) >= 3
    for id, completion in world.completions.items():
        t = completion.trajectory
        assert t["rounds", "policy_version"].tolist() == rounds[id]
        # Kept caches begin with the weights of the first drafted round: a prompt of one token drafts one round later.
        started = rounds[id][0] if len(wanted[id].prompt) > 1 else rounds[id][min(1, len(rounds[id]) - 1)]
        drafted = t["rounds", "offset"].diff() > 0
        expected = torch.tensor(rounds[id]) if rebuild else torch.full((len(rounds[id]),), started)
        assert torch.equal(t["rounds", "cache_version"][drafted], expected[drafted])
        if rebuild:  # the recorded versions are those that drafted: their weights give the recorded probabilities
            for version in set(rounds[id]):
                drafter.install(weights[version % 3])
                these = torch.repeat_interleave(t["rounds", "policy_version"] == version, t["rounds", "offset"].diff())
                scores = drafter.score(pack([t]))
                torch.testing.assert_close(scores[these].float(), t["nodes", "log_probs"][these], rtol=0, atol=1e-5)
