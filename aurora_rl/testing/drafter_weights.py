"""The conformance check of drafters, on weights: refused, staged, swapped in mid-request, saved and read."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from tensordict import TensorDict
from torch import Tensor
from transformers import PreTrainedModel

from aurora_rl.policies import Drafter, DrafterPolicy, Proposal, TargetParts, TreeShape
from aurora_rl.policies.drafter import draft_rows
from aurora_rl.policies.formats.files import load_drafter, save_drafter
from aurora_rl.storage import CheckpointError
from aurora_rl.testing.asserts import RECORDED, close, require
from aurora_rl.testing.drafter_serving import filled
from aurora_rl.testing.tiny import dtype_of, serve
from aurora_rl.training.moving_vocab import MovingVocab
from aurora_rl.trajectories import pack
from aurora_rl.tree_index import TreeIndex


def check_weight_loading(drafter: Drafter, trajectories: list[TensorDict], generator: torch.Generator) -> None:
    """Check that complete weights are taken, and others are refused by name and change nothing."""
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

    new = moved(before, generator)
    last = list(before)[-1]
    for broken, name in (
        *(({n: t for n, t in new.items() if n != name}, name) for name in before),
        *(({**new, name: tensor[:-1]}, name) for name, tensor in before.items()),
        ({**new, "no.such.tensor": new[last]}, "no.such.tensor"),
        *([({**new, "d2t": new["d2t"] + drafter.vocab_size}, "d2t")] if "d2t" in new else []),
    ):
        try:
            drafter.install(broken)
        except ValueError as error:
            require(repr(name) in str(error), f"install refuses the tensor {name!r} without naming it: {error}")
        else:
            raise AssertionError(f"install takes weights whose tensor {name!r} is missing, misshapen, unknown or false")
        unchanged(f"when weights are refused for {name!r}")

    drafter.install({name: t.double() if t.is_floating_point() else t for name, t in new.items()})
    for name, tensor in drafter.published().items():
        require(tensor.dtype == before[name].dtype, f"install changes the dtype of {name!r} to {tensor.dtype}")
        require(torch.equal(tensor, new[name]), f"install does not replace {name!r}")
    require(not torch.equal(drafter.score(batch).detach(), scored), "score does not change with the weights")
    drafter.install(before)
    unchanged("when other weights were installed in between")


def check_staging(drafter: Drafter, trajectories: list[TensorDict], generator: torch.Generator) -> None:
    """Check that staging leaves the rounds alone, and that after the swap the weights are the caller's again."""
    old, shape = {name: tensor.clone() for name, tensor in drafter.published().items()}, TreeShape(3, 2)

    def drafts() -> Proposal:
        return drafter.propose(filled(drafter, trajectories), shape)

    def same(before: Proposal, why: str) -> None:
        after = drafts()
        equal = all(close(a.double(), b.double(), 0.0) for a, b in zip(before[:3], after[:3], strict=True))
        require(equal, f"proposals change {why}")

    before, weights = drafts(), moved(old, generator)
    put = drafter.stage(weights)
    same(before, "when weights are staged, and not only when they are installed")
    put()
    after = drafts()
    for tensor in weights.values():
        tensor.zero_()
    same(after, "with the tensors that were given to stage, after they were installed: they are not copied")
    drafter.install(old)


def check_swap(
    drafter: Drafter, target: PreTrainedModel, prompts: Sequence[Tensor], generator: torch.Generator
) -> None:
    """Check requests whose weights change half way: each round is of the version that it names."""
    shape, old, new = TreeShape(3, 2), drafter.published(), moved(drafter.published(), generator)

    def swap(turn: int, policy: DrafterPolicy) -> None:
        if turn == 2:
            policy.install(new, version=1)

    batch = pack(serve(drafter, target, prompts, shape=shape, max_new_tokens=8, num_slots=3, before_round=swap))
    plain = serve(drafter, target, prompts, shape=TreeShape(0), max_new_tokens=8, num_slots=3)
    same = torch.equal(batch["sequence", "tokens"], pack(plain)["sequence", "tokens"])
    require(same, "a swap of weights changes the text")
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
            gap <= RECORDED[dtype_of(drafter)],
            f"drafts made {'after' if number else 'before'} a swap differ by {gap:.2g} nats from those weights' scores",
        )


