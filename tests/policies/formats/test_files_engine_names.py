"""Exported folders (formats/llama_eagle.py, formats/vllm.py) against an engine written from its documents alone.

The engine is ``tests/support/plain_engine.py``. Here it takes ``config.json`` and ``model.safetensors``, puts every
tensor where the loaders of SGLang or vLLM put it (fused projections included), and refuses what they pass over in
silence: a name that they do not know, a parameter that nothing fills.
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
from plain_engine import (
    SOME,
    THETA,
    Draft,
    Parameters,
    Target,
    assert_drafts_alike,
    decoder_layer,
    drafter_of,
    eagle3,
    of_layer,
    over_vocabulary,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from aurora_rl.policies import Drafter, EagleDrafter, MedusaDrafter
from aurora_rl.policies.formats.files import save_drafter

FUSED = {"q_proj": ("qkv_proj", 0), "k_proj": ("qkv_proj", 1), "v_proj": ("qkv_proj", 2),
         "gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1)}  # fmt: skip

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
        return blocks | {f"lm_heads.{h}.weight" for h in heads if not h or not config["original_lm_head"]}

    parameters, config = load(folder, lambda name: None if name == "token_map" else name, wanted)
    target = Target()

    def draft(text: Tensor, path: list[int]) -> Tensor:
        hidden, head = target.states(text)[-1][-2], len(path)
        for i in range(config["num_hidden_layers"]):
            hidden = hidden + F.silu(hidden @ parameters[f"blocks.{head}.layers.{i}.weight"].T)
        return hidden @ parameters[f"lm_heads.{0 if config['original_lm_head'] else head}.weight"].T

    return draft


ENGINES: dict[str, tuple[str, str, Callable[[Path], Draft]]] = {
    "eagle3 in sglang": ("eagle3", "sglang", sglang_eagle3_of),
    "eagle3 in vllm": ("eagle3", "vllm", vllm_eagle3_of),
    "eagle in sglang": ("eagle", "sglang", sglang_eagle_of),
    "medusa in vllm": ("medusa", "vllm", vllm_medusa_of),
}


def exported(engine: str, folder: Path, **options: Any) -> tuple[Drafter, Callable[[Path], Draft]]:
    name, format, reader = ENGINES[engine]
    drafter = drafter_of(name, SOME, **options)
    save_drafter(drafter.float(), folder, format)
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


@pytest.mark.parametrize("shared_head", [True, False])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_vllm_drafts_as_the_exported_medusa(num_layers: int, shared_head: bool, tmp_path: Path) -> None:
    options = {"num_heads": 3, "num_layers": num_layers, "shared_head": shared_head}
    drafter, reader = exported("medusa in vllm", tmp_path / "drafter", **options)
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
    options |= {"shared_head": False} if engine.startswith("medusa") else {}
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
    gone = next(name for name in tensors if name.endswith(("o_proj.weight", "lm_heads.0.weight")))
    change(folder, {name: t for name, t in tensors.items() if name != gone})
    with pytest.raises(KeyError, match="is missing"):
        reader(folder)


def test_another_draft_map_drafts_differently(tmp_path: Path) -> None:
    drafter, reader = exported("eagle3 in sglang", tmp_path / "drafter")
    tensors = load_file(tmp_path / "drafter" / "model.safetensors")
    change(tmp_path / "drafter", {**tensors, "d2t": tensors["d2t"] + 1})
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        assert_drafts_alike(drafter, reader(tmp_path / "drafter"))
