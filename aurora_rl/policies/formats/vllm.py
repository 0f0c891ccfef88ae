"""Drafter checkpoints as vLLM loads them, checked by the names and shapes that its loaders want (read in 0.32).

vLLM's own loaders check half of this. For EAGLE-3 they refuse unknown tensors, except biases, and serve with whatever
was in memory for missing ones; for Medusa they ignore unknown tensors and refuse missing ones. Here both are errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from aurora_rl.policies.drafter import check_draft_vocab

LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
"""Entry of an EAGLE-3's ``config.json`` that names the target's layers, in the top level or in ``eagle_config``."""
_NORMS = ("input_layernorm", "hidden_norm", "post_attention_layernorm")
_Shapes = dict[str, tuple[int, ...]]


def to_vllm(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Convert a drafter from this library's format to one that vLLM serves.

    EAGLE-3 keeps its names, and SGLang loads the result too: the file holds the layer ids of both engines. vLLM looks
    for them at the top level of ``config.json``, and names a feature by the layer that it enters. SGLang looks
    in ``eagle_config``, and names it by the layer that it leaves. A drafter with a row for every token has no ``d2t``.

    Medusa's heads get a row for every token, since vLLM 0.32 cannot load fewer. Each missing row becomes the mean of
    the others, which is never the greatest: the drafts stay the same. Heads that share a matrix are "original_lm_head".

    Args:
        tensors: Tensors of ``model.safetensors``.
        config: Entries of ``config.json``: SGLang's for EAGLE-3, those of ``MedusaDrafter.write`` for Medusa.

    Raises:
        ValueError: Names the first tensor that is missing, unknown or misshapen, or the architecture, or layer ids that
            do not rise: vLLM joins states in the order of its layers.

    Example:
        >>> heads = {"blocks.0.layers.0.weight": torch.eye(2), "lm_heads.0.weight": torch.eye(2)}
        >>> options = {"options": {"num_heads": 1, "num_layers": 1}, "feature_layers": [8]}
        >>> entries = {"architectures": ["MedusaDrafter"], "vocab_size": 3, **options}
        >>> written, config = to_vllm({**heads, "d2t": torch.tensor([0, 1])}, entries)
        >>> written["lm_heads.0.weight"].tolist(), written["token_map"].tolist()
        ([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]], [0, 2])
    """
    written = (_medusa_to_vllm if _is_medusa(config) else _eagle3_to_vllm)(dict(tensors), config)
    _check(*written)
    return written


