"""The conformance check of drafters, on training: scores, unrolled chains and gradients."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from aurora_rl.policies import Drafter, TreeShape
from aurora_rl.testing.asserts import COMPUTED, RECORDED, close, require
from aurora_rl.testing.tiny import dtype_of
from aurora_rl.trajectories import pack


def check_recorded(drafter: Drafter, trajectories: list[TensorDict], shape: TreeShape) -> None:
    """Check that training scores what serving recorded."""
    batch = pack(trajectories)
    recorded, scored = batch["nodes", "log_probs"], drafter.score(batch)
    require(scored.shape == recorded.shape, f"score gave {tuple(scored.shape)} for {tuple(recorded.shape)} nodes")
    learns = any(parameter.requires_grad for parameter in drafter.parameters())
    require(scored.requires_grad or not learns, "score is not differentiable in the drafter's parameters")
    drawn = recorded > -torch.inf  # other nodes are not the drafter's own
    gap = float((scored.detach() - recorded)[drawn].abs().max()) if bool(drawn.any()) else 0.0
    require(
        gap <= RECORDED[dtype_of(drafter)],
        f"score differs by {gap:.2g} nats from what serving recorded with {shape}; are features paired with tokens as "
        "in serving (feature t with token t + 1)?",
    )
    foreign = _outside(drafter.draft_vocab)
    if foreign is not None:
        batch["nodes", "tokens"] = torch.full_like(batch["nodes", "tokens"], foreign)
        impossible = bool((drafter.score(batch) == -torch.inf).all())
        require(impossible, "score of a token outside the draft vocabulary is not -inf")


def check_unroll(drafter: Drafter, trajectories: list[TensorDict]) -> None:
    """Step ``j`` of unroll against score, asked for chains of the true tokens from every anchor."""
    steps = 4
    batch = pack(trajectories)
    with torch.no_grad():
        logits, valid, _ = drafter.unroll(batch, steps)
    require(1 <= len(logits) <= steps, f"unroll of {steps} steps gave {len(logits)}")
    rows = batch["sequence", "hidden"].shape[0]
    expected, found = (rows, len(drafter.draft_vocab)), [tuple(step.shape) for step in logits]
    require(set(found) == {expected}, f"unroll gave logits {found}, expected {expected} at every step")
    require(valid.shape == (len(logits), rows), f"unroll gave valid {tuple(valid.shape)}")
    scored = drafter.score(pack([_with_true_chains(t, len(logits)) for t in trajectories])).detach()
    node, row = 0, 0
    for trajectory in trajectories:
        tokens, prompt = trajectory["sequence", "tokens"], int(trajectory["sequence", "prompt_length"])
        for anchor in range(prompt - 1, len(tokens) - 1):
            for step in range(min(len(logits), len(tokens) - 1 - anchor)):
                at = row + anchor + 1 + step - prompt
                require(
                    bool(valid[step, at]) == (anchor > 0),
                    f"unroll: step {step} from the anchor at position {anchor} of a prompt of {prompt} tokens must be "
                    f"{'valid' if anchor else 'invalid: nothing is before it'}",
                )
                choice = (drafter.draft_vocab == tokens[anchor + 1 + step]).nonzero().flatten()
                if anchor and len(choice):
                    gap = float((logits[step][at].log_softmax(-1)[choice[0]] - scored[node]).abs())
                    require(
                        gap <= COMPUTED[dtype_of(drafter)],
                        f"unroll at step {step} from the anchor at position {anchor} differs by {gap:.2g} nats from "
                        "the score of a chain of the true tokens",
                    )
                node += 1
        completion = len(tokens) - prompt
        for step in range(min(len(logits), completion)):
            early = bool(valid[step, row : row + step].any())
            require(not early, f"unroll: step {step} of the first {step} tokens has no anchor, yet is valid")
        row += completion


def check_packing(drafter: Drafter, trajectories: list[TensorDict]) -> None:
    """Check that training does not depend on what else is in the batch."""
    atol = COMPUTED[dtype_of(drafter)]
    together, alone = drafter.score(pack(trajectories)), [drafter.score(pack([t])) for t in trajectories]
    require(close(together, torch.cat(alone), atol), "score depends on the other trajectories of the batch")
    all_logits, valid, _ = drafter.unroll(pack(trajectories), 3)
    singles = [drafter.unroll(pack([t]), 3) for t in trajectories]
    same = torch.equal(valid, torch.cat([single.valid for single in singles], dim=1))
    require(same, "unroll's valid depends on the other trajectories of the batch")
    for step, logits in enumerate(all_logits):
        one_by_one = torch.cat([single.logits[step] for single in singles])
        same = close(logits[valid[step]], one_by_one[valid[step]], atol)
        require(same, f"unroll at step {step} depends on the other trajectories of the batch")


def check_paths(drafter: Drafter, trajectories: list[TensorDict]) -> None:
    """Check that a node's score does not depend on other branches: score each path from a root as a tree alone."""
    for trajectory in trajectories:
        offset, anchors = trajectory["rounds", "offset"].tolist(), trajectory["rounds", "anchor"].tolist()
        tokens, parents = trajectory["nodes", "tokens"], trajectory["nodes", "parents"].tolist()
        paths, roots = [], []
        for anchor, start, end in zip(anchors, offset, offset[1:], strict=False):
            for leaf in set(range(start, end)) - {start + above for above in parents[start:end] if above >= 0}:
                path = [leaf]
                while parents[path[0]] >= 0:
                    path.insert(0, start + parents[path[0]])
                paths.append(path)
                roots.append(anchor)
        if not paths:
            continue
        alone = _with_chains(trajectory, roots, [tokens[path] for path in paths])
        with torch.no_grad():
            together, apart = drafter.score(pack([trajectory])), drafter.score(pack([alone]))
        nodes = torch.tensor([node for path in paths for node in path])
        atol = COMPUTED[dtype_of(drafter)]
        require(close(together[nodes], apart, atol), "score of a node depends on other branches of its tree")


