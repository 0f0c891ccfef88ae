"""SumLoss: objectives that are learned together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import nn
from typing_extensions import override

from aurora_rl.objectives.objective import KeyedLoss, Objective


class SumLoss(KeyedLoss):
    """Objectives that are learned together. The optimisation step sums their losses, as with TorchRL's.

    The entries of a second objective of the same name, such as imitation by another divergence, end in "_2".

    Args:
        objectives: Objectives of the same drafter, at least one.

    Example:
        >>> import torch
        >>> from aurora_rl.objectives import make_objectives
        >>> from aurora_rl.policies import Eagle3Drafter, TargetParts
        >>> from aurora_rl.testing import tiny_target, tiny_trajectory
        >>> from aurora_rl.trajectories import pack
        >>> parts = TargetParts.of(tiny_target())
        >>> drafter = Eagle3Drafter.from_target(parts, draft_vocab=torch.arange(16)).double()
        >>> settings = [{"name": "imitation"}, {"name": "discard", "weight": 0.5}]
        >>> loss = SumLoss(make_objectives(settings, drafter, parts.head))
        >>> [key for key in loss(pack([tiny_trajectory(drafter)])).keys() if key.startswith("loss")]
        ['loss_imitation', 'loss_discard']
    """

    def __init__(self, objectives: Sequence[Objective]) -> None:
        if not objectives:
            raise ValueError("objectives is empty; name at least one, such as [{name: imitation}]")
        super().__init__()
        # In a ModuleList a drafter that all of them share is one module: its parameters are listed once.
        self.objectives = nn.ModuleList(objectives)
        seen: Counter[str] = Counter()
        self._suffixes: list[str] = []
        for objective in objectives:
            seen[objective.name] += 1
            self._suffixes.append("" if seen[objective.name] == 1 else f"_{seen[objective.name]}")

    def _parts(self) -> list[tuple[Objective, str]]:
        return [(o, s) for o, s in zip(self.objectives, self._suffixes, strict=True) if isinstance(o, Objective)]

    def set_keys(self, **keys: NestedKey | None) -> None:
        """Rename entries in every objective that has the key; None takes its default.

        Raises:
            ValueError: no objective has the key.
        """
        fields = [objective._AcceptedKeys.__dataclass_fields__ for objective, _ in self._parts()]
        known = dict.fromkeys(name for names in fields for name in names)
        for key in keys:
            if key not in known:
                raise ValueError(f"{key} is not an accepted tensordict key; the objectives have {', '.join(known)}")
        for (objective, _), names in zip(self._parts(), fields, strict=True):
            objective.set_keys(**{key: value for key, value in keys.items() if key in names})

    @override
    def reset_parameters_recursive(self) -> None:
        self._parts()[0][0].reset_parameters_recursive()

    @property
    def in_keys(self) -> list[NestedKey]:
        """Entries that forward reads."""
        return list(dict.fromkeys(key for objective, _ in self._parts() for key in objective.in_keys))

    @in_keys.setter
    def in_keys(self, keys: list[NestedKey]) -> None:
        raise AttributeError("the keys of a SumLoss are those of its objectives; set them there")

    @property
    def _all_keys(self) -> list[NestedKey]:
        return [f"{key}{suffix}" for objective, suffix in self._parts() for key in objective.out_keys]

    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """Losses and metrics of a packed batch; errors as of the objectives."""
        return self._selected(
            {
                f"{key}{suffix}": value
                for objective, suffix in self._parts()
                for key, value in objective(tensordict).items()
            }
        )
