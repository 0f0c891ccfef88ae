"""The conformance check of drafters: serving and training must agree."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from transformers import PreTrainedModel

from aurora_rl.checkpoints import CheckpointError
from aurora_rl.envs import SamplingParams
from aurora_rl.policies import Drafter, DrafterPolicy, Proposal, TargetParts, TreeShape, load_drafter, save_drafter
from aurora_rl.testing.asserts import require
from aurora_rl.testing.tiny import cast, dtype_of, serve
from aurora_rl.trajectories import pack
from aurora_rl.trees import depths, valid_nodes

# Nats between what serving recorded and what training computes: trajectories hold log-probabilities in float32.
_RECORDED = {torch.float64: 1e-5, torch.float32: 5e-4}
# Nats between two ways of computing the same log-probability.
_COMPUTED = {torch.float64: 1e-9, torch.float32: 5e-4}


def check_drafter(
    drafter: Drafter, target: PreTrainedModel, *, without_gradient: Collection[str] = (), seed: int = 0
) -> None:
    """Check that a drafter keeps the promises of :class:`~aurora_rl.policies.Drafter`.

    The target is served with it on several slots, from prompts of unequal length, with chains and with trees. All of
    this happens to copies, whose weights are moved a little at random, since parts that start at zero do nothing yet.

    Args:
        drafter: in float64 or float32; float64 tells a mistake from rounding.
        target: what the drafter was made for; its weights are used in the drafter's dtype.
        without_gradient: published float tensors that :meth:`~aurora_rl.policies.Drafter.unroll` need not reach.
        seed: of the weights' noise, the prompts and the completions.

    Raises:
        AssertionError: names the promise that is broken.
        ValueError: the drafter has another dtype.

    Example:
        >>> from aurora_rl.policies import MedusaDrafter
        >>> from aurora_rl.testing import tiny_target
        >>> target = tiny_target()
        >>> drafter = MedusaDrafter.from_target(TargetParts.of(target), draft_vocab=torch.arange(20))
        >>> check_drafter(drafter.double(), target)
    """
    dtype = dtype_of(drafter)
    if dtype not in _COMPUTED:
        raise ValueError(f"check_drafter needs a drafter in float64 or float32, got {dtype}")
    generator = torch.Generator().manual_seed(seed)
    _check_apart(drafter, target)  # copies are apart, whatever the originals are
    drafter = copy.deepcopy(drafter)
    drafter.install(_moved(drafter.published(), generator))
    target = cast(copy.deepcopy(target), dtype)
    vocab_size = TargetParts.of(target).head.shape[0]
    prompts = [torch.randint(vocab_size, (n,), generator=generator) for n in (1, 7, 2, 4)]
    shapes = (TreeShape(1), TreeShape(4), TreeShape(4, 2), TreeShape(3, 3, 9))

    def served(shape: TreeShape) -> list[TensorDict]:
        sampling = SamplingParams(temperature=1.0, seed=seed)
        return serve(drafter, target, prompts, shape=shape, max_new_tokens=8, num_slots=3, sampling=sampling)

    plain = served(TreeShape(0))
    for shape in shapes:
        _check_proposals(drafter, plain, shape, vocab_size)
    for shape in shapes:
        trajectories = served(shape)
        _check_recorded(drafter, trajectories, shape)
    for shape in (TreeShape(3, 2, mode=mode) for mode in drafter.draft_modes if mode != "topk"):
        _check_draws(drafter, plain, shape, seed)
        _check_recorded(drafter, served(shape), shape)
    _check_unroll(drafter, trajectories)
    _check_packing(drafter, trajectories)
    _check_paths(drafter, trajectories)
    _check_cache(drafter, trajectories)
    if any(parameter.requires_grad for parameter in drafter.parameters()):
        _check_gradients(drafter, trajectories, without_gradient)
        _check_weights(drafter, trajectories, generator)
        _check_staging(drafter, trajectories, generator)
        _check_swap(drafter, target, prompts, generator)
    _check_saved(drafter, TargetParts.of(target), trajectories)


def _check_apart(drafter: Drafter, target: PreTrainedModel) -> None:
    targets = {parameter.untyped_storage().data_ptr() for parameter in target.parameters()}
    learned = [*drafter.named_parameters(), *drafter.published().items()]
    for name, tensor in learned:
        require(
            tensor.untyped_storage().data_ptr() not in targets,
            f"no gradient may reach the target, and {name!r} shares its memory; clone it in from_target, or register "
            "it as a buffer that is not persistent",
        )


def _check_draws(drafter: Drafter, trajectories: list[TensorDict], shape: TreeShape, seed: int) -> None:
    """Nodes are drawn with the generator, from the law that is handed on with them."""
    slots, what = _filled(drafter, trajectories), f"propose with {shape}"

    def drawn(seed: int) -> Proposal:
        return drafter.propose(slots, shape, torch.Generator().manual_seed(seed))

    first, again, others = drawn(seed), drawn(seed), [drawn(seed + i) for i in range(1, 5)]
    require(torch.equal(first.tokens, again.tokens), f"{what} ignores the generator: one seed gave two trees")
    differ = any(not torch.equal(first.tokens, other.tokens) for other in others)
    require(differ, f"{what} draws nothing: seeds do not matter")
    nodes = (*first.tokens.shape, len(drafter.draft_vocab))
    require(first.q is not None and first.q.shape == nodes, f"{what}: q is not {nodes}")
    assert first.q is not None
    row = (first.tokens[:, :, None] == drafter.draft_vocab).int().argmax(-1, keepdim=True)
    total, of_token = first.q.sum(-1), first.q.gather(-1, row)[:, :, 0]
    require(_close(total, torch.ones_like(total), 1e-4), f"{what}: a row of q does not sum to 1")
    require(
        _close(of_token, first.log_probs.exp().to(of_token), 1e-4), f"{what}: q of a drawn token is not exp(log_probs)"
    )


def _check_proposals(drafter: Drafter, trajectories: list[TensorDict], shape: TreeShape, vocab_size: int) -> None:
    slots = _filled(drafter, trajectories)
    tokens, parents, log_probs, _, mask = drafter.propose(slots, shape)
    what, most = f"propose with {shape}", shape.most_nodes
    require(tokens.shape == parents.shape == log_probs.shape, f"{what}: tokens, parents and log_probs differ in shape")
    least = 1 if mask is None else 0
    require(
        tokens.shape[0] == len(slots) and least <= tokens.shape[1] <= most,
        f"{what}: expected [{len(slots)}, {least}..{most}] nodes, got {tuple(tokens.shape)}",
    )
    mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    require(mask.shape == tokens.shape and mask.dtype == torch.bool, f"{what}: mask is not bool {tuple(tokens.shape)}")
    require(tokens.dtype == parents.dtype == torch.int64, f"{what}: tokens and parents are not int64")
    require(log_probs.dtype == torch.float32, f"{what}: log_probs are {log_probs.dtype}, not float32")
    earlier = (parents >= -1) & (parents < torch.arange(parents.shape[1]))
    require(bool(earlier[mask].all()), f"{what}: a node's parent is neither an earlier node nor -1")
    deepest = max(shape.depth, drafter.min_depth)
    require(bool((depths(parents)[mask] <= deepest).all()), f"{what}: a path is deeper than {deepest}")
    drawn = tokens[mask & (log_probs > -torch.inf)]
    require(bool(torch.isin(drawn, drafter.draft_vocab).all()), f"{what}: a token is outside the draft vocabulary")
    legal = valid_nodes(tokens, parents, mask, vocab_size)
    require(bool(legal[mask].all()), f"{what}: two siblings carry the same token")
    require(bool((log_probs[mask] <= 0).all()), f"{what}: a log-probability is above 0 or not a number")
    empty = drafter.propose(slots, TreeShape(0)).tokens
    require(empty.shape == (len(slots), 0), f"propose at depth 0 gave {tuple(empty.shape)} and not no nodes")


def _check_recorded(drafter: Drafter, trajectories: list[TensorDict], shape: TreeShape) -> None:
    batch = pack(trajectories)
    recorded, scored = batch["nodes", "log_probs"], drafter.score(batch)
    require(scored.shape == recorded.shape, f"score gave {tuple(scored.shape)} for {tuple(recorded.shape)} nodes")
    learns = any(parameter.requires_grad for parameter in drafter.parameters())
    require(scored.requires_grad or not learns, "score is not differentiable in the drafter's parameters")
    drawn = recorded > -torch.inf  # other nodes are not the drafter's own
    gap = float((scored.detach() - recorded)[drawn].abs().max()) if bool(drawn.any()) else 0.0
    require(
        gap <= _RECORDED[dtype_of(drafter)],
        f"score differs by {gap:.2g} nats from what serving recorded with {shape}; are features paired with tokens as "
        "in serving (feature t with token t + 1)?",
    )
    foreign = _outside(drafter.draft_vocab)
    if foreign is not None:
        batch["nodes", "tokens"] = torch.full_like(batch["nodes", "tokens"], foreign)
        require(
            bool((drafter.score(batch) == -torch.inf).all()),
            "score of a token outside the draft vocabulary is not -inf",
        )


def _check_unroll(drafter: Drafter, trajectories: list[TensorDict]) -> None:
    """Step ``j`` of unroll against score, asked for chains of the true tokens from every anchor."""
    steps = 4
    batch = pack(trajectories)
    with torch.no_grad():
        logits, valid, _ = drafter.unroll(batch, steps)
    require(1 <= len(logits) <= steps, f"unroll of {steps} steps gave {len(logits)}")
    rows = batch["spine", "hidden"].shape[0]
    expected_shape = (rows, len(drafter.draft_vocab))
    require(
        all(step.shape == expected_shape for step in logits),
        f"unroll gave logits {[tuple(step.shape) for step in logits]}, expected {expected_shape} at every step",
    )
    require(valid.shape == (len(logits), rows), f"unroll gave valid {tuple(valid.shape)}")
    scored = drafter.score(pack([_with_true_chains(t, len(logits)) for t in trajectories])).detach()
    node, row = 0, 0
    for trajectory in trajectories:
        tokens, prompt = trajectory["spine", "tokens"], int(trajectory["spine", "prompt_length"])
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
                        gap <= _COMPUTED[dtype_of(drafter)],
                        f"unroll at step {step} from the anchor at position {anchor} differs by {gap:.2g} nats from "
                        "the score of a chain of the true tokens",
                    )
                node += 1
        completion = len(tokens) - prompt
        for step in range(min(len(logits), completion)):
            early = valid[step, row : row + step]
            require(
                not bool(early.any()), f"unroll: step {step} of the first {step} tokens has no anchor, yet is valid"
            )
        row += completion


def _check_packing(drafter: Drafter, trajectories: list[TensorDict]) -> None:
    """Training must not depend on what else is in the batch."""
    atol = _COMPUTED[dtype_of(drafter)]
    together, alone = drafter.score(pack(trajectories)), [drafter.score(pack([t])) for t in trajectories]
    require(_close(together, torch.cat(alone), atol), "score depends on the other trajectories of the batch")
    all_logits, valid, _ = drafter.unroll(pack(trajectories), 3)
    singles = [drafter.unroll(pack([t]), 3) for t in trajectories]
    require(
        torch.equal(valid, torch.cat([single.valid for single in singles], dim=1)),
        "unroll's valid depends on the other trajectories of the batch",
    )
    for step, logits in enumerate(all_logits):
        one_by_one = torch.cat([single.logits[step] for single in singles])
        require(
            _close(logits[valid[step]], one_by_one[valid[step]], atol),
            f"unroll at step {step} depends on the other trajectories of the batch",
        )


def _check_paths(drafter: Drafter, trajectories: list[TensorDict]) -> None:
    """A node's score must not depend on other branches: each path from a root to a leaf is scored as a tree alone."""
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
        atol = _COMPUTED[dtype_of(drafter)]
        require(_close(together[nodes], apart, atol), "score of a node depends on other branches of its tree")


