"""The real model in fp32: the same tokens as its own generate gives, for 36 real prompts and more than 2,000 tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from scripted_drafter import ScriptedDrafter
from torch import Tensor
from transformers import PreTrainedModel

from aurora_rl import testing
from aurora_rl.envs import Completion, Request, SamplingParams
from aurora_rl.models import loading as models
from aurora_rl.policies import Drafter, DrafterPolicy, Proposal, TargetParts, TreeShape
from aurora_rl.policies.decoder import SpeculativeDecoder
from aurora_rl.policies.eagle3 import Eagle3Drafter
from aurora_rl.training.gate import replay
from aurora_rl.trajectories import accepted_per_round, pack
from aurora_rl.workload.traffic import generate_traffic

pytestmark = [pytest.mark.smollm2, pytest.mark.slow]

NEW = 64
LAYERS = (2, 15, 27)
# Which prompts a test serves; together they are all 36, of which `make test` serves 8 and `make stress` the others.
# Each test has them answered by the model's own generate first, so that the processes share this work.
CHAINS = (0, 1, 2, 3, 4, 5)
TREE, MORE_TREES = (6, 7, 8, 23), (*range(9, 23), *range(24, 30), 34, 35)  # 23 and 29 end before their budget
SWAPS, REPLAY = (30, 31), (32, 33)
SHORT = 32  # new tokens there, where a drafter of weights drafts
LEAST = {CHAINS: 375, TREE: 205, MORE_TREES: 1345, SWAPS: 60, REPLAY: 60}
"""How many tokens a test compares at least."""


@dataclass(frozen=True)
class World:
    """The target, its prompts, and a copy of the target that no engine puts into inference form."""

    model: PreTrainedModel
    untouched: PreTrainedModel
    parts: TargetParts
    stop: tuple[int, ...]
    prompts: list[Tensor]

    def answers(self, numbers: tuple[int, ...], new: int = NEW) -> dict[int, list[int]]:
        """Answer prompts by the target's own generate; return the answers by number."""
        own = own_answers(self.untouched, [self.prompts[i] for i in numbers], self.stop, new)
        assert sum(map(len, own)) >= LEAST[numbers]
        return dict(zip(numbers, own, strict=True))


@torch.inference_mode()
def own_answers(model: PreTrainedModel, prompts: Sequence[Tensor], stop: tuple[int, ...], new: int) -> list[list[int]]:
    """Greedy `generate` of transformers, all prompts in one batch, padded on the left."""
    longest = max(map(len, prompts))
    tokens, mask = (torch.full((len(prompts), longest), fill) for fill in (stop[0], 0))
    for i, prompt in enumerate(prompts):
        tokens[i, longest - len(prompt) :], mask[i, longest - len(prompt) :] = prompt, 1
    out = model.generate(
        tokens,
        attention_mask=mask,
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=list(stop),
        pad_token_id=stop[0],
    )
    ends = [next((i + 1 for i, token in enumerate(row) if token in stop), new) for row in out[:, longest:].tolist()]
    return [row[:end] for row, end in zip(out[:, longest:].tolist(), ends, strict=True)]


def load(
    path: Path, dtype: torch.dtype, count: int
) -> tuple[PreTrainedModel, TargetParts, tuple[int, ...], list[Tensor]]:
    model, tokenizer = models.load_target(str(path), dtype=dtype, device="cpu")
    prompts = [
        torch.tensor(models.encode_chat(tokenizer, prompt.messages)) for prompt in generate_traffic(count, seed=0)
    ]
    return model, TargetParts.of(model), models.stop_token_ids(model, tokenizer), prompts


@pytest.fixture(scope="module")
def world(smollm2_path: Path) -> World:
    model, parts, stop, prompts = load(smollm2_path, torch.float32, 36)
    return World(model, copy.deepcopy(model), parts, stop, prompts)


def serve(
    world: World,
    answers: dict[int, list[int]],
    drafter: Drafter,
    shape: TreeShape,
    *,
    slots: int,
    new: int = NEW,
    each: Callable[[DrafterPolicy, int], None] = lambda policy, number: None,
) -> dict[int, Completion]:
    """Serve prompts with a drafter, compare every answer, and return the completions by number."""
    waiting = [Request(i, world.prompts[i], SamplingParams(max_tokens=new)) for i in answers]
    done: dict[int, Completion] = {}
    decoder = SpeculativeDecoder(
        world.model, drafter, waiting, shape=shape, max_length=192, num_slots=slots, stop_tokens=world.stop,
        rule="greedy", on_completion=lambda completion: done.update({completion.request.id: completion}),
    )  # fmt: skip
    assert decoder.policy is not None
    for number, _ in enumerate(decoder.rounds()):
        each(decoder.policy, number)
    assert sorted(done) == sorted(answers)
    for i, completion in done.items():
        assert completion.tokens.tolist() == answers[i], f"prompt {i}"
        assert completion.terminated == (completion.tokens[-1].item() in world.stop)
    return done


