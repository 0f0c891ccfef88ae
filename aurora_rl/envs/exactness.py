"""The checks that an engine makes before it serves: its logits against those of the model's own forward.

One of ``batch_invariant=True`` also compares the bits of its logits alone and in company.

Legend: ``R`` rows of the probe, ``n`` tokens of each, ``V`` vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from aurora_rl.envs.engine import Engine
from aurora_rl.models.attention import GROUPED_ATTENTION
from aurora_rl.models.inference_modules import FusedDecoderLayer, layer_kind
from aurora_rl.models.target_head import context_length, decoder_layers, decoder_of

# Tokens of the first row and of the others, and most rows of the probe: they bound the time of the check.
_LONG, _LENGTH, _MAX_ROWS = 48, 16, 6
# Most tokens of the float32 copy's vocabulary.
_FEW_TOKENS = 2048
# Depth of the true path in the tree that is verified; one more token is decoded after it.
_PATH = 2
# No difference above this is rounding, in any dtype: logits of unrelated texts differ by about 1.4.
_LARGEST = 0.3
# While the probe runs, windows and chunks of attention are this short, so that its texts cross them.
_WINDOW = 6
_WINDOWS = ("sliding_window", "attention_chunk_size")


# What to do with a model that is refused, and with one that keeps a state in place of keys and values.
TRY_SGLANG = "engine.name=sglang may serve it"
NOT_LEARNED = "serve it by another server without drafts; nothing here learns from such models yet"


def reason_of(error: Exception) -> str:
    """Return the type of an error and its message, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


class UnsupportedModelError(ValueError):
    """A model that an engine cannot serve exactly; the message names it, the reason and an engine that serves it."""


class NotCausalError(UnsupportedModelError):
    """A model whose own logits change with what follows, or with the other rows of a pass."""


class WrongLogitsError(UnsupportedModelError):
    """A model whose logits differ from its own in every form in which it could be run."""


@dataclass(frozen=True, slots=True)
class Exactness:
    """Result of the check.

    Attributes:
        form: Form in which the model is run: "fused" (decoder layers in fewer operations), "grouped" (its own layers
            with our attention), "sdpa" or "eager" (transformers' attention).
        error: Distance of the logits from the model's own, see :meth:`Probe.difference`.
        tolerance: Largest ``error`` that is rounding in the model's dtype.
        switched_off: Forms that were tried first, with the reason why each was switched off.
    """

    form: str
    error: float
    tolerance: float
    switched_off: Mapping[str, str] = field(default_factory=dict)


