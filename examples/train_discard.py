"""Learn from rejected branches too: imitation where drafts were accepted, discard sampling where they were not.

    python examples/train_discard.py --recording runs/trees --weight 0.3 --weighting reach

The recording holds trees, so that there is something to reject next to every accepted token.
"""

from __future__ import annotations

import torch
from common import arguments, open_stream
from tensordict import TensorDict

from aurora_rl.objectives import DiscardSamplingLoss, ImitationLoss, SumLoss
from aurora_rl.policies import TreeShape


def branches(trajectory: TensorDict) -> bool:
    """Whether two drafted nodes of a round have the same parent."""
    rounds, parents = trajectory["rounds", "offset"], trajectory["nodes", "parents"]
    tree = torch.repeat_interleave(torch.arange(len(rounds) - 1), rounds.diff())
    pairs = torch.stack([tree, parents])
    return pairs.unique(dim=1).shape[1] < pairs.shape[1]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--weight", type=float, default=0.3, help="of the rejected contexts, the paper's lambda")
    parser.add_argument("--weighting", default="uniform", choices=["uniform", "reach", "decay"])
    parser.add_argument("--top-k", type=int, help="compare over the target's likeliest tokens only")
    options = parser.parse_args()
    stream = open_stream(options, TreeShape(depth=4, width=2, num_nodes=8))
    if not any(branches(trajectory) for trajectory in stream.train):
        parser.error(
            f"there is nothing to discard: {options.recording} holds chains alone, without a rejected branch next "
            "to an accepted token; name a new folder, which is filled with trees, or record with drafter.width=2"
        )
    imitation = ImitationLoss(stream.drafter, stream.head)
    discard = DiscardSamplingLoss(
        stream.drafter, stream.head, weight=options.weight, weighting=options.weighting, top_k=options.top_k
    )
    stream.learn(SumLoss([imitation, discard]))
    stream.save(options.out)


if __name__ == "__main__":
    main()
