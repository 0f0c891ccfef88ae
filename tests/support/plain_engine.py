"""An engine in plain torch, in float64, on weights by an engine's names, and its comparison with a drafter.

It runs a path of tokens alone and anew at every step, without a cache.

Legend: ``n`` pairs of a path, ``H`` hidden size, ``L`` layers of the target, ``V`` target vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor

from aurora_rl.policies import Drafter, TargetParts, get_drafter
from aurora_rl.testing import tiny_target, tiny_trajectory
from aurora_rl.trajectories import pack
from aurora_rl.tree_index import TreeIndex

THETA = 300.0  # far from the base that engines fall back to
SOME = torch.tensor([1, 2, 5, 9, 14, 20, 30])
Parameters = dict[str, Tensor]
# A way to draft: logits [V] after a text of tokens and a path of drafted ones, −inf where no row is.
Draft = Callable[[Tensor, list[int]], Tensor]
# Turns [n, heads, d] to positions 0 … n − 1.
Rotation = Callable[[Tensor, dict[str, Any]], Tensor]

# ---- the engine -----------------------------------------------------------------------------------------------------


def norm(x: Tensor, weight: Tensor, config: dict[str, Any]) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt()


def rotate_halves(x: Tensor, config: dict[str, Any]) -> Tensor:
    """``[n, heads, d]`` at positions 0 … n − 1: pairs of the first and the second half, as Llama has them."""
    half = x.shape[-1] // 2
    frequency = config["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(len(x), dtype=torch.float64)[:, None, None] * frequency
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1)


def decoder_layer(
    x: Tensor, residual: Tensor, layer: Parameters, config: dict[str, Any], rotate: Rotation = rotate_halves
) -> Tensor:
    """``x [n, ·]``, what attention reads, and the residual stream ``[n, H]``, to ``[n, H]``; without a cache."""
    size, n = config["head_dim"], len(x)
    heads, key_heads = config["num_attention_heads"], config["num_key_value_heads"]
    q, k, v = (x @ layer["self_attn.qkv_proj.weight"].T).split([heads * size, key_heads * size, key_heads * size], -1)
    q, k = rotate(q.view(n, heads, size), config), rotate(k.view(n, key_heads, size), config)
    k, v = (t.view(n, key_heads, size).repeat_interleave(heads // key_heads, dim=1) for t in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * size**-0.5
    scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf)
    seen = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1)
    hidden = residual + seen @ layer["self_attn.o_proj.weight"].T
    read = norm(hidden, layer["post_attention_layernorm.weight"], config)
    gate, up = (read @ layer["mlp.gate_up_proj.weight"].T).chunk(2, -1)
    return hidden + (F.silu(gate) * up) @ layer["mlp.down_proj.weight"].T


def of_layer(parameters: Parameters, prefix: str) -> Parameters:
    return {name.removeprefix(prefix): t for name, t in parameters.items() if name.startswith(prefix)}


class Target:
    """The states that engines read, by transformers: entry ``l`` enters layer ``l``, the last its output head."""

    def __init__(self) -> None:
        self.model = tiny_target()
        self.embedding = self.model.get_input_embeddings().weight
        self.head = self.model.get_output_embeddings().weight

    def states(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """``L + 1`` tensors ``[n, H]``."""
        states = self.model(tokens[None], output_hidden_states=True).hidden_states
        return tuple(state[0] for state in states)


def over_vocabulary(logits: Tensor, ids: Tensor) -> Tensor:
    return torch.full((32,), -torch.inf, dtype=torch.float64).index_copy(0, ids, logits)


def eagle3(
    parameters: Parameters,
    config: dict[str, Any],
    layer: str,
    layers: list[int],
    d2t: str,
    rotate: Rotation = rotate_halves,
) -> Draft:
    """EAGLE-3 of parameters by an engine's names; ``layers`` are those that its captured states enter."""
    target, own, ids = Target(), of_layer(parameters, layer), parameters[d2t] + torch.arange(len(parameters[d2t]))
    assert len(ids) == len(parameters["lm_head.weight"]) == config["draft_vocab_size"]

    def draft(text: Tensor, path: list[int]) -> Tensor:
        captured = [target.states(text)[i][:-1] for i in layers]
        if config.get("fc_norm"):
            captured = [norm(s, parameters[f"model.fc_norm.{i}.weight"], config) for i, s in enumerate(captured)]
        carried = torch.cat(captured, -1) @ parameters["model.fc.weight"].T
        tokens = text[1:]
        for token in [*path, None]:
            embedded = norm(target.embedding[tokens], own["input_layernorm.weight"], config)
            read = torch.cat([embedded, norm(carried, own["hidden_norm.weight"], config)], -1)
            last = decoder_layer(read, carried, own, config, rotate)[-1:]
            normed = norm(last, parameters["model.norm.weight"], config)
            if token is not None:
                carried = torch.cat([carried, normed if config.get("norm_output") else last])
                tokens = torch.cat([tokens, torch.tensor([token])])
        return over_vocabulary(normed[0] @ parameters["lm_head.weight"].T, ids)

    return draft