def _check_cache(drafter: Drafter, trajectories: list[TensorDict]) -> None:
    """Serving must not depend on how a slot was filled nor on the other slots."""
    shape, atol = TreeShape(3, 2), _RECORDED[dtype_of(drafter)]
    slots = _filled(drafter, trajectories)
    lengths = torch.tensor([len(t["spine", "tokens"]) - 1 for t in trajectories])
    require(torch.equal(drafter.cached, lengths), f"cached is {drafter.cached.tolist()} after {lengths.tolist()} pairs")
    expected = drafter.propose(slots, shape)

    def same(slots: Tensor, why: str) -> None:
        got = drafter.propose(slots, shape)
        for row, slot in enumerate(slots.tolist()):
            new, old = _nodes(got, row), _nodes(expected, slot)
            equal = torch.equal(new[0], old[0]) and torch.equal(new[1], old[1])
            require(equal and _close(new[2], old[2], atol), f"proposals change {why}")

    same(slots, "when asked for again")
    same(slots.flip(0), "with the order of the slots")
    for slot in slots:
        same(slot[None], "when a slot is asked alone")

    drafter.forget(slots[1:2])
    require(int(drafter.cached[1]) == 0, "forget leaves pairs in `cached`")
    same(slots[:1], "when another slot is forgotten")
    for start in range(0, int(lengths[1]), 3):
        end = lengths[1:2].clamp(max=start + 3)
        _extend(drafter, trajectories[1:2], slots[1:2], torch.tensor([start]), end)
        drafter.propose(slots[1:2], shape)  # drafting between two rounds must leave no trace
    same(slots, "when a slot was forgotten and caught up in pieces")

    # Pieces of unequal length, one call for all slots: the shorter ones are padded.
    drafter.allocate(len(slots) + 2, int(lengths.max()) + 1)
    require(not bool(drafter.cached.any()), "allocate leaves pairs in `cached`")
    middle = lengths - 1 - torch.arange(len(slots)) % 3
    _extend(drafter, trajectories, slots, torch.zeros_like(lengths), middle)
    _extend(drafter, trajectories, slots, middle, lengths)
    same(slots, "when slots of unequal length are extended in one call, or beside empty slots")


