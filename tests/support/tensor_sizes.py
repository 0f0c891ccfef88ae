"""How large the tensors are that an operation makes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestTensor(TorchDispatchMode):
    """Records `elements`, those of the largest tensor that an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        # By its memory: a view or an expanded tensor takes none of its own.
        sizes = [t.untyped_storage().nbytes() // t.element_size() for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


def largest_tensor(function: Any) -> int:
    """Call a function and return the elements of the largest tensor that it made."""
    with LargestTensor() as largest:
        function()
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    return largest.elements
