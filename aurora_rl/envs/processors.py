"""The logits processors of a model's generation config, applied at every node of a draft tree.

A logits processor of transformers is a function of the text before a position and of the logits there. At a node the
text goes down to the node, so the processed logits are the target's own there, and every rule stays lossless.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EncoderRepetitionPenaltyLogitsProcessor,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    WatermarkingConfig,
)
from typing_extensions import override

from aurora_rl.envs.request import Request

# Fields whose logits processors are applied.
_APPLIED = (
    *("repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
    *("bad_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens"),
    *("min_length", "min_new_tokens", "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id"),
    *("remove_invalid_values", "renormalize_logits", "watermarking_config"),
)
# Fields that a request, or the environment by its stop tokens, decides.
_OF_THE_REQUEST = (
    *("max_length", "max_new_tokens", "eos_token_id"),
    *("do_sample", "temperature", "top_k", "top_p", "min_p"),
)
# Fields that do not change which tokens one completion has. Those of assisted decoding say how transformers drafts.
_WITHOUT_EFFECT = (
    *("bos_token_id", "pad_token_id", "decoder_start_token_id", "early_stopping", "length_penalty"),
    *("num_return_sequences", "output_attentions", "output_hidden_states", "output_logits", "output_scores"),
    *("return_dict_in_generate", "use_cache", "cache_implementation", "cache_config", "prefill_chunk_size"),
    *("compile_config", "disable_compile", "continuous_batching_config", "low_memory", "transformers_version"),
    *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("assistant_early_exit", "assistant_lookbehind", "target_lookbehind"),
    *("prompt_lookup_num_tokens", "max_matching_ngram_size"),
)
# Fields that transformers applies to sampled text only, after temperature, top-k and top-p.
_OF_SAMPLING = ("top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
# Values, next to None, that leave the text as it is. Fields that are not listed have none.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty", "guidance_scale", "typical_p"), (1,)),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens"), (0,)),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "penalty_alpha", "diversity_penalty"), (0,)),
    **dict.fromkeys(("remove_invalid_values", "renormalize_logits", "token_healing", "is_assistant"), (False,)),
    **dict.fromkeys(("num_beams", "num_beam_groups"), (1,)),
}


def text_settings(config: GenerationConfig | None) -> dict[str, Any]:
    """Return the fields of a model's generation config that change the text and that no request decides.

    Example:
        >>> text_settings(GenerationConfig(repetition_penalty=1.1, temperature=0.7, num_beams=1))
        {'repetition_penalty': 1.1}
    """
    found = {} if config is None else vars(config)
    text_fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    text_fields -= {*_OF_THE_REQUEST, *_WITHOUT_EFFECT}
    return {
        name: value
        for name, value in found.items()
        if name in text_fields and value is not None and value not in _NEUTRAL.get(name, ())
    }


def generation_processors(
    model: PreTrainedModel, stop_tokens: Sequence[int]
) -> Callable[[Request], LogitsProcessorList] | None:
    """Return the logits processors that a model's generation config asks for; None if it leaves the text as it is.

    Args:
        model: Target; its ``generation_config`` is read now.
        stop_tokens: Ids that end a completion, which a shortest length forbids and a length penalty favours.

    Returns:
        The ``processors`` of :class:`aurora_rl.envs.SpecDecodeEnv`. They raise ValueError for a request that would be
        sampled if the config has settings of sampling that are not applied.

    Raises:
        ValueError: The config sets a field that is no function of the text before a token, such as
            ``guidance_scale``, or a value that transformers refuses. The message names field, value and fix.

    Example:
        >>> from aurora_rl.envs import Request
        >>> from aurora_rl.testing import tiny_target
        >>> model = tiny_target()
        >>> model.generation_config.repetition_penalty = 1.1
        >>> [type(p).__name__ for p in generation_processors(model, ())(Request(0, torch.tensor([5])))]
        ['RepetitionPenaltyLogitsProcessor']
    """
    found = text_settings(model.generation_config)
    if not found:
        return None
    cure = "remove it from the model's generation_config.json, or serve raw logits (generation_config=ignore)"
    for name, value in found.items():
        # SynthID's watermark, which is of another class, remembers the contexts that it has seen.
        stateful = name == "watermarking_config" and type(value) is not WatermarkingConfig
        if name not in (*_APPLIED, *_OF_SAMPLING) or stateful:
            raise ValueError(
                f"the model's generation config sets {name}={value!r}, which cannot be applied when drafts are "
                f"verified; {cure}"
            )
    sampled = {name: value for name, value in found.items() if name in _OF_SAMPLING}
    settings = copy.deepcopy(model.generation_config)
    settings.do_sample = False  # temperature, min-p, top-k and top-p come after the processors, and from the request
    if settings.min_new_tokens is not None:
        settings.min_length = None  # as `generate` has it
    vocab_size = model.config.get_text_config().vocab_size
    ends = [token for token in stop_tokens if token < vocab_size]

    make: Any = model._get_logits_processor

    def build(prompt: Tensor, max_new_tokens: int, device: torch.device) -> Any:
        own = copy.copy(settings)
        own.max_length = len(prompt) + max_new_tokens
        own._eos_token_tensor = torch.tensor(ends, device=device) if ends else None
        prompts: Any = prompt.to(device)[None]
        built = make(own, len(prompt), encoder_input_ids=prompts, device=str(device))
        return LogitsProcessorList(
            _EncoderRepetitionPenalty(own.encoder_repetition_penalty, prompts)
            if isinstance(processor, EncoderRepetitionPenaltyLogitsProcessor)
            else processor
            for processor in built
        )

    # What transformers refuses shows before anything is served; at this length both forced tokens are tried, too.
    try:
        build(torch.tensor([0]), 1, torch.device("cpu"))(torch.zeros(1, 1).long(), torch.zeros(1, vocab_size))
    except Exception as error:  # whatever transformers raises: ValueError, TypeError, IndexError
        values = ", ".join(f"{name}={value!r}" for name, value in found.items())
        raise ValueError(f"the model's generation config ({values}) cannot be applied: {error}; {cure}") from error

    def processors_of(request: Request) -> LogitsProcessorList:
        if sampled and request.sampling_params.temperature > 0:
            name, value = next(iter(sampled.items()))
            raise ValueError(
                f"temperature {request.sampling_params.temperature:g} with {name}={value!r} of the model's generation "
                f"config, which is not applied to samples; set temperature=0, {cure}"
            )
        return build(request.prompt, request.sampling_params.token_budget, model.device)

    return processors_of


def process(
    logits: Tensor,
    texts: Sequence[Tensor],
    tokens: Tensor,
    parents: Tensor,
    valid: Tensor,
    processors: Sequence[LogitsProcessorList],
) -> Tensor:
    """Apply logits processors at the root and at every valid node of draft trees.

    A processor is called with all nodes of one depth of a tree at once. It gets real text only: no padding.

    Args:
        logits: Raw logits at the root and at every node, ``[b, n + 1, V]``.
        texts: Committed tokens of each tree, the root last, ``[length]`` int64.
        tokens: Token of each node, ``[b, n]`` int64.
        parents: Parent of each node, −1 = root, ``[b, n]`` int64.
        valid: Result of `aurora_kernels.trees.valid_nodes`, ``[b, n]`` bool.
        processors: Processors of each tree.

    Returns:
        ``[b, n + 1, V]`` float32, in which `generate` calls processors as well; raw at invalid nodes.
    """
    scores = logits.to(torch.float32, copy=True)
    calls: Sequence[Any] = processors  # transformers declares them for tensor types that torch no longer makes
    trees = zip(texts, tokens.tolist(), parents.tolist(), valid.tolist(), calls, strict=True)
    for row, (text, drafted, parent_of, real, own) in enumerate(trees):
        paths: dict[int, list[int]] = {0: []}  # drafted tokens from the root down to each column
        columns_at = defaultdict(list, {0: [0]})
        for node, (token, parent) in enumerate(zip(drafted, parent_of, strict=True)):
            if real[node]:
                paths[node + 1] = [*paths[parent + 1], token]
                columns_at[len(paths[node + 1])].append(node + 1)
        for depth, columns in columns_at.items():
            path = torch.tensor([paths[c] for c in columns], dtype=torch.int64, device=text.device)
            before = torch.cat([text.expand(len(columns), -1), path.view(len(columns), depth)], dim=1)
            scores[row, columns] = own(before, scores[row, columns])
    return scores


class _EncoderRepetitionPenalty(EncoderRepetitionPenaltyLogitsProcessor):
    """The parent takes a prompt for each row; here all rows are nodes of one prompt's tree."""

    @override
    def __call__(self, input_ids: Any, scores: Any) -> Any:
        rows: Any = self.encoder_input_ids[:1].expand(len(scores), -1)
        self.encoder_input_ids = rows
        return super().__call__(input_ids, scores)