def _check_gradients(drafter: Drafter, trajectories: list[TensorDict], without: Collection[str]) -> None:
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
        require(
            gradient is not None and bool((gradient != 0).any()) and bool(torch.isfinite(gradient).all()),
            f"unroll gives the published tensor {name!r} no gradient, or one that is not finite",
        )


def _check_weights(drafter: Drafter, trajectories: list[TensorDict], generator: torch.Generator) -> None:
    batch = pack(trajectories)
    before = {name: tensor.clone() for name, tensor in drafter.published().items()}
    scored = drafter.score(batch).detach()

    def unchanged(why: str) -> None:
        after = drafter.published()
        require(list(after) == list(before), f"published lists other tensors {why}")
        for name, tensor in before.items():
            require(torch.equal(after[name], tensor), f"the published tensor {name!r} changes {why}")
        require(torch.equal(drafter.score(batch).detach(), scored), f"score changes {why}")

    drafter.install(before)
    unchanged("when published tensors are installed again")

    moved = _moved(before, generator)
    last = list(before)[-1]
    for broken, name in (
        *(({n: t for n, t in moved.items() if n != name}, name) for name in before),
        *(({**moved, name: tensor[:-1]}, name) for name, tensor in before.items()),
        ({**moved, "no.such.tensor": moved[last]}, "no.such.tensor"),
        *([({**moved, "d2t": moved["d2t"] + drafter.vocab_size}, "d2t")] if "d2t" in moved else []),
    ):
        try:
            drafter.install(broken)
        except ValueError as error:
            require(repr(name) in str(error), f"install refuses the tensor {name!r} without naming it: {error}")
        else:
            raise AssertionError(f"install takes weights whose tensor {name!r} is missing, misshapen, unknown or false")
        unchanged(f"when weights are refused for {name!r}")

    drafter.install({name: t.double() if t.is_floating_point() else t for name, t in moved.items()})
    for name, tensor in drafter.published().items():
        require(tensor.dtype == before[name].dtype, f"install changes the dtype of {name!r} to {tensor.dtype}")
        require(torch.equal(tensor, moved[name]), f"install does not replace {name!r}")
    require(not torch.equal(drafter.score(batch).detach(), scored), "score does not change with the weights")
    drafter.install(before)
    unchanged("when other weights were installed in between")


