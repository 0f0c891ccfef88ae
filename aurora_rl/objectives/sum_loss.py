"""SumLoss: objectives that are learned together."""

from __future__ import annotations

from collections.abc import Sequence

from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import nn
from torchrl.objectives import LossModule

from aurora_rl.objectives.objective import Objective
from aurora_rl.tree_index import TREE_KEYS, indexed


class SumLoss(LossModule):
    """Objectives that are learned together. The optimisation step sums their losses, as with TorchRL's.

    The entries of a second objective of the same name, such as imitation by another divergence, end in "_2".

    Args:
        objectives: Objectives of the same drafter, at least one.

    Raises:
        ValueError: There is no objective.

    Example:
        >>> from aurora_rl.objectives import make_objectives
        >>> from aurora_rl.testing import tiny_batch
        >>> drafter, head, batch = tiny_batch()
        >>> settings = [{"name": "imitation"}, {"name": "discard", "weight": 0.5}]
        >>> loss = SumLoss(make_objectives(settings, drafter, head))
        >>> [key for key in loss(batch).keys() if key.startswith("loss")]
        ['loss_imitation', 'loss_discard']
    """

    def __init__(self, objectives: Sequence[Objective]) -> None:
        if not objectives:
            raise ValueError("objectives is empty; name at least one, such as [{name: imitation}]")
        super().__init__()
        # In a ModuleList a drafter that all of them share is one module: its parameters are listed once.
        self.objectives = nn.ModuleList(objectives)
        names = [objective.name for objective in objectives]
        numbers = (names[: place + 1].count(name) for place, name in enumerate(names))
        self._suffixes = ["" if number == 1 else f"_{number}" for number in numbers]

    def _parts(self) -> list[tuple[Objective, str]]:
        return [(o, s) for o, s in zip(self.objectives, self._suffixes, strict=True) if isinstance(o, Objective)]

    def set_keys(self, **keys: NestedKey | None) -> None:
        """Rename entries in every objective that has the key; None takes its default.

        Raises:
            ValueError: No objective has the key.
        """
        known = {o: o._AcceptedKeys.__dataclass_fields__ for o, _ in self._parts()}
        names = dict.fromkeys(name for fields in known.values() for name in fields)
        if unknown := [key for key in keys if key not in names]:
            raise ValueError(f"{unknown[0]} is not an accepted tensordict key; the objectives have {', '.join(names)}")
        for objective, fields in known.items():
            objective.set_keys(**{key: value for key, value in keys.items() if key in fields})

    @property
    def in_keys(self) -> list[NestedKey]:
        """Entries that forward reads."""
        return list(dict.fromkeys(key for objective, _ in self._parts() for key in objective.in_keys))

    @property
    def out_keys(self) -> list[NestedKey]:
        """Entries that forward returns."""
        return [f"{key}{suffix}" for objective, suffix in self._parts() for key in objective.out_keys]

    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """Compute losses and metrics of a packed batch; errors are those of the objectives."""
        readers = sum(set(TREE_KEYS) <= set(objective.in_keys) for objective, _ in self._parts())
        if readers > 1 and set(TREE_KEYS) <= set(tensordict.keys(include_nested=True)):
            tensordict = indexed(tensordict)
        found = ((objective(tensordict), suffix) for objective, suffix in self._parts())
        return TensorDict({f"{key}{suffix}": value for out, suffix in found for key, value in out.items()})
