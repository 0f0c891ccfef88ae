"""LoRA adapters of a drafter: low-rank deltas of its linear layers, chosen by the tenant of each request.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685). Requests of several adapters share a
pass, as in Punica (arXiv 2310.18547): each row is multiplied with the matrices of its own.

Legend: ``K`` adapters, ``r`` rank, ``b`` rows of a pass (slots, or requests of a batch), ``T`` positions of each.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from aurora_rl.tenants import check_adapters
from aurora_rl.trajectories import adapter_code

if TYPE_CHECKING:
    from aurora_rl.policies.drafter import Drafter

MAX_BYTES = 20_000_000
"""Most bytes of one adapter, in the dtype in which it is served."""


@dataclass(frozen=True)
class Adapters:
    """The adapters of a drafter.

    Attributes:
        names: Names of the adapters: each drafts for the tenant of its name.
        rank: Rank ``r`` of their matrices.

    Raises:
        ValueError: A name is no tenant's, cannot be a folder's, or comes twice, or the rank is less than 1.

    Example:
        >>> adapters = Adapters(("acme", "globex"), rank=4)
        >>> codes = adapters.codes(["globex", "initech", None, "acme"])
        >>> adapters.places(codes)
        tensor([ 1, -1, -1,  0])
    """

    names: tuple[str, ...]
    rank: int

    def __post_init__(self) -> None:
        check_adapters(self.names)
        if self.rank < 1:
            raise ValueError(f"the rank of an adapter must be at least 1, got {self.rank}")

    def codes(self, tenants: Sequence[str | None]) -> Tensor:
        """Return what trajectories say of each tenant's adapter, ``[b]`` int64; 0 if it has none."""
        return torch.tensor([adapter_code(each) if each in self.names else 0 for each in tenants], dtype=torch.int64)

    def places(self, codes: Tensor) -> Tensor:
        """Return the places ``[b]`` int64 of the adapters with these codes; −1 where there is none, on the CPU."""
        own = codes.cpu()[:, None] == self._known
        return torch.where(own.any(1), own.int().argmax(1), -1)

    @functools.cached_property
    def _known(self) -> Tensor:
        return self.codes(self.names)


# Rows of a pass that have an adapter, ``[n]`` int64, None if all have one; and which each has, ``[n]`` int64.
_ROWS: ContextVar[tuple[Tensor | None, Tensor] | None] = ContextVar("rows", default=None)


@contextmanager
def _adapted(places: Tensor | None, device: torch.device) -> Iterator[None]:
    """Let adapted layers use these adapters, ``[b]`` int64, for the rows of their inputs; −1, or None, uses none."""
    found = None
    if places is not None and len(rows := (places >= 0).nonzero().flatten()):
        some = None if len(rows) == len(places) else rows.to(device)
        found = some, places[rows].to(device)
    token = _ROWS.set(found)
    try:
        yield
    finally:
        _ROWS.reset(token)


_Method = TypeVar("_Method", bound=Callable[..., Any])


def by_slot(method: _Method) -> _Method:
    """Let a drafter's method, whose first argument are slots, compute each slot's rows with its adapter."""

    @functools.wraps(method)
    def adapted(drafter: Drafter, slots: Tensor, *args: Any, **keywords: Any) -> Any:
        places = None if drafter.adapters is None else drafter.slot_adapters[slots.cpu()]
        with _adapted(places, drafter.draft_vocab.device):
            return method(drafter, slots, *args, **keywords)

    return cast(_Method, adapted)


def by_request(method: _Method) -> _Method:
    """Let a drafter's method, whose first argument is a batch, compute each request's rows with its adapter."""

    @functools.wraps(method)
    def adapted(drafter: Drafter, batch: Any, *args: Any, **keywords: Any) -> Any:
        adapters, codes = drafter.adapters, batch.get(("sequence", "adapter"), None)
        places = None if adapters is None or codes is None else adapters.places(codes)
        with _adapted(places, drafter.draft_vocab.device):
            return method(drafter, batch, *args, **keywords)

    return cast(_Method, adapted)


class AdaptedLinear(nn.Module):
    """A linear layer, and a low-rank delta of its weight for each adapter.

    Outside of methods that :func:`by_slot` and :func:`by_request` wrap it is the layer that it was.

    Args:
        base: The layer; it stays a part of this one.
        count: Number ``K`` of adapters.
        rank: Their rank ``r``.

    Attributes:
        lora_A: Matrices into the low rank, ``[K, r, in]``.
        lora_B: Matrices out of it, ``[K, out, r]``, zero at first: an adapter begins as the shared drafter.
    """

    def __init__(self, base: nn.Linear, count: int, rank: int) -> None:
        super().__init__()
        self.base = base
        self.lora_A = nn.Parameter(base.weight.new_zeros(count, rank, base.in_features))
        self.lora_B = nn.Parameter(base.weight.new_zeros(count, base.out_features, rank))

    @property
    def weight(self) -> Tensor:
        """The shared weight, ``[out, in]``."""
        return self.base.weight

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Map ``[b, T, in]`` to ``[b, T, out]``."""
        out, found = self.base(x), _ROWS.get()
        if found is None:
            return out
        rows, adapter = found
        down, up = self.lora_A[adapter], self.lora_B[adapter]
        delta = torch.bmm(torch.bmm(x if rows is None else x[rows], down.mT), up.mT)
        # Rows without an adapter are not touched: they are those of the shared drafter to the bit.
        return out + delta if rows is None else out.index_add(0, rows, delta.to(out.dtype))

    def merged(self, place: int | None) -> nn.Linear:
        """Return a plain layer of the shared weight, plus the delta of the adapter at a place; None adds none."""
        with torch.device("meta"):
            linear = nn.Linear(self.lora_A.shape[2], self.lora_B.shape[1], bias=self.base.bias is not None)
        weight = self.weight.detach()
        if place is not None:
            weight = weight + (self.lora_B[place] @ self.lora_A[place]).detach()
        linear.weight = nn.Parameter(weight, requires_grad=self.lora_A.requires_grad)
        if (bias := self.base.bias) is not None:
            linear.bias = nn.Parameter(bias.detach(), bias.requires_grad)
        return linear


def _layers(drafter: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Return the linear layers that adapters change, by their paths: all but the head, which reads no whole rows."""
    return ((path, each) for path, each in drafter.named_modules() if type(each) is nn.Linear and "lm_head" not in path)


