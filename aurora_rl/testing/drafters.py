"""The conformance check of drafters: serving and training must agree."""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
from tensordict import TensorDict
from transformers import PreTrainedModel

from aurora_rl.envs import SamplingParams
from aurora_rl.policies import Drafter, TargetParts, TreeShape
from aurora_rl.testing.asserts import COMPUTED, require
from aurora_rl.testing.drafter_serving import check_cache, check_draws, check_proposals
from aurora_rl.testing.drafter_training import check_gradients, check_packing, check_paths, check_recorded, check_unroll
from aurora_rl.testing.drafter_weights import (
    check_moving_vocab,
    check_saved,
    check_staging,
    check_swap,
    check_weight_loading,
    moved,
)
from aurora_rl.testing.tiny import cast, dtype_of, serve


def check_drafter(
    drafter: Drafter, target: PreTrainedModel, *, without_gradient: Collection[str] = (), seed: int = 0
) -> None:
    """Check that a drafter keeps the promises of :class:`~aurora_rl.policies.Drafter`.

    The target is served with it on several slots, from prompts of unequal length, with chains and with trees. All of
    this happens to copies, whose weights are moved a little at random, since parts that start at zero do nothing yet.

    Args:
        drafter: Drafter in float64 or float32; float64 tells a mistake from rounding.
        target: Target of the drafter; its weights are used in the drafter's dtype.
        without_gradient: Published float tensors that :meth:`~aurora_rl.policies.Drafter.unroll` need not reach.
        seed: Seed of the weights' noise, the prompts and the completions.

    Raises:
        AssertionError: A promise is broken; the message names it.
        ValueError: The drafter has another dtype.

    Example:
        >>> from aurora_rl.policies import MedusaDrafter
        >>> from aurora_rl.testing import tiny_target
        >>> target = tiny_target()
        >>> drafter = MedusaDrafter.from_target(TargetParts.of(target), draft_vocab=torch.arange(20))
        >>> check_drafter(drafter.double(), target)
    """
    dtype = dtype_of(drafter)
    if dtype not in COMPUTED:
        raise ValueError(f"check_drafter needs a drafter in float64 or float32, got {dtype}")
    generator = torch.Generator().manual_seed(seed)
    _check_declared(drafter)
    _check_apart(drafter, target)  # copies are apart, whatever the originals are
    drafter = copy.deepcopy(drafter)
    drafter.install(moved(drafter.published(), generator))
    target = cast(copy.deepcopy(target), dtype)
    vocab_size = len(TargetParts.of(target).head)
    # One prompt is long: windows, and positions that are off by little, show far into a text.
    prompts = [torch.randint(vocab_size, (n,), generator=generator) for n in (1, 7, 2, 100)]
    *shapes, largest = (TreeShape(1), TreeShape(6), TreeShape(4, 2), TreeShape(3, 3, 9))

    def served(shape: TreeShape) -> list[TensorDict]:
        sampling = SamplingParams(temperature=1.0, seed=seed)
        return serve(drafter, target, prompts, shape=shape, max_new_tokens=8, num_slots=3, sampling_params=sampling)

    plain = served(TreeShape(0))
    for shape in (*shapes, largest):
        check_proposals(drafter, plain, shape, vocab_size)
    trajectories = served(largest)
    check_recorded(drafter, trajectories, largest)
    check_unroll(drafter, trajectories)
    check_packing(drafter, trajectories)
    check_paths(drafter, trajectories)
    check_cache(drafter, trajectories)
    learns = any(parameter.requires_grad for parameter in drafter.parameters())
    if learns:
        check_gradients(drafter, trajectories, without_gradient)
        check_weight_loading(drafter, trajectories, generator)
        check_staging(drafter, trajectories, generator)
        check_moving_vocab(drafter, TargetParts.of(target), trajectories)
    check_saved(drafter, TargetParts.of(target), trajectories)
    # What serves anew comes last: it takes as long as all of the above.
    for shape in shapes:
        check_recorded(drafter, served(shape), shape)
    for shape in (TreeShape(3, 2, mode=mode) for mode in drafter.draft_modes if mode != "topk"):
        check_draws(drafter, plain, shape, seed)
        check_recorded(drafter, served(shape), shape)
    if learns:
        check_swap(drafter, target, prompts, generator)


def _check_declared(drafter: Drafter) -> None:
    """Check that the attributes that callers read of a drafter exist, with the right types."""
    layers, vocab = getattr(drafter, "feature_layers", None), getattr(drafter, "draft_vocab", None)
    integers = isinstance(layers, tuple) and all(type(layer) is int for layer in layers)
    require(integers, f"feature_layers is no tuple of integers, but {layers!r}")
    ids = isinstance(vocab, torch.Tensor) and vocab.dtype == torch.int64 and vocab.dim() == 1
    require(ids, "draft_vocab is no int64 tensor [Vd]")
    require(bool((drafter.draft_vocab.diff() > 0).all()), "draft_vocab does not rise")
    own = {id(parameter) for parameter in drafter.parameters()}
    for table in drafter.vocab_tables:
        require(id(table) in own, "an entry of vocab_tables is no parameter of the drafter")
        require(
            table.dim() == 2 and len(table) == len(drafter.draft_vocab),
            f"a table of vocab_tables is {tuple(table.shape)}",
        )
    size = getattr(drafter, "vocab_size", None)
    require(type(size) is int, f"vocab_size is no integer, but {size!r}")


def _check_apart(drafter: Drafter, target: PreTrainedModel) -> None:
    targets = {parameter.untyped_storage().data_ptr() for parameter in target.parameters()}
    learned = [*drafter.named_parameters(), *drafter.published().items()]
    for name, tensor in learned:
        require(
            tensor.untyped_storage().data_ptr() not in targets,
            f"no gradient may reach the target, and {name!r} shares its memory; clone it in from_target, or register "
            "it as a buffer that is not persistent",
        )