def _check_staging(drafter: Drafter, trajectories: list[TensorDict], generator: torch.Generator) -> None:
    """Staging is for beside the rounds, and what was given is the caller's again after the swap."""
    old, shape = {name: tensor.clone() for name, tensor in drafter.published().items()}, TreeShape(3, 2)

    def drafts() -> Proposal:
        return drafter.propose(_filled(drafter, trajectories), shape)

    def same(before: Proposal, why: str) -> None:
        after = drafts()
        equal = all(_close(a.double(), b.double(), 0.0) for a, b in zip(before[:3], after[:3], strict=True))
        require(equal, f"proposals change {why}")

    before, given = drafts(), _moved(old, generator)
    put = drafter.stage(given)
    same(before, "when weights are staged, and not only when they are installed")
    put()
    after = drafts()
    for tensor in given.values():
        tensor.zero_()
    same(after, "with the tensors that were given to stage, after they were installed: they are not copied")
    drafter.install(old)


def _check_swap(
    drafter: Drafter, target: PreTrainedModel, prompts: Sequence[Tensor], generator: torch.Generator
) -> None:
    """Requests that meet other weights half way: each round is of the version that it says."""
    shape, old, new = TreeShape(3, 2), drafter.published(), _moved(drafter.published(), generator)

    def swap(turn: int, policy: DrafterPolicy) -> None:
        if turn == 2:
            policy.install(new, version=1)

    batch = pack(serve(drafter, target, prompts, shape=shape, max_new_tokens=8, num_slots=3, before_round=swap))
    plain = serve(drafter, target, prompts, shape=TreeShape(0), max_new_tokens=8, num_slots=3)
    require(torch.equal(batch["spine", "tokens"], pack(plain)["spine", "tokens"]), "a swap of weights changes the text")
    version = torch.repeat_interleave(batch["rounds", "policy_version"], batch["rounds", "offset"].diff())
    recorded = batch["nodes", "log_probs"]
    for number, weights in enumerate((old, new)):
        scorer = copy.deepcopy(drafter)
        scorer.install(weights)
        with torch.no_grad():
            scored = scorer.score(batch)
        here = (version == number) & (recorded > -torch.inf)
        require(bool(here.any()), f"no drafts of the weights {'after' if number else 'before'} a swap")
        gap = float((scored - recorded)[here].abs().max())
        require(
            gap <= _RECORDED[dtype_of(drafter)],
            f"drafts made {'after' if number else 'before'} a swap differ by {gap:.2g} nats from those weights' scores",
        )


