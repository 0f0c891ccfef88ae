"""Policy gradient on the accepted length, from drafts that were sampled.

    python examples/train_acceptance_reward.py --recording runs/sampled --baseline leave_one_out

A drafter's likeliest nodes hold no exploration, so the recording is of four chains drawn at random from every root.
They are an old drafter's by the time they are learned from: hence the clipped importance ratio. Imitation of a small
weight keeps the drafter near the target where no draw has been yet.
"""

from __future__ import annotations

from common import arguments, open_stream

from aurora_rl.objectives import AcceptanceRewardLoss, ImitationLoss, SumLoss
from aurora_rl.policies import TreeShape


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--baseline", default="leave_one_out", choices=["none", "leave_one_out", "group"])
    parser.add_argument("--imitation", type=float, default=0.1, help="weight of imitation next to it; 0 for none")
    parser.add_argument("--temperature", type=float, default=1.0)
    options = parser.parse_args()
    stream = open_stream(options, TreeShape(3, 4, 12, mode="sampled"), temperature=options.temperature)
    reward = AcceptanceRewardLoss(stream.drafter, stream.head, baseline=options.baseline, clip=0.2)
    objectives = [reward]
    if options.imitation:
        objectives.append(ImitationLoss(stream.drafter, stream.head, weight=options.imitation))
    stream.learn(SumLoss(objectives))
    stream.save(options.out)


if __name__ == "__main__":
    main()
