"""Drafters of one layer: trees, recorded contexts and training against each path alone, position after position."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from drafters import perturbed
from peak_memory import peak_memory
from tensordict import TensorDict
from torch import Tensor

from aurora_rl.envs import SamplingParams
from aurora_rl.objectives import ExpectedLengthLoss, ImitationLoss, SumLoss
from aurora_rl.policies import Eagle3Drafter, EagleDrafter, TargetParts, TreeShape, recurrent
from aurora_rl.testing import tiny_target, tiny_trajectory
from aurora_rl.trajectories import make_trajectory, pack
from aurora_rl.tree_index import TreeIndex

VOCAB = torch.arange(0, 32, 2)  # half of the tokens are outside


def eagle(vocab: Tensor = VOCAB, architecture: str = "llama") -> EagleDrafter:
    torch.manual_seed(0)
    drafter = EagleDrafter.from_target(TargetParts.of(tiny_target(architecture)), draft_vocab=vocab)
    return perturbed(drafter.double())


def eagle3(vocab: Tensor = VOCAB) -> Eagle3Drafter:
    torch.manual_seed(0)
    return Eagle3Drafter.from_target(TargetParts.of(tiny_target()), draft_vocab=vocab).double()


def test_a_tree_holds_the_likeliest_paths() -> None:
    """With as many nodes expanded as there are tokens, no path of depth 2 is left out: brute force over all of them."""
    drafter = eagle3(torch.arange(6))
    trajectory = tiny_trajectory(drafter, prompt_length=4, max_new_tokens=2)
    drafter.allocate(1, 16)
    slot = torch.tensor([0])
    drafter.extend(
        slot,
        trajectory["sequence", "tokens"][None, :4],
        trajectory["sequence", "features"][None, :3],
        torch.tensor([3]),
    )
    tokens, parents, log_probs = (part[0] for part in drafter.propose(slot, TreeShape(2, 6, 9))[:3])

    # The same root, with every path of depth 2 recorded below it, scored in training.
    every = trajectory.clone()
    every["rounds"] = {
        "anchor": torch.tensor([3]), "offset": torch.tensor([0, 42]),
        "policy_version": torch.zeros(1, dtype=torch.int64), "cache_version": torch.zeros(1, dtype=torch.int64),
    }  # fmt: skip
    children = [node for first in range(6) for node in ((first, -1), *((t, first * 7) for t in range(6)))]
    every["nodes"] = {
        "tokens": torch.tensor([t for t, _ in children]), "parents": torch.tensor([p for _, p in children]),
        "log_probs": torch.zeros(42), "accepted": torch.zeros(42, dtype=torch.bool), "hidden": torch.zeros(42, 16),
    }  # fmt: skip
    scores = drafter.score(pack([every])).tolist()
    joint = {
        (t,) if p < 0 else (children[p][0], t): scores[i] + (scores[p] if p >= 0 else 0.0)
        for i, (t, p) in enumerate(children)
    }
    expected = sorted(joint, key=lambda path: -joint[path])[:9]
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(tokens.tolist(), parents.tolist(), strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    assert set(paths) == set(expected)
    for path, log_prob in zip(paths, log_probs.tolist(), strict=True):
        assert log_prob == pytest.approx(joint[path] - joint.get(path[:-1], 0.0), abs=1e-5)


# ---- contexts of recorded trees, against each path alone ------------------------------------------------------------


def turn(x: Tensor, position: int, theta: float) -> Tensor:
    """Rotary embedding of ``[heads, d]``: each number with the one half a head further on, as a complex number.

    By float32 angles, as transformers has them, so that all the rest can be compared in float64.
    """
    half = x.shape[-1] // 2
    angle = position * (1.0 / theta ** (torch.arange(half, dtype=torch.float32) / half))
    turned = torch.complex(x[:, :half], x[:, half:]) * torch.complex(angle.cos(), angle.sin())
    return torch.cat([turned.real, turned.imag], dim=1)


def of_contexts(trajectories: list[TensorDict], predict: Callable[[Tensor, Tensor, int, list[int]], Tensor]) -> Tensor:
    """What a reference predicts for every root of the trajectories, then for every node: one path at a time."""
    roots, nodes = [], []
    for trajectory in trajectories:
        tokens, features = trajectory["sequence", "tokens"], trajectory["sequence", "features"].double()
        offset, parents = trajectory["rounds", "offset"].tolist(), trajectory["nodes", "parents"].tolist()
        for number, anchor in enumerate(trajectory["rounds", "anchor"].tolist()):
            roots.append(predict(tokens, features, anchor - 1, []))
            for node in range(offset[number], offset[number + 1]):
                path, at = [], node - offset[number]
                while at >= 0:
                    path.insert(0, int(trajectory["nodes", "tokens"][offset[number] + at]))
                    at = parents[offset[number] + at]
                nodes.append(predict(tokens, features, anchor - 1, path))
    return torch.stack(roots + nodes)


def path_logits(drafter: Eagle3Drafter, tokens: Tensor, features: Tensor, root: int, path: list[int]) -> Tensor:
    """What one path alone predicts: position after position, with a plain attention over all that came before."""
    layer, attention, config = drafter.midlayer, drafter.midlayer.self_attn, drafter.config
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    theta = config.rope_parameters["rope_theta"]
    keys, values, state = [], [], None
    steps = [(tokens[t + 1], drafter.fc(features[t])) for t in range(root + 1)] + [
        (torch.tensor(t), None) for t in path
    ]
    for position, (token, feature) in enumerate(steps):
        came = state if feature is None else feature
        x = torch.cat([layer.input_layernorm(drafter.embedding[token].double()), layer.hidden_norm(came)])
        keys.append(turn(attention.k_proj(x).view(groups, -1), position, theta))
        values.append(attention.v_proj(x).view(groups, -1))
        query = turn(attention.q_proj(x).view(heads, -1), position, theta)
        out = []
        for head in range(heads):
            group = head * groups // heads
            scores = torch.stack([key[group] @ query[head] for key in keys]) / query.shape[1] ** 0.5
            out.append(scores.softmax(0) @ torch.stack([value[group] for value in values]))
        state = came + attention.o_proj(torch.cat(out))
        state = state + layer.mlp(layer.post_attention_layernorm(state))
    return drafter.lm_head(drafter.norm(state))


@pytest.mark.parametrize("shape", [TreeShape(1, 2), TreeShape(3, 3, 9)])
def test_contexts_predict_what_their_path_alone_predicts_in_eagle3(shape: TreeShape) -> None:
    drafter = perturbed(eagle3())
    sizes = [(4, 6), (2, 3), (9, 5)]
    trajectories = [tiny_trajectory(drafter, prompt_length=p, max_new_tokens=n, shape=shape) for p, n in sizes]
    expected = of_contexts(trajectories, partial(path_logits, drafter))
    wanted = torch.ones(len(expected), dtype=torch.bool)
    batch = pack(trajectories)
    trees = TreeIndex.of(batch)
    got = drafter.context_logits(batch, trees, wanted)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)

    weight = torch.randn_like(expected)
    parameters = list(drafter.parameters())
    for gradient, slow in zip(
        torch.autograd.grad((weight * got).sum(), parameters),
        torch.autograd.grad((weight * expected).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(gradient, slow, rtol=0, atol=1e-9)

    wanted = torch.rand(len(expected)) < 0.4
    torch.testing.assert_close(drafter.context_logits(batch, trees, wanted), expected[wanted], rtol=0, atol=1e-9)
    assert drafter.context_logits(batch, trees, torch.zeros_like(wanted)).shape == (0, 16)


def test_width_ends_with_the_vocabulary() -> None:
    drafter = eagle3(torch.tensor([3, 1]))
    drafter.allocate(1, 8)
    drafter.extend(torch.tensor([0]), torch.tensor([[1, 3]]), torch.randn(1, 1, 32).double(), torch.tensor([1]))
    proposal = drafter.propose(torch.tensor([0]), TreeShape(2, 5))
    assert sorted(proposal.tokens[0, :2].tolist()) == [1, 3]
    assert proposal.parents.tolist() == [[-1, -1, 0, 0, 1, 1]]


def path_states(drafter: EagleDrafter, tokens: Tensor, features: Tensor, root: int, path: list[int]) -> Tensor:
    """The feature that one path alone predicts, from the weights by name: SGLang's ``LlamaForCausalLMEagle`` by hand.

    Position after position, [embedding, feature] through ``fc``, a layer without a first norm, and no final norm.
    """
    w, config = {name: p for name, p in drafter.named_parameters()}, drafter.config
    layer, size = "layers.0.", config.head_dim
    theta, eps = config.rope_parameters["rope_theta"], config.rms_norm_eps
    groups, heads = config.num_key_value_heads, config.num_attention_heads
    keys, values, state = [], [], features[0]
    known = [(int(tokens[t + 1]), features[t]) for t in range(root + 1)]
    for position, (token, feature) in enumerate([*known, *((token, None) for token in path)]):
        came = state if feature is None else feature
        x = w["fc.weight"] @ torch.cat([drafter.embedding[token].double(), came]) + w["fc.bias"]
        q, k, v = (
            (w[f"{layer}self_attn.{name}_proj.weight"] @ x).view(count, size)
            for name, count in (("q", heads), ("k", groups), ("v", groups))
        )
        keys.append(turn(k, position, theta))
        values.append(v)
        query, out = turn(q, position, theta), []
        for head in range(heads):
            group = head * groups // heads
            scores = torch.stack([key[group] @ query[head] for key in keys]) * size**-0.5
            out.append(sum(s * value[group] for s, value in zip(scores.softmax(0), values, strict=True)))
        x = x + w[f"{layer}self_attn.o_proj.weight"] @ torch.cat(out)
        normed = x / (x.square().mean() + eps).sqrt() * w[f"{layer}post_attention_layernorm.weight"]
        gate, up = (w[f"{layer}mlp.{name}_proj.weight"] @ normed for name in ("gate", "up"))
        state = x + w[f"{layer}mlp.down_proj.weight"] @ (gate * torch.sigmoid(gate) * up)
    return state


@pytest.mark.parametrize(("architecture", "shape"), [("llama", TreeShape(3)), ("qwen3", TreeShape(3, 3, 9))])
def test_contexts_predict_what_their_path_alone_predicts_in_eagle(architecture: str, shape: TreeShape) -> None:
    drafter = eagle(architecture=architecture)
    head = TargetParts.of(tiny_target(architecture)).head.weight[VOCAB]
    sizes = [(4, 6), (2, 3), (9, 5)]
    trajectories = [
        tiny_trajectory(drafter, architecture=architecture, prompt_length=p, max_new_tokens=n, shape=shape)
        for p, n in sizes
    ]
    expected = of_contexts(trajectories, partial(path_states, drafter)) @ head.T
    batch = pack(trajectories)
    got = drafter.context_logits(batch, TreeIndex.of(batch), torch.ones(len(expected), dtype=torch.bool))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-8)

    weight, parameters = torch.randn_like(expected), list(drafter.parameters())
    gradients = torch.autograd.grad((weight * got).sum(), parameters)
    for gradient, slow in zip(gradients, torch.autograd.grad((weight * expected).sum(), parameters), strict=True):
        torch.testing.assert_close(gradient, slow, rtol=1e-8, atol=1e-6)


def test_what_is_unrolled_is_the_feature_that_the_head_reads() -> None:
    drafter = eagle(torch.arange(32))
    trajectory = tiny_trajectory(drafter, prompt_length=4, max_new_tokens=5)
    unroll = drafter.unroll(pack([trajectory]), 3)
    assert unroll.states is not None
    tokens, features = trajectory["sequence", "tokens"], trajectory["sequence", "features"].double()
    for step, (states, logits) in enumerate(zip(unroll.states, unroll.logits, strict=True)):
        torch.testing.assert_close(states @ drafter.head.T, logits)
        for row in range(step, 5):
            root = 4 - 2 + row - step
            path = tokens[root + 2 : root + 2 + step].tolist()
            torch.testing.assert_close(
                states[row], path_states(drafter, tokens, features, root, path), rtol=1e-9, atol=1e-8
            )


@pytest.mark.parametrize("make", [eagle, eagle3])
@pytest.mark.parametrize("scores", [1, 700])
def test_a_pass_by_rows_is_the_whole_pass(
    make: Callable[[], Eagle3Drafter | EagleDrafter], scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter, parts = make(), TargetParts.of(tiny_target())
    sizes = [(5, 12), (1, 3), (9, 7)]
    batch = pack([
        tiny_trajectory(drafter, prompt_length=p, max_new_tokens=n, request=i, shape=TreeShape(3, 2, 5))
        for i, (p, n) in enumerate(sizes)
    ])  # fmt: skip
    loss = SumLoss([ImitationLoss(drafter, parts.head, steps=3), ExpectedLengthLoss(drafter, parts.head)])
    found = []
    for most in (2**25, scores):
        monkeypatch.setitem(recurrent._SCORES, "cpu", most)
        out = loss(batch)
        total = sum(value for name, value in out.items() if name.startswith("loss_"))
        grads = torch.autograd.grad(total, list(drafter.parameters()), allow_unused=True)
        found.append([total.detach(), *(grad for grad in grads if grad is not None)])
    assert len(found[0]) == len(found[1]) > 5
    for whole, by_rows in zip(*found, strict=True):
        torch.testing.assert_close(by_rows, whole, rtol=1e-9, atol=1e-12)  # float64, added up in another order


def test_memory_of_a_step_is_linear_in_the_length_of_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(recurrent._SCORES, "cpu", 2**21)  # so that a text of a few thousand tokens is a long one
    target = TargetParts.of(tiny_target(dtype=torch.float32))
    drafter = Eagle3Drafter.from_target(target, draft_vocab=VOCAB)
    loss = ImitationLoss(drafter, target.head, steps=2)

    def peak(length: int) -> float:
        trajectory = make_trajectory(
            request=0, tokens=torch.randint(32, (length,)), prompt_length=4, features=torch.randn(length - 1, 32),
            target={"hidden": torch.randn(length - 4, 16)}, anchors=[], trees=[], policy_versions=[],
            cache_versions=[], sampling_params=SamplingParams(),
        )  # fmt: skip
        batch = pack([trajectory])
        return peak_memory(lambda: loss(batch)["loss_imitation"].backward())

    peak(1024)
    # MB. Scores of all pairs would be 268 for 4 heads in float32, in each step, and a mask of them 17.
    assert peak(4096) < 100