class Probe:
    """Texts at telling positions, and the untouched model's logits on them.

    The first row is a longer text from position 0 on. The others start at both sides of every threshold that the
    rotary settings name, and at the last positions that will be served. Attention windows are shortened meanwhile, so
    that these texts cross them.

    Args:
        model: Model as it was loaded, before anything of it is replaced.
        max_length: Most tokens of a slot.
        by_median: Whether to judge the median context instead of the worst, if a float32 copy was compared too. In half
            precision one context is far off if rounding flips the choice of a router.

    Attributes:
        texts: ``R`` rows ``[n]`` int64; the first is the longest.
        starts: Position of each row's first token, ``[R]`` int64.
        roots: Index of the token of each row that is the root of its tree, ``[R]`` int64; they differ.
        logits: Logits of the model's own forward at the root and the three tokens after it, ``[R, 4, V]``.
        tolerance: Largest :meth:`difference` that is rounding. It is 8 times the model's difference from itself on the
            same text in a pass of another size. It is at least 8 times the sum of rounding in each layer.

    Raises:
        NotCausalError: The model's logits depend on later tokens, on other rows or on the length of the pass.
        UnsupportedModelError: Its context has no room for a row.
    """

    def __init__(self, model: PreTrainedModel, max_length: int, *, by_median: bool = False) -> None:
        config = model.config.get_text_config()
        context = context_length(config) or max_length + _LENGTH
        length = min(_LENGTH, context)
        if length < 2 * (_PATH + 2):
            raise UnsupportedModelError(
                f"{type(model).__name__} has a context of {context} tokens, too short to check its logits in"
            )
        self._config, self._by_median = config, by_median
        self.takes_positions = takes_positions(model)
        starts = {0}
        if self.takes_positions:
            starts |= {t - length // 2 for t in _thresholds(config) if t < max_length} | {max_length - length}
        later = sorted({min(max(start, 0), context - length) for start in starts} - {0})[1 - _MAX_ROWS :] or [0]
        self.starts = torch.tensor([0, *later])
        tokens = _telling_tokens(model, len(self.starts), max(length, min(_LONG, context, max_length)))
        self.texts = [tokens[0], *tokens[1:, :length]]
        # The trees of the first three rows end at different places of a chunk.
        sizes = torch.tensor([len(text) for text in self.texts])
        self.roots = sizes - 2 - _PATH - 2 * torch.arange(len(sizes)) % 3
        # The first text cut short, and with another last token.
        cut = tokens[:1, :length]
        changed = cut.clone()
        changed[:, -1] = (changed[:, -1] + 1) % config.vocab_size
        with self.short_windows(), _eager(model):
            (first,) = self._own(model, tokens[:1], [0])
            *rest, of_cut, of_changed = self._own(model, torch.cat([tokens[1:, :length], cut, changed]), [*later, 0, 0])
        own = [first, *rest]
        self.logits = torch.stack(
            [row[root : root + _PATH + 2] for row, root in zip(own, self.roots.tolist(), strict=True)]
        )
        # In a pass of another length, with other texts.
        noise = self.difference(first[:length], of_cut)
        # Norms compute in float32 whatever the dtype, and some models cast their logits to it. A sum in float32 rounds
        # at each of its terms, one in half precision once. Two roundings a layer add up as a random walk does.
        half = max(torch.finfo(first.dtype).eps, torch.finfo(model.dtype).eps)
        precision = max(half, 8 * torch.finfo(torch.float32).eps)
        rounding = min(8 * precision * (2 * config.num_hidden_layers) ** 0.5, _LARGEST)
        # In one pass, where nothing is rounded in another way.
        ahead = self.difference(of_changed[:-1], of_cut[:-1])
        # A tolerance from noise that is no rounding would let everything pass.
        if not (noise <= min(4 * rounding, _LARGEST) and ahead <= rounding):
            raise NotCausalError(
                f"{type(model).__name__} is not causal, or its attention depends on the length of the pass: its logits "
                f"change by {max(noise, ahead):.1%} of their spread with later tokens or other texts in the pass, so "
                f"trees cannot be verified; {TRY_SGLANG}"
            )
        self.tolerance = max(min(8 * noise, _LARGEST), rounding)

    def _own(self, model: PreTrainedModel, tokens: Tensor, starts: Sequence[int]) -> Tensor:
        """Return the logits ``[r, n, V]`` of the model's own forward on ``tokens`` ``[r, n]`` from ``starts`` on."""
        arguments: dict[str, Any] = {}
        if self.takes_positions:
            positions = torch.tensor(starts)[:, None] + torch.arange(tokens.shape[1])
            arguments["position_ids"] = positions.to(model.device)
        with torch.inference_mode():
            return model(tokens, use_cache=False, **arguments).logits

    def difference(self, logits: Tensor, own: Tensor) -> float:
        """Return the root mean square of the difference of logits ``[..., V]`` over their spread, at its worst."""
        precise = torch.promote_types(own.dtype, torch.float32)
        logits, own = logits.to(precise), own.to(precise)
        gap = (logits - own).square().mean(-1).sqrt() / own.std(-1).mean()
        gap = gap.nan_to_num(nan=torch.inf)
        return float(gap.median() if self._by_median else gap.max())

    @contextlib.contextmanager
    def short_windows(self) -> Iterator[None]:
        """Shorten the attention windows of the model's configuration, where it has any."""
        kept = {name: value for name in _WINDOWS if (value := getattr(self._config, name, None)) is not None}
        try:
            for name, value in kept.items():
                setattr(self._config, name, min(value, _WINDOW))
            yield
        finally:
            for name, value in kept.items():
                setattr(self._config, name, value)


@contextlib.contextmanager
def _eager(model: PreTrainedModel) -> Iterator[None]:
    """Compute attention as the model's family defines it: other forms drop terms (SDPA drops Gemma 2's cap)."""
    kept = model.config._attn_implementation
    if kept == GROUPED_ATTENTION:  # it is in inference form already, checked by the engine that put it there
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(kept)


def few_layers_in_float32(model: PreTrainedModel, layers: nn.ModuleList) -> PreTrainedModel:
    """Copy a model, as it was loaded, with its first decoder layers only: at least two, one of each kind, 8 at most."""
    kinds = [layer_kind(layer) for layer in layers]
    # Two at least: a norm after a single layer may undo what a second layer would show.
    count = min(max(2, *(kinds.index(kind) + 1 for kind in kinds)), 8, len(kinds))
    removed = list(layers[count:])
    del layers[count:]
    try:
        few: PreTrainedModel = copy.deepcopy(model)
    finally:
        layers.extend(removed)
    few.config.get_text_config().num_hidden_layers = count
    _keep_first_tokens(few)
    nn.Module.float(few)
    return few


def _keep_first_tokens(model: PreTrainedModel) -> None:
    """Keep only the first rows of the embedding and of the head: products with the others take most of the time."""
    config, ends = model.config.get_text_config(), (model.get_input_embeddings(), model.get_output_embeddings())
    if config.vocab_size <= _FEW_TOKENS or any(type(end) not in (nn.Embedding, nn.Linear) for end in ends):
        return
    kept: dict[int, nn.Parameter] = {}  # a tied weight stays one
    for end in ends:
        for name, parameter in end.named_parameters():
            rows = nn.Parameter(parameter[:_FEW_TOKENS].clone(), requires_grad=False)
            setattr(end, name, kept.setdefault(id(parameter), rows))
    config.vocab_size = _FEW_TOKENS
    setattr(ends[0], "padding_idx", None)  # noqa: B010


@torch.no_grad()
def with_larger_products(few: PreTrainedModel, factor: float) -> PreTrainedModel:
    """Copy a model, but for embedding and head, with products ``factor`` times as large, which makes outliers."""
    ends = (few.get_input_embeddings(), few.get_output_embeddings())
    shared = {id(parameter): parameter for end in ends for parameter in end.parameters()}
    larger: PreTrainedModel = copy.deepcopy(few, memo=shared)
    for module in decoder_layers(larger).modules():
        if isinstance(module, nn.Linear | Conv1D):
            module.weight.mul_(factor)
    return larger


def takes_positions(model: PreTrainedModel) -> bool:
    """Return whether the decoder takes the positions of its tokens; ALiBi has none."""
    return "position_ids" in inspect.signature(decoder_of(model).forward).parameters


def _thresholds(config: PretrainedConfig) -> set[int]:
    """Return the positions at which, by its rotary settings, the model starts to compute something else."""

    def whole_numbers(settings: Any) -> Iterator[int]:
        if isinstance(settings, Mapping):
            for value in settings.values():
                yield from whole_numbers(value)
        elif isinstance(settings, int) and not isinstance(settings, bool) and settings > 1:
            yield settings

    names = ("rope_parameters", "original_max_position_embeddings")
    return {number for name in names for number in whole_numbers(getattr(config, name, None))}


@torch.inference_mode()
def _telling_tokens(model: PreTrainedModel, rows: int, length: int) -> Tensor:
    """Return ``[rows, length]`` int64: random tokens, every second one of a large embedding (outliers), bos first."""
    embedding, generator = model.get_input_embeddings().get_parameter("weight"), torch.Generator().manual_seed(0)
    vocab = min(len(embedding), model.config.get_text_config().vocab_size)
    ids = torch.arange(0, vocab, max(vocab // 4096, 1))
    norms = embedding[ids.to(embedding.device)].float().norm(dim=-1).cpu()
    large = ids[norms.argsort(descending=True)[:32]]
    tokens = torch.randint(vocab, (rows, length), generator=generator)
    tokens[:, 1::2] = large[torch.randint(len(large), (rows, length // 2), generator=generator)]
    bos = getattr(model.config.get_text_config(), "bos_token_id", None)
    if isinstance(bos, int) and 0 <= bos < vocab:
        tokens[:, 0] = bos
    return tokens.to(model.device)


def check_batch_invariance(engine: Engine, text: Tensor) -> None:
    """Check that logits are the same bits in plain rounds and in a tree, next to another slot, after a whole prefill.

    All slots are free; ``text`` is ``[n]`` int64 with ``n > 5``. UnsupportedModelError says where logits differ.
    """
    root, slot = len(text) - 5, engine.num_slots - 1
    engine.prefill([slot], [text[:1]])
    alone, none, logits = torch.tensor([slot]), text[None, :0], []
    for token in text[1:]:
        logits.append(engine.logits(engine.verify(alone, none, none, none.bool()))[:, 0])
        engine.commit(alone, none, token.view(1, 1), torch.ones_like(alone))
    plain = torch.cat(logits[-4:])
    engine.release(slot)
    slots = sorted({0, slot})
    # The other slot has a shorter text, so that columns are masked for one and not for both.
    engine.prefill(slots, [text[: root + 1] if each == slot else text[:2] for each in slots])
    wrong = (text[root + 1] + 1) % engine.vocab_size
    tree = torch.stack([wrong, text[root + 1], wrong, text[root + 2], wrong, text[root + 3]]).repeat(len(slots), 1)
    parents = torch.tensor([-1, -1, 1, 1, 0, 3], device=text.device).repeat(len(slots), 1)
    hidden = engine.verify(torch.tensor(slots), tree, parents, torch.ones_like(tree, dtype=torch.bool))
    together = engine.logits(hidden)[-1, [0, 2, 4, 6]]
    for each in slots:
        engine.release(each)
    if not torch.equal(together, plain):
        raise UnsupportedModelError(
            "logits of a token change in their last bits with what else is in the pass, by at most "
            f"{float((together - plain).abs().max()):.2g}; set engine.batch_invariant=false"
        )


def require_fused(layers: nn.ModuleList, found: Exactness) -> bool:
    """Return True if all decoder layers are fused, or raise UnsupportedModelError."""
    if all(isinstance(layer, FusedDecoderLayer) for layer in layers):
        return True
    reasons = "".join(f"; {form}: {reason}" for form, reason in found.switched_off.items())
    raise UnsupportedModelError(
        "engine.batch_invariant=true serves models whose decoder layers are all fused, which these are not"
        f"{reasons}; set engine.batch_invariant=false"
    )