def check_moving_vocab(drafter: Drafter, parts: TargetParts, trajectories: list[TensorDict]) -> None:
    """Check that rows which become other tokens' leave the logits of all other tokens as they were."""
    if not drafter.vocab_tables:
        return
    batch, old, kept = pack(trajectories), drafter.draft_vocab, copy.deepcopy(drafter)
    trees = TreeIndex.of(batch)
    wanted = (trees.root >= 0) & (trees.depth < drafter.max_depth)
    said = {"tokens": torch.arange(drafter.vocab_size), "prompt_length": torch.tensor(0)}
    said["tokens"] = said["tokens"][
        ~torch.isin(said["tokens"], old[len(old) // 2 :])
    ]  # half of the rows become others'
    MovingVocab(kept, parts.head, []).follow([TensorDict({"sequence": TensorDict(said)})])
    with torch.no_grad():
        before, after = (each.context_logits(batch, trees, wanted) + 0 for each in (drafter, kept))
    stay = old[torch.isin(old, kept.draft_vocab)]
    same = close(before[:, draft_rows(old, stay)], after[:, draft_rows(kept.draft_vocab, stay)], 1e-4)
    require(
        same,
        "logits of tokens that stay change when the rows of vocab_tables become other tokens'; name all parameters "
        "that have a row for each token, or return () from vocab_tables",
    )


def check_saved(drafter: Drafter, parts: TargetParts, trajectories: list[TensorDict]) -> None:
    """Check that the drafter comes back from its folder, in each of its formats."""
    for format in drafter.formats:
        try:
            _check_format(drafter, parts, trajectories, format)
        except CheckpointError as error:
            raise AssertionError(f"the format {format!r} cannot be written: {error}") from error


def _check_format(drafter: Drafter, parts: TargetParts, trajectories: list[TensorDict], format: str) -> None:
    """Check a format with real files. Raise CheckpointError if the drafter cannot be written in it."""
    kind, way, batch = type(drafter), f"by way of the format {format!r}", pack(trajectories)
    with tempfile.TemporaryDirectory() as folder:
        # The first as runs are kept, by no name: SGLang cannot read all that a drafter of a tiny target reads.
        save_drafter(drafter, Path(folder) / "saved", None if format == drafter.formats[0] else format)
        config = json.loads((Path(folder) / "saved" / "config.json").read_text())
        require(kind.recognizes(config), f"recognizes is false for the drafter's own folder, {way}")
        try:
            read = load_drafter(Path(folder) / "saved", parts, kind, format=format, options=drafter.options)
        except CheckpointError as error:
            raise AssertionError(f"the drafter's own folder cannot be read {way}: {error}") from error
    require(dict(read.options) == dict(drafter.options), f"options change to {dict(read.options)} {way}")
    require(read.feature_layers == drafter.feature_layers, f"feature_layers change {way}")
    for name, tensor in read.published().items():
        same = name in drafter.published() and torch.equal(tensor, drafter.published()[name].to(tensor))
        require(same, f"the published tensor {name!r} changes {way}")
    with torch.no_grad():
        again, scored = read.to(dtype_of(drafter)).score(batch), drafter.score(batch)
    require(close(again, scored, 5e-3), f"score changes {way}")


def moved(weights: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Return copies of the weights, with noise on those that are floats."""
    return {
        name: t + 0.1 * torch.randn(t.shape, generator=generator).to(t) if t.is_floating_point() else t.clone()
        for name, t in weights.items()
    }
