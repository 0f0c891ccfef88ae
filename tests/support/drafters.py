"""Drafters that are no longer those of day 0, and edits of the folders that hold them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from aurora_rl.policies import DFlashDrafter, Drafter, TargetParts
from aurora_rl.testing import tiny_target

D = TypeVar("D", bound=Drafter)


def perturbed(drafter: D, scale: float = 0.1) -> D:
    """Move every parameter by noise, so that none adds nothing and no part is a copy of another."""
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter += scale * torch.randn_like(parameter)
    return drafter


def dflash_layer_shapes(number: int) -> dict[str, tuple[int, ...]]:
    shapes = {
        "input_layernorm": (16,), "post_attention_layernorm": (16,), "self_attn.q_norm": (4,), "self_attn.k_norm": (4,),
        "self_attn.q_proj": (16, 16), "self_attn.k_proj": (8, 16), "self_attn.v_proj": (8, 16),
        "self_attn.o_proj": (16, 16), "mlp.gate_proj": (32, 16), "mlp.up_proj": (32, 16), "mlp.down_proj": (16, 32),
    }  # fmt: skip
    return {f"layers.{number}.{name}.weight": shape for name, shape in shapes.items()}


# What SGLang's DFlashDraftModel loads of a drafter of the tiny target with two layers.
DFLASH_SHAPES = {
    "fc.weight": (16, 32),
    "hidden_norm.weight": (16,),
    "norm.weight": (16,),
    **dflash_layer_shapes(0),
    **dflash_layer_shapes(1),
}


HALF_THE_VOCAB = torch.arange(0, 32, 2)


def dflash_of_the_target(architecture: str = "llama", vocab: Tensor = HALF_THE_VOCAB, **options: Any) -> DFlashDrafter:
    """A perturbed DFlash of a tiny target, in float64."""
    torch.manual_seed(0)
    parts = TargetParts.of(tiny_target(architecture))
    return perturbed(DFlashDrafter.from_target(parts, draft_vocab=vocab, **options).double())


def edit_config(folder: Path, **entries: Any) -> None:
    """Replace entries of ``config.json``."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **entries}))


def edit_tensors(folder: Path, **tensors: Tensor | None) -> None:
    """Replace tensors of ``model.safetensors``; None removes one."""
    edited = {**load_file(folder / "model.safetensors"), **tensors}
    save_file({name: tensor for name, tensor in edited.items() if tensor is not None}, folder / "model.safetensors")