def _check_saved(drafter: Drafter, parts: TargetParts, trajectories: list[TensorDict]) -> None:
    rising = bool((drafter.draft_vocab.diff() > 0).all())
    for layout in drafter.formats:
        try:
            _check_format(drafter, parts, trajectories, layout)
        except CheckpointError as error:
            require(not rising, f"the format {layout!r} cannot be written: {error}")
            # Some formats hold no other maps than rising ones; any weights go with one.
            sorted_ = copy.deepcopy(drafter)
            vocab = drafter.draft_vocab.sort().values
            sorted_.install({**drafter.published(), "d2t": vocab - torch.arange(len(vocab))})
            _check_format(sorted_, parts, trajectories, layout)


def _check_format(drafter: Drafter, parts: TargetParts, trajectories: list[TensorDict], layout: str) -> None:
    """By way of real files.

    Raises:
        CheckpointError: the drafter cannot be written in the format.
    """
    kind, way, batch = type(drafter), f"by way of the format {layout!r}", pack(trajectories)
    with tempfile.TemporaryDirectory() as folder:
        save_drafter(drafter, Path(folder) / "saved", layout)
        config = json.loads((Path(folder) / "saved" / "config.json").read_text())
        require(kind.recognizes(config), f"recognizes is false for the drafter's own folder, {way}")
        try:
            read = load_drafter(Path(folder) / "saved", parts, kind, layout=layout, options=drafter.options)
        except CheckpointError as error:
            raise AssertionError(f"the drafter's own folder cannot be read {way}: {error}") from error
    require(dict(read.options) == dict(drafter.options), f"options change to {dict(read.options)} {way}")
    require(read.feature_layers == drafter.feature_layers, f"feature_layers change {way}")
    for name, tensor in read.published().items():
        require(
            name in drafter.published() and torch.equal(tensor, drafter.published()[name].to(tensor)),
            f"the published tensor {name!r} changes {way}",
        )
    with torch.no_grad():
        again, scored = read.to(dtype_of(drafter)).score(batch), drafter.score(batch)
    require(_close(again, scored, 5e-3), f"score changes {way}")


