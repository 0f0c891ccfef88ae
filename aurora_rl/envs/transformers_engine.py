"""The embedded engine: any Hugging Face causal LM that takes an SDPA-style mask, with a static KV cache per slot."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from aurora_rl.envs.engine import Engine
from aurora_rl.inference_modules import GROUPED_ATTENTION, fuse_decoder_layers, grouped_mask, prepare_for_inference
from aurora_rl.slot_cache import SlotCache, cache_mask, sliding_window
from aurora_rl.trajectories import ContextStore
from aurora_rl.trees import ancestor_mask, depths

# A tree is written behind the committed tokens before any of it is accepted: columns of a slot for it.
_TREE_ROOM = 64


class TransformersEngine(Engine):
    """Serve a Hugging Face causal LM by rounds of tree verification.

    Args:
        model: the target; it is put into inference form in place (see :func:`prepare_for_inference`).
        num_slots: slots ``B``, each with its own KV and length.
        max_length: most tokens of a slot, prompt, completion and tree; at most the model's context.
        feature_layers: layer ids whose inputs are concatenated into a feature: ``l`` is the residual stream that
            enters decoder layer ``l``, and ``num_hidden_layers`` the input of the output head.

    Raises:
        ValueError: the model has no decoder layers that can be hooked, a layer id or ``max_length`` is out of range,
            the model slides its attention window inside ``max_length``, or does more than its head to make logits.

    Example:
        >>> from aurora_rl.testing import tiny_target
        >>> engine = TransformersEngine(tiny_target(), num_slots=1, max_length=32, feature_layers=(0, 1))
        >>> engine.prefill([0], [torch.tensor([5, 6, 7])])
        >>> none = torch.zeros(1, 0, dtype=torch.int64)
        >>> engine.verify(torch.tensor([0]), none, none, none.bool()).shape
        torch.Size([1, 1, 16])
    """

    def __init__(
        self, model: PreTrainedModel, *, num_slots: int, max_length: int, feature_layers: Sequence[int]
    ) -> None:
        config = model.config.get_text_config()
        decoder = model.get_decoder()
        layers = getattr(decoder, "layers", None)
        if not isinstance(layers, nn.ModuleList):
            raise ValueError(
                f"{type(model).__name__} has no `layers` in its decoder that TransformersEngine could hook"
            )
        if not all(0 <= layer <= len(layers) for layer in feature_layers):
            raise ValueError(f"feature_layers must be layer ids in 0..{len(layers)}, got {tuple(feature_layers)}")
        if not 2 <= max_length <= config.max_position_embeddings:
            raise ValueError(
                f"max_length must lie in 2..{config.max_position_embeddings} (the model's context), got {max_length}"
            )
        window = sliding_window(config)
        if window is not None and window < max_length:
            raise ValueError(f"the model slides its attention over {window} tokens; set engine.max_length <= {window}")
        self.model, self._decoder = model, decoder
        self.vocab_size, self._feature_layers = config.vocab_size, tuple(feature_layers)
        self._groups = config.num_attention_heads // config.num_key_value_heads
        self._num_layers = len(layers)
        device, dtype = model.device, model.dtype
        self.store = ContextStore(
            num_slots, max_length, config.hidden_size * len(feature_layers), config.hidden_size, dtype, device
        )
        model.set_attn_implementation(GROUPED_ATTENTION)
        if not _head_is_linear(model, self._groups):
            raise ValueError(
                f"{type(model).__name__} scales or caps the logits behind its output head, which is not supported"
            )
        fuse_decoder_layers(layers, self._groups)
        prepare_for_inference(model)
        self._head = model.get_output_embeddings()  # after the call above, which replaces it
        self._cache = SlotCache(config, num_slots, max_length + _TREE_ROOM, dtype, device)
        self._captured: dict[int, Tensor] = {}
        for layer in set(feature_layers) - {len(layers)}:
            layers[layer].register_forward_pre_hook(self._capture(layer), with_kwargs=True)
        self.prefill_seconds = 0.0

    def _capture(self, layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self._captured[layer] = args[0] if args else kwargs["hidden_states"]

        return hook

    @torch.inference_mode()
    def _forward(self, slots: Tensor, tokens: Tensor, depth: Tensor, ancestors: Tensor) -> tuple[Tensor, Tensor]:
        """One pass over ``tokens`` ``[b, T]``, the tree behind each slot's KV: hidden ``[b, T, H]``, features."""
        device, width = tokens.device, tokens.shape[1]
        past = (self.store.lengths[slots] - 1).clamp(min=0)
        end = int(past.max()) + width
        past = past.to(device)[:, None]
        self._cache.aim(slots, past + torch.arange(width, device=device), end)
        mask = cache_mask(ancestors, past, end)
        hidden = self._decoder(
            input_ids=tokens,
            position_ids=past + depth,
            attention_mask=grouped_mask(mask, self._groups),
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state
        self._captured[self._num_layers] = hidden
        # Empty columns first: a drafter may read no features at all.
        return hidden, torch.cat([hidden[..., :0], *(self._captured[layer] for layer in self._feature_layers)], dim=-1)

    def prefill(self, slots: Sequence[int], prompts: Sequence[Tensor]) -> None:
        """See :meth:`Engine.prefill`. The last token of a prompt is left to be the root of the first round."""
        began = time.perf_counter()
        for slot, prompt in zip(slots, prompts, strict=True):
            if not 1 <= len(prompt) < self.max_length:
                raise ValueError(f"a prompt has 1..{self.max_length - 1} tokens in this engine, got {len(prompt)}")
            prompt = prompt.to(self.store.tokens.device)
            body = prompt[None, :-1]
            if body.shape[1]:
                self.store.lengths[slot] = 0
                depth = torch.arange(body.shape[1], device=prompt.device)[None]
                causal = depth[:, :, None] >= depth[:, None, :]
                _, features = self._forward(torch.tensor([slot]), body, depth, causal)
                self.store.features[slot, : body.shape[1]] = features[0]
            self.store.start(slot, prompt)
        self.prefill_seconds += time.perf_counter() - began

    def verify(self, slots: Tensor, tokens: Tensor, parents: Tensor, valid: Tensor) -> Tensor:
        """See :meth:`Engine.verify`.

        Raises:
            ValueError: the tree has more nodes than a slot has room for behind its context.
        """
        if tokens.shape[1] > _TREE_ROOM:  # it would run into the next slot's columns
            raise ValueError(f"a tree of {tokens.shape[1]} nodes exceeds the engine's {_TREE_ROOM}; lower num_nodes")
        where = slots.to(tokens.device)
        root = self.store.tokens[where, (self.store.lengths[slots] - 1).to(tokens.device)]
        depth = torch.cat([torch.zeros_like(root)[:, None], depths(parents)], dim=1)
        rows = torch.cat([root[:, None], torch.where(valid, tokens, 0)], dim=1)
        hidden, self._features = self._forward(slots, rows, depth, ancestor_mask(parents, valid))
        self._hidden = hidden
        return hidden

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """See :meth:`Engine.logits`."""
        return self._head(hidden)

    @torch.inference_mode()
    def commit(self, slots: Tensor, path: Tensor, tokens: Tensor, num_new: Tensor) -> Tensor:
        """See :meth:`Engine.commit`."""
        device = path.device
        place = torch.arange(path.shape[1], device=device).expand_as(path)
        moved = (path >= 0) & (path != place)
        if bool(moved.any()):
            row, index = moved.nonzero(as_tuple=True)
            base = self.store.lengths[slots].to(device)[row]
            self._cache.move(slots.to(device)[row], base + path[row, index], base + index)
        columns = (
            torch.cat([torch.zeros_like(path[:, :1]), path.clamp(min=-1) + 1], dim=1)
            if path.shape[1]
            else (torch.zeros(len(slots), 1, dtype=torch.int64, device=device))
        )
        rows = torch.arange(len(slots), device=device)[:, None]
        features = self._features[rows, columns]
        self.store.append(slots, tokens, num_new, features, self._hidden[rows, columns])
        return features

    def release(self, slot: int) -> None:
        """See :meth:`Engine.release`."""
        self.store.release(slot)


@torch.inference_mode()
def _head_is_linear(model: PreTrainedModel, groups: int) -> bool:
    """Whether the logits are what the output head makes of the decoder's output (Cohere scales them, Gemma 2 caps)."""
    tokens = torch.arange(4, device=model.device)[None]  # not one alone: a padding token has logits of zero
    mask = grouped_mask(torch.ones(1, 4, 4, dtype=torch.bool, device=model.device).tril(), groups)
    given = model(tokens, attention_mask=mask, past_key_values=DynamicCache()).logits
    hidden = model.get_decoder()(tokens, attention_mask=mask, past_key_values=DynamicCache()).last_hidden_state
    tolerance = 16 * torch.finfo(given.dtype).eps * float(given.abs().max())
    return torch.allclose(model.get_output_embeddings()(hidden), given, rtol=0, atol=tolerance)
