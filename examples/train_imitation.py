"""Teach a drafter the target's distribution at accepted contexts, from recorded trajectories.

    python examples/train_imitation.py --recording runs/chains --divergence reverse_kl

Any divergence of `aurora_rl.objectives.DIVERGENCES` will do; `--expected-length` weighs the unroll's steps by how much
of the accepted length hangs on them.
"""

from __future__ import annotations

from common import arguments, open_stream

from aurora_rl.objectives import DIVERGENCES, ImitationLoss
from aurora_rl.policies import TreeShape


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--divergence", default="forward_kl", choices=list(DIVERGENCES))
    parser.add_argument("--expected-length", action="store_true")
    options = parser.parse_args()
    stream = open_stream(options, TreeShape(depth=4))
    loss = ImitationLoss(
        stream.drafter,
        stream.head,
        divergence=options.divergence,
        weighting="expected_length" if options.expected_length else "decay",
    )
    stream.learn(loss)
    stream.save(options.out)


if __name__ == "__main__":
    main()
