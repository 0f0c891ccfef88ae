"""The embedded engine: a Hugging Face causal LM with a static KV cache per slot."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import override

from aurora_kernels.trees import ancestor_mask, depths
from aurora_rl.context import ContextStore
from aurora_rl.envs.attention_span import kv_shapes, make_independent_of_length, mask_kinds
from aurora_rl.envs.engine import Engine, PromptChunk, register_engine
from aurora_rl.envs.exactness import (
    TRY_SGLANG,
    Exactness,
    NotCausalError,
    Probe,
    UnsupportedModelError,
    WrongLogitsError,
    check_batch_invariance,
    few_layers_in_float32,
    reason_of,
    require_fused,
    takes_positions,
    with_larger_products,
)
from aurora_rl.envs.forward_pass import AlibiPositions, ForwardPass, Rows
from aurora_rl.models.attention import GROUPED_ATTENTION
from aurora_rl.models.batch_invariant import make_batch_invariant, whole_blocks
from aurora_rl.models.inference_modules import prepare_for_inference
from aurora_rl.models.kv_cache import SlotCache
from aurora_rl.models.loading import quiet_transformers
from aurora_rl.models.target_head import TargetHead, context_length, decoder_layers

logger = logging.getLogger(__name__)

# A prompt is read in chunks of so many rows. In transformers' forms of attention a chunk also has at most so many
# scores (rows x heads x columns), so that memory stays linear in its length.
_PREFILL_ROWS, _PREFILL_SCORES = 512, 2**24
# The fastest first; a form that computes something else than the model is switched off.
_FORMS = ("fused", "grouped", "sdpa", "eager")
# By which the products of the float32 probe are multiplied: 1 shows what a token attends to, and 4, which makes
# attention all but one-hot, shows clips, caps and scales.
_FACTORS = (1.0, 4.0)


@register_engine("transformers")
class TransformersEngine(Engine):
    """Serve a Hugging Face causal LM by rounds of tree verification.

    Any family is served whose layers attend to keys and values under a mask. Before it serves, the engine compares its
    logits with those of the model's own, untouched forward (see :mod:`aurora_rl.envs.exactness`). A faster form that
    disagrees is switched off; a model that disagrees in every form is refused.

    Args:
        model: Target, put into inference form in place (see :func:`prepare_for_inference`): on a CPU its linear layers
            are packed, and their plain weights dropped. Give a copy if it is to be trained on.
        num_slots: Number of slots ``B``, each with its own KV cache and length.
        max_length: Most tokens of a slot, prompt, completion and tree; at most the model's context.
        feature_layers: Layer ids whose inputs are concatenated into a feature: ``l`` is the residual stream that
            enters decoder layer ``l``, and ``num_hidden_layers`` the input of the output head.
        batch_invariant: Whether a token's logits are the same, bit for bit, whatever else is in the pass: a tree, other
            slots, more of a prompt. It costs time; a model that is not served in the form "fused" is refused.

    Attributes:
        exactness: Form in which the model is run, and the distance of its logits from the model's own.
        feature_layers: Layers whose inputs are the features.

    Raises:
        ValueError: A layer id, ``num_slots`` or ``max_length`` is out of range.
        UnsupportedModelError: The model cannot be served exactly. It keeps a recurrent state, its rotary embedding
            depends on the length of the pass, or the engine's logits differ from its own in every form.

    Example:
        >>> from aurora_rl.testing import tiny_target
        >>> engine = TransformersEngine(tiny_target(), num_slots=1, max_length=32, feature_layers=(0, 1))
        >>> engine.exactness.form
        'fused'
        >>> engine.prefill([0], [torch.tensor([5, 6, 7])])
        >>> none = torch.zeros(1, 0, dtype=torch.int64)
        >>> engine.verify(torch.tensor([0]), none, none, none.bool()).shape
        torch.Size([1, 1, 16])
    """

    _least_tolerance: ClassVar[float] = 0.0
    feature_layers: tuple[int, ...] = ()
    _prefill_rows: int = _PREFILL_ROWS
    _chunk_rows: Sequence[Rows] = ()  # chunks of prompts that are read in the next verification

    def __init__(
        self, model: PreTrainedModel, *, num_slots: int, max_length: int, feature_layers: Sequence[int],
        batch_invariant: bool = False,
    ) -> None:  # fmt: skip
        if num_slots < 1:
            raise ValueError(f"num_slots must be at least 1, got {num_slots}")
        probe = self._set_up(model, max_length)
        count = len(self._layers)
        if not all(0 <= layer <= count for layer in feature_layers):
            raise ValueError(f"feature_layers must be layer ids in 0..{count}, got {tuple(feature_layers)}")
        with quiet_transformers():  # it warns of each form of attention that it does not know of a family
            self.exactness = self._in_inference_form(self._choose_form(probe, max_length), probe, batch_invariant)
        self.feature_layers = tuple(feature_layers)
        self._pass.set_feature_layers(self.feature_layers)
        self._allocate(num_slots, max_length, self._feature_size())
        if batch_invariant:
            check_batch_invariance(self, probe.texts[-1][:max_length])
        self.prefill_seconds = 0.0

    def _set_up(self, model: PreTrainedModel, max_length: int) -> Probe:
        """Read what a pass through the model takes, and probe it before anything of it is replaced."""
        config, name = model.config.get_text_config(), type(model).__name__
        context = context_length(config)
        if not 2 <= max_length <= (context or max_length):
            raise ValueError(f"max_length must lie in 2..{context} (the model's context), got {max_length}")
        self.model, self._config = model, config
        told, kinds = takes_positions(model), mask_kinds(config, name, max_length)
        make_independent_of_length(model, max_length)
        self.vocab_size = config.vocab_size
        try:
            self._layers, self._output = decoder_layers(model), TargetHead.of(model)
            with quiet_transformers():
                self._wrong_forms = self._wrong_in_float32(max_length)
                probe = Probe(model, max_length, by_median=self._wrong_forms is not None)
        except UnsupportedModelError:
            raise
        except Exception as error:  # whatever a forward raises that is called in another way
            own = isinstance(error, ValueError) and name in str(error)
            raise UnsupportedModelError(
                str(error) if own else f"{name} does not run on a plain text ({reason_of(error)}); {TRY_SGLANG}"
            ) from error
        self._shapes = kv_shapes(model)
        alibi = AlibiPositions.of(model, max_length + self.max_nodes, takes_positions=told)
        self._pass = ForwardPass(model, self._layers, kinds, alibi, takes_positions=told)
        self.prefill_seconds = 0.0
        return probe

    def _allocate(self, num_slots: int, max_length: int, feature_size: int) -> None:
        device, dtype = self.model.device, self.model.dtype
        width = self._output.weight.shape[1]
        self.store = ContextStore(num_slots, max_length, feature_size, width, dtype, device)
        # A tree is written after the committed tokens before any of it is accepted.
        columns = whole_blocks(max_length + self.max_nodes, self._pass.batch_invariant)
        self._pass.cache = SlotCache(self._shapes, num_slots, columns, dtype, device)

    def _feature_size(self) -> int:
        """Return the width of the features, found by a pass."""
        self._allocate(1, 2, 0)
        zero = torch.zeros(1, 1, dtype=torch.int64, device=self.model.device)
        try:
            ((_, features),) = self._pass(Rows(torch.tensor([0]), torch.tensor([0]), zero, zero))
        except Exception as error:  # Gemma 3n's layers hand on several streams, of four dimensions
            raise UnsupportedModelError(
                f"{type(self.model).__name__} has no features at layers {self.feature_layers} that a drafter could "
                f"read ({reason_of(error)}); take a drafter that reads none: drafter.name=ngram or standalone"
            ) from error
        return features.shape[-1]

    @property
    def cache_bytes(self) -> int:
        """Memory of all slots' keys and values, in bytes."""
        return self._pass.cache.nbytes

    # ---- the form in which the model is run -------------------------------------------------------------------------

    def _choose_form(self, probe: Probe, max_length: int) -> Exactness:
        """Put the model into the fastest form whose logits are the model's own."""
        switched_off, tolerance = dict(self._wrong_forms or {}), max(probe.tolerance, self._least_tolerance)
        for form in _FORMS:
            if form in switched_off:
                continue
            undo = None
            try:
                undo = self._pass.set_form(form, max_length)
                if form == "fused" and undo is None:
                    continue
                error = self._disagreement(probe)
            except Exception as raised:  # a forward that is called in another way fails with whatever error it meets
                reason = reason_of(raised)
            else:
                if error <= tolerance:
                    break
                reason = f"its logits differ by {error:.2g} of their spread, {tolerance:.2g} is rounding"
            switched_off[form] = reason
            if undo is not None:
                undo()
        else:
            name = type(self.model).__name__
            kind = WrongLogitsError if "logits differ" in switched_off[_FORMS[-1]] else UnsupportedModelError
            raise kind(
                f"{name} is not served exactly: {switched_off[_FORMS[-1]]} ({_FORMS[-1]} attention); {TRY_SGLANG}"
            )
        return Exactness(form, error, tolerance, switched_off)

    def _in_inference_form(self, exactness: Exactness, probe: Probe, batch_invariant: bool) -> Exactness:
        """Replace norms and linear layers by faster ones, for good, and compare once more."""
        self._pass.batch_invariant = batch_invariant and require_fused(self._layers, exactness)
        prepare_for_inference(self.model)
        if batch_invariant:
            make_batch_invariant(self.model)
        try:
            error = self._disagreement(probe)
            reason = f"its logits differ by {error:.2g} of their spread"
        except Exception as raised:  # a layer may look into another
            error, reason = torch.inf, reason_of(raised)
        if error > exactness.tolerance:
            kind = WrongLogitsError if error < torch.inf else UnsupportedModelError
            raise kind(
                f"the norms and linear layers of {type(self.model).__name__} compute something else in inference "
                f"form: {reason}; {TRY_SGLANG}"
            )
        return replace(exactness, error=error)

    def _wrong_in_float32(self, max_length: int) -> dict[str, str] | None:
        """Return forms that are wrong on a few layers of a half-precision model in float32, where rounding hides none.

        None if such a copy cannot be made or run; NotCausalError or WrongLogitsError if it is wrong in every form.
        """
        in_inference_form = self._config._attn_implementation == GROUPED_ATTENTION  # another engine did it
        if self.model.dtype not in (torch.bfloat16, torch.float16) or in_inference_form:
            return None
        wrong: dict[str, str] = {}
        try:
            few = few_layers_in_float32(self.model, self._layers)
            for factor in _FACTORS:
                try:
                    probed = _FewLayers(with_larger_products(few, factor), max_length)
                except NotCausalError:
                    if factor == 1:
                        raise
                    continue  # rounding weighs more here, too
                wrong |= {form: f"{reason} (in float32)" for form, reason in probed.switched_off.items()}
        except (NotCausalError, WrongLogitsError) as error:
            raise type(error)(f"{error} (found in float32)") from error
        except Exception as error:  # a copy that looks like no model of the family
            logger.debug("no probe of %s in float32: %s", type(self.model).__name__, error)
            return None
        return wrong

    def _disagreement(self, probe: Probe) -> float:
        """Return how far this engine's logits are from the model's own on the probe.

        Every row goes through all steps of a request: prefill, a tree with wrong nodes among the true ones, the move
        of the accepted path, and a plain round. Slots of unequal length, and trees of unequal size, share each pass.
        """
        length = max(len(text) for text in probe.texts)
        self._allocate(len(probe.texts), length, 0)
        kinds, slots = self._pass.kinds, torch.arange(len(probe.texts))
        with probe.short_windows():
            self._pass.kinds = mask_kinds(self._config, type(self.model).__name__, length)
            self._pass.starts = probe.starts
            try:
                roots = probe.roots.tolist()
                self._prefill_rows = length // 2
                self.prefill(slots.tolist(), [text[: root + 1] for text, root in zip(probe.texts, roots, strict=True)])
                following = torch.stack(
                    [text[root + 1 : root + 4] for text, root in zip(probe.texts, roots, strict=True)]
                )
                # Nodes 1 and 3 are the text; the others are other tokens, above, among and below them.
                wrong = (following + 1) % self.vocab_size
                tree = torch.stack([wrong[:, 0], following[:, 0], wrong[:, 1], following[:, 1], wrong[:, 2]], dim=1)
                parents = torch.tensor([-1, -1, 1, 1, 0], device=tree.device).expand(len(slots), -1)
                valid = torch.ones_like(tree, dtype=torch.bool)
                valid[::2, 4] = False
                hidden = self.verify(slots, tree, parents, valid)
                path = torch.tensor([1, 3, -1, -1, -1], device=tree.device).expand(len(slots), -1)
                delivered = torch.cat([following, following], dim=1)
                self.commit(slots, path, delivered, torch.full((len(slots),), 3))
                none = tree[:, :0]
                last = self.verify(slots, none, none, none.bool())
            finally:
                self._pass.kinds, self._pass.starts, self._prefill_rows = kinds, None, _PREFILL_ROWS
        return probe.difference(self.logits(torch.cat([hidden[:, [0, 2, 4]], last], dim=1)), probe.logits)

    # ---- rounds -----------------------------------------------------------------------------------------------------

    @override
    def prefill(self, slots: Sequence[int], prompts: Sequence[Tensor]) -> None:
        for slot, prompt in zip(slots, prompts, strict=True):
            self.prefill_chunk(slot, prompt, 0, len(prompt))

    @override
    def prefill_chunk(self, slot: int, prompt: Tensor, done: int, max_tokens: int) -> int:
        began = time.perf_counter()
        prompt, done = self._begin(slot, prompt, done)
        # The last token of a prompt is left to be the root of the first round.
        last = min(done + max_tokens, len(prompt) - 1)
        while done < last:
            rows = self._chunk(slot, prompt, done, last)
            ((_, features),) = self._pass(rows)
            self._keep(rows, features)
            done += features.shape[1]
        read = self._end(slot, prompt, done)
        if prompt.is_cuda:  # or it would be the next round that waits
            torch.cuda.synchronize(prompt.device)
        self.prefill_seconds += time.perf_counter() - began
        return read

    def _begin(self, slot: int, prompt: Tensor, done: int) -> tuple[Tensor, int]:
        """Return a prompt on the device, and how much of it is read, kept rows included."""
        if not 1 <= len(prompt) < self.max_length:
            raise ValueError(f"a prompt has 1..{self.max_length - 1} tokens in this engine, got {len(prompt)}")
        prompt = prompt.to(self.store.tokens.device)
        if not done:
            cache, salt = self.prefix_cache, self.store.cache_salts[slot]
            done = 0 if cache is None else cache.load(prompt[:-1], self._rows(slot), salt)
            self.store.cached_lengths[slot] = done
        return prompt, done

    def _chunk(self, slot: int, prompt: Tensor, done: int, last: int) -> Rows:
        """Return the next rows of a prompt, up to ``last`` at most."""
        size = self._prefill_rows
        if self._pass.form in ("sdpa", "eager"):
            size = max(16, min(size, _PREFILL_SCORES // (self._config.num_attention_heads * len(prompt))))
        part = prompt[None, done : min(done + size, last)]
        depth = torch.arange(part.shape[1], device=prompt.device)[None]
        return Rows(torch.tensor([slot]), torch.tensor([done]), part, depth)

    def _keep(self, rows: Rows, features: Tensor) -> None:
        """Keep the features ``[1, c, F]`` of a chunk."""
        start = int(rows.past)
        self.store.features[int(rows.slots), start : start + features.shape[1]] = features[0]

    def _end(self, slot: int, prompt: Tensor, done: int) -> int:
        """Occupy the slot if all of its prompt but the last token is read; return how many tokens then are."""
        if done < len(prompt) - 1:
            return done
        self.store.start(slot, prompt)
        return len(prompt)

    @override
    def verify(self, slots: Tensor, tokens: Tensor, parents: Tensor, valid: Tensor) -> Tensor:
        if tokens.shape[1] > self.max_nodes:  # it would run into the next slot's columns
            raise ValueError(
                f"a tree of {tokens.shape[1]} nodes exceeds the engine's {self.max_nodes}; lower num_nodes"
            )
        past = self.store.lengths[slots] - 1
        root = self.store.tokens[slots.to(tokens.device), past.to(tokens.device)]
        depth = torch.cat([torch.zeros_like(root)[:, None], depths(parents)], dim=1)
        tokens = torch.cat([root[:, None], torch.where(valid, tokens, 0)], dim=1)
        present = F.pad(valid, (1, 0), value=True)
        trees = Rows(slots, past, tokens, depth, ancestor_mask(parents, valid), present)
        (self._hidden, self._features), *read = self._pass(trees, *self._chunk_rows)
        for rows, (_, features) in zip(self._chunk_rows, read, strict=True):
            self._keep(rows, features)
        return self._hidden

    @override
    def verify_with_chunk(
        self, slots: Tensor, tokens: Tensor, parents: Tensor, valid: Tensor, chunk: PromptChunk
    ) -> tuple[Tensor, int]:
        prompt, done = self._begin(chunk.slot, chunk.prompt, chunk.done)
        last = min(done + chunk.max_tokens, len(prompt) - 1)
        chunk_rows = [self._chunk(chunk.slot, prompt, done, last)] if done < last else []
        self._chunk_rows = chunk_rows
        try:  # through self.verify: a subclass may extend it
            hidden = self.verify(slots, tokens, parents, valid)
        finally:
            self._chunk_rows = ()
        done += sum(rows.tokens.shape[1] for rows in chunk_rows)
        return hidden, self._end(chunk.slot, prompt, done)

    @override
    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        # The module and not its weight: prepare_for_inference replaces it by a faster one.
        return self._output.finish(self.model.get_output_embeddings()(hidden))

    @override
    @torch.inference_mode()
    def commit(self, slots: Tensor, path: Tensor, tokens: Tensor, num_new: Tensor) -> Tensor:
        device = path.device
        place = torch.arange(path.shape[1], device=device).expand_as(path)
        moved = (path >= 0) & (path != place)
        if bool(moved.any()):
            row, index = moved.nonzero(as_tuple=True)
            base = self.store.lengths[slots].to(device)[row]
            self._pass.cache.move(slots.to(device)[row], base + path[row, index], base + index)
        columns = F.pad(path.clamp(min=-1) + 1, (1, 0))
        rows = torch.arange(len(slots), device=device)[:, None]
        features = self._features[rows, columns]
        self.store.append(slots, tokens, num_new, features, self._hidden[rows, columns])
        return features

    @override
    def release(self, slot: int) -> None:
        if self.prefix_cache is not None and (held := int(self.store.lengths[slot]) - 1) > 0:
            self.prefix_cache.save(self.store.tokens[slot, :held], self._rows(slot), self.store.cache_salts[slot])
        self.store.release(slot)

    def _rows(self, slot: int) -> list[Tensor]:
        """Return views of what a slot holds of each token but the last, after nothing but the tokens before it."""
        return [*self._pass.cache.rows(slot), self.store.features[slot]]


class _FewLayers(TransformersEngine):
    """An engine of a few layers that chooses its form and serves nothing, so that its weights may be scaled."""

    _least_tolerance = 1e-4

    def __init__(self, model: PreTrainedModel, max_length: int) -> None:
        probe = self._set_up(model, max_length)
        prepare_for_inference(model)  # before the form is chosen, which saves a comparison: it is a copy
        self.switched_off = self._choose_form(probe, max_length).switched_off
