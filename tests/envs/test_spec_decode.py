"""The environment: whatever is drafted, swapped or batched, the text is the target's own."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.collectors import Collector
from torchrl.envs.utils import check_env_specs
from warped import warp_logits

from aurora_rl.envs import Completion, Request, SamplingParams, SpecDecodeEnv, TransformersEngine, transformers_engine
from aurora_rl.envs.exactness import UnsupportedModelError
from aurora_rl.envs.verification.sampling import gumbel
from aurora_rl.models.kv_cache import SlotCache
from aurora_rl.policies import DrafterPolicy, TargetParts, TreeShape
from aurora_rl.policies.eagle3 import Eagle3Drafter
from aurora_rl.testing import tiny_target
from aurora_rl.trajectories import RULE_CODES, accepted_per_round, pack, validate

# So few tokens that random trees are often right, and wide random weights so that texts do not repeat one token.
VOCAB = 8
LAYERS = (0, 1)
NODES = 6
ARCHITECTURES = ("llama", "qwen3")
Policy = Callable[[TensorDictBase], TensorDictBase]


# ---- the slow reference -----------------------------------------------------------------------------------------


@functools.cache
def reference(architecture: str = "llama"):
    """A copy of the target that no engine has touched."""
    return tiny_target(architecture, vocab_size=VOCAB)


@functools.cache
def next_tokens(prompt: tuple[int, ...], sampling: SamplingParams, architecture: str, count: int) -> list[int]:
    """What follows the prompt: transformers' own generate, or for samples a pass over the whole text per token."""
    model, text = reference(architecture), torch.tensor(prompt)[None]
    if sampling.temperature == 0:
        text = model.generate(
            text, max_new_tokens=count, do_sample=False, attention_mask=torch.ones_like(text), pad_token_id=0
        )
        return text[0, len(prompt) :].tolist()
    for position in range(len(prompt), len(prompt) + count):
        scores = warp_logits(model(text).logits[0, -1], sampling.temperature, sampling.top_k, sampling.top_p)
        noise = gumbel(torch.tensor(sampling.seed), torch.tensor(position), VOCAB)
        text = torch.cat([text, (scores + noise).argmax()[None, None]], dim=1)
    return text[0, len(prompt) :].tolist()


def letters(tokens: list[int]) -> str:
    return "".join("abcdefgh"[t] for t in tokens)


@dataclass
class Truth:
    """A request's completion, and what the target would say if it went on."""

    request: Request
    tokens: list[int]
    terminated: bool
    known: list[int]
    features: Tensor  # [P + len(known), F]

    @classmethod
    def of(cls, request: Request, architecture: str = "llama", stop_tokens: Sequence[int] = ()) -> Truth:
        count = request.sampling.max_tokens + NODES + 1
        known = next_tokens(tuple(request.prompt.tolist()), request.sampling, architecture, count)
        end, terminated = request.sampling.max_tokens, False
        for count in range(request.sampling.max_tokens, 0, -1):
            said = known[:count]
            if said[-1] in stop_tokens or any(letters(said).endswith(s) for s in request.sampling.stop):
                end, terminated = count, True
        text = torch.cat([request.prompt, torch.tensor(known)])
        states = reference(architecture)(text[None], output_hidden_states=True).hidden_states
        return cls(request, known[:end], terminated, known, torch.cat([states[layer][0] for layer in LAYERS], dim=-1))


def brute_force_tree(tokens: list[int], parents: list[int], mask: list[bool]) -> list[tuple[int, int, int]]:
    """(node, parent, token) of the nodes that count, by the definition."""
    nodes: list[tuple[int, int, int]] = []
    for i, (token, parent, meant) in enumerate(zip(tokens, parents, mask, strict=True)):
        here = [n for n, _, _ in nodes]
        twin = any(p == parent and t == token for _, p, t in nodes)
        if meant and 0 <= token < VOCAB and (parent == -1 or parent in here) and not twin:
            nodes.append((i, parent, token))
    return nodes


