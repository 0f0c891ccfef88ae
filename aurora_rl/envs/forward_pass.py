"""One pass of the target over rows of slots: what it writes, what its tokens see, and where it is tapped.

The trees of a round and a chunk of a prompt share a pass where they can. A pass over a few rows takes about as long as
one over one row: what takes time is to read the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from aurora_rl.envs.attention_span import First
from aurora_rl.envs.exactness import TRY_SGLANG, UnsupportedModelError
from aurora_rl.models.attention import GROUPED_ATTENTION, PartMasks, pass_mask
from aurora_rl.models.batch_invariant import invariant_mask, whole_blocks
from aurora_rl.models.inference_modules import FusedDecoderLayer, fuse_decoder_layers
from aurora_rl.models.kv_cache import PassPart, SlotCache, column_positions, path_order
from aurora_rl.models.target_head import context_length, decoder_of


class Rows(NamedTuple):
    """Tokens of slots that attend together in a pass: trees, or a chunk of a prompt."""

    slots: Tensor  # [b] int64 on the CPU
    past: Tensor  # first column that is written, [b] int64 on the CPU
    tokens: Tensor  # [b, T] int64
    depth: Tensor  # distance of each token from `past`, [b, T] int64
    seen: Tensor | None = None  # which of the tokens a token sees, [b, T, T] bool; None if those up to itself
    present: Tensor | None = None  # which tokens are no padding, [b, T] bool; None if all


class AlibiPositions:
    """Replaces the ALiBi of a decoder that counts positions itself, such as BLOOM's; made by :meth:`of`.

    A tree's nodes lie in another order than their positions.
    """

    def __init__(self, decoder: Any, max_length: int, device: torch.device) -> None:
        self._decoder, self._max_length, self._device = decoder, max_length, device

    @classmethod
    def of(cls, model: PreTrainedModel, max_length: int, *, takes_positions: bool) -> AlibiPositions | None:
        """Return what gives a model's ALiBi its positions; None if the model can be told them (``takes_positions``).

        ``max_length`` is the most columns of a pass.

        Raises:
            UnsupportedModelError: The decoder counts positions itself, in a way that is not known here.
        """
        decoder = decoder_of(model)
        if getattr(type(decoder), "build_alibi_tensor", None) is not None:
            return cls(decoder, max_length, model.device)
        if takes_positions and not getattr(model.config.get_text_config(), "alibi", False):
            return None
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be told the positions of a tree's nodes: its decoder counts them itself; "
            f"{TRY_SGLANG}"
        )

    def aim(self, columns: Tensor) -> None:
        """Let the next pass read positions ``columns`` (``[b, L]``); at every pass, as another engine has its own."""
        self._columns, self._decoder.build_alibi_tensor = columns, self._build

    def _build(self, attention_mask: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
        original = type(self._decoder).build_alibi_tensor
        if attention_mask.ndim == 2:  # not one of ours
            return original(self._decoder, attention_mask, num_heads, dtype)
        every = torch.ones(1, self._max_length, dtype=torch.float32, device=self._device)
        table = original(self._decoder, every, num_heads, dtype)[:, 0]
        return table[:, self._columns].transpose(0, 1).flatten(0, 1)[:, None]


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
        packs: Whether the layers take a pass without its padding, and rows of several kinds together.
        batch_invariant: Whether what is computed for a token must not depend on the rest of the pass.
        cache: Keys and values of every slot; whoever runs a pass sets it before.
        starts: Position of column 0 of each slot, ``[B]`` int64 on the CPU; None if it is 0.
    """

    cache: SlotCache

    def __init__(
        self, model: PreTrainedModel, layers: nn.ModuleList, kinds: dict[str | None, First | None],
        alibi: AlibiPositions | None, *, takes_positions: bool,
    ) -> None:  # fmt: skip
        self._model, self._decoder, self._layers = model, decoder_of(model), layers
        self._config = model.config.get_text_config()
        context = context_length(self._config)
        self._last = None if context is None else context - 1
        self.kinds, self._alibi, self._takes_positions = kinds, alibi, takes_positions
        self.form, self.packs, self.batch_invariant = "eager", False, False
        self.starts: Tensor | None = None
        self._inputs: dict[int, Tensor] = {}
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

    def set_feature_layers(self, layers: Sequence[int]) -> None:
        """Let the inputs of these layers be a pass's features; the layer after the last is the head's input."""
        self._feature_layers = tuple(layers)
        for layer in set(layers) - {len(self._layers)}:
            self._layers[layer].register_forward_pre_hook(partial(self._keep_input, layer), with_kwargs=True)

    def _keep_input(self, layer: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._inputs[layer] = args[0] if args else kwargs["hidden_states"]

    @torch.inference_mode()
    def __call__(self, *rows: Rows) -> list[tuple[Tensor, Tensor]]:
        """Run one pass over all rows where the form packs, so that it reads the weights once, and else one for each.

        Returns:
            For each of ``rows`` the inputs of the output head, ``[b, T, H]``, and the features, ``[b, T, F]``.
        """
        if len(rows) > 1 and not self.packs:
            return [pair for each in rows for pair in self(each)]
        parts = [self._part(each) for each in rows]
        packed = self.packs and (len(rows) > 1 or any(part.present is not None for part in parts))
        self.cache.aim(*parts, packed=packed)
        arguments = {}
        if self._takes_positions:
            arguments["position_ids"] = self.cache.pack(*(self._positions(each) for each in rows))
        if self._alibi is not None:  # only forms that do not pack have it
            self._alibi.aim(column_positions(rows[0].depth, _past(rows[0]), parts[0].end))
        hidden = self._decoder(
            input_ids=self.cache.pack(*(each.tokens for each in rows)),
            attention_mask=self._attention_mask(rows, [part.end for part in parts]),
            past_key_values=self.cache,
            use_cache=True,
            **arguments,
        ).last_hidden_state
        self._inputs[len(self._layers)] = hidden
        # Empty columns first: a drafter may read no features at all.
        features = torch.cat([hidden[..., :0], *(self._inputs[layer] for layer in self._feature_layers)], dim=-1)
        return list(zip(self.cache.unpack(hidden), self.cache.unpack(features), strict=True))

    def _part(self, rows: Rows) -> PassPart:
        past, width = _past(rows), rows.tokens.shape[1]
        end = whole_blocks(int(rows.past.max()) + width, self.batch_invariant)
        order = path_order(rows.seen, rows.depth, past, end) if self.batch_invariant else None
        present = rows.present if rows.present is not None and not bool(rows.present.all()) else None
        return PassPart(rows.slots, past + torch.arange(width, device=past.device), end, present, order)

    def _positions(self, rows: Rows) -> Tensor:
        positions = _past(rows) + rows.depth
        if self.starts is not None:
            positions = positions + self.starts[rows.slots, None].to(positions.device)
        # A node past the model's last position is never delivered, and a table of positions has no row for it.
        return positions if self._last is None else positions.clamp(max=self._last)

    def _attention_mask(self, rows: Sequence[Rows], ends: Sequence[int]) -> Tensor | dict[str | None, Tensor]:
        """Return the mask of a pass as the model takes it, by kind of layer if not all see the whole text."""
        name = GROUPED_ATTENTION if self.form in ("fused", "grouped") else self.form  # some models keep their own
        form: Any = {"implementation": name, "dtype": self._model.dtype}

        def mask(each: Rows, end: int, first: First | None) -> Tensor:
            if self.batch_invariant:
                return invariant_mask(each.depth, _past(each), end, first)
            return pass_mask(each.depth, _past(each), end, first, seen=each.seen, **form)

        masks = {
            kind: PartMasks.of([mask(each, end, first) for each, end in zip(rows, ends, strict=True)])
            for kind, first in (self.kinds or {None: None}).items()
        }
        return masks[None] if None in masks else masks


def _past(rows: Rows) -> Tensor:
    """Return the first column that is written, where the tokens are, ``[b, 1]``."""
    return rows.past.to(rows.tokens.device)[:, None]
