"""EAGLE-3: names, day-0 weights, trees against brute force; the rest is check_drafter's."""

from __future__ import annotations

import pytest
import torch

from aurora_rl.policies import Eagle3Drafter, TargetParts, TreeShape
from aurora_rl.testing import tiny_target, tiny_trajectory
from aurora_rl.trajectories import pack
from aurora_rl.tree_index import TreeIndex


def drafter(vocab: torch.Tensor | None = None, architecture: str = "llama") -> Eagle3Drafter:
    torch.manual_seed(0)
    parts = TargetParts.of(tiny_target(architecture))
    return Eagle3Drafter.from_target(parts, draft_vocab=torch.arange(6) if vocab is None else vocab).double()


def test_published_names_are_those_of_serving_engines() -> None:
    assert {name: tuple(t.shape) for name, t in drafter().published().items()} == {
        "fc.weight": (16, 32),
        "midlayer.input_layernorm.weight": (16,),
        "midlayer.hidden_norm.weight": (16,),
        "midlayer.post_attention_layernorm.weight": (16,),
        "midlayer.self_attn.q_proj.weight": (16, 32),
        "midlayer.self_attn.k_proj.weight": (8, 32),
        "midlayer.self_attn.v_proj.weight": (8, 32),
        "midlayer.self_attn.o_proj.weight": (16, 16),
        "midlayer.mlp.gate_proj.weight": (32, 16),
        "midlayer.mlp.up_proj.weight": (32, 16),
        "midlayer.mlp.down_proj.weight": (16, 32),
        "norm.weight": (16,),
        "lm_head.weight": (6, 16),
        "d2t": (6,),
    }


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_day_0_starts_from_the_target(architecture: str) -> None:
    target = tiny_target(architecture)
    vocab = torch.tensor([30, 4, 2])
    made = drafter(vocab, architecture)
    last = target.model.layers[-1]
    published = {name: tensor.float() for name, tensor in made.published().items()}
    assert made.published()["d2t"].tolist() == [30, 3, 0]
    torch.testing.assert_close(published["lm_head.weight"], target.lm_head.weight[vocab].float())
    torch.testing.assert_close(published["midlayer.mlp.up_proj.weight"], last.mlp.up_proj.weight.float())
    torch.testing.assert_close(published["midlayer.hidden_norm.weight"], last.input_layernorm.weight.float())
    query = published["midlayer.self_attn.q_proj.weight"]
    assert not query[:, :16].any()
    torch.testing.assert_close(query[:, 16:], last.self_attn.q_proj.weight.float())
    # The deepest of the two features passes, the other nearly does not.
    torch.testing.assert_close(published["fc.weight"][:, 16:], torch.eye(16), atol=0.05, rtol=0)
    torch.testing.assert_close(published["fc.weight"][:, :16], torch.zeros(16, 16), atol=0.05, rtol=0)


def test_a_tree_holds_the_likeliest_paths() -> None:
    """With as many nodes expanded as there are tokens, no path of depth 2 is left out: brute force over all of them."""
    made = drafter()
    trajectory = tiny_trajectory(made, prompt_length=4, max_new_tokens=2)
    made.allocate(1, 16)
    slot = torch.tensor([0])
    made.extend(
        slot,
        trajectory["sequence", "tokens"][None, :4],
        trajectory["sequence", "features"][None, :3],
        torch.tensor([3]),
    )
    tokens, parents, log_probs = (part[0] for part in made.propose(slot, TreeShape(2, 6, 9))[:3])

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
    scores = made.score(pack([every])).tolist()
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


# ---- contexts of recorded trees, against each path alone ----------------------------------------------------------


def turn(x: torch.Tensor, position: int, theta: float) -> torch.Tensor:
    """Rotary embedding of ``[heads, d]``, number by number as Su et al. write it down (halves instead of pairs)."""
    half = x.shape[-1] // 2
    angles = torch.tensor([position * theta ** (-i / half) for i in range(half)], dtype=x.dtype)
    a, b = x[:, :half], x[:, half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=1)