def check_rounds(steps: list[TensorDictBase], truths: Sequence[Truth]) -> None:
    """Every entry of every step against the known text: path, bonus, reward, window, features, ends."""
    by_id = {t.request.id: t for t in truths}
    delivered = dict.fromkeys(by_id, 0)
    for step in steps:
        after, observation, verifier = step["next"], step["next", "observation"], step["next", "verifier"]
        trees = zip(*(step["draft", key].tolist() for key in ("tokens", "parents", "mask")), strict=True)
        for slot, (request, tree) in enumerate(zip(after["request"].tolist(), trees, strict=True)):
            reward, done, terminated, truncated, bonus, num_new, position = (
                column[slot].item()
                for column in (
                    after["reward"],
                    after["done"],
                    after["terminated"],
                    after["truncated"],
                    verifier["bonus_token"],
                    observation["num_new"],
                    observation["position"],
                )
            )
            accepted = verifier["accepted"][slot].nonzero().flatten().tolist()
            assert done == (terminated or truncated)
            if request == -1:
                assert (reward, truncated, bonus, num_new, position, accepted) == (0, True, -1, 0, -1, [])
                continue
            truth, at = by_id[request], delivered[request]
            nodes, path = brute_force_tree(*tree), [-1]
            while here := [n for n, p, t in nodes if p == path[-1] and t == truth.known[at + len(path) - 1]]:
                path += here
            path = path[1:]
            new = truth.tokens[at : at + len(path) + 1]
            assert reward == num_new == len(new)
            assert observation["tokens"][slot, :num_new].tolist() == new
            assert accepted == path[:num_new]
            assert bonus == (new[-1] if num_new > len(path) else -1)
            # Row i belongs to the position just before token i.
            start = len(truth.request.prompt) + at - 1
            features = truth.features[start : start + num_new]
            assert torch.allclose(observation["features"][slot, :num_new], features, rtol=0, atol=1e-6)
            delivered[request] = at = at + num_new
            ended = at == len(truth.tokens)
            assert (terminated, truncated) == (ended and truth.terminated, ended and not truth.terminated)
            assert position == (-1 if ended else start + num_new)
    assert delivered == {id: len(t.tokens) for id, t in by_id.items()}


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


# ---- worlds and policies ----------------------------------------------------------------------------------------


def requests(*shapes: tuple[int, int]) -> list[Request]:
    """Requests of (prompt length, token budget)."""
    generator = torch.Generator().manual_seed(1)
    return [
        Request(i, torch.randint(0, VOCAB, (length,), generator=generator), SamplingParams(max_tokens=budget))
        for i, (length, budget) in enumerate(shapes)
    ]


# More than slots, of unequal lengths; a prompt of one token has no feature to draft from at first.
MANY = ((1, 20), (9, 7), (5, 1), (3, 24), (17, 12), (2, 2), (4, 18))


class World:
    """An environment over a tiny target, and what came out of it."""

    def __init__(
        self,
        waiting: Sequence[Request],
        *,
        architecture: str = "llama",
        slots: int = 3,
        num_nodes: int = NODES,
        max_length: int = 64,
        **options: object,
    ) -> None:
        queue = list(waiting)
        self.engine = TransformersEngine(
            tiny_target(architecture, vocab_size=VOCAB), num_slots=slots, max_length=max_length, feature_layers=LAYERS
        )
        self.completions: dict[int, Completion] = {}
        self.env = SpecDecodeEnv(
            self.engine,
            lambda: queue.pop(0) if queue else None,
            num_nodes=num_nodes,
            on_completion=self._completed,
            **options,
        )

    def _completed(self, completion: Completion) -> None:
        assert completion.request.id not in self.completions
        self.completions[completion.request.id] = completion

    def run(self, policy: Policy) -> list[TensorDictBase]:
        steps, td = [], self.env.reset()
        while self.env.num_active:
            step, td = self.env.step_and_maybe_reset(policy(td))
            steps.append(step)
        return steps


def check(world: World, steps: list[TensorDictBase], truths: Sequence[Truth]) -> None:
    check_rounds(steps, truths)
    assert sorted(world.completions) == sorted(t.request.id for t in truths)
    for truth in truths:
        completion = world.completions[truth.request.id]
        assert completion.tokens.tolist() == truth.tokens and completion.terminated == truth.terminated


