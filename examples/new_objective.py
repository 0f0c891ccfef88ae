"""A new objective is one function: registered, checked, and trained alongside imitation.

    python examples/new_objective.py --recording runs/chains --plot objective.png

Serving throws away every draft after the first rejected one. The objective weights a draft by the chance that the
drafts before it are accepted, and by ``floor`` at least, so that late drafts learn from the start.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from common import arguments, open_stream
from matplotlib.figure import Figure
from torch import Tensor

from aurora_rl.objectives import Windows, forward_kl, get_objective, make_objectives, overlap, register_objective
from aurora_rl.policies import TreeShape
from aurora_rl.testing import check_objective
from aurora_rl.training.optimizers import drafter_optimizers
from aurora_rl.training.steps import train_on


@register_objective("reach_kl")
def reach_kl(log_p: Tensor, log_q: Tensor, windows: Windows, *, floor: float = 0.1) -> tuple[Tensor, Tensor]:
    """Forward KL of every draft, weighted by the chance that serving gets to it: that all before it are accepted."""
    accepted = torch.where(windows.valid, overlap(log_p, log_q), 0.0).detach()
    reached = torch.cat([torch.ones_like(accepted[:1]), accepted[:-1]]).cumprod(0)
    return reached.clamp(min=floor) * forward_kl(log_p, log_q), windows.valid


def main() -> None:
    parser = arguments(__doc__, saves=False)
    parser.add_argument("--floor", type=float, default=0.1)
    parser.add_argument("--plot", type=Path, default=Path("objective.png"))
    options = parser.parse_args()
    check_objective(get_objective("reach_kl"), differentiable=False)  # its weight is held constant
    stream = open_stream(options, TreeShape(depth=4))
    first = copy.deepcopy(stream.drafter)
    autocast = stream.train[0]["sequence", "features"].dtype == torch.bfloat16
    curves: dict[str, list[tuple[int, float]]] = {}
    for settings in ({"name": "imitation"}, {"name": "reach_kl", "floor": options.floor}):
        stream.drafter = copy.deepcopy(first)
        (loss,) = make_objectives([settings], stream.drafter, stream.head)
        optimizers = drafter_optimizers(stream.drafter)
        curve = curves[loss.name] = [(0, stream.acceptance())]
        for seen, _, _ in train_on(stream.train, loss, optimizers, autocast=autocast):
            if seen % 16 == 0 or seen == len(stream.train):
                curve.append((seen, stream.acceptance()))
                print(f"{loss.name}: {seen} requests, acceptance length {curve[-1][1]:.2f}", flush=True)
    figure = Figure()
    axes = figure.subplots()
    for name, curve in curves.items():
        axes.plot(*zip(*curve, strict=True), label=name)
    axes.set_xlabel("requests learned from")
    axes.set_ylabel(f"acceptance length on {len(stream.held_out)} unseen requests")
    axes.legend()
    figure.savefig(options.plot)
    print(f"written to {options.plot}")


if __name__ == "__main__":
    main()