def path_logits(
    made: Eagle3Drafter, tokens: torch.Tensor, features: torch.Tensor, root: int, path: list[int]
) -> torch.Tensor:
    """What one path alone predicts: position after position, with a plain attention over all that came before."""
    layer, attention, config = made.midlayer, made.midlayer.self_attn, made.config
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    theta = config.rope_parameters["rope_theta"]
    keys, values, state = [], [], None
    steps = [(tokens[t + 1], made.fc(features[t])) for t in range(root + 1)] + [(torch.tensor(t), None) for t in path]
    for position, (token, feature) in enumerate(steps):
        came = state if feature is None else feature
        x = torch.cat([layer.input_layernorm(made.embedding[token].double()), layer.hidden_norm(came)])
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
    return made.lm_head(made.norm(state))


@pytest.mark.parametrize("shape", [TreeShape(1, 2), TreeShape(3), TreeShape(3, 3, 9)])
def test_contexts_predict_what_their_path_alone_predicts(shape: TreeShape) -> None:
    made = drafter(torch.arange(0, 32, 2))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    sizes = [(4, 6), (2, 3), (9, 5)]
    trajectories = [tiny_trajectory(made, prompt_length=p, max_new_tokens=n, shape=shape) for p, n in sizes]
    roots, nodes = [], []
    for trajectory in trajectories:
        tokens, features = trajectory["sequence", "tokens"], trajectory["sequence", "features"].double()
        offset, parents = trajectory["rounds", "offset"].tolist(), trajectory["nodes", "parents"].tolist()
        for number, anchor in enumerate(trajectory["rounds", "anchor"].tolist()):
            roots.append(path_logits(made, tokens, features, anchor - 1, []))
            for node in range(offset[number], offset[number + 1]):
                path, at = [], node - offset[number]
                while at >= 0:
                    path.insert(0, int(trajectory["nodes", "tokens"][offset[number] + at]))
                    at = parents[offset[number] + at]
                nodes.append(path_logits(made, tokens, features, anchor - 1, path))
    expected = torch.stack(roots + nodes)
    wanted = torch.ones(len(expected), dtype=torch.bool)
    batch = pack(trajectories)
    trees = TreeIndex.of(batch)
    got = made.context_logits(batch, trees, wanted)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)  # the drafter turns by float32 angles

    weight = torch.randn_like(expected)
    parameters = list(made.parameters())
    for mine, slow in zip(
        torch.autograd.grad((weight * got).sum(), parameters),
        torch.autograd.grad((weight * expected).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(mine, slow, rtol=0, atol=1e-5)

    wanted = torch.rand(len(expected)) < 0.4
    torch.testing.assert_close(made.context_logits(batch, trees, wanted), expected[wanted], rtol=0, atol=1e-6)
    assert made.context_logits(batch, trees, torch.zeros_like(wanted)).shape == (0, 16)


def test_width_ends_with_the_vocabulary() -> None:
    made = drafter(torch.tensor([3, 1]))
    made.allocate(1, 8)
    made.extend(torch.tensor([0]), torch.tensor([[1, 3]]), torch.randn(1, 1, 32).double(), torch.tensor([1]))
    proposal = made.propose(torch.tensor([0]), TreeShape(2, 5))
    assert sorted(proposal.tokens[0, :2].tolist()) == [1, 3]
    assert proposal.parents.tolist() == [[-1, -1, 0, 0, 1, 1]]


def test_a_map_outside_the_vocabulary_is_refused() -> None:
    made = drafter()
    weights = {**made.published(), "d2t": torch.full((6,), 31)}
    with pytest.raises(ValueError, match="'d2t' points outside the target's vocabulary of 32"):
        made.install(weights)
    assert made.draft_vocab.tolist() == [0, 1, 2, 3, 4, 5]