def check_gradients(drafter: Drafter, trajectories: list[TensorDict], without: Collection[str]) -> None:
    """Check that every published tensor learns, and that whatever learns is published."""
    learner = copy.deepcopy(drafter).requires_grad_(True)
    logits, valid, _ = learner.unroll(pack(trajectories), 4)
    torch.stack([(step[ok] ** 2).sum() for step, ok in zip(logits, valid, strict=True)]).sum().backward()
    gradients = {parameter.data_ptr(): parameter.grad for parameter in learner.parameters()}
    published = {tensor.data_ptr() for tensor in learner.published().values()}
    for name, parameter in learner.named_parameters():
        require(
            parameter.data_ptr() in published,
            f"the parameter {name!r} is not published: it would learn, and serving keep the old one; is it the "
            "target's? Then register it as a buffer",
        )
    for name, tensor in learner.published().items():
        if not tensor.is_floating_point() or name in without:
            continue
        require(tensor.data_ptr() in gradients, f"the published tensor {name!r} is not one of the parameters")
        gradient = gradients[tensor.data_ptr()]
        learns = gradient is not None and bool((gradient != 0).any()) and bool(torch.isfinite(gradient).all())
        require(learns, f"unroll gives the published tensor {name!r} no gradient, or one that is not finite")


def _with_true_chains(trajectory: TensorDictBase, steps: int) -> TensorDictBase:
    """Replace the rounds: from every anchor a chain of up to ``steps`` tokens of the text itself."""
    tokens, prompt = trajectory["sequence", "tokens"], int(trajectory["sequence", "prompt_length"])
    anchors = range(prompt - 1, len(tokens) - 1)
    return _with_chains(trajectory, anchors, [tokens[a + 1 : a + 1 + steps] for a in anchors])


def _with_chains(trajectory: TensorDictBase, anchors: Sequence[int], chains: list[Tensor]) -> TensorDictBase:
    """Replace the rounds: a chain of the true tokens after each anchor."""
    out = trajectory.clone()
    out["rounds", "anchor"] = torch.tensor(anchors)
    out["rounds", "offset"] = torch.tensor([0] + [len(c) for c in chains]).cumsum(0)
    for key in ("policy_version", "cache_version"):
        out["rounds", key] = torch.zeros(len(anchors), dtype=torch.int64)
    out["nodes", "tokens"] = torch.cat(chains)
    out["nodes", "parents"] = torch.cat([torch.arange(len(c)) - 1 for c in chains])
    nodes = len(out["nodes", "tokens"])
    out["nodes", "log_probs"] = torch.zeros(nodes)
    out["nodes", "accepted"] = torch.ones(nodes, dtype=torch.bool)
    out["nodes", "hidden"] = trajectory["nodes", "hidden"].new_zeros(nodes, trajectory["sequence", "hidden"].shape[1])
    return out


def _outside(draft_vocab: Tensor) -> int | None:
    """Return a token id that is not in the draft vocabulary and smaller than its largest, if there is one."""
    known = set(draft_vocab.tolist())
    return next((i for i in range(max(known)) if i not in known), None)