# ---- the drafter, and the comparison ---------------------------------------------------------------------------------


def drafter_of(name: str, vocab: Tensor, rope: Mapping[str, Any] = MappingProxyType({}), **options: Any) -> Drafter:
    """A drafter, none of its tensors as it started; float64 of float32 weights. The target's base is ``THETA``."""
    target = tiny_target(dtype=torch.float32)
    target.config.rope_parameters = {"rope_type": "default", "rope_theta": THETA, **rope}
    torch.manual_seed(0)
    if name == "eagle3":
        options.setdefault(
            "feature_layers", (1, 2)
        )  # by default a target of three layers gives 0, which SGLang has not
    # No wider: without a norm before its attention, EAGLE makes 1e-4 of what a float32 table of cosines rounds away.
    drafter = get_drafter(name).from_target(TargetParts.of(target), draft_vocab=vocab, **options)
    drafter.install(
        {n: t + 0.1 * torch.randn_like(t) if t.is_floating_point() else t for n, t in drafter.published().items()}
    )
    return drafter.double()


def texts_and_paths(trajectory: TensorDict) -> list[tuple[Tensor, list[int]]]:
    """Text and path of every root, then of every node."""
    tokens, offset = trajectory["sequence", "tokens"], trajectory["rounds", "offset"].tolist()
    nodes, parents = trajectory["nodes", "tokens"].tolist(), trajectory["nodes", "parents"].tolist()
    roots, paths = [], []
    for number, anchor in enumerate(trajectory["rounds", "anchor"].tolist()):
        roots.append((tokens[: anchor + 1], []))
        for node in range(offset[number], offset[number + 1]):
            path, at = [], node - offset[number]
            while at >= 0:
                path.insert(0, nodes[offset[number] + at])
                at = parents[offset[number] + at]
            paths.append((tokens[: anchor + 1], path))
    return roots + paths


@torch.no_grad()
def assert_drafts_alike(drafter: Drafter, draft: Draft) -> None:
    """The drafter's logits at every root and node of a served request are those of an engine, to 1e-5."""
    trajectory = tiny_trajectory(drafter, max_new_tokens=6)
    deep = [len(path) < drafter.max_depth for _, path in texts_and_paths(trajectory)]
    batch = pack([trajectory])
    logits_here = drafter.context_logits(batch, TreeIndex.of(batch), torch.tensor(deep)).double()
    logits_there = [draft(*context) for context, there in zip(texts_and_paths(trajectory), deep, strict=True) if there]
    assert len(logits_there) > 6
    for logits, expected in zip(logits_here, logits_there, strict=True):
        drafted = over_vocabulary(logits, drafter.draft_vocab)
        torch.testing.assert_close(drafted[drafter.draft_vocab], expected[drafter.draft_vocab], rtol=1e-5, atol=1e-5)
        assert int(drafted.argmax()) == int(expected.argmax())
