"""Medusa heads: alignment with literal features, trees, limits."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch.nn.functional import silu

from aurora_rl.policies import MedusaDrafter, TargetParts, TreeShape
from aurora_rl.testing import tiny_target, tiny_trajectory
from aurora_rl.trajectories import pack


def identity(num_heads: int = 3, size: int = 4) -> MedusaDrafter:
    """Heads that return the feature itself, plus 100 times their number in the first place."""
    drafter = MedusaDrafter(size, 10, draft_vocab=torch.tensor([6, 1, 8, 3]), feature_layers=(2,), num_heads=num_heads)
    with torch.no_grad():
        for parameter in drafter.blocks.parameters():
            parameter.zero_()
        for head in drafter.lm_heads:
            head.weight.copy_(torch.eye(size))
    return drafter


def trajectory(tokens: int, prompt: int, first: float) -> TensorDict:
    """Row ``t`` of the features is ``[first + t, 0, 0, 0]``; no rounds."""
    features = torch.zeros(tokens - 1, 4)
    features[:, 0] = first + torch.arange(tokens - 1)
    drafter = MedusaDrafter.from_target(TargetParts.of(tiny_target()), draft_vocab=torch.arange(8))
    out = tiny_trajectory(drafter, prompt_length=prompt, max_new_tokens=tokens - prompt)
    out["sequence", "features"] = features
    return out


def test_unroll_reads_the_feature_before_the_root() -> None:
    batch = pack([trajectory(6, 3, 0.0), trajectory(4, 1, 50.0)])
    logits, valid, _ = identity().unroll(batch, 2)
    # Completion tokens at positions 3, 4, 5 and 1, 2, 3. At depth 1 the root is the token before, its pair one earlier.
    assert valid.tolist() == [[True, True, True, False, True, True], [False, True, True, False, False, True]]
    assert logits[0][valid[0], 0].tolist() == [1.0, 2.0, 3.0, 50.0, 51.0]
    assert logits[1][valid[1], 0].tolist() == [1.0, 2.0, 50.0]


def test_unroll_stops_at_the_last_head() -> None:
    logits, valid, _ = identity(num_heads=2).unroll(pack([trajectory(6, 2, 0.0)]), 5)
    assert len(logits) == len(valid) == 2


def test_score_gives_nothing_that_could_not_be_drafted() -> None:
    out = trajectory(6, 1, 0.0)
    out["rounds", "anchor"] = torch.tensor([0, 2])
    out["rounds", "offset"] = torch.tensor([0, 1, 6])
    out["nodes", "tokens"] = torch.tensor([6, 6, 1, 8, 3, 7])
    out["nodes", "parents"] = torch.tensor([-1, -1, 0, 1, 2, -1])
    batch = pack([out])
    scores = identity().score(batch)
    # Feature 1 is [1, 0, 0, 0]: the root at 2 has pair 1; rows of 6, 1, 8, 3 in this order.
    peak, rest = torch.tensor([1.0, 0.0, 0.0, 0.0]).log_softmax(-1)[:2].tolist()
    infinite = -float("inf")  # the root at 0 has no pair, there is no fourth head, and 7 has no row
    torch.testing.assert_close(scores, torch.tensor([infinite, peak, rest, rest, infinite, infinite]))


@pytest.mark.parametrize("shared", [True, False])
def test_a_head_is_residual_blocks_and_a_linear_layer(shared: bool) -> None:
    options = {"num_heads": 2, "num_layers": 2, "shared_head": shared}
    drafter = MedusaDrafter(4, 10, draft_vocab=torch.arange(3), feature_layers=(1,), **options)
    assert len(drafter.lm_heads) == (1 if shared else 2)
    feature = torch.randn(4)
    drafter.allocate(1, 8)
    drafter.extend(torch.tensor([0]), torch.tensor([[1, 5]]), feature[None, None], torch.tensor([1]))
    proposal = drafter.propose(torch.tensor([0]), TreeShape(2))
    for depth in range(2):
        block = drafter.blocks[depth]
        hidden = feature + silu(block.layers[0].weight @ feature)
        hidden = hidden + silu(block.layers[1].weight @ hidden)
        head = drafter.lm_heads[0 if shared else depth]
        best = (head.weight @ hidden).log_softmax(-1).max(-1)
        assert int(proposal.tokens[0, depth]) == int(best.indices)
        torch.testing.assert_close(proposal.log_probs[0, depth], best.values)


def test_depth_ends_with_the_heads_and_width_with_the_vocabulary() -> None:
    drafter = identity(num_heads=2)
    drafter.allocate(1, 8)
    drafter.extend(torch.tensor([0]), torch.tensor([[1, 5]]), torch.tensor([[[3.0, 2.0, 1.0, 0.0]]]), torch.tensor([1]))
    assert drafter.propose(torch.tensor([0]), TreeShape(4)).parents.tolist() == [[-1, 0]]
    wide = drafter.propose(torch.tensor([0]), TreeShape(1, 9))
    assert wide.tokens.tolist() == [[6, 1, 8, 3]]
    pruned = drafter.propose(torch.tensor([0]), TreeShape(4, 2, 4))
    # With a = -0.44 the best log-probability of a head: 6 has a, 1 a - 1, and below them 6 and 1 again: 2a, 2a - 1 and
    # 2a - 1, 2a - 2. The fourth is the earlier of two equals.
    assert pruned.tokens.tolist() == [[6, 1, 6, 1]]
    assert pruned.parents.tolist() == [[-1, -1, 0, 0]]
    a = torch.tensor([3.0, 2.0, 1.0, 0.0]).log_softmax(-1)[0].item()
    torch.testing.assert_close(pruned.log_probs, torch.tensor([[a, a - 1, a, a - 1]]))


def test_a_shared_matrix_is_one_that_all_heads_have() -> None:
    """Logits and scores are those of heads that each have the matrix; what they have in common gets all gradients."""
    parts, vocab = TargetParts.of(tiny_target()), torch.arange(8)
    one, each = (MedusaDrafter.from_target(parts, draft_vocab=vocab, shared_head=s).double() for s in (True, False))
    with torch.no_grad():
        for parameter, other in zip(one.blocks.parameters(), each.blocks.parameters(), strict=True):
            other.copy_(parameter.normal_(std=0.3))
    batch = pack([tiny_trajectory(each, prompt_length=3, max_new_tokens=12, shape=TreeShape(3, 2))])
    torch.testing.assert_close(one.score(batch), each.score(batch))
    totals = []
    for drafter in (one, each):
        logits, valid, _ = drafter.unroll(batch, 4)
        (sum((step + 0).log_softmax(-1)[ok].square().sum() for step, ok in zip(logits, valid, strict=True))).backward()
        totals.append(sum(head.weight.grad for head in drafter.lm_heads))
    torch.testing.assert_close(*totals)


def test_a_checkpoint_of_an_earlier_release_has_a_matrix_for_each_head() -> None:
    parts = TargetParts.of(tiny_target())
    written = MedusaDrafter.from_target(parts, draft_vocab=torch.arange(8), shared_head=False).write("aurora_rl")
    del written.config["options"]["shared_head"]
    assert len(MedusaDrafter.read(written, parts, "aurora_rl").lm_heads) == 4


@pytest.mark.parametrize("shared", [True, False])
def test_day_0_is_the_targets_own_head(shared: bool) -> None:
    target = tiny_target()
    parts = TargetParts.of(target)
    vocab = torch.tensor([4, 30, 2])
    drafter = MedusaDrafter.from_target(parts, draft_vocab=vocab, num_heads=3, shared_head=shared)
    assert drafter.feature_layers == (3,) and drafter.num_heads == 3
    assert {name: tuple(t.shape) for name, t in drafter.published().items()} == {
        **{f"blocks.{h}.layers.0.weight": (16, 16) for h in range(3)},
        **{f"lm_heads.{h}.weight": (3, 16) for h in range(1 if shared else 3)},
        "d2t": (3,),
    }
    feature = torch.randn(16)
    drafter.allocate(1, 4)
    drafter.extend(torch.tensor([0]), torch.tensor([[1, 5]]), feature[None, None], torch.tensor([1]))
    logits = (parts.head.weight.float() @ feature)[vocab].log_softmax(-1)
    proposal = drafter.propose(torch.tensor([0]), TreeShape(3))
    assert proposal.tokens.tolist() == [[int(vocab[logits.argmax()])] * 3]
    torch.testing.assert_close(proposal.log_probs[0], logits.max().expand(3))


def test_a_number_of_blocks_below_none_is_refused() -> None:
    with pytest.raises(ValueError, match="num_layers must not be negative, got -1"):
        MedusaDrafter(16, 10, draft_vocab=torch.arange(4), feature_layers=(2,), num_layers=-1)


@pytest.mark.parametrize(("layers", "heads"), [((1, 2), 4), ((), 4), ((3,), 0)])
def test_one_feature_layer_and_some_heads_are_needed(layers: tuple[int, ...], heads: int) -> None:
    with pytest.raises(ValueError, match="reads one feature layer and has at least one head"):
        MedusaDrafter(4, 10, draft_vocab=torch.arange(3), feature_layers=layers, num_heads=heads)


def test_a_map_outside_the_vocabulary_is_refused() -> None:
    drafter = identity()
    weights = {name: tensor.clone() for name, tensor in drafter.published().items()}
    assert weights["d2t"].tolist() == [6, 0, 6, 0]
    weights["d2t"][1] = 9
    weights["lm_heads.0.weight"] += 1
    with pytest.raises(ValueError, match="'d2t' points outside the target's vocabulary of 10"):
        drafter.install(weights)
    assert drafter.draft_vocab.tolist() == [6, 1, 8, 3]
    assert torch.equal(drafter.lm_heads[0].weight, torch.eye(4))
