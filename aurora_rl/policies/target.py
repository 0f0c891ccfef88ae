"""What a drafter and its training need of the target: its embedding, head, final norm and last layer."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PretrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)
# In config.json: heads or rotary settings are not the target's, and are meant so.
_OWN_ATTENTION = "aurora_rl_attention"
_CURE = " If it was trained with them, set drafter.options={attention: own}"


@dataclass(frozen=True, slots=True)
class TargetParts:
    """Copies of frozen pieces of a target, to be taken before an engine puts the model into inference form.

    Attributes:
        config: the target's (text) configuration.
        embedding: ``[V, H]``.
        head: ``[V, H]``, the output head; one tensor with ``embedding`` where they are tied.
        norm: ``[H]`` weight of the final norm, None where the decoder has none by that name.
        last_layer: parameters of the last decoder layer by name.

    Example:
        >>> from aurora_rl.testing import tiny_target
        >>> parts = TargetParts.of(tiny_target())
        >>> parts.head.shape, parts.fingerprint == TargetParts.of(tiny_target(dtype=torch.float32)).fingerprint
        (torch.Size([32, 16]), True)
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
            embedding=model.get_input_embeddings().get_parameter("weight").detach(),
            head=head.get_parameter("weight").detach(),
            norm=norm.get_parameter("weight").detach() if isinstance(norm, nn.Module) else None,
            last_layer=last,
        )

    @property
    def digest(self) -> str:
        """Identity of the target's architecture: a digest of the configuration entries that shape it."""
        names = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads")
        return hashlib.blake2b(
            json.dumps({name: getattr(self.config, name, None) for name in names}).encode(), digest_size=8
        ).hexdigest()

    @property
    def fingerprint(self) -> str:
        """Identity of the target's weights, in whichever dtype they are loaded.

        A digest of rows of the head and the last decoder layer. A target that was tuned further is another one, also
        where its head stayed as it was. Weights that are kept in float32 and loaded in float16 have a digest of their
        own, as the two roundings differ.
        """
        found = hashlib.blake2b(digest_size=8)
        for weight in (self.head, *(self.last_layer[name] for name in sorted(self.last_layer))):
            found.update(_few_rows(weight).contiguous().view(torch.int16).numpy().tobytes())
        return found.hexdigest()