def _nodes(proposal: Proposal, row: int) -> tuple[Tensor, ...]:
    """Tokens, parents and log-probabilities of a row's nodes."""
    keep = slice(None) if proposal.mask is None else proposal.mask[row]
    return tuple(part[row][keep] for part in proposal[:3])


def _filled(drafter: Drafter, trajectories: Sequence[TensorDictBase]) -> Tensor:
    """Give each trajectory a slot and put all of its pairs there, slot by slot; returns the slots."""
    lengths = torch.tensor([len(t["spine", "tokens"]) - 1 for t in trajectories])
    slots = torch.arange(len(trajectories))
    drafter.allocate(len(slots), int(lengths.max()) + 1)
    for i in slots.tolist():
        _extend(
            drafter, trajectories[i : i + 1], slots[i : i + 1], torch.zeros(1, dtype=torch.int64), lengths[i : i + 1]
        )
    return slots


def _extend(
    drafter: Drafter, trajectories: Sequence[TensorDictBase], slots: Tensor, start: Tensor, end: Tensor
) -> None:
    """Append pairs ``start`` to ``end - 1`` of each trajectory to its slot; there is always a column of padding."""
    count = end - start
    width = int(count.max()) + 1
    first = trajectories[0]["spine", "features"]
    tokens = torch.zeros(len(slots), width + 1, dtype=torch.int64)
    features = first.new_full((len(slots), width, first.shape[1]), 7.0)
    for i, trajectory in enumerate(trajectories):
        here = slice(int(start[i]), int(end[i]))
        tokens[i, : int(count[i]) + 1] = trajectory["spine", "tokens"][int(start[i]) : int(end[i]) + 1]
        features[i, : int(count[i])] = trajectory["spine", "features"][here]
    drafter.extend(slots, tokens, features, count)


def _with_true_chains(trajectory: TensorDictBase, steps: int) -> TensorDictBase:
    """The trajectory with other rounds: from every anchor a chain of up to ``steps`` tokens of the text itself."""
    tokens, prompt = trajectory["spine", "tokens"], int(trajectory["spine", "prompt_length"])
    anchors = range(prompt - 1, len(tokens) - 1)
    return _with_chains(trajectory, anchors, [tokens[a + 1 : a + 1 + steps] for a in anchors])


def _with_chains(trajectory: TensorDictBase, anchors: Sequence[int], chains: list[Tensor]) -> TensorDictBase:
    """The trajectory with other rounds: from each anchor the chain beside it."""
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
    out["nodes", "hidden"] = trajectory["nodes", "hidden"].new_zeros(nodes, trajectory["spine", "hidden"].shape[1])
    return out


def _moved(weights: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Copies of the weights with noise on those that are floats."""
    return {
        name: t + 0.1 * torch.randn(t.shape, generator=generator).to(t) if t.is_floating_point() else t.clone()
        for name, t in weights.items()
    }


def _outside(draft_vocab: Tensor) -> int | None:
    """Some token id that is not in the draft vocabulary and smaller than its largest, if there is one."""
    known = set(draft_vocab.tolist())
    return next((i for i in range(max(known)) if i not in known), None)


def _close(a: Tensor, b: Tensor, atol: float) -> bool:
    # Where both are −inf they agree, and their difference is not a number.
    return a.shape == b.shape and torch.allclose(a.clamp(min=-1e9), b.clamp(min=-1e9), rtol=0, atol=atol)
