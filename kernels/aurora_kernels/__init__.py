"""Kernels of speculative decoding, usable without `aurora_rl`: nothing of it is imported here.

:func:`two_head_loss` compares a drafter with its target through both output heads, a chunk of rows at a time.
:func:`tree_attention` attends from draft trees to a cached text and to themselves, and :func:`tree_training_attention`
from a text and all its trees at once, with gradients.
:func:`walk` follows the target's choices down draft trees, and :func:`gumbel_argmax` makes choices that replay.
:func:`invariant_linear` and :func:`invariant_attention` compute a row to the same bits whatever else is in the call.
"""

from aurora_kernels.batch_invariant import invariant_attention, invariant_elementwise, invariant_linear
from aurora_kernels.closed_forms import CLOSED_FORMS, ClosedForm, closed_form
from aurora_kernels.noise import gumbel, gumbel_argmax
from aurora_kernels.targets import HeadTarget, LogProbTarget, Target, TopKTarget
from aurora_kernels.tree_attention import tree_attention
from aurora_kernels.tree_mask import TreeMask
from aurora_kernels.tree_training_attention import tree_training_attention
from aurora_kernels.trees import accepted_path, valid_nodes, walk
from aurora_kernels.two_head_loss import two_head_loss

__all__ = [
    "CLOSED_FORMS",
    "ClosedForm",
    "HeadTarget",
    "LogProbTarget",
    "Target",
    "TopKTarget",
    "TreeMask",
    "accepted_path",
    "closed_form",
    "gumbel",
    "gumbel_argmax",
    "invariant_attention",
    "invariant_elementwise",
    "invariant_linear",
    "tree_attention",
    "tree_training_attention",
    "two_head_loss",
    "valid_nodes",
    "walk",
]
