"""DFlash: blocks against a slow reference, names, day-0 weights, checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import silu

from aurora_rl.policies import DFlashDrafter, TargetParts, TreeShape, load_drafter, save_drafter
from aurora_rl.testing import check_drafter, tiny_target, tiny_trajectory
from aurora_rl.training.checkpoint import CheckpointError
from aurora_rl.trajectories import pack
from aurora_rl.tree_index import TreeIndex

HALF = torch.arange(0, 32, 2)
SHORT, LONG = (4, 5), (8, 4)  # prompt and completion


def drafter(architecture: str = "llama", vocab: Tensor = HALF, **options: Any) -> DFlashDrafter:
    """In float64, its weights moved a little so that no part is a copy of another."""
    torch.manual_seed(0)
    made = DFlashDrafter.from_target(TargetParts.of(tiny_target(architecture)), draft_vocab=vocab, **options).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return made


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


def block_logits(made: DFlashDrafter, tokens: Tensor, features: Tensor, root: int) -> Tensor:
    """What the block behind the root at position ``root`` predicts, ``[W - 1, Vd]``; one number at a time."""
    target, weights, config = tiny_target(), made.published(), made.config
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    theta = config.rope_parameters["rope_theta"]
    weights |= dict(made.named_parameters())  # with gradients
    context = [normed(weights["fc.weight"] @ f, weights["hidden_norm.weight"]) for f in features[:root]]
    said = [int(tokens[root])] + [made.mask_token_id] * (made.block_size - 1)
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
    head_rows = target.lm_head.weight[made.draft_vocab]
    return torch.stack([head_rows @ normed(x, weights["norm.weight"]) for x in hidden[1:]])


@pytest.mark.parametrize("options", [{"num_layers": 1, "block_size": 2}, {"num_layers": 2, "block_size": 4}])
def test_contexts_and_their_gradients_are_those_of_the_block_alone(options: dict[str, int]) -> None:
    made = drafter(**options)
    trajectories = [tiny_trajectory(made, prompt_length=p, max_new_tokens=n) for p, n in (SHORT, (1, 2), LONG)]
    roots, nodes, possible = [], [], []
    for trajectory in trajectories:
        tokens, features = trajectory["sequence", "tokens"], trajectory["sequence", "features"].double()
        offset = trajectory["rounds", "offset"].tolist()
        for number, anchor in enumerate(trajectory["rounds", "anchor"].tolist()):
            block = block_logits(made, tokens, features, anchor)
            roots.append(block[0])
            for depth in range(1, 1 + offset[number + 1] - offset[number]):  # of a chain
                nodes.append(block[min(depth, len(block) - 1)])
                possible.append(depth < len(block))
    expected, wanted = torch.stack(roots + nodes), torch.tensor([True] * len(roots) + possible)
    batch = pack(trajectories)
    got = made.context_logits(batch, TreeIndex.of(batch), torch.ones_like(wanted))
    torch.testing.assert_close(got[wanted], expected[wanted], rtol=0, atol=1e-12)

    weight = torch.randn_like(expected[wanted])
    mine, slow = (
        torch.autograd.grad((weight * logits).sum(), list(made.parameters()))
        for logits in (got[wanted], expected[wanted])
    )
    for a, b in zip(mine, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)

    wanted &= torch.rand(len(wanted)) < 0.4
    torch.testing.assert_close(
        made.context_logits(batch, TreeIndex.of(batch), wanted), expected[wanted], rtol=0, atol=1e-12
    )
    assert made.context_logits(batch, TreeIndex.of(batch), torch.zeros_like(wanted)).shape == (0, 16)


def test_a_served_block_is_the_block_alone() -> None:
    made = drafter(block_size=5)
    trajectories = [tiny_trajectory(made, prompt_length=p, max_new_tokens=n) for p, n in (SHORT, LONG)]
    made.allocate(2, 16)
    slots, lengths = torch.tensor([0, 1]), torch.tensor([5, 10])
    tokens, features = torch.zeros(2, 11, dtype=torch.int64), torch.zeros(2, 10, 32, dtype=torch.float64)
    for slot, (trajectory, length) in enumerate(zip(trajectories, lengths.tolist(), strict=True)):
        tokens[slot, : length + 1] = trajectory["sequence", "tokens"][: length + 1]
        features[slot, :length] = trajectory["sequence", "features"][:length]
    made.extend(slots, tokens, features, lengths)
    chains = made.propose(slots, TreeShape(9))  # deeper than there are masks
    assert chains.tokens.shape == (2, 4)
    for slot, length in enumerate(lengths.tolist()):
        log_q = block_logits(made, tokens[slot], features[slot], length).log_softmax(-1)
        assert chains.tokens[slot].tolist() == HALF[log_q.argmax(-1)].tolist()
        torch.testing.assert_close(chains.log_probs[slot], log_q.max(-1).values.float(), rtol=0, atol=1e-6)
    tree = made.propose(slots, TreeShape(2, 2))
    assert tree.parents.tolist() == [[-1, -1, 0, 0, 1, 1]] * 2
    assert torch.equal(tree.tokens[:, 2:4], tree.tokens[:, 4:])  # a depth has one distribution


def test_unroll_ends_with_the_block() -> None:
    made = drafter(block_size=3)
    batch = pack([tiny_trajectory(made, prompt_length=p, max_new_tokens=n) for p, n in ((1, 3), (4, 2))])
    logits, valid, states = made.unroll(batch, 5)
    # No feature lies before the first token of the first prompt: its first anchor drafts nothing.
    assert valid.tolist() == [[False, True, True, True, True], [False, False, True, False, True]]
    assert states is not None and [s.shape for s in states] == [(5, 16)] * 2
    assert all(torch.equal(state @ made.head.T, rows) for state, rows in zip(states, logits, strict=True))


@pytest.mark.parametrize(("architecture", "options"), [("llama", {}), ("qwen3", {"num_layers": 1, "block_size": 4})])
def test_it_conforms(architecture: str, options: dict[str, int]) -> None:
    check_drafter(drafter(architecture, **options), tiny_target(architecture))


# ---- weights --------------------------------------------------------------------------------------------------------


def layer_names(number: int) -> dict[str, tuple[int, ...]]:
    shapes = {
        "input_layernorm": (16,), "post_attention_layernorm": (16,), "self_attn.q_norm": (4,), "self_attn.k_norm": (4,),
        "self_attn.q_proj": (16, 16), "self_attn.k_proj": (8, 16), "self_attn.v_proj": (8, 16),
        "self_attn.o_proj": (16, 16), "mlp.gate_proj": (32, 16), "mlp.up_proj": (32, 16), "mlp.down_proj": (16, 32),
    }  # fmt: skip
    return {f"layers.{number}.{name}.weight": shape for name, shape in shapes.items()}


# What SGLang's DFlashDraftModel loads.
NAMES = {"fc.weight": (16, 32), "hidden_norm.weight": (16,), "norm.weight": (16,), **layer_names(0), **layer_names(1)}


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_day_0_starts_from_the_target(architecture: str) -> None:
    target = tiny_target(architecture)
    last = target.model.layers[-1]
    with torch.no_grad():
        last.input_layernorm.weight.mul_(1.5)
        if architecture == "qwen3":
            last.self_attn.q_norm.weight.mul_(3)
    made = DFlashDrafter.from_target(TargetParts.of(target), draft_vocab=HALF)
    assert made.feature_layers == (1, 2) and made.mask_token_id == 31
    assert made.options == {"num_layers": 2, "block_size": 8, "mask_token_id": 31}
    published = made.published()
    assert {name: tuple(tensor.shape) for name, tensor in published.items()} == {**NAMES, "d2t": (16,)}
    for number in range(2):
        for name, weight in last.named_parameters():
            torch.testing.assert_close(published[f"layers.{number}.{name}"], weight.float())
    torch.testing.assert_close(published["hidden_norm.weight"], last.input_layernorm.weight.float())
    torch.testing.assert_close(published["fc.weight"][:, 16:], torch.eye(16), atol=0.05, rtol=0)
    if architecture == "llama":
        # Queries are as large as the target's: behind its norm, of inputs that vary freely.
        x = last.input_layernorm(torch.randn(4096, 16, dtype=torch.float64))
        size = last.self_attn.q_proj(x).square().mean().sqrt().float()
        torch.testing.assert_close(published["layers.1.self_attn.q_norm.weight"], size.expand(4), rtol=0.05, atol=0)


def test_another_draft_vocabulary_takes_other_rows_of_the_targets_head() -> None:
    made, vocab = drafter(), HALF + 1
    weights = made.published() | {"d2t": vocab - torch.arange(16)}
    put, before = made.stage(weights), made.head
    assert torch.equal(made.draft_vocab, HALF) and made.head is before
    put()
    assert torch.equal(made.draft_vocab, vocab)
    assert torch.equal(made.head, tiny_target().lm_head.weight[vocab])


def test_tied_embeddings_are_held_once() -> None:
    target = tiny_target()
    target.lm_head.weight = target.model.embed_tokens.weight
    made = DFlashDrafter.from_target(TargetParts.of(target), draft_vocab=HALF)
    assert made.target_head is None and torch.equal(made.head, made.embedding[HALF])


# ---- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.fixture
def parts() -> TargetParts:
    return TargetParts.of(tiny_target(dtype=torch.float32))


@pytest.mark.parametrize("layout", ["hf", "sglang"])
@pytest.mark.parametrize("vocab", [HALF, torch.arange(32)])
def test_a_folder_holds_what_engines_read(layout: str, vocab: Tensor, parts: TargetParts, tmp_path: Path) -> None:
    made = drafter(vocab=vocab, block_size=4, mask_token_id=7).float()
    save_drafter(made, tmp_path / "drafter", layout)
    tensors = load_file(tmp_path / "drafter" / "model.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == NAMES | ({"d2t": (16,)} if len(vocab) < 32 else {})
    config = json.loads((tmp_path / "drafter" / "config.json").read_text())
    expected = {
        "architectures": ["DFlashDraftModel"], "model_type": "qwen3", "block_size": 4, "num_hidden_layers": 2,
        "num_target_layers": 3, "layer_types": ["full_attention"] * 2, "hidden_size": 16, "head_dim": 4,
        "attention_bias": False, "hidden_act": "silu", "tie_word_embeddings": False, "dtype": "float32",
        "dflash_config": {"mask_token_id": 7, "target_layer_ids": [0, 1]},
    }  # fmt: skip
    assert {name: config[name] for name in expected} == expected

    read = load_drafter(tmp_path / "drafter", parts, layout=layout)
    assert isinstance(read, DFlashDrafter) and read.options == made.options
    assert read.feature_layers == made.feature_layers and torch.equal(read.head, made.head)
    assert all(torch.equal(read.published()[name], tensor) for name, tensor in made.published().items())
    batch = pack([tiny_trajectory(made)])
    assert torch.equal(read.score(batch), made.score(batch))


@pytest.mark.parametrize(("layers", "ids"), [((0, 2), [-1, 1]), ((1, 3), [0, 2])])
def test_sglang_captures_between_layers_only(
    layers: tuple[int, ...], ids: list[int], parts: TargetParts, tmp_path: Path
) -> None:
    made = drafter(feature_layers=layers)
    with pytest.raises(CheckpointError, match=r"feature_layers has [03]; engines capture .* 1..2 of this target"):
        save_drafter(made, tmp_path / "drafter", "sglang")
    save_drafter(made, tmp_path / "drafter", "hf")
    config = json.loads((tmp_path / "drafter" / "config.json").read_text())
    assert config["dflash_config"]["target_layer_ids"] == ids
    assert load_drafter(tmp_path / "drafter", parts).feature_layers == layers


def edit(folder: Path, drop: str = "", **entries: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | entries
    config["dflash_config"].pop(drop, None)
    (folder / "config.json").write_text(json.dumps(config))


def test_entries_that_a_file_leaves_out(tmp_path: Path) -> None:
    """Older files say less: layers follow from the target's, the block has SGLang's size, the mask is asked for."""
    target = tiny_target(num_layers=8)
    parts = TargetParts.of(target)
    save_drafter(DFlashDrafter.from_target(parts, draft_vocab=HALF, feature_layers=(2, 6)), tmp_path / "drafter")
    edit(tmp_path / "drafter", "target_layer_ids", block_size=16)
    assert load_drafter(tmp_path / "drafter", parts).feature_layers == (2, 6)
    edit(tmp_path / "drafter", "mask_token_id")
    with pytest.raises(CheckpointError, match="mask_token_id is missing; set the option"):
        load_drafter(tmp_path / "drafter", parts)
    read = load_drafter(tmp_path / "drafter", parts, options={"mask_token_id": 3})
    assert read.options == {"num_layers": 2, "block_size": 16, "mask_token_id": 3}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"is_causal": True}, "is_causal is True, which this drafter has no form for"),
        ({"output_multiplier": 2.0}, "output_multiplier is 2.0"),
        ({"projector_type": "domino"}, "projector_type is 'domino'"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has sliding_attention"),
        ({"num_target_layers": 30}, "num_target_layers is 30, the target has 3"),
        ({"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}, "rope_parameters are"),
        ({"hidden_size": 8}, "hidden_size is 8, the target has 16"),
        ({"num_hidden_layers": 3}, r"config.json: `num_hidden_layers` \(3\) must be equal"),
        ({"num_hidden_layers": 3, "layer_types": None}, "tensor 'layers.2.input_layernorm.weight' .* is missing"),
        ({"dflash_config": {"mask_token_id": 7, "target_layer_ids": [0]}}, "tensor 'fc.weight' has shape"),
        ({"dflash_config": {"mask_token_id": 32, "target_layer_ids": [0, 1]}}, r"must lie in 0..31, got 32"),
    ],
)
def test_files_of_other_drafters_and_targets(
    entries: dict[str, Any], message: str, parts: TargetParts, tmp_path: Path
) -> None:
    save_drafter(drafter(), tmp_path / "drafter")
    edit(tmp_path / "drafter", **entries)
    with pytest.raises(CheckpointError, match=message):
        load_drafter(tmp_path / "drafter", parts)


def test_unknown_tensors_are_named(parts: TargetParts, tmp_path: Path) -> None:
    save_drafter(drafter(), tmp_path / "drafter")
    tensors = load_file(tmp_path / "drafter" / "model.safetensors")
    save_file({**tensors, "candidate.weight": torch.ones(4)}, tmp_path / "drafter" / "model.safetensors")
    with pytest.raises(CheckpointError, match="'candidate.weight' is unknown"):
        load_drafter(tmp_path / "drafter", parts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 1}, "at least 2 positions, a layer and a feature, got block_size=1, 2 layers"),
        ({"num_layers": 0}, "got block_size=8, 0 layers"),
        ({"mask_token_id": 32}, "mask_token_id must lie in 0..31, got 32"),
    ],
)
def test_bad_options(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        drafter(**options)
