"""EAGLE: names, day-0 weights, paths against a slow reference, the authors' loss, and checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from aurora_rl.objectives.imitation import ImitationLoss
from aurora_rl.policies import Eagle3Drafter, EagleDrafter, TargetParts, TreeShape, get_drafter
from aurora_rl.policies.formats.files import load_drafter, save_drafter
from aurora_rl.policies.registry import recognized
from aurora_rl.testing import check_drafter, tiny_target, tiny_trajectory
from aurora_rl.training.checkpoint import CheckpointError
from aurora_rl.trajectories import pack
from aurora_rl.tree_index import TreeIndex

# Half of the tokens are outside.
VOCAB = torch.arange(0, 32, 2)


def drafter(vocab: Tensor = VOCAB, architecture: str = "llama") -> EagleDrafter:
    torch.manual_seed(0)
    return EagleDrafter.from_target(TargetParts.of(tiny_target(architecture)), draft_vocab=vocab).double()


def moved(made: EagleDrafter) -> EagleDrafter:
    """With every parameter another, so that none is at rest."""
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return made


# ---- the model ------------------------------------------------------------------------------------------------------


def test_published_names_are_those_that_sglang_loads() -> None:
    made = drafter()
    assert {name: tuple(t.shape) for name, t in made.published().items()} == {
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
    assert {name for name, _ in made.named_parameters()} == set(made.published()) - {"d2t"}
    assert get_drafter("eagle") is EagleDrafter and made.feature_layers == (3,)


def turn(x: Tensor, position: int, theta: float) -> Tensor:
    """Rotary embedding of ``[heads, d]``: each number with the one half a head further on, as a complex number.

    By float32 angles, as transformers has them, so that all the rest can be compared in float64.
    """
    half = x.shape[-1] // 2
    angle = position * (1.0 / theta ** (torch.arange(half, dtype=torch.float32) / half))
    turned = torch.complex(x[:, :half], x[:, half:]) * torch.complex(angle.cos(), angle.sin())
    return torch.cat([turned.real, turned.imag], dim=1)


def path_states(made: EagleDrafter, tokens: Tensor, features: Tensor, root: int, path: list[int]) -> Tensor:
    """The feature that one path alone predicts, from the weights by name: SGLang's ``LlamaForCausalLMEagle`` by hand.

    Position after position, [embedding, feature] through ``fc``, a layer without a first norm, and no final norm.
    """
    w, config = {name: p for name, p in made.named_parameters()}, made.config
    layer, size = "layers.0.", config.head_dim
    theta, eps = config.rope_parameters["rope_theta"], config.rms_norm_eps
    groups, heads = config.num_key_value_heads, config.num_attention_heads
    keys, values, state = [], [], features[0]
    known = [(int(tokens[t + 1]), features[t]) for t in range(root + 1)]
    for position, (token, feature) in enumerate([*known, *((token, None) for token in path)]):
        came = state if feature is None else feature
        x = w["fc.weight"] @ torch.cat([made.embedding[token].double(), came]) + w["fc.bias"]
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


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
@pytest.mark.parametrize("shape", [TreeShape(3), TreeShape(3, 3, 9)])
def test_contexts_predict_what_their_path_alone_predicts(architecture: str, shape: TreeShape) -> None:
    made = moved(drafter(architecture=architecture))
    head = TargetParts.of(tiny_target(architecture)).head.weight[VOCAB]
    sizes = [(4, 6), (2, 3), (9, 5)]
    trajectories = [
        tiny_trajectory(made, architecture=architecture, prompt_length=p, max_new_tokens=n, shape=shape)
        for p, n in sizes
    ]
    roots, nodes = [], []
    for trajectory in trajectories:
        tokens, features = trajectory["sequence", "tokens"], trajectory["sequence", "features"].double()
        offset, parents = trajectory["rounds", "offset"].tolist(), trajectory["nodes", "parents"].tolist()
        for number, anchor in enumerate(trajectory["rounds", "anchor"].tolist()):
            roots.append(path_states(made, tokens, features, anchor - 1, []))
            for node in range(offset[number], offset[number + 1]):
                path, at = [], node - offset[number]
                while at >= 0:
                    path.insert(0, int(trajectory["nodes", "tokens"][offset[number] + at]))
                    at = parents[offset[number] + at]
                nodes.append(path_states(made, tokens, features, anchor - 1, path))
    expected = torch.stack(roots + nodes) @ head.T
    batch = pack(trajectories)
    got = made.context_logits(batch, TreeIndex.of(batch), torch.ones(len(expected), dtype=torch.bool))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-8)

    weight, parameters = torch.randn_like(expected), list(made.parameters())
    mine = torch.autograd.grad((weight * got).sum(), parameters)
    for own, slow in zip(mine, torch.autograd.grad((weight * expected).sum(), parameters), strict=True):
        torch.testing.assert_close(own, slow, rtol=1e-8, atol=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_day_0_passes_the_feature_on(architecture: str) -> None:
    target, made = tiny_target(architecture), drafter(architecture=architecture)
    trajectory = tiny_trajectory(made, architecture=architecture, prompt_length=4, max_new_tokens=5)
    (states,) = made.unroll(pack([trajectory]), 1).states or []
    tokens, features = trajectory["sequence", "tokens"], trajectory["sequence", "features"].double()
    image = made.embedding[tokens[3:8]].double() @ made.fc.weight[:, :16].detach().T
    torch.testing.assert_close(states, features[2:7] + image, rtol=0, atol=0.1)
    assert 0.25 < float((image.square().mean() / features[2:7].square().mean()).sqrt()) < 1.0

    # Attention and MLP read it as the last layer read its input: there, behind norms of its own.
    last = target.model.layers[-1].double()
    read = torch.randn(5, 16).double()
    final = target.model.norm.double()
    with torch.no_grad():
        final.weight.uniform_(0.5, 2.0)
        last.input_layernorm.weight.uniform_(0.5, 2.0)
        last.post_attention_layernorm.weight.uniform_(0.5, 2.0)
    made = EagleDrafter.from_target(TargetParts.of(target), draft_vocab=VOCAB).double()
    layer = made.layers[0]
    for name in ("q_proj", "k_proj", "v_proj"):
        expected = last.self_attn.get_submodule(name)(last.input_layernorm(read))
        mine = layer.get_submodule(f"self_attn.{name}")(final(read))
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)


def test_what_is_unrolled_is_the_feature_that_the_head_reads() -> None:
    made = moved(drafter(torch.arange(32)))
    trajectory = tiny_trajectory(made, prompt_length=4, max_new_tokens=5)
    unroll = made.unroll(pack([trajectory]), 3)
    assert unroll.states is not None
    tokens, features = trajectory["sequence", "tokens"], trajectory["sequence", "features"].double()
    for step, (states, logits) in enumerate(zip(unroll.states, unroll.logits, strict=True)):
        torch.testing.assert_close(states @ made.head.T, logits)
        for row in range(step, 5):
            root = 4 - 2 + row - step
            path = tokens[root + 2 : root + 2 + step].tolist()
            torch.testing.assert_close(
                states[row], path_states(made, tokens, features, root, path), rtol=1e-9, atol=1e-8
            )


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_the_feature_of_a_position_is_what_the_head_read_there(architecture: str) -> None:
    """So the loss's regression target and the next feature are one and the same, as in the authors' training."""
    trajectory = tiny_trajectory(drafter(architecture=architecture), architecture=architecture, prompt_length=4)
    features, hidden = trajectory["sequence", "features"], trajectory["sequence", "hidden"]
    torch.testing.assert_close(features[3:], hidden)


def test_regression_brings_the_states_to_the_targets() -> None:
    made = drafter()
    head, batch = TargetParts.of(tiny_target()).head, pack([tiny_trajectory(made, prompt_length=4, max_new_tokens=20)])
    loss = ImitationLoss(made, head, steps=2, regression=5.0)
    unroll, hidden = made.unroll(batch, 2), batch["sequence", "hidden"]
    assert unroll.states is not None
    distance = torch.stack([F.smooth_l1_loss(s, hidden, reduction="none").mean(-1) for s in unroll.states])
    plain, with_it = (
        ImitationLoss(made, head, steps=2, regression=weight, reduction="none")(batch)["loss_imitation"]
        for weight in (0.0, 5.0)
    )
    decayed = 0.8 ** torch.arange(2.0)[:, None]
    torch.testing.assert_close(with_it - plain, torch.where(unroll.valid, 5.0 * decayed * distance, 0.0))

    def error() -> float:
        states = made.unroll(batch, 2).states
        assert states is not None
        return float(F.smooth_l1_loss(states[0].detach(), hidden))

    before, optimizer = error(), torch.optim.Adam(made.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        loss(batch)["loss_imitation"].backward()
        optimizer.step()
    assert error() < 0.7 * before
    assert torch.equal(made.head, head.weight[VOCAB]), "the target's head is frozen"


@pytest.mark.parametrize(("architecture", "size"), [("llama", 20), ("qwen3", 32)])
def test_conforms_with_a_rising_and_with_the_whole_vocabulary(architecture: str, size: int) -> None:
    """Which formats hold; tests/testing/test_testing.py has the one that does not rise."""
    check_drafter(drafter(torch.arange(size), architecture), tiny_target(architecture))


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_other_feature_layers_are_refused() -> None:
    parts = TargetParts.of(tiny_target())
    with pytest.raises(ValueError, match=r"feature_layers=\(3,\), got \(0, 1\)"):
        EagleDrafter.from_target(parts, draft_vocab=VOCAB, feature_layers=(0, 1))
    made = EagleDrafter.from_target(parts, draft_vocab=VOCAB, feature_layers=(3,))
    for layers, rows in (((1, 2), 16), ((3,), 15)):
        with pytest.raises(ValueError, match=rf"got layers .* and {rows} rows for 16 tokens"):
            EagleDrafter(
                made.config,
                embedding=made.embedding,
                head=made.head[:rows],
                draft_vocab=VOCAB,
                feature_layers=layers,
            )


@pytest.mark.parametrize(
    ("d2t", "message"),
    [
        (VOCAB + 1 - torch.arange(16), "'d2t' is another draft vocabulary"),
        (torch.full((16,), 31), "'d2t' points outside the target's vocabulary of 32"),
    ],
)
def test_another_draft_vocabulary_is_refused(d2t: Tensor, message: str) -> None:
    made = drafter()
    weights = {name: tensor + 1 for name, tensor in made.published().items()}
    before = {name: tensor.clone() for name, tensor in made.published().items()}
    with pytest.raises(ValueError, match=message):
        made.install({**weights, "d2t": d2t})
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.published().items())


# ---- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.fixture
def parts() -> TargetParts:
    return TargetParts.of(tiny_target(dtype=torch.float32))


def saved(parts: TargetParts, folder: Path, layout: str, vocab: Tensor) -> EagleDrafter:
    made = moved(EagleDrafter.from_target(parts, draft_vocab=vocab))
    save_drafter(made, folder, layout)
    return made


@pytest.mark.parametrize("vocab", [torch.tensor([2, 7, 11, 30]), VOCAB, torch.arange(32)])
@pytest.mark.parametrize("layout", ["sglang", "hf"])
def test_what_is_read_scores_as_what_was_written(
    parts: TargetParts, tmp_path: Path, layout: str, vocab: Tensor
) -> None:
    made = saved(parts, tmp_path / "drafter", layout, vocab)
    read = load_drafter(tmp_path / "drafter", parts, layout=layout)
    assert isinstance(read, EagleDrafter) and read.published().keys() == made.published().keys()
    assert all(torch.equal(read.published()[name], tensor) for name, tensor in made.published().items())
    assert torch.equal(read.head, parts.head.weight[vocab]) and read.feature_layers == (3,)
    batch = pack([tiny_trajectory(made)])
    assert torch.equal(read.score(batch), made.score(batch))


@pytest.mark.parametrize("layout", ["sglang", "hf"])
def test_a_folder_holds_what_others_read(parts: TargetParts, tmp_path: Path, layout: str) -> None:
    made = saved(parts, tmp_path / "whole", layout, torch.arange(32))
    saved(parts, tmp_path / "part", layout, torch.tensor([2, 7, 11, 30]))
    # What the authors' and SGLang's own conversions of their drafters hold, less the rotary table.
    names = {
        "fc.weight", "fc.bias", "layers.0.self_attn.q_proj.weight", "layers.0.self_attn.k_proj.weight",
        "layers.0.self_attn.v_proj.weight", "layers.0.self_attn.o_proj.weight", "layers.0.mlp.gate_proj.weight",
        "layers.0.mlp.up_proj.weight", "layers.0.mlp.down_proj.weight", "layers.0.post_attention_layernorm.weight",
        *({"embed_tokens.weight"} if layout == "hf" else ()),
    }  # fmt: skip
    whole, part = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "part"))
    assert set(whole) == names and set(part) == {*names, "d2t"}
    assert part["d2t"].tolist() == [2, 6, 9, 27]
    assert layout == "sglang" or torch.equal(whole["embed_tokens.weight"], made.embedding)
    config = json.loads((tmp_path / "part" / "config.json").read_text())
    expected = {
        "architectures": [{"sglang": "LlamaForCausalLMEagle", "hf": "LlamaForCausalLM"}[layout]],
        "model_type": "llama", "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_key_value_heads": 2,
        "head_dim": 4, "dtype": "float32", "tie_word_embeddings": False, "bias": True,
    }  # fmt: skip
    assert {name: config[name] for name in expected} == expected
    assert "draft_vocab_size" not in config  # SGLang and this library would take it for EAGLE-3's


def test_a_drafter_as_the_authors_publish_it_is_read(parts: TargetParts, tmp_path: Path) -> None:
    """Theirs for Llama 3 has no bias, names its entries as transformers did then, and holds the embedding."""
    made = moved(EagleDrafter.from_target(parts, draft_vocab=torch.arange(32)))
    tensors = {name: t.half() for name, t in made.published().items() if name not in ("fc.bias", "d2t")}
    config = {
        "architectures": ["LlamaForCausalLM"], "bias": False, "hidden_act": "silu", "hidden_size": 16, "head_dim": 4,
        "intermediate_size": 32, "max_position_embeddings": 2048, "model_type": "llama", "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_hidden_layers": 1, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "torch_dtype": "float16", "vocab_size": 32,
    }  # fmt: skip
    save_file(
        {**tensors, "embed_tokens.weight": torch.zeros(32, 16), "lm_head.weight": torch.zeros(32, 16)},
        tmp_path / "model.safetensors",
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = load_drafter(tmp_path, parts, layout="hf")
    assert isinstance(read, EagleDrafter) and not read.fc.bias.any()
    assert torch.equal(read.embedding, parts.embedding) and torch.equal(read.head, parts.head.weight)
    assert read.fc.weight.dtype == torch.float32 and torch.equal(read.fc.weight, tensors["fc.weight"].float())
    (tmp_path / "config.json").write_text(json.dumps({**config, "bias": True}))
    with pytest.raises(CheckpointError, match="'fc.bias'.* is missing"):
        load_drafter(tmp_path, parts, layout="hf")


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"architectures": ["LlamaForCausalLMEagle"]}, EagleDrafter),
        ({"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1}, EagleDrafter),
        ({"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1, "draft_vocab_size": 8}, Eagle3Drafter),
        ({"architectures": ["LlamaForCausalLMEagle3"], "num_hidden_layers": 1}, Eagle3Drafter),
    ],
)
def test_eagle_and_eagle3_are_told_apart(config: dict[str, Any], kind: type) -> None:
    assert recognized(config) is kind


def test_a_whole_llama_is_no_eagle() -> None:
    assert recognized({"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 30}) is not EagleDrafter


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"hidden_size": 32}, "config.json: hidden_size is 32, the target has 16"),
        ({"vocab_size": 33}, "config.json: vocab_size is 33, the target has 32"),
        ({"attention_bias": True}, "attention_bias is set, which this drafter has no form for"),
        ({"num_hidden_layers": 2}, "num_hidden_layers is 2, this drafter has one layer"),
        ({"rope_parameters": {"rope_theta": 77.0, "rope_type": "default"}}, "'rope_theta': 77.0.*the target has"),
        ({"num_key_value_heads": 4}, "num_key_value_heads is 4, the target has 2"),
    ],
)
def test_another_targets_drafter_is_refused_by_name(
    parts: TargetParts, tmp_path: Path, entries: dict[str, Any], message: str
) -> None:
    saved(parts, tmp_path / "drafter", "sglang", VOCAB)
    path = tmp_path / "drafter" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
    with pytest.raises(CheckpointError, match=message):
        load_drafter(tmp_path / "drafter", parts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fc.weight": None}, "'fc.weight'.* is missing"),
        ({"fc.bias": None}, "'fc.bias'.* is missing"),
        ({"layers.0.mlp.up_proj.weight": None}, "'layers.0.mlp.up_proj.weight'.* is missing"),
        ({"layers.0.input_layernorm.weight": torch.ones(16)}, "'layers.0.input_layernorm.weight' is unknown"),
        ({"norm.weight": torch.ones(16)}, "'norm.weight' is unknown"),
        ({"d2t": torch.full((16,), 30)}, "'d2t' points outside the target's vocabulary of 32"),
        ({"d2t": -torch.arange(16)}, "'d2t' gives token 0 more than one row"),
    ],
)
def test_a_tensor_that_does_not_belong_is_named(
    parts: TargetParts, tmp_path: Path, change: dict[str, Tensor | None], message: str
) -> None:
    saved(parts, tmp_path / "drafter", "sglang", VOCAB)
    path = tmp_path / "drafter" / "model.safetensors"
    tensors = {**load_file(path), **change}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    with pytest.raises(CheckpointError, match=message):
        load_drafter(tmp_path / "drafter", parts)
