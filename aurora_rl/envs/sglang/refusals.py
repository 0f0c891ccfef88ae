"""Which servers, targets and drafters of SGLang cannot be learned from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

_ARCHITECTURES = ("LlamaForCausalLMEagle3", "LlamaForCausalLMEagle")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_HEAD = ("lm_head", "logits_processor")
_SIZES = ("vocab_size", "num_hidden_layers")


def layout_fault(arguments: Mapping[str, Any]) -> str:
    """Return why a server of several GPUs cannot be learned from, by SGLang's arguments; empty if it can.

    Example:
        >>> layout_fault({"tp_size": 2, "pp_size": 2})
        'pp_size=2 is not supported: no rank has the whole of target and drafter; use --tp-size'
    """
    size, pipeline = arguments["tp_size"], arguments["pp_size"]
    if pipeline != 1:
        return f"pp_size={pipeline} is not supported: no rank has the whole of target and drafter; use --tp-size"
    if arguments["enable_dp_attention"]:
        return (
            "enable_dp_attention is not supported: its replicas share layers and one drafter; start without "
            "--enable-dp-attention, then each has a drafter of its own"
        )
    if arguments["attn_cp_size"] != 1:
        return (
            f"attn_cp_size={arguments['attn_cp_size']} is not supported: a rank has features of a part of a prompt "
            "alone; use --tp-size"
        )
    if size > 1 and (backend := arguments["moe_a2a_backend"]) not in (None, "none"):
        return (
            f"moe_a2a_backend={backend!r} is not supported with tp_size={size}: a rank may have features of a part of "
            "the tokens alone; start without --moe-a2a-backend"
        )
    if size > 1 and arguments["speculative_token_map"] and str(arguments["speculative_algorithm"]).upper() == "EAGLE":
        return (
            f"EAGLE with a reduced vocabulary is not supported with tp_size={size}: SGLang takes rows of each rank's "
            "part of the head by ids of the whole vocabulary; start without --speculative-token-map"
        )
    return ""


def target_fault(model: Any, algorithm: str, *, hybrid: bool) -> str:
    """Return why the passes of a target in SGLang cannot be recorded, empty if they can.

    A ``hybrid`` model has layers with a state in place of a cache, such as linear attention.
    """
    if hybrid:
        return (
            f"SGLang's {type(model).__name__} has layers with a state (linear attention or Mamba), on which the "
            "recorder has not been run; serve another target"
        )
    lacks = [name for name in _HEAD if not hasattr(model, name)]
    lacks += [f"config.{name}" for name in _SIZES if not hasattr(getattr(model, "config", None), name)]
    if algorithm == "EAGLE3" and not hasattr(getattr(model, "model", None), "layers_to_capture"):
        lacks.append("model.layers_to_capture")
    if not lacks:
        return ""
    name = type(model).__name__
    return f"SGLang's {name} has no {', '.join(lacks)}; serve a target of text alone that has, such as a Llama or Qwen3"


def drafter_fault(model: Any) -> str:
    """Return why the weights of a draft model of SGLang cannot be swapped, empty if they can.

    Example:
        >>> class DeepseekV3ForCausalLMNextN(torch.nn.Module): ...
        >>> drafter_fault(DeepseekV3ForCausalLMNextN())
        "SGLang's drafter is a DeepseekV3ForCausalLMNextN; use one of LlamaForCausalLMEagle3, LlamaForCausalLMEagle"
    """
    if (name := type(model).__name__) not in _ARCHITECTURES:
        return f"SGLang's drafter is a {name}; use one of {', '.join(_ARCHITECTURES)}"
    for name, parameter in model.named_parameters():
        if parameter.dtype not in _DTYPES or name.endswith("_scale"):
            dtype = str(parameter.dtype).removeprefix("torch.")
            return (
                f"SGLang's drafter is quantized ({name!r} is {dtype}), and learned weights are not; start the server "
                "with --speculative-draft-model-quantization unquant"
            )
    return ""
