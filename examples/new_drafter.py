"""A drafter that the library does not have: one recurrent cell over tokens, started by the target's feature.

    python examples/new_drafter.py --recording runs/recurrent

It is checked against the promises of the seam and trained. `drafter.name=new_drafter:RecurrentDrafter` serves it in a
flywheel, if this folder is on PYTHONPATH. Written after Cheng et al., "Recurrent Drafter" (arXiv 2403.09919).
"""

from __future__ import annotations

import torch
from common import arguments, open_stream
from torch import nn

from aurora_kernels.rows import log_softmax
from aurora_rl.objectives import ImitationLoss
from aurora_rl.policies import Drafter, TargetParts, TreeShape
from aurora_rl.policies.tree_search import grow
from aurora_rl.testing import check_drafter, tiny_target


class RecurrentDrafter(Drafter):
    """The state of a node is cell(its token, state of its parent); the root's parent is the target's feature."""

    def __init__(self, parts, draft_vocab, layer):
        super().__init__()
        self.feature_layers, self.vocab_size, size = (layer,), len(parts.head), parts.config.hidden_size
        self.cell = nn.GRUCell(size, size)
        self.lm_head = nn.Linear(size, len(draft_vocab), bias=False)
        self.lm_head.weight.data.copy_(parts.head.rows(draft_vocab))
        self.register_buffer("embedding", parts.embedding.float(), persistent=False)
        self.register_buffer("draft_vocab", draft_vocab.clone(), persistent=False)

    @classmethod
    def from_target(cls, parts, *, draft_vocab, feature_layers=None):
        return cls(parts, draft_vocab, (feature_layers or (parts.config.num_hidden_layers,))[0])

    def step(self, tokens, states):
        dtype = self.lm_head.weight.dtype
        out = self.cell(self.embedding[tokens].flatten(0, -2).to(dtype), states.flatten(0, -2).to(dtype))
        return states.to(dtype) + out.view(states.shape)

    def allocate(self, num_slots, max_length):
        self.cached = torch.zeros(num_slots, dtype=torch.int64)
        self.states = self.lm_head.weight.new_zeros(num_slots, self.lm_head.weight.shape[1])

    @torch.inference_mode()
    def extend(self, slots, tokens, features, num_new):
        row, last = torch.arange(len(slots)), num_new - 1
        self.states[slots] = self.step(tokens[row, last + 1], features[row, last])
        self.cached[slots] += num_new

    @torch.inference_mode()
    def propose(self, slots, shape, generator=None):
        search, states = grow(self.draft_vocab, shape, generator), self.states[slots, None]
        search.add(log_softmax(self.lm_head(states)))
        for _ in range(1, shape.depth):
            tokens, parent = search.frontier()
            states = self.step(tokens, states.gather(1, parent[..., None].expand(-1, -1, states.shape[-1])))
            search.add(log_softmax(self.lm_head(states)))
        return search.proposal()

    def context_logits(self, batch, trees, wanted):
        sequence = batch["sequence"]
        start, pair = sequence["offset"][trees.request], trees.root.clamp(min=0)
        # A request has one feature less than tokens.
        states = self.step(sequence["tokens"][start + pair + 1], sequence["features"][start - trees.request + pair])
        for level in range(1, int(trees.depth.max()) + 1):
            here = (trees.depth == level).nonzero().flatten()
            nodes = here - trees.num_rounds
            states = states.index_copy(0, here, self.step(batch["nodes", "tokens"][nodes], states[trees.parent[nodes]]))
        return self.lm_head(states[wanted])


def main() -> None:
    options = arguments(__doc__).parse_args()
    tiny = tiny_target()
    check_drafter(RecurrentDrafter.from_target(TargetParts.of(tiny), draft_vocab=torch.arange(20)).double(), tiny)
    print("the drafter keeps the promises of the seam")
    stream = open_stream(options, TreeShape(depth=4), RecurrentDrafter)
    stream.learn(ImitationLoss(stream.drafter, stream.head))
    stream.save(options.out)


if __name__ == "__main__":
    main()
