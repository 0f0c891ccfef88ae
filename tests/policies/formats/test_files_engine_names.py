"""Exported folders (formats/llama_eagle.py, formats/vllm.py) against an engine written from its documents alone.

The engine here is plain torch in float64. It takes ``config.json`` and ``model.safetensors``, puts every tensor where
the loaders of SGLang or vLLM put it (fused projections included), and refuses what they pass over in silence: a name
that they do not know, a parameter that nothing fills. It runs a path of tokens alone and anew at every step, without a
cache.

Legend: ``n`` pairs of a path, ``H`` hidden size, ``L`` layers of the target, ``V`` target vocabulary.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tensordict import TensorDict
from torch import Tensor

from aurora_rl.policies import Drafter, EagleDrafter, MedusaDrafter, TargetParts, get_drafter
from aurora_rl.policies.formats.files import save_drafter
from aurora_rl.testing import tiny_target, tiny_trajectory
from aurora_rl.trajectories import pack
from aurora_rl.tree_index import TreeIndex

THETA = 300.0  # far from the base that engines fall back to
SOME = torch.tensor([1, 2, 5, 9, 14, 20, 30])
FUSED = {"q_proj": ("qkv_proj", 0), "k_proj": ("qkv_proj", 1), "v_proj": ("qkv_proj", 2),
         "gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1)}  # fmt: skip
Parameters = dict[str, Tensor]

# ---- the engine: names ----------------------------------------------------------------------------------------------


def sglang_eagle3(name: str) -> str | None:
    """``LlamaForCausalLMEagle3``: the name itself, or with "model." before it. ``t2d`` is not read."""
    return None if name == "t2d" else name if name in ("lm_head.weight", "d2t") else f"model.{name}"


def vllm_eagle3(name: str) -> str | None:
    """``Eagle3LlamaForCausalLM``."""
    if name == "t2d":
        return None
    name = name.replace("d2t", "draft_id_to_target_id").replace("midlayer.", "layers.0.")
    return name if "lm_head" in name or "draft_id" in name else f"model.{name}"


def sglang_eagle(name: str) -> str | None:
    """``LlamaForCausalLMEagle``. It has no ``d2t``: a user makes the token map of it that goes on the command line."""
    return "token_map" if name == "d2t" else f"model.{name}"


def layer_names(prefix: str, *norms: str) -> set[str]:
    return {
        f"{prefix}{name}.weight"
        for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj",
                     "post_attention_layernorm", *norms)
    }  # fmt: skip


def eagle3_names(layer: str, d2t: str, config: dict[str, Any]) -> set[str]:
    norms = {f"model.fc_norm.{i}.weight" for i in range(2)} if config.get("fc_norm") else set()
    own = {"model.fc.weight", "model.norm.weight", "lm_head.weight", d2t}
    return own | norms | layer_names(layer, "input_layernorm", "hidden_norm")


def load(
    folder: Path, named: Callable[[str], str | None], wanted: Callable[[dict[str, Any]], set[str]]
) -> tuple[Parameters, dict[str, Any]]:
    """The engine's parameters and the configuration.

    Raises:
        KeyError: names the first tensor without a parameter, or parameter without a tensor.
    """
    config = json.loads((folder / "config.json").read_text())
    parts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if (place := named(name)) is None:
            continue
        shard = 0
        for piece, (fused, index) in FUSED.items():
            if f".{piece}." in place:
                place, shard = place.replace(piece, fused), index
        parts.setdefault(place, {})[shard] = tensor.double() if tensor.is_floating_point() else tensor
    for name in sorted(parts.keys() ^ wanted(config)):
        raise KeyError(f"{name} is {'unknown' if name in parts else 'missing'}")
    for name, shards in parts.items():
        if len(shards) != (3 if "qkv" in name else 2 if "gate_up" in name else 1):
            raise KeyError(f"{name} is filled in part")
    return {name: torch.cat([shards[i] for i in sorted(shards)]) for name, shards in parts.items()}, config


# ---- the engine: sums -----------------------------------------------------------------------------------------------


def norm(x: Tensor, weight: Tensor, config: dict[str, Any]) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt()


def rotate(x: Tensor, config: dict[str, Any]) -> Tensor:
    """``[n, heads, d]`` at positions 0 … n − 1: pairs of the first and the second half, as Llama has them."""
    half = x.shape[-1] // 2
    frequency = config["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(len(x), dtype=torch.float64)[:, None, None] * frequency
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1)


def decoder_layer(x: Tensor, residual: Tensor, layer: Parameters, config: dict[str, Any]) -> Tensor:
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
    """The states that engines capture, by transformers: entry ``l`` enters layer ``l``, the last its output head."""

    def __init__(self) -> None:
        self.model = tiny_target()
        self.embedding = self.model.get_input_embeddings().weight
        self.head = self.model.get_output_embeddings().weight

    def states(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """``L + 1`` tensors ``[n, H]``."""
        states = self.model(tokens[None], output_hidden_states=True).hidden_states
        return tuple(state[0] for state in states)


# A way to draft: logits [V] after a text of tokens and a path of drafted ones, −inf where no row is.
Draft = Callable[[Tensor, list[int]], Tensor]


def over_vocabulary(logits: Tensor, ids: Tensor) -> Tensor:
    return torch.full((32,), -torch.inf, dtype=torch.float64).index_copy(0, ids, logits)


def eagle3(parameters: Parameters, config: dict[str, Any], layer: str, layers: list[int], d2t: str) -> Draft:
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
            last = decoder_layer(read, carried, own, config)[-1:]
            normed = norm(last, parameters["model.norm.weight"], config)
            if token is not None:
                carried = torch.cat([carried, normed if config.get("norm_output") else last])
                tokens = torch.cat([tokens, torch.tensor([token])])
        return over_vocabulary(normed[0] @ parameters["lm_head.weight"].T, ids)

    return draft


def sglang_eagle3_of(folder: Path) -> Draft:
    parameters, config = load(folder, sglang_eagle3, lambda config: eagle3_names("model.midlayer.", "d2t", config))
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    left = config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
    return eagle3(parameters, config, "model.midlayer.", [i + 1 for i in left], "d2t")


def vllm_eagle3_of(folder: Path) -> Draft:
    d2t, layer = "draft_id_to_target_id", "model.layers.0."
    parameters, config = load(folder, vllm_eagle3, lambda config: eagle3_names(layer, d2t, config))
    return eagle3(parameters, config, layer, config["eagle_aux_hidden_state_layer_ids"], d2t)


def sglang_eagle_of(folder: Path, mapped: bool = True) -> Draft:
    """EAGLE under the target's own head; the token map is the whole vocabulary where none is given."""
    names = {"model.fc.weight", "model.fc.bias", *layer_names("model.layers.0.")}
    parameters, config = load(folder, sglang_eagle, lambda config: names | ({"token_map"} if mapped else set()))
    assert config["architectures"] == ["LlamaForCausalLMEagle"]
    target, own = Target(), of_layer(parameters, "model.layers.0.")
    offsets = parameters.get("token_map", torch.zeros(32, dtype=torch.int64))
    ids = offsets + torch.arange(len(offsets))

    def draft(text: Tensor, path: list[int]) -> Tensor:
        carried, tokens = target.states(text)[-1][:-1], text[1:]
        for token in [*path, None]:
            both = torch.cat([target.embedding[tokens], carried], -1)
            fused = both @ parameters["model.fc.weight"].T + parameters["model.fc.bias"]
            last = decoder_layer(fused, fused, own, config)[-1:]
            if token is not None:
                carried, tokens = torch.cat([carried, last]), torch.cat([tokens, torch.tensor([token])])
        return over_vocabulary(last[0] @ target.head[ids].T, ids)

    return draft