def check_size(drafter: Drafter, rank: int, dtype: torch.dtype) -> None:
    """Raise ValueError, with size, rank and the fix, where an adapter of this rank has more than :data:`MAX_BYTES`."""
    size = sum(layer.in_features + layer.out_features for _, layer in _layers(drafter)) * dtype.itemsize
    if size * rank > MAX_BYTES:
        name, most = str(dtype).removeprefix("torch."), MAX_BYTES // size
        fix = f"take a rank of {most} or less" if most else "its drafter is too large for adapters"
        raise ValueError(
            f"an adapter of rank {rank} has {size * rank / 1e6:.1f} MB in {name}, and {MAX_BYTES / 1e6:.0f} MB is the "
            f"most: {fix}"
        )


def add_adapters(drafter: Drafter, names: Sequence[str], rank: int) -> None:
    """Give a drafter adapters, in place, each of which begins as the drafter itself.

    What an adapter begins with follows from its name alone, so that server and learner start alike.

    Args:
        drafter: Drafter without adapters, in training form.
        names: Names of the adapters, those of tenants.
        rank: Their rank ``r``.

    Raises:
        ValueError: Its architecture takes none, or see :class:`Adapters`.

    Example:
        >>> from aurora_rl.policies import Eagle3Drafter, TargetParts
        >>> from aurora_rl.testing import tiny_target
        >>> drafter = Eagle3Drafter.from_target(TargetParts.of(tiny_target()), draft_vocab=torch.arange(16))
        >>> add_adapters(drafter, ["acme", "globex"], rank=4)
        >>> drafter.published()["fc.lora_A"].shape
        torch.Size([2, 4, 32])
    """
    kind = type(drafter)
    if not kind.takes_adapters:
        raise ValueError(f"{kind.__name__} takes no adapters; those of EAGLE-3 and EAGLE do")
    drafter.adapters = Adapters(tuple(names), rank)
    generators = [torch.Generator().manual_seed(adapter_code(name)) for name in names]
    for path, linear in list(_layers(drafter)):
        adapted = AdaptedLinear(linear, len(names), rank)
        for first, generator in zip(adapted.lora_A.data, generators, strict=True):
            bound = linear.in_features**-0.5  # as PEFT begins
            first.copy_(torch.empty(first.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator))
        drafter.set_submodule(path, adapted)


def adapted_layers(drafter: Drafter) -> dict[str, AdaptedLinear]:
    """Return the layers that :func:`add_adapters` put in place, by their paths."""
    return {path: each for path, each in drafter.named_modules() if isinstance(each, AdaptedLinear)}


DrafterKind = TypeVar("DrafterKind", bound="Drafter")


def merge_adapter(drafter: DrafterKind, name: str | None = None) -> DrafterKind:
    """Return the drafter without adapters, one of them merged into its weights. Memory of other weights is shared.

    Args:
        drafter: Drafter, with adapters or without.
        name: Name of the adapter; None merges none and returns the shared drafter.

    Raises:
        ValueError: It has no adapter of the name.

    Example:
        >>> from aurora_rl.policies import Eagle3Drafter, TargetParts
        >>> from aurora_rl.testing import tiny_target
        >>> drafter = Eagle3Drafter.from_target(TargetParts.of(tiny_target()), draft_vocab=torch.arange(16))
        >>> before = drafter.published()
        >>> add_adapters(drafter, ["acme"], rank=4)
        >>> after = merge_adapter(drafter, "acme").published()
        >>> all(bool((after[key] == value).all()) for key, value in before.items())
        True
    """
    there = () if drafter.adapters is None else drafter.adapters.names
    if name is not None and name not in there:
        raise ValueError(f"the drafter has no adapter {name!r}; it has {', '.join(there) or 'none'}")
    if drafter.adapters is None:
        return drafter
    plain = _merged(drafter, None if name is None else there.index(name))
    plain.adapters = None
    return cast(DrafterKind, plain)


def _merged(module: Any, place: int | None) -> Any:
    if isinstance(module, AdaptedLinear):
        return module.merged(place)
    plain = copy.copy(module)
    plain._modules = {name: each and _merged(each, place) for name, each in module._modules.items()}
    plain._buffers = dict(module._buffers)
    # Parameters of its own on the same memory: casts and swaps of the one leave the other as it is.
    plain._parameters = {
        name: None if each is None else nn.Parameter(each.detach(), each.requires_grad)
        for name, each in module._parameters.items()
    }
    return plain