def from_vllm(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Convert a drafter that vLLM serves to this library's format, the inverse of :func:`to_vllm`.

    ``feature_layers``, the target's number of layers, are missing if another program wrote the file of a Medusa.

    Raises:
        ValueError: Names the first tensor that is missing, unknown or misshapen, or the architecture, or layer ids that
            vLLM itself reads in two ways.

    Example:
        >>> heads = {"blocks.0.layers.0.weight": torch.eye(2), "lm_heads.0.weight": torch.zeros(3, 2)}
        >>> published = {"architectures": ["MedusaModel"], "vocab_size": 3, "hidden_size": 2, "num_heads": 1}
        >>> read, ours = from_vllm({**heads, "token_map": torch.tensor([0, 2])}, {**published, "num_hidden_layers": 1})
        >>> read["lm_heads.0.weight"].shape, read["d2t"].tolist(), ours["options"]
        (torch.Size([2, 2]), [0, 1], {'num_heads': 1, 'num_layers': 1, 'shared_head': False})
    """
    _check(tensors, config)
    return (_medusa_from_vllm if _is_medusa(config) else _eagle3_from_vllm)(dict(tensors), config)


_Files = tuple[dict[str, Tensor], dict[str, Any]]


def _eagle3_to_vllm(tensors: dict[str, Tensor], config: Mapping[str, Any]) -> _Files:
    known, ids = dict(config), _target_ids(tensors)
    if layers := (config.get("eagle_config") or {}).get(LAYER_IDS):
        if sorted(set(layers)) != list(layers):
            raise ValueError(f"config.json: {LAYER_IDS} must rise, got {layers}: vLLM joins states in that order")
        known[LAYER_IDS] = [layer + 1 for layer in layers]
    if len(ids) == config["vocab_size"]:
        del tensors["d2t"]
        tensors["lm_head.weight"] = _tensor(tensors, "lm_head.weight")[ids.argsort()]
    return tensors, known


def _eagle3_from_vllm(tensors: dict[str, Tensor], config: Mapping[str, Any]) -> _Files:
    known = dict(config)
    nested, layers = config.get("eagle_config") or {}, known.pop(LAYER_IDS, None)
    if nested.get(LAYER_IDS) and not layers:
        raise ValueError(
            f"config.json: {LAYER_IDS} stands in eagle_config only, where vLLM's model runners disagree on it (one "
            "takes the ids as they are, the other its defaults); write at the top level which layers the states enter"
        )
    if layers:
        known["eagle_config"] = {**nested, LAYER_IDS: [layer - 1 for layer in layers]}
    every = torch.zeros(config["vocab_size"], dtype=torch.int64)  # offsets where each token has its row
    return {"d2t": every, **{_file_name(name): tensor for name, tensor in tensors.items()}}, known


def _medusa_to_vllm(tensors: dict[str, Tensor], config: Mapping[str, Any]) -> _Files:
    ids = _target_ids(tensors)
    del tensors["d2t"]
    known = {
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "hidden_size": _tensor(tensors, "lm_heads.0.weight").shape[1],
        "vocab_size": config["vocab_size"],
        "num_heads": config["options"]["num_heads"],
        "num_hidden_layers": config["options"]["num_layers"],
        "original_lm_head": config["options"].get("shared_head", False),
        "feature_layers": config["feature_layers"],
    }
    for name, head in tensors.items():
        if name.startswith("lm_heads."):
            rows = head.mean(0, keepdim=True).repeat(config["vocab_size"], 1)
            tensors[name] = rows.index_copy(0, ids, head)
    # vLLM passes over the map if each token has a row. It is for the way back, as are the feature layers.
    return {**tensors, "token_map": ids}, known


def _medusa_from_vllm(tensors: dict[str, Tensor], config: Mapping[str, Any]) -> _Files:
    ids = tensors.pop("token_map", torch.arange(config["vocab_size"]))
    check_draft_vocab(ids, config["vocab_size"], "tensor 'token_map'")
    known = {
        "architectures": ["MedusaDrafter"],
        "vocab_size": config["vocab_size"],
        "draft_vocab_size": len(ids),
        "options": {
            "num_heads": config["num_heads"],
            "num_layers": config["num_hidden_layers"],
            "shared_head": config.get("original_lm_head", False),
        },
        **{name: value for name, value in config.items() if name == "feature_layers"},
    }
    heads = {name: head[ids] for name, head in tensors.items() if name.startswith("lm_heads.")}
    return {**tensors, **heads, "d2t": ids - torch.arange(len(ids), device=ids.device)}, known


def _tensor(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise ValueError(f"tensor {name!r} is missing")
    return tensors[name]


def _target_ids(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the target ids of the draft head's rows; ``d2t`` holds the differences."""
    offsets = _tensor(tensors, "d2t")
    return offsets + torch.arange(len(offsets), device=offsets.device)


def _is_medusa(config: Mapping[str, Any]) -> bool:
    name = (config.get("architectures") or [""])[0]
    if "Medusa" not in name and "Eagle3" not in name:
        raise ValueError(f"config.json: architectures names {name!r}; vLLM's format is for EAGLE-3 and Medusa")
    return "Medusa" in name


def _file_name(name: str) -> str:
    """Return an EAGLE-3 tensor's name here; vLLM accepts another for two of them."""
    return name.replace("layers.0.", "midlayer.").replace("draft_id_to_target_id", "d2t")


def _check(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Raise ValueError for tensors that vLLM's loaders refuse, and for those that they pass over."""
    medusa = _is_medusa(config)
    wanted, optional = (_medusa_shapes if medusa else _eagle3_shapes)(config)
    named = dict(tensors) if medusa else {_file_name(name): tensor for name, tensor in tensors.items()}
    for name, shape in wanted.items():
        if name not in named:
            raise ValueError(f"tensor {name!r} {shape} is missing; vLLM would serve without it")
        if tuple(named[name].shape) != shape:
            raise ValueError(f"tensor {name!r} must have shape {shape}, got {tuple(named[name].shape)}")
    if unknown := sorted(named.keys() - wanted.keys() - optional):
        raise ValueError(f"tensor {unknown[0]!r} is unknown to vLLM")


def _eagle3_shapes(config: Mapping[str, Any]) -> tuple[_Shapes, set[str]]:
    """Return the tensors of ``Eagle3LlamaForCausalLM``, and optional ones: it skips ``t2d`` and shares embeddings."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = (config[f"num_{kind}_heads"] * head_dim for kind in ("attention", "key_value"))
    rows = config.get("draft_vocab_size") or vocab
    nested = (config.get("eagle_config") or {}).get(LAYER_IDS)
    # In this order vLLM counts the states that it joins, top-level ids not among them.
    joined = config.get("num_aux_hidden_states") or (len(nested) if nested else 3)
    width = config.get("target_hidden_size") or hidden
    shapes: _Shapes = {
        "fc.weight": (hidden, joined * width),
        **{f"midlayer.{name}.weight": (hidden,) for name in _NORMS},
        "midlayer.self_attn.q_proj.weight": (queries, 2 * hidden),
        **{f"midlayer.self_attn.{kind}_proj.weight": (keys, 2 * hidden) for kind in ("k", "v")},
        "midlayer.self_attn.o_proj.weight": (hidden, queries),
        **{f"midlayer.mlp.{kind}_proj.weight": (inner, hidden) for kind in ("gate", "up")},
        "midlayer.mlp.down_proj.weight": (hidden, inner),
        "norm.weight": (hidden,),
        "lm_head.weight": (rows, hidden),
    }
    if config.get("fc_norm"):
        shapes |= {f"fc_norm.{i}.weight": (width,) for i in range(joined)}
    if rows != vocab:  # otherwise vLLM has no such parameter and refuses the tensor
        shapes["d2t"] = (rows,)
    return shapes, {"t2d", "embed_tokens.weight"}


def _medusa_shapes(config: Mapping[str, Any]) -> tuple[_Shapes, set[str]]:
    """Return the tensors of ``MedusaModel``, and optional ones."""
    hidden, shapes = config["hidden_size"], _Shapes()
    for head in range(config["num_heads"]):
        shapes |= {f"blocks.{head}.layers.{i}.weight": (hidden, hidden) for i in range(config["num_hidden_layers"])}
        if not head or not config.get("original_lm_head"):  # else all share the first
            shapes[f"lm_heads.{head}.weight"] = (config["vocab_size"], hidden)
    return shapes, {"token_map"}