def _few_rows(weight: Tensor) -> Tensor:
    """About 64 rows ``[·, last size]`` from all over a weight, as bfloat16 and float16 both have them, on the CPU."""
    rows = weight.reshape(-1, *weight.shape[-1:])  # a scalar is a row too
    # float16 has fewer digits of small weights than bfloat16.
    return rows[:: max(len(rows) // 64, 1)].to("cpu", torch.bfloat16).half().bfloat16()


def layer_config(parts: TargetParts) -> LlamaConfig:
    """Configuration of one Llama layer of the target's sizes and rotary settings, for drafters that have one."""
    target = parts.config
    return LlamaConfig.from_dict(
        {
            "hidden_size": target.hidden_size,
            "intermediate_size": target.intermediate_size,
            "num_attention_heads": target.num_attention_heads,
            "num_key_value_heads": target.num_key_value_heads,
            "head_dim": getattr(target, "head_dim", None) or target.hidden_size // target.num_attention_heads,
            "num_hidden_layers": 1,
            "rms_norm_eps": target.rms_norm_eps,
            "rope_parameters": target.rope_parameters,
            "vocab_size": target.vocab_size,
            "tie_word_embeddings": False,
            **targets_entries(parts),
        }
    )


def targets_entries(parts: TargetParts) -> dict[str, Any]:
    """Entries of a drafter's configuration that are the target's, whatever a file says.

    Files are often cut to the length of their training; positions are computed here, as far as the target's go.
    """
    target = parts.config
    ends = {name: getattr(target, name, None) for name in ("bos_token_id", "eos_token_id")}
    return {
        "max_position_embeddings": target.max_position_embeddings,
        "num_target_layers": target.num_hidden_layers,
        **{name: value for name, value in ends.items() if value is not None},
    }


def written_config(config: PretrainedConfig, dtype: torch.dtype) -> dict[str, Any]:
    """What ``config.json`` holds of a configuration, for engines on transformers 5 and 4.

    The latter look for ``rope_theta``, ``rope_scaling`` and ``torch_dtype``, and would fall back to base 10000.
    """
    name = str(dtype).removeprefix("torch.")
    written = {**config.to_dict(), "dtype": name, "torch_dtype": name}
    rope = dict(written.get("rope_parameters") or {})
    if "rope_theta" in rope:  # not where each type of layer has its own, for which the older form has no place
        written["rope_theta"] = rope.pop("rope_theta")
        written["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
    return written


def check_rope(config: PretrainedConfig, parts: TargetParts, cure: str = "") -> None:
    """Raise ValueError where a drafter's positions are not the target's: it would draft, and be wrong far into a text.

    Args:
        config: read from the drafter's ``config.json``.
        parts: the target's.
        cure: what the message adds.
    """
    mine, targets = (_rope(of) for of in (config, parts.config))
    if mine != targets:
        raise ValueError(
            f"config.json: rope_parameters are {mine}, the target has {targets}; was the drafter made for another "
            f"target, or were they left out of the file?{cure}"
        )


def settle_attention(config: PretrainedConfig, entries: Mapping[str, Any], parts: TargetParts, attention: str) -> None:
    """Check heads and positions of a drafter whose layer has its own: they may be others than the target's if meant so.

    A drafter must be served as it was trained. Authors of EAGLE train with base 10000 for any target and leave rotary
    settings out of their files, as engines read them too. Settings that a file states, and that are not the target's,
    are most often of another target: they are refused unless the option says "own", or the file itself that this was so
    when it was read before. Heads are compared since the shapes of tensors do not tell eight heads of two from four of
    four.

    Args:
        config: read from the drafter's ``config.json``; marked where its attention is its own.
        entries: of that file.
        parts: the target's.
        attention: the option.

    Raises:
        ValueError: heads or positions of another target, or another option than "target" and "own".
    """
    if attention not in ("target", "own"):
        raise ValueError(f"the option attention must be target or own, got {attention!r}")
    meant = "own" in (attention, entries.get(_OWN_ATTENTION))
    heads = [f"{name} is {getattr(config, name)}, the target has {value}" for name, value in _heads(config, parts)]
    if heads and not meant:
        raise ValueError(f"config.json: {heads[0]}; was the drafter made for another target?{_CURE}")
    same_rope = _rope(config) == _rope(parts.config)
    if not same_rope and not any(entries.get(name) for name in ("rope_parameters", "rope_theta", "rope_scaling")):
        logger.warning(
            "config.json says nothing of RoPE: the drafter keeps the default of its authors, %s; the target has %s",
            _rope(config),
            _rope(parts.config),
        )
    elif not meant:
        check_rope(config, parts, _CURE)
    if heads or not same_rope:
        setattr(config, _OWN_ATTENTION, "own")


def _heads(config: PretrainedConfig, parts: TargetParts) -> list[tuple[str, int]]:
    """Entries of a layer's heads that are not the target's, with the target's."""
    target = layer_config(parts)
    names = ("num_attention_heads", "num_key_value_heads", "head_dim")
    return [(name, getattr(target, name)) for name in names if getattr(config, name) != getattr(target, name)]


def check_heads_stated(entries: Mapping[str, Any]) -> None:
    """Raise ValueError where a ``config.json`` leaves it to a default how many heads there are."""
    if entries.get("num_attention_heads") is None:
        raise ValueError("config.json: num_attention_heads is missing, and tensors do not tell how many there are")


def refuse_own_attention(attention: str) -> None:
    """Raise ValueError where a drafter that starts from the target is asked for an attention of its own."""
    if attention != "target":
        raise ValueError(
            f"the option attention={attention!r} is for a checkpoint, drafter.path; a new drafter has the target's"
        )


def _rope(config: PretrainedConfig) -> dict[str, Any]:
    """Rotary settings without those that stand for their default."""
    settings = {"rope_type": "default", **(config.rope_parameters or {})}
    return {name: value for name, value in sorted(settings.items()) if value is not None}


def check_captured(feature_layers: Sequence[int], num_target_layers: int, *, lowest: int = 0) -> None:
    """Raise ValueError where engines cannot capture the features, or would join them in another order.

    Args:
        feature_layers: ids by the layer that a state enters.
        num_target_layers: decoder layers of the target.
        lowest: that the engine captures; 0 is the embedding.
    """
    for layer in feature_layers:
        if not lowest <= layer < num_target_layers:
            raise ValueError(
                f"feature_layers has {layer}; engines capture what enters a layer, {lowest}..{num_target_layers - 1} "
                "of this target"
            )
    check_layers_rise(feature_layers)


def check_layers_rise(feature_layers: Sequence[int]) -> None:
    """Raise ValueError where engines would join the features in another order than they are given in."""
    if sorted(set(feature_layers)) != list(feature_layers):
        raise ValueError(f"feature_layers must rise, got {tuple(feature_layers)}: engines join states in that order")


def default_feature_layers(num_layers: int) -> tuple[int, ...]:
    """EAGLE-3's early, middle and late layers, as SGLang captures them: 2, n // 2, n − 3 (fewer in tiny models).

    >>> default_feature_layers(30)
    (2, 15, 27)
    >>> default_feature_layers(2)
    (0, 1)
    """
    return tuple(sorted({max(min(2, num_layers - 2), 0), num_layers // 2, max(num_layers - 3, 0)}))


@torch.inference_mode()
def token_prior(model: PreTrainedModel, prompts: list[list[int]]) -> Tensor:
    """How often the target would say each token, before it has said any: ``[V]`` expected counts, float32.

    The sum over all positions of the prompts of the target's next-token distribution, plus the prompts' own tokens.
    On code prompts the best 4,096 tokens by this held 90% of the tokens that were then generated, the 4,096 lowest ids
    with the prompts' tokens 84%.
    """
    vocab, device = model.get_input_embeddings().get_parameter("weight").shape[0], model.device
    prior = torch.zeros(vocab, device=device)
    for prompt in prompts:
        tokens = torch.tensor([prompt], device=device)
        prior += model(tokens).logits[0].softmax(-1, dtype=torch.float32).sum(0)
        prior += torch.bincount(tokens[0], minlength=vocab)
    return prior.cpu()


def choose_draft_vocab(size: int, prior: Tensor) -> Tensor:
    """Day-0 draft vocabulary: the tokens of highest prior, of equal ones the lowest ids.

    Merges of a byte-pair tokenizer are numbered by how early, hence how often, they were made, so low ids are the
    frequent tokens where nothing else is known.

    Args:
        size: rows of the draft head; at most the target's vocabulary.
        prior: ``[V]``, see :func:`token_prior`; zeros where there are no prompts yet.

    Returns:
        ``[size]`` int64, rising.

    Example:
        >>> choose_draft_vocab(2, torch.tensor([0.0, 0.0, 3.0]))
        tensor([0, 2])
    """
    if not 1 <= size <= len(prior):
        raise ValueError(f"drafter.vocab_size must lie in 1..{len(prior)} (the target's vocabulary), got {size}")
    return prior.sort(descending=True, stable=True).indices[:size].sort().values
