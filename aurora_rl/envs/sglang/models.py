"""Which targets and drafters in SGLang can be learned from."""

from __future__ import annotations

from typing import Any

import torch

_ARCHITECTURES = ("LlamaForCausalLMEagle3", "LlamaForCausalLMEagle")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_HEAD = ("lm_head", "logits_processor")
_SIZES = ("vocab_size", "num_hidden_layers")


def target_fault(model: Any, algorithm: str, *, hybrid: bool) -> str:
    """Return why the passes of a target in SGLang cannot be recorded, empty if they can.

    Args:
        model: SGLang's model.
        algorithm: SGLang's speculative algorithm.
        hybrid: Whether some of its layers have a state in place of a cache, such as linear attention.
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
