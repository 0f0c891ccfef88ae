"""What turns the target's last hidden states into logits, and where its decoder layers are."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

# Entries of configurations by which families scale their logits; some multiply by the value and some divide.
_SCALES = ("logit_scale", "logits_scaling")
_SOFTCAPS = ("final_logit_softcapping",)


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
        """Find how a causal LM makes logits of its decoder's output, by comparing candidates with its own logits.

        Args:
            model: The target, as it was loaded.

        Returns:
            A head that shares the model's weight.

        Raises:
            ValueError: The model has no output head, or does more to make logits than this class knows.
        """
        output: Any = model.get_output_embeddings()
        name = type(model).__name__
        weight = getattr(output, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            raise ValueError(f"{name} has no output head (a weight of one row for each token)")
        hidden, logits = _probe(model)
        bias = getattr(output, "bias", None)
        # Rounding of a product in the model's dtype, and of a scale or cap after it.
        tolerance = 16 * torch.finfo(logits.dtype).eps * float(logits.abs().max())
        for scale, softcap in itertools.product(*_candidates(model.config.get_text_config())):
            head = cls(weight.detach(), None if bias is None else bias.detach(), scale=scale, softcap=softcap)
            if torch.allclose(head(hidden), logits, rtol=0, atol=tolerance):
                return head
        raise ValueError(
            f"{name} does more to make its logits than a linear head with a bias, a scale and a cap, "
            "which aurora_rl cannot reproduce; serve it with engine.name=sglang"
        )

    @classmethod
    def like(cls, head: TargetHead | Tensor) -> TargetHead:
        """Return a head that shares the tensors of another, or a plain one of a weight ``[V, H]``.

        Casting or moving the result leaves ``head`` as it is.
        """
        if isinstance(head, Tensor):
            return cls(head)
        return cls(head.weight, head.bias, scale=head.scale, softcap=head.softcap)

    def __len__(self) -> int:
        """Return the size of the vocabulary, ``V``."""
        return len(self.weight)

    def rows(self, tokens: Tensor | None = None) -> Tensor:
        """Return ``scale * weight``, ``[V, H]``, or its rows ``[T, H]`` of ``tokens``.

        A drafter whose head is a plain matrix starts from these. It leaves out the bias and the cap.
        """
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


def _candidates(config: PretrainedConfig) -> tuple[list[float], list[float | None]]:
    """Scales and caps that the configuration of a model allows, the plain ones first."""
    values = [float(value) for name in _SCALES if isinstance(value := getattr(config, name, None), int | float)]
    caps = [float(value) for name in _SOFTCAPS if isinstance(value := getattr(config, name, None), int | float)]
    return [1.0, *values, *(1 / value for value in values if value)], [None, *caps]


@torch.inference_mode()
def _probe(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Hidden states ``[1, 4, H]`` and logits ``[1, 4, V]`` of a few tokens, from the model's own forward."""
    vocab = model.get_input_embeddings().get_parameter("weight").shape[0]
    # Not the first ids alone: a padding token may have an embedding of zeros, and logits of zeros tell nothing.
    tokens = torch.arange(1, 5, device=model.device)[None] * max((vocab - 1) // 4, 1) % vocab
    out = model(tokens, use_cache=False)
    hidden = model.get_decoder()(tokens, use_cache=False).last_hidden_state
    return hidden, out.logits


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of a causal LM, under whichever name its family has them (``layers``, ``h``, ``blocks``).

    Raises:
        ValueError: The decoder has no list of ``num_hidden_layers`` modules.

    Example:
        >>> from aurora_rl.testing import tiny_target
        >>> len(decoder_layers(tiny_target()))
        3
    """
    decoder, count = model.get_decoder(), model.config.get_text_config().num_hidden_layers
    lists = [child for child in decoder.children() if isinstance(child, nn.ModuleList) and len(child) == count]
    if len(lists) != 1:
        raise ValueError(
            f"{type(model).__name__} has no single list of {count} decoder layers that hidden states could be read "
            "from; serve it with engine.name=sglang"
        )
    return lists[0]


def context_length(config: PretrainedConfig) -> int | None:
    """Positions that a model has, None where its configuration names no limit (BLOOM's ALiBi has none).

    Example:
        >>> from transformers import MptConfig
        >>> context_length(MptConfig(max_seq_len=64))
        64
    """
    return getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
