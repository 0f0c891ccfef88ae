"""The target's head, from last hidden states to logits, and the place of its decoder layers."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

# Entries of configurations by which families scale their logits; some multiply by the value and some divide.
_SCALES, _SOFTCAPS = ("logit_scale", "logits_scaling"), ("final_logit_softcapping",)


class TargetHead(nn.Module):
    """The target's frozen output head: ``softcap(scale * (weight @ hidden + bias))``.

    Granite and Cohere scale their logits, Gemma 2 caps them (``cap * tanh(logits / cap)``), Phi adds a bias.

    Args:
        weight: ``[V, H]``.
        bias: ``[V]``, or None.
        scale: Factor on the product.
        softcap: Bound on the absolute value of a logit, or None.

    Example:
        >>> head = TargetHead(torch.eye(3), scale=2.0)
        >>> head(torch.tensor([1.0, 0.0, 0.5]))
        tensor([2., 0., 1.])
        >>> head(torch.tensor([1.0, 0.0, 0.5]), tokens=torch.tensor([2, 0]))
        tensor([1., 2.])
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, *, scale: float = 1.0, softcap: float | None = None
    ) -> None:
        super().__init__()
        self.scale, self.softcap = scale, softcap
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    @classmethod
    def of(cls, model: PreTrainedModel) -> TargetHead:
        """Find the head of a causal LM, as it was loaded, by comparing candidates with its own logits.

        The result shares the model's weight.

        Raises:
            ValueError: The model has no output head, or does more to make logits than this class knows.
        """
        output: Any = model.get_output_embeddings()
        name = type(model).__name__
        weight = getattr(output, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            raise ValueError(f"{name} has no output head (a weight of one row for each token)")
        hidden, logits = _probe(model)
        if not bool(logits.isfinite().all()):
            raise ValueError(
                f"{name} gives logits that are not finite; its weights are damaged, or too large for {logits.dtype}"
            )
        if not bool((logits != logits[..., :1]).any()):
            raise ValueError(f"{name} gives every token the same logit; its weights are missing or zero")
        bias = None if getattr(output, "bias", None) is None else output.bias.detach()
        heads = cls.candidates(weight.detach(), bias, model.config.get_text_config())
        # The nearest and not the first that is near: a cap changes small logits by less than bfloat16 rounds.
        gaps = [float((head(hidden) - logits).abs().max()) for head in heads]
        # A packed head, of a model in inference form, adds up in another order.
        sums = math.sqrt(weight.shape[1]) * torch.finfo(torch.promote_types(logits.dtype, torch.float32)).eps
        if min(gaps) <= 4 * (torch.finfo(logits.dtype).eps + sums) * float(logits.abs().max()):
            return heads[gaps.index(min(gaps))]
        raise ValueError(
            f"{name} does more to make its logits than a linear head with a bias, a scale and a cap, "
            "which aurora_rl cannot reproduce; engine.name=sglang may serve it"
        )

    @classmethod
    def candidates(cls, weight: Tensor, bias: Tensor | None, config: PretrainedConfig) -> list[TargetHead]:
        """Return the heads that a model may have by its configuration, the plain one first."""
        scales = [float(value) for name in _SCALES if isinstance(value := getattr(config, name, None), int | float)]
        caps = [float(value) for name in _SOFTCAPS if isinstance(value := getattr(config, name, None), int | float)]
        return [
            cls(weight, bias, scale=scale, softcap=softcap)
            for scale in [1.0, *scales, *(1 / scale for scale in scales if scale)]
            for softcap in [None, *caps]
        ]

    @classmethod
    def like(cls, head: TargetHead | Tensor) -> TargetHead:
        """Return a head of another's tensors, or of a plain weight ``[V, H]``, which may be cast or moved."""
        if isinstance(head, Tensor):
            return cls(head)
        return cls(head.weight, head.bias, scale=head.scale, softcap=head.softcap)

    def __len__(self) -> int:
        return len(self.weight)

    def rows(self, tokens: Tensor | None = None) -> Tensor:
        """Return ``scale * weight``, ``[V, H]``, or its rows ``[T, H]`` of ``tokens``, without bias and cap."""
        weight = self.weight if tokens is None else self.weight[tokens.to(self.weight.device)]
        return weight if self.scale == 1.0 else weight * self.scale

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that shapes the logits, by name, for checksums: "head" alone where the head is plain."""
        found = {"head": self.weight}
        if self.bias is not None:
            found["bias"] = self.bias
        if self.scale != 1.0:
            found["scale"] = torch.tensor([self.scale])
        if self.softcap is not None:
            found["softcap"] = torch.tensor([self.softcap])
        return found

    def forward(self, hidden: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Return the logits ``[..., V]`` of ``hidden`` ``[..., H]``, or ``[..., T]`` of ``tokens`` ``[T]`` alone."""
        weight, bias = self.weight, self.bias
        if tokens is not None:
            weight, bias = weight[tokens], None if bias is None else bias[tokens]
        return self.finish(F.linear(hidden, weight, bias))

    def finish(self, product: Tensor) -> Tensor:
        """Return the logits of ``weight @ hidden + bias``, ``[..., V]``: scale, then cap."""
        if self.scale != 1.0:
            product = product * self.scale
        return product if self.softcap is None else torch.tanh(product / self.softcap) * self.softcap


@torch.inference_mode()
def _probe(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Return hidden states ``[1, 4, H]`` and logits ``[1, 4, V]`` of a few tokens, by the model's own forward."""
    vocab = model.get_input_embeddings().get_parameter("weight").shape[0]
    # Not the first ids alone: a padding token may have an embedding of zeros, and logits of zeros tell nothing.
    tokens = torch.arange(1, 5, device=model.device)[None] * max((vocab - 1) // 4, 1) % vocab
    read: list[Any] = []
    with decoder_of(model).register_forward_hook(lambda module, args, out: read.append(out)):
        logits = model(tokens, use_cache=False).logits
    if not hasattr(read[-1] if read else None, "last_hidden_state"):  # the decoder is called in another way
        read.append(decoder_of(model)(tokens, use_cache=False))
    return read[-1].last_hidden_state, logits


def decoder_of(model: PreTrainedModel) -> Any:
    """Return the part of a causal LM that turns tokens into what its output head reads."""
    candidates = (model.get_decoder(), getattr(model, "model", None), model.base_model)
    lists = (part for part in candidates if part is not None and part is not model and _outermost_lists(part))
    return next(lists, model.get_decoder())


def _outermost_lists(module: nn.Module) -> list[nn.ModuleList]:
    lists = {name: part for name, part in module.named_modules() if isinstance(part, nn.ModuleList)}
    return [part for name, part in lists.items() if not any(name.startswith(f"{above}.") for above in lists)]


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the decoder layers of a causal LM, whatever its family calls them (``layers``, ``h``, ``blocks``).

    Raises:
        ValueError: The decoder has no list of modules, or several of ``num_hidden_layers``.

    Example:
        >>> from aurora_rl.testing import tiny_target
        >>> len(decoder_layers(tiny_target()))
        3
    """
    count = model.config.get_text_config().num_hidden_layers
    lists = _outermost_lists(decoder_of(model))
    if len(lists) > 1:
        lists = [each for each in lists if len(each) == count]
    if len(lists) != 1:
        raise ValueError(
            f"{type(model).__name__} has no single list of {count} decoder layers that hidden states could be read "
            "from; engine.name=sglang may serve it"
        )
    return lists[0]


def context_length(config: PretrainedConfig) -> int | None:
    """Return how many positions a model has, None if its configuration names no limit (BLOOM's ALiBi has none).

    Example:
        >>> from transformers import MptConfig
        >>> context_length(MptConfig(max_seq_len=64))
        64
    """
    lengths = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len"))
    return next((length for length in lengths if isinstance(length, int) and length > 0), None)
