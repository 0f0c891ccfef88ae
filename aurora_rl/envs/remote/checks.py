"""Checks that engines share: target and drafter against the learner's, and new weights before they load.

Legend: ``V`` vocabulary, ``Vd`` rows of the draft head, ``H`` hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from aurora_rl.collectors.codec import checksum
from aurora_rl.collectors.handshake import Handshake
from aurora_rl.envs.remote.plugin_server import PluginError
from aurora_rl.models.target_head import TargetHead
from aurora_rl.policies.policy import not_finite

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Projections that engines fuse, with their parts in the order of the rows."""


def check_target(
    handshake: Handshake, *, head: Tensor, bias: Tensor | None, config: Any, vocab: Tensor, folder: str
) -> None:
    """Refuse another output head or another draft vocabulary than the learner's.

    Args:
        handshake: What the learner expects.
        head: Weight of the target's output head, ``[>= V, H]``; rows after the vocabulary are padding.
        bias: Bias of the head, ``[V]``; None if it has none.
        config: Configuration of the target, with ``vocab_size`` and what scales or caps its logits.
        vocab: The target's token of each row of the draft head, ``[Vd]`` int64.
        folder: Folder on which server and learner are to be started, in words.

    Raises:
        PluginError: Names what differs, and what to do.
    """
    head = head[: config.vocab_size]
    # The learner found out which of them the model has; the engine's own code computes it.
    heads = TargetHead.candidates(head, bias, config)
    if not any(checksum(each.tensors()) == handshake.head_checksum for each in heads):
        raise PluginError(
            f"the target's output head differs from the learner's (the engine has it in {head.dtype}); "
            "serve the same model in the same dtype"
        )
    if checksum({"draft_vocab": vocab}) != handshake.draft_map_checksum:
        raise PluginError(f"the draft vocabulary (d2t) differs from the learner's; start both on {folder}")


def weights_fault(weights: Mapping[str, Tensor], vocab: Tensor, *, engine: str) -> str:
    """Return what is wrong with weights for a drafter of a draft vocabulary, empty if nothing is.

    Args:
        weights: Tensors by checkpoint names; ``d2t`` ``[Vd]`` may be among them.
        vocab: The target's token of each row of the draft head, ``[Vd]`` int64.
        engine: Name of the engine, for messages.

    Example:
        >>> weights_fault({"d2t": torch.tensor([0, 3])}, torch.tensor([0, 4]), engine="vLLM")
        ''
        >>> weights_fault({"fc.weight": torch.tensor([float("nan")])}, torch.tensor([0, 4]), engine="vLLM")
        "tensor 'fc.weight' has 1 value that is infinite or not a number; lower the learning rate"
    """
    if (fault := not_finite({name: tensor for name, tensor in weights.items() if name != "d2t"})) is not None:
        return fault
    if (shift := weights.get("d2t")) is not None and not torch.equal(shift.cpu() + torch.arange(len(shift)), vocab):
        return (
            f"the draft map 'd2t' differs from the one that the server was started with; restart {engine} with the "
            "learner's drafter"
        )
    return ""