def empty_draft(slots: int, num_nodes: int = NODES) -> TensorDict:
    return TensorDict(
        {
            "tokens": torch.zeros(slots, num_nodes, dtype=torch.int64),
            "parents": torch.full((slots, num_nodes), -1),
            "mask": torch.zeros(slots, num_nodes, dtype=torch.bool),
        },
        batch_size=[slots],
    )


def plain(td: TensorDictBase) -> TensorDictBase:
    return td.set("draft", empty_draft(len(td)))


def knowing(truths: Sequence[Truth], *, chain: bool = False) -> Policy:
    """Drafts what the target will say, with mistakes; in trees the right path runs through columns that must move."""
    generator = torch.Generator().manual_seed(2)
    by_id = {t.request.id: t for t in truths}

    def chance(share: float) -> bool:
        return float(torch.rand((), generator=generator)) < share

    def wrong(token: int) -> int:
        return (token + 1 + int(torch.randint(0, VOCAB - 1, (), generator=generator))) % VOCAB

    def policy(td: TensorDictBase) -> TensorDictBase:
        draft = empty_draft(len(td))
        for slot, (request, position) in enumerate(
            zip(td["request"].tolist(), td["observation", "position"].tolist(), strict=True)
        ):
            if request < 0:
                continue
            truth = by_id[request]
            right = truth.known[position + 1 - len(truth.request.prompt) :]
            true = decoy = -1
            for level in range(NODES if chain else NODES // 2):
                token = right[level] if not chance(0.2) else wrong(right[level])
                pairs = [(token, true)] if chain else [(wrong(token), true if chance(0.5) else decoy), (token, true)]
                first = level * len(pairs)
                for i, (drafted, parent) in enumerate(pairs):
                    draft["tokens"][slot, first + i], draft["parents"][slot, first + i] = drafted, parent
                decoy, true = first, first + len(pairs) - 1
            draft["mask"][slot] = True
        return td.set("draft", draft)

    return policy


def random_drafter(seed: int = 0, vocab: Sequence[int] = (0, 1, 2, 3, 5, 7)) -> Eagle3Drafter:
    """A drafter of random weights over a reduced vocabulary, in fp64."""
    torch.manual_seed(seed)
    drafter = Eagle3Drafter.from_target(
        TargetParts.of(reference()), draft_vocab=torch.tensor(vocab), feature_layers=LAYERS
    )
    drafter = drafter.double().eval().requires_grad_(False)
    for parameter in drafter.parameters():
        if parameter.ndim == 2:
            parameter.normal_(std=0.4)
    return drafter


def accepted_counts(steps: list[TensorDictBase]) -> set[int]:
    return {int(n) for step in steps for n in step["next", "verifier", "accepted"].sum(1)}


# ---- the environment as TorchRL sees it -------------------------------------------------------------------------


@pytest.mark.parametrize("idle", [False, True], ids=["busy", "one slot idle"])
def test_specs(idle: bool) -> None:
    # Both full and partial resets; the requests end after few rounds, so that resets happen in the checked rollout.
    numbers = iter(range(10**6))

    def source() -> Request | None:
        number = next(numbers)
        return (
            None if idle and number % 3 == 1 else Request(number, torch.tensor([1, 2, 3]), SamplingParams(max_tokens=3))
        )

    engine = World([]).engine
    env = SpecDecodeEnv(engine, source, num_nodes=NODES)
    check_env_specs(env, seed=0, break_when_any_done="both")


def test_collector() -> None:
    wanted = requests(*MANY)
    truths = {r.id: Truth.of(r).tokens for r in wanted}
    source = iter(range(10**6))
    done: list[Completion] = []

    def again() -> Request:
        number = next(source)
        request = wanted[number % len(wanted)]
        return Request(number, request.prompt, request.sampling)

    world = World([])
    env = SpecDecodeEnv(world.engine, again, num_nodes=NODES, on_completion=done.append)
    policy = DrafterPolicy(
        random_drafter(), world.engine.store, num_nodes=NODES, shape=TreeShape(3, 2, NODES), version=7
    )
    collector = Collector(env, policy, frames_per_batch=3 * 16, total_frames=3 * 48)
    rewards = []
    for batch in collector:
        assert batch.shape == (3, 16) and bool((batch["policy_version"] == 7).all())
        rewards.append(batch["next", "reward"])
    collector.shutdown()
    assert len(rewards) == 3 and len(done) > len(wanted)
    for completion in done:
        assert completion.tokens.tolist() == truths[completion.request.id % len(wanted)]
    in_flight = int((world.engine.store.lengths - world.engine.store.prompt_lengths).sum())
    assert int(torch.cat(rewards).sum()) == sum(len(c.tokens) for c in done) + in_flight


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
    assert len(faults) == len(wanted) and all("a log-probability is above 0 or not a number" in f for f in faults)


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


# ---- ends -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["plain", "chain", "tree"])
def test_stop_tokens(policy: str) -> None:
    wanted = requests(*MANY)
    truths = [Truth.of(r, stop_tokens=(6, 2)) for r in wanted]
    assert {True, False} == {t.terminated for t in truths}
    world = World(wanted, stop_tokens=(6, 2))
    check(world, world.run(plain if policy == "plain" else knowing(truths, chain=policy == "chain")), truths)


def test_a_stop_token_as_the_last_of_the_budget_terminates() -> None:
    request = requests((4, 12))[0]
    known = Truth.of(request).tokens
    request.sampling = SamplingParams(max_tokens=known.index(known[5]) + 1)
    truth = Truth.of(request, stop_tokens=(known[5],))
    assert truth.terminated and len(truth.tokens) == request.sampling.max_tokens
    world = World([request], stop_tokens=(known[5],))
    check(world, world.run(knowing([truth])), [truth])


@pytest.mark.parametrize("policy", ["plain", "chain", "tree"])
def test_stop_strings(policy: str) -> None:
    # A stop string of three tokens, hence one that begins in one round and ends in another or inside a path.
    wanted = requests((4, 18), (3, 24), (9, 20), (2, 9))
    for request in wanted[:3]:
        said = letters(Truth.of(request).tokens)
        request.sampling = replace(request.sampling, stop=(said[6:9], "zz"))
    truths = [Truth.of(r) for r in wanted]
    assert [t.terminated for t in truths] == [True, True, True, False]
    world = World(wanted, decode=letters)
    check(world, world.run(plain if policy == "plain" else knowing(truths, chain=policy == "chain")), truths)


def test_record_false_leaves_no_trajectory() -> None:
    wanted = requests((4, 6))
    world = World(wanted, record=False)
    check(world, world.run(world.env.rand_action), [Truth.of(r) for r in wanted])
    assert world.completions[0].trajectory is None


def test_a_full_reset_drops_what_is_in_flight() -> None:
    wanted = requests(*MANY)
    world = World(wanted)
    td = world.env.reset()
    for _ in range(2):
        td = world.env.step_and_maybe_reset(plain(td))[1]
    served = set(world.completions)
    active = {int(i) for i in td["request"] if i >= 0}
    world.run(world.env.rand_action)
    assert set(world.completions) == {r.id for r in wanted} - (active - served)
    for id, completion in world.completions.items():
        assert completion.tokens.tolist() == Truth.of(wanted[id]).tokens


# ---- sampling ---------------------------------------------------------------------------------------------------

SAMPLING = (
    SamplingParams(),
    SamplingParams(1.0, seed=3),
    SamplingParams(0.7, top_k=3, seed=4),
    SamplingParams(1.5, top_p=0.8, seed=2**40 + 5),
    SamplingParams(),
    SamplingParams(2.0, top_k=6, top_p=0.9, seed=6),
    SamplingParams(1.0, seed=8),
)


def test_sampled_text_is_that_of_plain_sampling() -> None:
    wanted = requests(*MANY)
    for request, sampling in zip(wanted, SAMPLING, strict=True):
        request.sampling = replace(sampling, max_tokens=request.sampling.max_tokens)
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
        assert (int(recorded["top_k"]), int(recorded["seed"])) == (sampling.top_k, sampling.seed)
        assert float(recorded["temperature"]) == pytest.approx(sampling.temperature)


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


# ---- bad requests -----------------------------------------------------------------------------------------------

BAD: dict[str, tuple[Request, str]] = {
    "empty": (Request(9, torch.tensor([], dtype=torch.int64)), "request 9: the prompt is empty"),
    "too long": (
        Request(9, torch.ones(60, dtype=torch.int64), SamplingParams(max_tokens=5)),
        "request 9: a prompt of 60 tokens and 5 new ones exceed the context of 64; shorten",
    ),
    "unknown token": (
        Request(9, torch.tensor([1, VOCAB])),
        r"request 9: the prompt's tokens must lie in 0\.\.7 "
        r".*, got 1\.\.8",
    ),
    "sampled under greedy": (
        Request(9, torch.tensor([1]), SamplingParams(0.5, max_tokens=4)),
        "request 9: temperature 0.5 needs the rule 'sample_and_match', not 'greedy'",
    ),
    "stop without decode": (
        Request(9, torch.tensor([1]), SamplingParams(max_tokens=4, stop=("a",))),
        "request 9: stop strings need",
    ),
    "id": (Request(-3, torch.tensor([1])), "request -3: an id is not negative"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_request_is_named_and_changes_nothing(case: str) -> None:
    bad, message = BAD[case]
    good = requests((5, 12), (3, 4), (4, 6))
    world = World([good[0], bad, good[1], bad, good[2]], slots=2, rule="greedy")
    env, store = world.env, world.engine.store
    with pytest.raises(ValueError, match=message):
        env.check(bad)
    with pytest.raises(ValueError, match=message):  # taken together with a good one, which must not be lost
        env.reset()
    assert env.num_active == 0 and store.lengths.tolist() == [0, 0]
    td = env.reset()
    assert env.num_active == 2
    for _ in range(3):
        td = env.step_and_maybe_reset(plain(td))[1]
    with pytest.raises(ValueError, match=message):  # the second request ends, and its slot asks for the next
        env.step_and_maybe_reset(plain(td))
    assert env.num_active == 1 and store.lengths.tolist() == [9, 0]
    while env.num_active:  # serving goes on from where it was
        td = env.step_and_maybe_reset(plain(td))[1]
    assert {id: c.tokens.tolist() for id, c in world.completions.items()} == {r.id: Truth.of(r).tokens for r in good}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_request_that_is_handed_back_ends_no_other(case: str) -> None:
    bad, message = BAD[case]
    good = requests((5, 12), (3, 4), (4, 6))
    refused: list[tuple[Request, str]] = []
    world = World(
        [bad, good[0], good[1], bad, bad, good[2], bad],
        slots=2,
        rule="greedy",
        on_refused=lambda *both: refused.append(both),
    )
    world.run(plain)
    assert [request for request, _ in refused] == [bad] * 4 and all(re.match(message, reason) for _, reason in refused)
    assert {id: c.tokens.tolist() for id, c in world.completions.items()} == {r.id: Truth.of(r).tokens for r in good}


def test_the_largest_tree_that_fits_is_verified_to_the_end_of_a_slot() -> None:
    request = Request(
        0, torch.ones(4, dtype=torch.int64), SamplingParams(max_tokens=60)
    )  # fills the slot, its last rounds too
    most = TransformersEngine.max_nodes
    world = World([request], slots=1, num_nodes=most)

    def chain(td: TensorDictBase) -> TensorDictBase:
        tokens = torch.zeros(1, most, dtype=torch.int64)
        parents = torch.arange(-1, most - 1)[None]
        td["draft"] = {"tokens": tokens, "parents": parents, "mask": torch.ones(1, most, dtype=torch.bool)}
        return td

    world.run(chain)
    assert world.completions[0].tokens.tolist() == next_tokens((1,) * 4, request.sampling, "llama", 60)
    with pytest.raises(
        ValueError, match=f"num_nodes={most + 1} is more than the {most} nodes that the engine verifies"
    ):
        World([], num_nodes=most + 1)


def test_the_largest_request_that_fits_is_served() -> None:
    request = Request(0, torch.ones(59, dtype=torch.int64), SamplingParams(max_tokens=5))
    world = World([request], slots=1)
    world.run(plain)
    assert world.completions[0].tokens.tolist() == Truth.of(request).tokens
