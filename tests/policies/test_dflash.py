"""DFlash: blocks against a slow reference, names, and weights at day 0."""

from __future__ import annotations

import pytest
import torch
from drafters import DFLASH_SHAPES, HALF_THE_VOCAB, dflash_of_the_target
from torch import Tensor
from torch.nn.functional import silu

from aurora_rl.policies import DFlashDrafter, TargetParts, TreeShape
from aurora_rl.testing import check_drafter, tiny_target, tiny_trajectory
from aurora_rl.trajectories import pack
from aurora_rl.tree_index import TreeIndex

SHORT, LONG = (4, 5), (8, 4)  # prompt and completion


# ---- blocks, position by position -----------------------------------------------------------------------------------


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean() + 1e-6).sqrt() * weight


def turned(x: Tensor, position: int, theta: float) -> Tensor:
    """Rotary embedding of one head ``[d]``; angles in float32, as models compute them."""
    size = len(x)
    out = x.clone()
    for i in range(size // 2):
        angle = torch.tensor(float(position)) * (1.0 / theta ** (torch.tensor(2.0 * i) / size))
        cos, sin = angle.cos().double(), angle.sin().double()
        a, b = x[i], x[i + size // 2]
        out[i], out[i + size // 2] = a * cos - b * sin, b * cos + a * sin
    return out


def block_logits(drafter: DFlashDrafter, tokens: Tensor, features: Tensor, root: int) -> Tensor:
    """Return what the block after the root at position ``root`` predicts, ``[W - 1, Vd]``, one number at a time."""
    target, weights, config = tiny_target(), drafter.published(), drafter.config
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    theta = config.rope_parameters["rope_theta"]
    weights |= dict(drafter.named_parameters())  # with gradients
    context = [normed(weights["fc.weight"] @ f, weights["hidden_norm.weight"]) for f in features[:root]]
    said = [int(tokens[root])] + [drafter.mask_token_id] * (drafter.block_size - 1)
    hidden = [target.model.embed_tokens.weight[token] for token in said]
    for number in range(config.num_hidden_layers):
        own = {n.removeprefix(f"layers.{number}."): w for n, w in weights.items() if n.startswith(f"layers.{number}.")}
        read = context + [normed(x, own["input_layernorm.weight"]) for x in hidden]
        keys, values = [], []
        for position, x in enumerate(read):
            parts = (own["self_attn.k_proj.weight"] @ x).view(groups, size)
            keys.append([turned(normed(part, own["self_attn.k_norm.weight"]), position, theta) for part in parts])
            values.append((own["self_attn.v_proj.weight"] @ x).view(groups, size))
        after = []
        for place, x in enumerate(hidden):
            query = (own["self_attn.q_proj.weight"] @ read[root + place]).view(heads, size)
            out = []
            for head in range(heads):
                group = head * groups // heads
                q = turned(normed(query[head], own["self_attn.q_norm.weight"]), root + place, theta)
                scores = torch.stack([key[group] @ q for key in keys]) / size**0.5
                out.append(scores.softmax(0) @ torch.stack([value[group] for value in values]))
            x = x + own["self_attn.o_proj.weight"] @ torch.cat(out)
            read_by_mlp = normed(x, own["post_attention_layernorm.weight"])
            gate, up = (own[f"mlp.{kind}_proj.weight"] @ read_by_mlp for kind in ("gate", "up"))
            after.append(x + own["mlp.down_proj.weight"] @ (silu(gate) * up))
        hidden = after
    head_rows = target.lm_head.weight[drafter.draft_vocab]
    return torch.stack([head_rows @ normed(x, weights["norm.weight"]) for x in hidden[1:]])


@pytest.mark.parametrize("options", [{"num_layers": 1, "block_size": 2}, {"num_layers": 2, "block_size": 4}])
def test_contexts_and_their_gradients_are_those_of_the_block_alone(options: dict[str, int]) -> None:
    drafter = dflash_of_the_target(**options)
    trajectories = [tiny_trajectory(drafter, prompt_length=p, max_new_tokens=n) for p, n in (SHORT, (1, 2), LONG)]
    roots, nodes, possible = [], [], []
    for trajectory in trajectories:
        tokens, features = trajectory["sequence", "tokens"], trajectory["sequence", "features"].double()
        offset = trajectory["rounds", "offset"].tolist()
        for number, anchor in enumerate(trajectory["rounds", "anchor"].tolist()):
            block = block_logits(drafter, tokens, features, anchor)
            roots.append(block[0])
            for depth in range(1, 1 + offset[number + 1] - offset[number]):  # of a chain
                nodes.append(block[min(depth, len(block) - 1)])
                possible.append(depth < len(block))
    expected, wanted = torch.stack(roots + nodes), torch.tensor([True] * len(roots) + possible)
    batch = pack(trajectories)
    got = drafter.context_logits(batch, TreeIndex.of(batch), torch.ones_like(wanted))
    torch.testing.assert_close(got[wanted], expected[wanted], rtol=0, atol=1e-12)

    weight = torch.randn_like(expected[wanted])
    mine, slow = (
        torch.autograd.grad((weight * logits).sum(), list(drafter.parameters()))
        for logits in (got[wanted], expected[wanted])
    )
    for a, b in zip(mine, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)

    wanted &= torch.rand(len(wanted)) < 0.4
    torch.testing.assert_close(
        drafter.context_logits(batch, TreeIndex.of(batch), wanted), expected[wanted], rtol=0, atol=1e-12
    )
    assert drafter.context_logits(batch, TreeIndex.of(batch), torch.zeros_like(wanted)).shape == (0, 16)


def test_a_served_block_is_the_block_alone() -> None:
    drafter = dflash_of_the_target(block_size=5)
    trajectories = [tiny_trajectory(drafter, prompt_length=p, max_new_tokens=n) for p, n in (SHORT, LONG)]
    drafter.allocate(2, 16)
    slots, lengths = torch.tensor([0, 1]), torch.tensor([5, 10])
    tokens, features = torch.zeros(2, 11, dtype=torch.int64), torch.zeros(2, 10, 32, dtype=torch.float64)
    for slot, (trajectory, length) in enumerate(zip(trajectories, lengths.tolist(), strict=True)):
        tokens[slot, : length + 1] = trajectory["sequence", "tokens"][: length + 1]
        features[slot, :length] = trajectory["sequence", "features"][:length]
    drafter.extend(slots, tokens, features, lengths)
    chains = drafter.propose(slots, TreeShape(9))  # deeper than there are masks
    assert chains.tokens.shape == (2, 4)
    for slot, length in enumerate(lengths.tolist()):
        log_q = block_logits(drafter, tokens[slot], features[slot], length).log_softmax(-1)
        assert chains.tokens[slot].tolist() == HALF_THE_VOCAB[log_q.argmax(-1)].tolist()
        torch.testing.assert_close(chains.log_probs[slot], log_q.max(-1).values.float(), rtol=0, atol=1e-6)
    tree = drafter.propose(slots, TreeShape(2, 2))
    assert tree.parents.tolist() == [[-1, -1, 0, 0, 1, 1]] * 2
    assert torch.equal(tree.tokens[:, 2:4], tree.tokens[:, 4:])  # a depth has one distribution


def test_unroll_ends_with_the_block() -> None:
    drafter = dflash_of_the_target(block_size=3)
    batch = pack([tiny_trajectory(drafter, prompt_length=p, max_new_tokens=n) for p, n in ((1, 3), (4, 2))])
    logits, valid, states = drafter.unroll(batch, 5)
    # No feature lies before the first token of the first prompt: its first anchor drafts nothing.
    assert valid.tolist() == [[False, True, True, True, True], [False, False, True, False, True]]
    assert states is not None and [s.shape for s in states] == [(5, 16)] * 2
    assert all(torch.equal(state @ drafter.head.T, rows) for state, rows in zip(states, logits, strict=True))


def test_dflash_of_other_sizes_passes_the_checks_of_drafters() -> None:
    check_drafter(dflash_of_the_target("qwen3", num_layers=1, block_size=4), tiny_target("qwen3"))


# ---- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_day_0_starts_from_the_target(architecture: str) -> None:
    target = tiny_target(architecture)
    last = target.model.layers[-1]
    with torch.no_grad():
        last.input_layernorm.weight.mul_(1.5)
        if architecture == "qwen3":
            last.self_attn.q_norm.weight.mul_(3)
    drafter = DFlashDrafter.from_target(TargetParts.of(target), draft_vocab=HALF_THE_VOCAB)
    assert drafter.feature_layers == (1, 2) and drafter.mask_token_id == 31
    assert drafter.options == {"num_layers": 2, "block_size": 8, "mask_token_id": 31}
    published = drafter.published()
    assert {name: tuple(tensor.shape) for name, tensor in published.items()} == {**DFLASH_SHAPES, "d2t": (16,)}
    for number in range(2):
        for name, weight in last.named_parameters():
            torch.testing.assert_close(published[f"layers.{number}.{name}"], weight.float())
    torch.testing.assert_close(published["hidden_norm.weight"], last.input_layernorm.weight.float())
    torch.testing.assert_close(published["fc.weight"][:, 16:], torch.eye(16), atol=0.05, rtol=0)
    if architecture == "llama":
        # Queries are as large as the target's: after its norm, and of inputs that vary freely.
        x = last.input_layernorm(torch.randn(4096, 16, dtype=torch.float64))
        size = last.self_attn.q_proj(x).square().mean().sqrt().float()
        torch.testing.assert_close(published["layers.1.self_attn.q_norm.weight"], size.expand(4), rtol=0.05, atol=0)


def test_another_draft_vocabulary_takes_other_rows_of_the_targets_head() -> None:
    drafter, vocab = dflash_of_the_target(), HALF_THE_VOCAB + 1
    weights = drafter.published() | {"d2t": vocab - torch.arange(16)}
    put, before = drafter.stage(weights), drafter.head
    assert torch.equal(drafter.draft_vocab, HALF_THE_VOCAB) and drafter.head is before
    put()
    assert torch.equal(drafter.draft_vocab, vocab)
    assert torch.equal(drafter.head, tiny_target().lm_head.weight[vocab])


def test_tied_embeddings_are_held_once() -> None:
    target = tiny_target()
    target.lm_head.weight = target.model.embed_tokens.weight
    drafter = DFlashDrafter.from_target(TargetParts.of(target), draft_vocab=HALF_THE_VOCAB)
    assert drafter.target_head is None and torch.equal(drafter.head, drafter.embedding[HALF_THE_VOCAB])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 1}, "at least 2 positions, a layer and a feature, got block_size=1, 2 layers"),
        ({"num_layers": 0}, "got block_size=8, 0 layers"),
        ({"mask_token_id": 32}, "mask_token_id must lie in 0..31, got 32"),
    ],
)
def test_bad_options_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dflash_of_the_target(**options)
