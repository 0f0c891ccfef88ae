"""New drafter weights into vLLM's draft model, by its own reload in place."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from aurora_rl.envs.remote.checks import FUSED, weights_fault
from aurora_rl.envs.remote.session import SwapError
from aurora_rl.envs.vllm import ENGINE
from aurora_rl.policies.formats.vllm import to_vllm

logger = logging.getLogger(__name__)


def draft_vocab(model: Any) -> Tensor:
    """Return the target's token of each row of a draft model's head, ``[Vd]`` int64."""
    rows, offsets = int(model.config.draft_vocab_size), model.draft_id_to_target_id
    return torch.arange(rows) + (0 if offsets is None else offsets.detach().cpu())


def loadable(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return published weights as vLLM's loader takes them, checked by the names and shapes that it wants.

    They are by checkpoint names, ``d2t`` ``[Vd]`` int64 among them; ``config`` is that of the draft model.

    Raises:
        SwapError: Names the first tensor that is missing, unknown or misshapen.
    """
    try:
        return to_vllm(dict(weights), config)[0]
    except (KeyError, ValueError) as error:
        raise SwapError(f"vLLM's drafter does not take the weights: {error}") from error


class DraftLoader:
    """Loads weights into the draft model of one worker, between two batches.

    Args:
        model: vLLM's draft model, unwrapped: a module replaced on a wrapper would not reach it.
        target: The target, from which vLLM's draft model may borrow its embedding and its head.
        vllm_config: vLLM's configuration.
    """

    def __init__(self, model: Any, target: nn.Module, vllm_config: Any) -> None:
        self.model, self._target, self._config = model, target, vllm_config
        self._draft_config = vllm_config.speculative_config.draft_model_config
        self._serving: dict[str, Tensor] | None = None  # None are those of the folder that the server was started on

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Replace the drafter's weights by tensors by checkpoint names, of the shapes that the drafter publishes.

        They have any floating dtype. The draft map ``d2t``, ``[Vd]`` int64, must not change.

        Raises:
            SwapError: They do not fit, or vLLM did not load them. The weights before serve on then.
        """
        if fault := weights_fault(weights, draft_vocab(self.model), engine=ENGINE):
            raise SwapError(fault)
        new = loadable(weights, self._draft_config.hf_config.to_dict())
        try:
            self._reload(new.items())
            self._check(new)
        except Exception as error:
            reason = f"vLLM did not load the weights: {error}"
            try:
                self._reload(self._before())
            except Exception as worse:
                reason += f"; nor those before, so that its drafter is damaged until it is restarted: {worse}"
            raise SwapError(reason) from error
        self._serving = new

    def _before(self) -> Iterable[tuple[str, Tensor]]:
        if self._serving is not None:
            return self._serving.items()
        from vllm.model_executor.model_loader import get_model_loader

        loader: Any = get_model_loader(self._config.load_config)
        found = loader.get_all_weights(self._draft_config, self.model)
        return ((name, tensor) for name, tensor in found if not name.endswith("embed_tokens.weight"))

    @torch.no_grad()
    def _reload(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        model = self.model
        # The embedding is the target's: taken out, vLLM neither resets it nor complains that it was not loaded.
        embedding = model.model._modules.pop("embed_tokens")
        try:
            # A worker infers without autograd's versions of tensors, and weights are not to be made without them.
            with torch.inference_mode(False), set_current_vllm_config(self._config):
                self._own_head(model)
                initialize_layerwise_reload(model)
                try:
                    model.load_weights(weights)
                finally:
                    finalize_layerwise_reload(model, self._draft_config)
        finally:
            model.model._modules["embed_tokens"] = embedding

    def _own_head(self, model: Any) -> None:
        """Part the drafter's head from the target's: vLLM makes them one where they begin alike."""
        from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

        if model.lm_head is getattr(self._target, "lm_head", None):
            head = copy.deepcopy(model.lm_head)
            record_metadata_for_reloading(head)
            model.lm_head = head

    def _check(self, weights: Mapping[str, Tensor]) -> None:
        """Compare what the model holds with ``weights``, where it keeps them as they came.

        On a CPU projections are packed and hidden by vLLM. The learner's check of what is drafted covers those.
        """
        held = dict(self.model.named_parameters())
        for name, tensor in as_fused(weights).items():
            parameter = held.get(name)
            if parameter is not None and parameter.numel() and parameter.shape == tensor.shape:
                if not torch.equal(parameter.data, tensor.to(parameter)):
                    raise SwapError(f"{name!r} in vLLM's drafter is not what was loaded")


def as_fused(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors by checkpoint names as vLLM's draft model has them, by its own names.

    Example:
        >>> parts = {f"midlayer.mlp.{name}_proj.weight": torch.zeros(2, 3) for name in ("gate", "up", "down")}
        >>> {name: list(tensor.shape) for name, tensor in as_fused(parts).items()}
        {'model.layers.0.mlp.down_proj.weight': [2, 3], 'model.layers.0.mlp.gate_up_proj.weight': [4, 3]}
    """
    named = {
        name if name.startswith("lm_head.") else f"model.{name.replace('midlayer.', 'layers.0.')}": tensor
        for name, tensor in weights.items()
        if name not in ("d2t", "t2d")
    }
    for fused, parts in FUSED.items():
        for first in [name for name in named if f".{parts[0]}." in name]:
            names = [first.replace(parts[0], part) for part in parts]
            if all(name in named for name in names):
                named[first.replace(parts[0], fused)] = torch.cat([named.pop(name) for name in names])
    return named
