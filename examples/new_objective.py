"""A new objective in twenty lines: registered, checked, and trained beside imitation.

    python examples/new_objective.py --recording runs/chains --plot objective.png

The objective weighs every position by how badly the drafter does there, as focal losses do: (1 - overlap) ** gamma.
"""

from __future__ import annotations

import copy
from pathlib import Path

import matplotlib
import torch
from common import arguments, open_stream

from aurora_rl.objectives import ImitationLoss, make_objectives, overlap, register_objective
from aurora_rl.policies import TreeShape
from aurora_rl.policies.drafter import log_softmax
from aurora_rl.testing import check_objective
from aurora_rl.training.offline import train_on
from aurora_rl.training.optimizers import drafter_optimizers


@register_objective("focal_imitation")
class FocalImitationLoss(ImitationLoss):
    """Imitation that dwells on what the drafter does not know yet."""

    def __init__(self, drafter, head, *, gamma: float = 1.0, **settings) -> None:
        super().__init__(drafter, head, **settings)
        self.gamma = gamma

    def position_weights(self, batch, unroll, log_p):
        missed = torch.stack([1 - overlap(log_p, log_softmax(logits)) for logits in unroll.logits])
        # Of equal distributions it may round to less than 0.
        focus = missed.detach().clamp(min=0) ** self.gamma
        return focus * super().position_weights(batch, unroll, log_p)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--gamma", type=float, default=1.0)
    parser.add_argument("--plot", type=Path, default=Path("objective.png"))
    options = parser.parse_args()
    check_objective(lambda d, head, reduction: FocalImitationLoss(d, head, reduction=reduction), differentiable=False)
    stream = open_stream(options, TreeShape(depth=4))
    first = copy.deepcopy(stream.drafter)
    autocast = stream.train[0]["sequence", "features"].dtype == torch.bfloat16
    curves: dict[str, list[tuple[int, float]]] = {}
    for settings in ({"name": "imitation"}, {"name": "focal_imitation", "gamma": options.gamma}):
        stream.drafter = copy.deepcopy(first)
        (loss,) = make_objectives([settings], stream.drafter, stream.head)
        optimizers = drafter_optimizers(stream.drafter, muon_lr=0.02, adam_lr=5e-4)
        curve = curves[loss.name] = [(0, stream.acceptance())]
        for seen, _, _ in train_on(stream.train, loss, optimizers, autocast=autocast):
            if seen % 16 == 0 or seen == len(stream.train):
                curve.append((seen, stream.acceptance()))
                print(f"{loss.name}: {seen} requests, acceptance length {curve[-1][1]:.2f}", flush=True)
    matplotlib.use("agg")
    from matplotlib import pyplot

    for name, curve in curves.items():
        pyplot.plot(*zip(*curve, strict=True), label=name)
    pyplot.xlabel("requests learned from")
    pyplot.ylabel(f"acceptance length on {len(stream.held_out)} unseen requests")
    pyplot.legend()
    pyplot.savefig(options.plot)
    print(f"written to {options.plot}")


if __name__ == "__main__":
    main()
