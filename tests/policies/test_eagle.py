"""EAGLE: names, weights at day 0, the authors' regression loss, and draft vocabularies that are refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aurora_rl.objectives.imitation import ImitationLoss
from aurora_rl.policies import EagleDrafter, TargetParts, get_drafter
from aurora_rl.testing import check_drafter, tiny_target, tiny_trajectory
from aurora_rl.trajectories import pack

# Half of the tokens are outside.
VOCAB = torch.arange(0, 32, 2)


def eagle(vocab: Tensor = VOCAB, architecture: str = "llama") -> EagleDrafter:
    torch.manual_seed(0)
    return EagleDrafter.from_target(TargetParts.of(tiny_target(architecture)), draft_vocab=vocab).double()


# ---- the model ------------------------------------------------------------------------------------------------------


def test_published_names_are_those_that_sglang_loads() -> None:
    drafter = eagle()
    assert {name: tuple(t.shape) for name, t in drafter.published().items()} == {
        "fc.weight": (16, 32),
        "fc.bias": (16,),
        "layers.0.self_attn.q_proj.weight": (16, 16),
        "layers.0.self_attn.k_proj.weight": (8, 16),
        "layers.0.self_attn.v_proj.weight": (8, 16),
        "layers.0.self_attn.o_proj.weight": (16, 16),
        "layers.0.post_attention_layernorm.weight": (16,),
        "layers.0.mlp.gate_proj.weight": (32, 16),
        "layers.0.mlp.up_proj.weight": (32, 16),
        "layers.0.mlp.down_proj.weight": (16, 32),
        "d2t": (16,),
    }
    assert {name for name, _ in drafter.named_parameters()} == set(drafter.published()) - {"d2t"}
    assert get_drafter("eagle") is EagleDrafter and drafter.feature_layers == (3,)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_day_0_passes_the_feature_on(architecture: str) -> None:
    target, drafter = tiny_target(architecture), eagle(architecture=architecture)
    trajectory = tiny_trajectory(drafter, architecture=architecture, prompt_length=4, max_new_tokens=5)
    (states,) = drafter.unroll(pack([trajectory]), 1).states or []
    tokens, features = trajectory["sequence", "tokens"], trajectory["sequence", "features"].double()
    image = drafter.embedding[tokens[3:8]].double() @ drafter.fc.weight[:, :16].detach().T
    torch.testing.assert_close(states, features[2:7] + image, rtol=0, atol=0.1)
    assert 0.25 < float((image.square().mean() / features[2:7].square().mean()).sqrt()) < 1.0

    # Attention and MLP read it as the last layer read its input: there, after norms of its own.
    last = target.model.layers[-1].double()
    read = torch.randn(5, 16).double()
    final = target.model.norm.double()
    with torch.no_grad():
        final.weight.uniform_(0.5, 2.0)
        last.input_layernorm.weight.uniform_(0.5, 2.0)
        last.post_attention_layernorm.weight.uniform_(0.5, 2.0)
    drafter = EagleDrafter.from_target(TargetParts.of(target), draft_vocab=VOCAB).double()
    layer = drafter.layers[0]
    for name in ("q_proj", "k_proj", "v_proj"):
        expected = last.self_attn.get_submodule(name)(last.input_layernorm(read))
        mine = layer.get_submodule(f"self_attn.{name}")(final(read))
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_the_feature_of_a_position_is_what_the_head_read_there(architecture: str) -> None:
    """So the loss's regression target and the next feature are one and the same, as in the authors' training."""
    trajectory = tiny_trajectory(eagle(architecture=architecture), architecture=architecture, prompt_length=4)
    features, hidden = trajectory["sequence", "features"], trajectory["sequence", "hidden"]
    torch.testing.assert_close(features[3:], hidden)


def test_regression_brings_the_states_to_the_targets() -> None:
    drafter = eagle()
    head = TargetParts.of(tiny_target()).head
    batch = pack([tiny_trajectory(drafter, prompt_length=4, max_new_tokens=20)])
    loss = ImitationLoss(drafter, head, steps=2, regression=5.0)
    unroll, hidden = drafter.unroll(batch, 2), batch["sequence", "hidden"]
    assert unroll.states is not None
    distance = torch.stack([F.smooth_l1_loss(s, hidden, reduction="none").mean(-1) for s in unroll.states])
    plain, with_it = (
        ImitationLoss(drafter, head, steps=2, regression=weight, reduction="none")(batch)["loss_imitation"]
        for weight in (0.0, 5.0)
    )
    decayed = 0.8 ** torch.arange(2.0)[:, None]
    torch.testing.assert_close(with_it - plain, torch.where(unroll.valid, 5.0 * decayed * distance, 0.0))

    def error() -> float:
        states = drafter.unroll(batch, 2).states
        assert states is not None
        return float(F.smooth_l1_loss(states[0].detach(), hidden))

    before, optimizer = error(), torch.optim.Adam(drafter.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        loss(batch)["loss_imitation"].backward()
        optimizer.step()
    assert error() < 0.7 * before
    assert torch.equal(drafter.head, head.weight[VOCAB]), "the target's head is frozen"


@pytest.mark.parametrize(("architecture", "size"), [("llama", 20), ("qwen3", 32)])
def test_eagle_passes_the_checks_with_a_rising_and_with_the_whole_vocabulary(architecture: str, size: int) -> None:
    """Which formats hold; tests/testing/test_drafters.py has the one that does not rise."""
    check_drafter(eagle(torch.arange(size), architecture), tiny_target(architecture))


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_other_feature_layers_are_refused() -> None:
    parts = TargetParts.of(tiny_target())
    with pytest.raises(ValueError, match=r"feature_layers=\(3,\), got \(0, 1\)"):
        EagleDrafter.from_target(parts, draft_vocab=VOCAB, feature_layers=(0, 1))
    drafter = EagleDrafter.from_target(parts, draft_vocab=VOCAB, feature_layers=(3,))
    for layers, rows in (((1, 2), 16), ((3,), 15)):
        with pytest.raises(ValueError, match=rf"got layers .* and {rows} rows for 16 tokens"):
            EagleDrafter(
                drafter.config,
                embedding=drafter.embedding,
                head=drafter.head[:rows],
                draft_vocab=VOCAB,
                feature_layers=layers,
            )


@pytest.mark.parametrize(
    ("d2t", "message"),
    [
        (VOCAB + 1 - torch.arange(16), "'d2t' is not this drafter's draft vocabulary of 16 tokens"),
        (torch.full((16,), 31), "'d2t' points outside the target's vocabulary of 32"),
    ],
)
def test_another_draft_vocabulary_is_refused(d2t: Tensor, message: str) -> None:
    drafter = eagle()
    weights = {name: tensor + 1 for name, tensor in drafter.published().items()}
    before = {name: tensor.clone() for name, tensor in drafter.published().items()}
    with pytest.raises(ValueError, match=message):
        drafter.install({**weights, "d2t": d2t})
    assert all(torch.equal(tensor, before[name]) for name, tensor in drafter.published().items())
