"""Keys and values that a model keeps of earlier tokens, found by running it."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from aurora_rl.envs.exactness import NOT_LEARNED, TRY_SGLANG, UnsupportedModelError, reason_of
from aurora_rl.models.kv_cache import KVShape, RecurrentStateError, ShapeRecorder
from aurora_rl.models.target_head import decoder_of


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
