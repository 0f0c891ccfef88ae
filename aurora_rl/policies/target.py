"""What a drafter and its training need of the target: its embedding, head, final norm and last layer."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True, slots=True)
class TargetParts:
    """Copies of frozen pieces of a target, to be taken before an engine puts the model into inference form.

    Attributes:
        config: the target's (text) configuration.
        embedding: ``[V, H]``.
        head: ``[V, H]``, the output head; one tensor with ``embedding`` where they are tied.
        norm: ``[H]`` weight of the final norm, None where the decoder has none by that name.
        last_layer: parameters of the last decoder layer by name.
    """

    config: PretrainedConfig
    embedding: Tensor
    head: Tensor
    norm: Tensor | None
    last_layer: dict[str, Tensor]

    @classmethod
    def of(cls, model: PreTrainedModel) -> TargetParts:
        """Read the parts of a Hugging Face causal LM.

        Raises:
            ValueError: the model's head has a bias, which the layout of trajectories has no place for.
        """
        head, decoder = model.get_output_embeddings(), model.get_decoder()
        if getattr(head, "bias", None) is not None:
            raise ValueError(f"{type(model).__name__} has an output head with a bias, which is not supported")
        norm = getattr(decoder, "norm", None)
        last = {name: p.detach() for name, p in decoder.layers[-1].named_parameters()}
        return cls(
            config=model.config.get_text_config(),
            embedding=model.get_input_embeddings().weight.detach(),
            head=head.weight.detach(),
            norm=norm.weight.detach() if isinstance(norm, nn.Module) else None,
            last_layer=last,
        )

    @property
    def digest(self) -> str:
        """Identity of the target's architecture: a digest of the configuration entries that shape it."""
        names = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads")
        return hashlib.blake2b(
            json.dumps({name: getattr(self.config, name, None) for name in names}).encode(), digest_size=8
        ).hexdigest()


def default_feature_layers(num_layers: int) -> tuple[int, ...]:
    """EAGLE-3's early, middle and late layers, as SGLang captures them: 2, n // 2, n − 3 (fewer in tiny models).

    >>> default_feature_layers(30)
    (2, 15, 27)
    >>> default_feature_layers(2)
    (0, 1)
    """
    return tuple(sorted({min(2, num_layers - 2), num_layers // 2, max(num_layers - 3, 0)}))


def choose_draft_vocab(size: int, parts: TargetParts, prompts: list[list[int]]) -> Tensor:
    """Day-0 draft vocabulary: every token of the first prompts, then the lowest ids.

    Merges of a byte-pair tokenizer are numbered by how early, hence how often, they were made, so low ids are the
    frequent tokens.

    Args:
        size: rows of the draft head; at most the target's vocabulary.
        parts: the target.
        prompts: token ids of the first prompts.

    Returns:
        ``[size]`` int64, rising.
    """
    vocab = parts.embedding.shape[0]
    if not 1 <= size <= vocab:
        raise ValueError(f"drafter.vocab_size must lie in 1..{vocab} (the target's vocabulary), got {size}")
    counts = torch.bincount(torch.tensor([t for p in prompts for t in p], dtype=torch.int64), minlength=vocab)
    # Sorting by count, then id: stable over the ids in rising order.
    return counts.sort(descending=True, stable=True).indices[:size].sort().values