def vllm_medusa_of(folder: Path) -> Draft:
    """``MedusaModel``, whose heads have a row for every token; the path says no more than which head it is."""

    def wanted(config: dict[str, Any]) -> set[str]:
        assert config["architectures"] == ["MedusaModel"] and config["model_type"] == "medusa"
        heads = range(config["num_heads"])
        blocks = {f"blocks.{h}.layers.{i}.weight" for h in heads for i in range(config["num_hidden_layers"])}
        return blocks | {f"lm_heads.{h}.weight" for h in heads}

    parameters, config = load(folder, lambda name: None if name == "token_map" else name, wanted)
    target = Target()

    def draft(text: Tensor, path: list[int]) -> Tensor:
        hidden, head = target.states(text)[-1][-2], len(path)
        for i in range(config["num_hidden_layers"]):
            hidden = hidden + F.silu(hidden @ parameters[f"blocks.{head}.layers.{i}.weight"].T)
        return hidden @ parameters[f"lm_heads.{head}.weight"].T

    return draft


# ---- the drafter, and the comparison ---------------------------------------------------------------------------------


def drafter_of(name: str, vocab: Tensor, **options: Any) -> Drafter:
    """A drafter of a target with base ``THETA``, none of its tensors as it started; float64 of float32 weights."""
    target = tiny_target(dtype=torch.float32)
    target.config.rope_parameters = {"rope_type": "default", "rope_theta": THETA}
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


ENGINES: dict[str, tuple[str, str, Callable[[Path], Draft]]] = {
    "eagle3 in sglang": ("eagle3", "sglang", sglang_eagle3_of),
    "eagle3 in vllm": ("eagle3", "vllm", vllm_eagle3_of),
    "eagle in sglang": ("eagle", "sglang", sglang_eagle_of),
    "medusa in vllm": ("medusa", "vllm", vllm_medusa_of),
}


def exported(engine: str, folder: Path, **options: Any) -> tuple[Drafter, Callable[[Path], Draft]]:
    name, layout, reader = ENGINES[engine]
    drafter = drafter_of(name, SOME, **options)
    save_drafter(drafter.float(), folder, layout)
    config = json.loads((folder / "config.json").read_text())
    assert name == "medusa" or config["rope_theta"] == config["rope_parameters"]["rope_theta"] == THETA
    return drafter.double(), reader


