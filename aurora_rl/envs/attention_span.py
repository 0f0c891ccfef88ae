"""What a layer keeps and sees of a text: keys and values, windows and chunks, lengths on which attention depends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from aurora_rl.envs.exactness import NOT_LEARNED, TRY_SGLANG, UnsupportedModelError, reason_of
from aurora_rl.models.kv_cache import KVShape, RecurrentStateError, ShapeRecorder, sliding_window
from aurora_rl.models.target_head import decoder_of

# Lengths from which on GPT-Neo's local layers and Doge drop keys by their place in the pass.
_LENGTHS = ("window_size", "keep_window_size")
# Kinds of layers, in a configuration's `layer_types`: that have a state, and that attend to keys and values or keep
# nothing. Others, such as DeepSeek's sparse attention, choose the keys that they read.
_STATE_TYPES = ("linear_attention", "conv", "mamba", "hybrid")
_ATTENTION_TYPES = ("full_attention", "sliding_attention", "chunked_attention", "attention", "mlp", "moe")

First = Callable[[Tensor], Tensor]
"""First position that queries at some positions see."""


def kv_shapes(model: PreTrainedModel) -> dict[int, tuple[KVShape, KVShape]]:
    """Return the shapes of the keys and values of each layer, as the model writes them."""
    name, recorder = type(model).__name__, ShapeRecorder()
    tokens = torch.tensor([[1, 2]], device=model.device)
    try:
        with torch.inference_mode():
            decoder_of(model)(input_ids=tokens, past_key_values=recorder, use_cache=True)
        if not recorder.shapes:
            raise RecurrentStateError("it keeps no keys and values of earlier tokens that slots could hold")
    except RecurrentStateError as error:
        raise UnsupportedModelError(f"{name} cannot verify trees: {error}; {NOT_LEARNED}") from error
    except Exception as error:  # whatever a forward raises that takes another cache
        raise UnsupportedModelError(
            f"{name} does not run with a cache of keys and values ({reason_of(error)}); {TRY_SGLANG}"
        ) from error
    return recorder.shapes


def mask_kinds(config: PretrainedConfig, name: str, max_length: int) -> dict[str | None, First | None]:
    """Return from which position on each kind of layer sees a text: None for all of it, empty if all layers do.

    The key is None if all layers are of one kind that does not see all of it.

    Raises:
        UnsupportedModelError: Some layers are no attention over keys and values.
    """
    types = getattr(config, "layer_types", None)
    if types is not None and (unknown := sorted(set(types) - set(_ATTENTION_TYPES))):
        layers = f"{name} has layers of the kind {', '.join(unknown)}"
        if not set(unknown).isdisjoint(_STATE_TYPES):
            raise UnsupportedModelError(
                f"{layers}, which keep a state that cannot be rolled back to the accepted node of a tree; {NOT_LEARNED}"
            )
        raise UnsupportedModelError(f"{layers}, which choose the keys that they read; {TRY_SGLANG}")
    window, chunk = sliding_window(config), getattr(config, "attention_chunk_size", None)
    kinds: dict[str | None, First | None] = {}
    if window is not None and window < max_length:
        kinds["sliding_attention"] = lambda position: (position - window + 1).clamp(min=0)
    if chunk and chunk < max_length and "chunked_attention" in (types or ()):
        kinds["chunked_attention"] = lambda position: position // chunk * chunk
    if not kinds or types is None:
        return dict.fromkeys([None] * len(kinds), next(iter(kinds.values()), None))
    return {kind: kinds.get(kind) for kind in set(types)}


def make_independent_of_length(model: PreTrainedModel, max_length: int) -> None:
    """Keep attention from changing with the length of a pass, which a neighbour or a draft may change.

    `dynamic` and `longrope` compute with other frequencies once a pass is longer than the original context, while
    cached keys keep theirs. Up to that length they are constant, and are served as such.

    Raises:
        UnsupportedModelError: ``max_length`` goes beyond the original context.
    """
    config = model.config.get_text_config()
    module: Any
    for module in decoder_of(model).modules():
        kinds = getattr(module, "rope_type", None)
        layer_types = list(kinds) if isinstance(kinds, dict) else [None] if isinstance(kinds, str) else []
        for layer_type in layer_types:
            settings = config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
            kind = settings["rope_type"]  # not the module's: another engine may have frozen it
            if "dynamic" not in kind and kind != "longrope":
                continue
            original = settings.get("original_max_position_embeddings") or config.max_position_embeddings
            if max_length > original:
                raise UnsupportedModelError(
                    f"{type(model).__name__} has {kind} RoPE, whose frequencies change when a text grows beyond "
                    f"{original} tokens, with those that are cached; set engine.max_length <= {original} "
                    f"(got {max_length})"
                )
            # An earlier pass, of whoever used the model, may have left frequencies of its length.
            prefix = "" if layer_type is None else f"{layer_type}_"
            own = getattr(module, f"{prefix}original_inv_freq").to(model.device)
            module.register_buffer(f"{prefix}inv_freq", own.clone(), persistent=False)
            if isinstance(kinds, dict):
                kinds[layer_type] = "default"
            else:
                module.rope_type = "default"
    for name in _LENGTHS:
        limit = getattr(config, name, None)
        if isinstance(limit, int) and max_length > limit:
            raise UnsupportedModelError(
                f"{type(model).__name__} attends to part of a text beyond {name}={limit} tokens, and finds it by the "
                f"length of a pass; set engine.max_length <= {limit} (got {max_length})"
            )
    floor = getattr(config, "floor_scale", None)
    if floor and getattr(config, "attn_temperature_tuning", False) and max_length >= floor:
        raise UnsupportedModelError(
            f"{type(model).__name__} scales attention by the length of its cache from position {floor} on, and a "
            f"tree has no such length; set engine.max_length <= {floor - 1} (got {max_length})"
        )
