"""One pass of the target over rows of slots: what it writes, what its tokens see, and where it is tapped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from aurora_rl.envs.alibi import AlibiPositions
from aurora_rl.envs.attention_span import First
from aurora_rl.models.attention import GROUPED_ATTENTION, pass_mask
from aurora_rl.models.batch_invariant import invariant_mask, whole_blocks
from aurora_rl.models.inference_modules import FusedDecoderLayer, fuse_decoder_layers
from aurora_rl.models.kv_cache import SlotCache, column_positions, path_order
from aurora_rl.models.target_head import context_length, decoder_of


class Rows(NamedTuple):
    """Tokens of slots in a pass: trees, or a chunk of a prompt.

    Attributes:
        slots: The slots, ``[b]`` int64 on the CPU.
        past: First column that is written, ``[b]`` int64 on the CPU.
        tokens: The tokens, ``[b, T]`` int64.
        depth: Distance of each from ``past``, ``[b, T]`` int64.
        seen: Which of the tokens a token sees, ``[b, T, T]`` bool; None if those up to itself.
        present: Which tokens are no padding, ``[b, T]`` bool; None if all.
    """

    slots: Tensor
    past: Tensor
    tokens: Tensor
    depth: Tensor
    seen: Tensor | None = None
    present: Tensor | None = None


class ForwardPass:
    """Runs the decoder of a target, in one of the forms of its attention, on a cache of slots.

    Args:
        model: The target.
        layers: Its decoder layers.
        kinds: From which position on each kind of layer sees a text, see :func:`mask_kinds`.
        alibi: What tells its ALiBi the positions; None if it is told them by ``position_ids`` or has none.
        takes_positions: Whether the decoder takes ``position_ids``.

    Attributes:
        form: Form of attention: "fused", "grouped", "sdpa" or "eager".
        packs: Whether the layers take a pass without its padding.
        batch_invariant: Whether what is computed for a token must not depend on the rest of the pass.
        cache: Keys and values of every slot; whoever runs a pass sets it before.
        kinds: As given.
        starts: Position of column 0 of each slot, ``[B]`` int64 on the CPU; None if it is 0.
    """

    cache: SlotCache

    def __init__(
        self, model: PreTrainedModel, layers: nn.ModuleList, kinds: dict[str | None, First | None],
        alibi: AlibiPositions | None, *, takes_positions: bool,
    ) -> None:  # fmt: skip
        self._model, self._decoder, self._layers, self._config = (
            model, decoder_of(model), layers, model.config.get_text_config(),
        )  # fmt: skip
        context = context_length(self._config)
        self._last = None if context is None else context - 1
        self.kinds, self._alibi, self._takes_positions = kinds, alibi, takes_positions
        self.form, self.packs, self.batch_invariant = "eager", False, False
        self.starts: Tensor | None = None
        self._captured: dict[int, Tensor] = {}
        self._feature_layers: tuple[int, ...] = ()

    def set_form(self, form: str, max_length: int) -> Callable[[], None] | None:
        """Change how attention is computed; return a function that undoes "fused", None if no layer can be fused."""
        self.form, self.packs = form, False
        implementation = GROUPED_ATTENTION if form in ("fused", "grouped") else form
        if self._config._attn_implementation != implementation:
            self._model.set_attn_implementation(implementation)
        rotary = getattr(self._decoder, "rotary_emb", None)
        if form == "fused" and rotary is not None:
            # To the model's last position and not the engine's: another engine may serve the model further.
            undo = fuse_decoder_layers(self._layers, rotary, max_length - 1 if self._last is None else self._last)
            self.packs = all(isinstance(layer, FusedDecoderLayer) for layer in self._layers)
            return undo
        return None

    def capture(self, layers: Sequence[int]) -> None:
        """Let the inputs of these layers be a pass's features; the layer after the last is the head's input."""
        self._feature_layers = tuple(layers)
        for layer in set(layers) - {len(self._layers)}:
            self._layers[layer].register_forward_pre_hook(partial(self._capture, layer), with_kwargs=True)

    def _capture(self, layer: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._captured[layer] = args[0] if args else kwargs["hidden_states"]

    @torch.inference_mode()
    def __call__(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Run one pass; return the inputs of the output head, ``[b, T, H]``, and the features, ``[b, T, F]``."""
        slots, first_column, tokens, depth, seen, present = rows
        device, width = tokens.device, tokens.shape[1]
        end = whole_blocks(int(first_column.max()) + width, self.batch_invariant)
        past = first_column.to(device)[:, None]
        present = present if self.packs and present is not None and not bool(present.all()) else None
        order = path_order(seen, depth, past, end) if self.batch_invariant else None
        self.cache.aim(slots, past + torch.arange(width, device=device), end, present, order)
        arguments = {}
        if self._takes_positions:
            positions = past + depth + (0 if self.starts is None else self.starts[slots, None].to(device))
            # A node past the model's last position is never delivered, and a table of positions has no row for it.
            positions = positions if self._last is None else positions.clamp(max=self._last)
            arguments["position_ids"] = self.cache.pack(positions)
        if self._alibi is not None:
            self._alibi.aim(column_positions(depth, past, end))
        hidden = self._decoder(
            input_ids=self.cache.pack(tokens),
            attention_mask=self._attention_mask(seen, depth, past, end),
            past_key_values=self.cache,
            use_cache=True,
            **arguments,
        ).last_hidden_state
        self._captured[len(self._layers)] = hidden
        # Empty columns first: a drafter may read no features at all.
        features = torch.cat([hidden[..., :0], *(self._captured[layer] for layer in self._feature_layers)], dim=-1)
        return self.cache.unpack(hidden), self.cache.unpack(features)

    def _attention_mask(
        self, seen: Tensor | None, depth: Tensor, past: Tensor, end: int
    ) -> Tensor | dict[str | None, Tensor]:
        """Return the mask of a pass as the model takes it, by kind of layer if not all see the whole text."""
        name = GROUPED_ATTENTION if self.form in ("fused", "grouped") else self.form  # some models keep their own
        form: Any = {"implementation": name, "seen": seen, "dtype": self._model.dtype}
        mask: Callable[..., Tensor] = invariant_mask if self.batch_invariant else partial(pass_mask, **form)
        masks = {kind: mask(depth, past, end, first) for kind, first in (self.kinds or {None: None}).items()}
        return masks[None] if None in masks else masks
