"""The parts of a target that drafters need, read from its files without the rest of its weights."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from aurora_rl.models.loading import freeze_model, load_target, quiet_transformers, source_of
from aurora_rl.models.parts import TargetParts
from aurora_rl.models.target_head import decoder_layers

logger = logging.getLogger(__name__)

_LAYER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")  # the first number in a weight's name is that of its layer


def load_parts(model: str | os.PathLike[str], *, dtype: torch.dtype, device: str | torch.device) -> TargetParts:
    """Load what drafters and their training need of a target: embedding, head, norms and the last decoder layer.

    They are read from safetensors alone, of which a model on the hub has only those files fetched that hold them.
    The whole target is loaded, and dropped, if it is quantized, kept in another format, or of a family that cannot run
    with its last layer alone.

    Args:
        model: Target, as `load_target` takes it.
        dtype: Dtype of the weights.
        device: Device of the weights, such as ``"cpu"`` or ``"cuda:0"``.

    Returns:
        The same as ``TargetParts.of`` of the whole target.

    Raises:
        ModelError: As `load_target` raises it.
        ValueError: As ``TargetParts.of`` raises it.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from aurora_rl.testing import tiny_folder
        >>> with TemporaryDirectory() as folder:
        ...     parts = load_parts(tiny_folder(folder), dtype=torch.float32, device="cpu")
        >>> parts.head.weight.shape, parts.config.num_hidden_layers
        (torch.Size([300, 32]), 3)
    """
    source, config = source_of(os.fspath(model))[0], None
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(source)
            return TargetParts.of(_last_layer_alone(source, config, dtype, device))
    except Exception as error:  # families fail in their own ways; what is wrong with the files, the other way tells
        if config is not None:  # else there is no model, which one line tells
            logger.warning(
                "the whole of model %s is loaded for its parts, which cannot be read alone: %s", model, error
            )
    return TargetParts.of(load_target(model, dtype=dtype, device=device)[0])


def _last_layer_alone(
    source: str, config: PretrainedConfig, dtype: torch.dtype, device: str | torch.device
) -> PreTrainedModel:
    """Load a causal LM whose decoder has its last layer alone, which is number 0 then."""
    if hasattr(config, "quantization_config"):
        raise ValueError("it is quantized")
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(config)
    kind: Any = type(whole)

    class LastLayer(kind):
        def __init__(self, config: PretrainedConfig, *arguments: Any, **options: Any) -> None:
            super().__init__(config, *arguments, **options)
            del decoder_layers(self)[:-1]

    # Errors have the name, and transformers reads the module's source for what the family can do.
    LastLayer.__name__, LastLayer.__module__ = kind.__name__, kind.__module__
    with _weights(source, len(decoder_layers(whole)) - 1) as weights:
        loaded: Any = LastLayer.from_pretrained(
            None, config=whole.config, state_dict=weights, dtype=dtype, output_loading_info=True
        )
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{missing[0]!r} is missing")
    return freeze_model(model, device)


@contextmanager
def _weights(source: str, last: int) -> Iterator[dict[str, Any]]:
    """Return the weights of no layer, and those of layer ``last`` under number 0. They are read once they are used."""
    with ExitStack() as opened:
        files: dict[str, Any] = {}
        weights = {}
        for name, file in _files(source).items():
            layer = _LAYER.search(name)
            if layer is not None and int(layer[0]) != last:
                continue
            if file not in files:
                files[file] = opened.enter_context(safe_open(cached_file(source, file), framework="pt"))
            weights[_LAYER.sub("0", name, count=1)] = files[file].get_slice(name)
        yield weights


def _files(source: str) -> dict[str, str]:
    """Return the file of each weight, by their names."""
    try:
        with safe_open(cached_file(source, SAFE_WEIGHTS_NAME), framework="pt") as file:
            return dict.fromkeys(file.keys(), SAFE_WEIGHTS_NAME)
    except OSError:  # there is none: they are in several
        index = json.loads(Path(str(cached_file(source, SAFE_WEIGHTS_INDEX_NAME))).read_bytes())
        return dict(index["weight_map"])