@pytest.mark.parametrize(
    ("engine", "options"),
    [
        *itertools.product(
            ["eagle3 in sglang", "eagle3 in vllm"],
            [{}, {"fc_norm": True}, {"norm_output": True}, {"fc_norm": True, "norm_output": True}],
        ),
        ("eagle3 in vllm", {"feature_layers": (0, 1)}),
    ],
)
def test_an_engine_drafts_as_the_exported_eagle3(engine: str, options: dict[str, Any], tmp_path: Path) -> None:
    drafter, reader = exported(engine, tmp_path / "drafter", **options)
    assert_drafts_alike(drafter, reader(tmp_path / "drafter"))


@pytest.mark.parametrize("vocab", [SOME, torch.arange(32)])
def test_sglang_drafts_as_the_exported_eagle(vocab: Tensor, tmp_path: Path) -> None:
    drafter = drafter_of("eagle", vocab)
    assert isinstance(drafter, EagleDrafter)
    save_drafter(drafter.float(), tmp_path / "drafter")
    assert_drafts_alike(drafter.double(), sglang_eagle_of(tmp_path / "drafter", mapped=len(vocab) < 32))


@pytest.mark.parametrize("num_layers", [1, 2])
def test_vllm_drafts_as_the_exported_medusa(num_layers: int, tmp_path: Path) -> None:
    drafter, reader = exported("medusa in vllm", tmp_path / "drafter", num_heads=3, num_layers=num_layers)
    assert isinstance(drafter, MedusaDrafter)
    assert_drafts_alike(drafter, reader(tmp_path / "drafter"))


# ---- the comparison sees what is wrong ------------------------------------------------------------------------------


def change(folder: Path, tensors: dict[str, Tensor], **entries: Any) -> None:
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **entries}))


@pytest.mark.parametrize("engine", ["eagle3 in sglang", "eagle3 in vllm", "eagle in sglang"])
def test_another_theta_drafts_differently(engine: str, tmp_path: Path) -> None:
    drafter, reader = exported(engine, tmp_path / "drafter")
    change(tmp_path / "drafter", load_file(tmp_path / "drafter" / "model.safetensors"), rope_theta=10000.0)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        assert_drafts_alike(drafter, reader(tmp_path / "drafter"))


@pytest.mark.parametrize(
    ("engine", "first", "second"),
    [
        ("eagle3 in sglang", "midlayer.self_attn.k_proj.weight", "midlayer.self_attn.v_proj.weight"),
        ("eagle3 in vllm", "midlayer.mlp.gate_proj.weight", "midlayer.mlp.up_proj.weight"),
        ("eagle3 in sglang", "midlayer.input_layernorm.weight", "midlayer.hidden_norm.weight"),
        ("eagle3 in vllm", "norm.weight", "midlayer.post_attention_layernorm.weight"),
        ("eagle3 in sglang", "fc_norm.0.weight", "fc_norm.1.weight"),
        ("eagle in sglang", "layers.0.mlp.gate_proj.weight", "layers.0.mlp.up_proj.weight"),
        ("eagle in sglang", "fc.bias", "layers.0.post_attention_layernorm.weight"),
        ("medusa in vllm", "lm_heads.0.weight", "lm_heads.1.weight"),
        ("medusa in vllm", "blocks.0.layers.0.weight", "blocks.1.layers.0.weight"),
    ],
)
def test_swapped_tensors_draft_differently(engine: str, first: str, second: str, tmp_path: Path) -> None:
    options = {"fc_norm": True} if engine.startswith("eagle3") else {}
    drafter, reader = exported(engine, tmp_path / "drafter", **options)
    tensors = load_file(tmp_path / "drafter" / "model.safetensors")
    change(tmp_path / "drafter", {**tensors, first: tensors[second], second: tensors[first]})
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        assert_drafts_alike(drafter, reader(tmp_path / "drafter"))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_name_too_many_or_too_few_is_an_error(engine: str, tmp_path: Path) -> None:
    folder = tmp_path / "drafter"
    _, reader = exported(engine, folder)
    tensors = load_file(folder / "model.safetensors")
    change(folder, {**tensors, "rotary_emb.inv_freq": torch.ones(2)})
    with pytest.raises(KeyError, match="rotary_emb.inv_freq is unknown"):
        reader(folder)
    gone = next(name for name in tensors if name.endswith(("o_proj.weight", "lm_heads.1.weight")))
    change(folder, {name: t for name, t in tensors.items() if name != gone})
    with pytest.raises(KeyError, match="is missing"):
        reader(folder)


def test_another_draft_map_drafts_differently(tmp_path: Path) -> None:
    drafter, reader = exported("eagle3 in sglang", tmp_path / "drafter")
    tensors = load_file(tmp_path / "drafter" / "model.safetensors")
    change(tmp_path / "drafter", {**tensors, "d2t": tensors["d2t"] + 1})
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        assert_drafts_alike(drafter, reader(tmp_path / "drafter"))
