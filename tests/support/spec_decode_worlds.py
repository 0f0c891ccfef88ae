"""Worlds of several requests for the environment, policies for them, and the slow reference that checks every round."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from warped import warp_logits

from aurora_kernels.noise import gumbel
from aurora_rl.envs import Completion, Request, SamplingParams, SpecDecodeEnv, TransformersEngine
from aurora_rl.policies import TargetParts
from aurora_rl.policies.eagle3 import Eagle3Drafter
from aurora_rl.testing import tiny_target

# So few tokens that random trees are often right, and wide random weights so that texts do not repeat one token.
VOCAB = 8
LAYERS = (0, 1)
NODES = 6
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
        how = sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p
        scores = warp_logits(model(text).logits[0, -1], *how)
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
        count = request.sampling_params.max_tokens + NODES + 1
        known = next_tokens(tuple(request.prompt.tolist()), request.sampling_params, architecture, count)
        end, terminated = request.sampling_params.max_tokens, False
        for count in range(request.sampling_params.max_tokens, 0, -1):
            said = known[:count]
            if said[-1] in stop_tokens or any(letters(said).endswith(s) for s in request.sampling_params.stop):
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
        # Not a SpeculativeDecoder: `run` takes any policy, and the features that it checks need no drafter.
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