class Knowing(ScriptedDrafter):
    """Drafts the answer with mistakes and with wrong branches around it, so that paths are long and fork anywhere."""

    def __init__(self, world: World, answers: dict[int, list[int]], *, branches: bool) -> None:
        super().__init__()
        self.feature_layers, self.vocab_size = LAYERS, len(world.parts.head)
        self.draft_vocab = torch.arange(self.vocab_size)
        self._texts = [world.prompts[i].tolist() + answer for i, answer in answers.items()]
        self._branches, self._generator = branches, torch.Generator().manual_seed(5)

    def propose(self, slots: Tensor, shape: TreeShape, generator: torch.Generator | None = None) -> Proposal:
        random = torch.randint(0, len(self.draft_vocab), (len(slots), shape.depth, 2), generator=self._generator)
        chance = torch.rand(len(slots), shape.depth, generator=self._generator)
        tokens, parents = [], []
        for i, slot in enumerate(slots.tolist()):
            held = self._held[slot]  # all tokens but the first, which is in no pair
            text = next(t for t in self._texts if t[1 : 1 + len(held)] == held)
            right = (text[1 + len(held) :] + [0] * shape.depth)[: shape.depth]
            wrong, true = [-1, -1], -1
            row_tokens: list[int] = []
            row_parents: list[int] = []
            for level in range(shape.depth):
                drafted = right[level] if chance[i, level] < 0.85 else int(random[i, level, 0])
                if self._branches:  # a decoy before the right node: accepted nodes have to be moved
                    row_tokens.append(int(random[i, level, 1]))
                    row_parents.append(true if chance[i, level] < 0.4 else wrong[-1])
                    wrong.append(len(row_tokens) - 1)
                row_tokens.append(drafted)
                row_parents.append(true)
                true = len(row_tokens) - 1
            tokens.append(row_tokens)
            parents.append(row_parents)
        rows = torch.tensor(tokens)
        return Proposal(rows, torch.tensor(parents), torch.zeros(rows.shape))


def eagle(parts: TargetParts, dtype: torch.dtype = torch.float32) -> Eagle3Drafter:
    # Low ids are the frequent tokens of a byte-pair tokenizer.
    drafter = Eagle3Drafter.from_target(parts, draft_vocab=torch.arange(4096), feature_layers=LAYERS)
    return drafter.to(dtype).eval().requires_grad_(False)


def accepted(completions: dict[int, Completion]) -> Tensor:
    return torch.cat([accepted_per_round(c.trajectory)[0] for c in completions.values()])


def test_the_prompts_are_enough(world: World) -> None:
    assert sorted(number for numbers in LEAST for number in numbers) == list(range(36))
    assert sum(LEAST.values()) >= 2000
    assert len({len(p) for p in world.prompts}) > 10  # so that slots have unequal lengths


@pytest.mark.stress  # chains in two slots, swapped in mid-request, are served below
def test_chains_in_one_slot(world: World) -> None:
    answers = world.answers(CHAINS)
    done = serve(world, answers, Knowing(world, answers, branches=False), TreeShape(4), slots=1)
    assert set(accepted(done).tolist()) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("numbers", [TREE, pytest.param(MORE_TREES, marks=pytest.mark.stress)], ids=["four", "others"])
def test_trees_in_four_slots_of_unequal_lengths(world: World, numbers: tuple[int, ...]) -> None:
    answers = world.answers(numbers)
    done = serve(world, answers, Knowing(world, answers, branches=True), TreeShape(4, 2, 8), slots=4)
    assert set(accepted(done).tolist()) == {0, 1, 2, 3, 4}


def test_swaps_in_mid_request(world: World) -> None:
    drafter = eagle(world.parts)
    published = {name: tensor.clone() for name, tensor in drafter.published().items()}

    def swap(policy: DrafterPolicy, number: int) -> None:
        if number % 6 == 5:
            weights = {k: v if k == "d2t" else v + 0.01 * torch.randn_like(v) for k, v in published.items()}
            policy.install(weights, policy.version + 1)

    done = serve(world, world.answers(SWAPS, SHORT), drafter, TreeShape(2), slots=2, new=SHORT, each=swap)
    for completion in done.values():
        versions = completion.trajectory["rounds", "policy_version"]
        assert len(versions.unique()) > 3 and bool((versions.diff() >= 0).all())
    assert int(accepted(done).max()) > 0


def test_recorded_streams_replay_exactly_and_score_as_served(world: World) -> None:
    drafter, shape = eagle(world.parts), TreeShape(3, 2, 5, lookup=2)
    done = serve(world, world.answers(REPLAY, SHORT), drafter, shape, slots=2, new=SHORT)
    trajectories = [completion.trajectory for completion in done.values()]
    replayed = replay(copy.deepcopy(drafter), trajectories, shape)
    assert replayed.tokens.tolist() == [len(c.tokens) for c in done.values()]
    assert replayed.rounds.tolist() == [len(t["rounds", "anchor"]) for t in trajectories]
    assert replayed.acceptance_length > 1  # an untrained drafter is right at times
    batch = pack(trajectories)
    # fp32: served with a cache round by round, scored in one pass per depth: sums in another order.
    scores, recorded = drafter.score(batch), batch["nodes", "log_probs"]
    drafted = recorded.isfinite()
    torch.testing.assert_close(scores[drafted], recorded[drafted], rtol=0, atol=1e-4)
    assert bool(batch["nodes", "accepted"][~drafted].any())  # lookup was right at times


def test_scores_in_bf16(smollm2_path: Path) -> None:
    if models.default_dtype("cpu") != torch.bfloat16:
        pytest.skip("this CPU does not compute in bf16")
    model, parts, _, prompts = load(smollm2_path, torch.bfloat16, 2)
    drafter = eagle(parts, torch.bfloat16)
    batch = pack(
        testing.serve(drafter, model, prompts, shape=TreeShape(3, 2, 5), max_new_tokens=24, num_slots=2, rule="greedy")
    )
    error = (drafter.score(batch) - batch["nodes", "log_probs"]).abs()
    # bf16 has 8 bits: logits of size 16 are known to 1/16, and what is fed from depth to depth is rounded again.
    assert bool(error.isfinite().all()) and float(error.max()) < 0.5 and float(error.mean()) < 0.05
