"""Notice that parameters were written, however torch or TorchRL write them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from aurora_rl.models.inference_modules import PackedLinear, writes_to


class WatchedParameter(nn.Parameter):
    """A parameter whose ``.data`` leaves a trace when it is written.

    PyTorch counts writes to a tensor (``_version``), but not those through its ``.data``, and TorchRL's collectors
    write by ``TensorDict.data``. Here ``.data`` is ``detach()``, which shares the counter.

    Attributes:
        times_replaced: How often other memory was assigned to ``.data``.

    Example:
        >>> plain = nn.Parameter(torch.zeros(2))
        >>> _ = plain.data.fill_(1.0)
        >>> plain._version
        0
        >>> plain.__class__ = WatchedParameter
        >>> _ = plain.data.fill_(1.0)
        >>> plain._version
        1
    """

    times_replaced = 0

    @property
    def data(self) -> Tensor:
        """The values, without gradients, on the same memory."""
        return self.detach()

    @data.setter
    def data(self, new: Tensor) -> None:
        torch.Tensor.data.__set__(self, new)  # type: ignore[attr-defined]
        self.times_replaced += 1


def _count_fused(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
    """Count the writes of an optimizer made with ``fused=True``: torch's fused kernels do not."""
    for group in optimizer.param_groups:
        if group.get("fused"):
            for parameter in group["params"]:
                if isinstance(parameter, WatchedParameter) and parameter.grad is not None:
                    torch.autograd.graph.increment_version(parameter)


register_optimizer_step_post_hook(_count_fused)


class WeightWatch:
    """Tells whether parameters of a module were written, and packs anew those that are kept packed.

    Noticed are ``load_state_dict``, ``copy_`` and every other operation of torch on a parameter or its ``.data``,
    optimizers, fused ones too, assignments to ``.data``, ``TensorDict.update_`` and ``TensorDict.to_module``. For this
    the parameters become :class:`WatchedParameter`, in place: an optimizer that has them keeps them.

    Not noticed is a write that torch does not count: through a ``.data`` that was taken before the watch began,
    through NumPy or DLPack, by ``torch.distributed`` (``broadcast``, ``recv``, ...), or by another process that shares
    the memory. ``torch.autograd.graph.increment_version(parameter)`` counts one. Nor is a write to a buffer noticed.

    Args:
        module: Module whose parameters are watched; its submodules must stay.

    Example:
        >>> linear = nn.Linear(2, 2)
        >>> watch = WeightWatch(linear)
        >>> _ = linear.load_state_dict(nn.Linear(2, 2).state_dict())
        >>> watch.written(), watch.written()
        (True, False)
    """

    def __init__(self, module: nn.Module) -> None:
        self._owners = [each for each in module.modules() if each._parameters]
        self._known: list[tuple[nn.Module, str, nn.Parameter, int, int]] = []
        self.accept()

    def accept(self) -> None:
        """Take the parameters as they are: only later writes count."""
        self._known = []
        for owner in self._owners:
            for name, parameter in owner._parameters.items():
                # Torch refuses to write an inference tensor outside of inference mode, and counts nothing.
                if parameter is None or parameter.is_inference():
                    continue
                if type(parameter) is nn.Parameter:
                    parameter.__class__ = WatchedParameter
                replaced = getattr(parameter, "times_replaced", 0)
                self._known.append((owner, name, parameter, writes_to(parameter), replaced))

    def written(self) -> bool:
        """Return whether a parameter was written since the last :meth:`accept` or call of this."""
        owners = [
            owner
            for owner, name, parameter, version, replaced in self._known
            if owner._parameters.get(name) is not parameter
            or writes_to(parameter) != version
            or getattr(parameter, "times_replaced", 0) != replaced
        ]
        if not owners:
            return False
        for owner in owners:
            if isinstance(owner, PackedLinear):
                owner.repack()
        self.accept()
        return True
