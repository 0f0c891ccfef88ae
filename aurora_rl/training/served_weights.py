"""Check that an engine drafts with the weights that it says it loaded."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from tensordict import TensorDictBase
from torch import Tensor

from aurora_rl.collectors.codec import checksum
from aurora_rl.policies.drafter import Drafter, draft_rows
from aurora_rl.telemetry.log import MetricsLog
from aurora_rl.trajectories import pack
from aurora_rl.tree_index import TreeIndex

logger = logging.getLogger(__name__)

_CHECKED_DRAFTS = 100
_MAX_TOLD = 64  # answers of engines


def with_weights(drafter: Drafter, weights: dict[str, Tensor], dtype: torch.dtype) -> Drafter:
    """Return a copy of a drafter as it is served with these weights, in ``dtype``."""
    served = drafter.serving_copy(dtype)
    served.install(weights)
    return served


class WeightAudit:
    """Checks, once per version, that the drafts attributed to it came from its weights.

    An event "served" says how many drafts of a version match its weights, and how many those that it replaced. If the
    replaced ones match more, a warning says that the engine probably did not load the new ones.

    Args:
        drafter: Drafter in training; copies of it draft with the weights to compare.
        weights: Weights that are served before anything is published.
        dtype: Dtype in which the drafter is served.
        log: Metrics of the run.
    """

    def __init__(self, drafter: Drafter, weights: dict[str, Tensor], dtype: torch.dtype, log: MetricsLog) -> None:
        self._drafter, self._weights, self._dtype, self._log = drafter, weights, dtype, log
        self._replaced: dict[str, Tensor] | None = None  # until the version is checked
        self._version, self._drafted, self._own, self._old = 0, 0, 0, 0

    def published(self, version: int, weights: dict[str, Tensor]) -> None:
        """Begin to check a version; the weights may be those that are published already."""
        if weights is not self._weights:
            self._replaced, self._weights = self._weights, weights
        self._version, self._drafted, self._own, self._old = version, 0, 0, 0

    def withdrawn(self, weights: dict[str, Tensor]) -> None:
        """Leave the version unchecked: the weights that it replaced are served again."""
        self._replaced, self._weights = None, weights

    def check(self, arrivals: Sequence[TensorDictBase]) -> None:
        """Compare the drafts of the newest version among trajectories that arrived, until there were enough."""
        if self._replaced is None:
            return
        labelled = [
            t
            for t in arrivals
            if int(t["sampling", "draft_mode"]) == 0 and bool((t["rounds", "policy_version"] == self._version).any())
        ]
        if not labelled:
            return
        drafted, own = drafts_agreed(self._with(self._weights), labelled, self._version)
        _, old = drafts_agreed(self._with(self._replaced), labelled, self._version)
        self._drafted, self._own, self._old = self._drafted + drafted, self._own + own, self._old + old
        if self._drafted < _CHECKED_DRAFTS:
            return
        self._replaced = None
        self._log.write("served", version=self._version, drafts=self._drafted, own=self._own, of_replaced=self._old)
        if self._own < self._old:
            logger.warning(
                "of %d drafts labelled version %d, %d match the previous weights and %d match its own: "
                "the engine probably did not load it",
                *(self._drafted, self._version, self._old, self._own),
            )

    def _with(self, weights: dict[str, Tensor]) -> Drafter:
        return with_weights(self._drafter, weights, self._dtype)


class StartCheck:
    """Says whether the gate of a learner that has published nothing compares with what engines serve.

    A learner that did not resume compares with the drafter that it started from. An engine may serve what an earlier
    learner published.

    Args:
        weights: Weights that the gate compares with, as they are served.
        log: Metrics of the run; gets an event "gate_against" for each new answer of an engine, for 64 at most: a
            peer may make up ever new ones.
    """

    def __init__(self, weights: dict[str, Tensor], log: MetricsLog) -> None:
        self._digest, self._log = checksum(weights), log
        self._told: set[tuple[str, int, str]] = set()

    def check(self, served: Sequence[tuple[str, int, str]]) -> None:
        """Take in the name, version and checksum that engines say; see ``WeightPublisher.served``."""
        for name, version, digest in served:
            same = digest == self._digest
            if (name, version, digest) in self._told or (same and not version):  # as both started
                continue
            if len(self._told) == _MAX_TOLD:
                return
            self._told.add((name, version, digest))
            self._log.write("gate_against", engine=name, version=version, same=same)
            if not same:
                logger.warning(
                    "engine %r serves version %d, whose weights this learner does not have: until it publishes, its "
                    "gate compares with the drafter that it started from; to compare with what is served, start it "
                    "with --resume, or with drafter.path set to that version's drafter",
                    *(name, version),
                )


@torch.inference_mode()
def drafts_agreed(drafter: Drafter, trajectories: Sequence[TensorDictBase], version: int) -> tuple[int, int]:
    """Return the first drafts in rounds of a version, and how many of them a drafter of its weights would have drafted.

    The tokens proposed at the root of a round are the likeliest there by the weights that drafted it. Those that prompt
    lookup added are left out. Where the engine's drafter cache holds rows of older weights, or in bfloat16, some drafts
    differ: compare with another version's weights, which agree less often.

    Trajectories are as they arrived, drafted in mode "topk".

    Example:
        >>> from aurora_rl.policies import Eagle3Drafter, TargetParts
        >>> from aurora_rl.testing import tiny_target, tiny_trajectory
        >>> drafter = Eagle3Drafter.from_target(TargetParts.of(tiny_target()), draft_vocab=torch.arange(16)).double()
        >>> drafted, agreed = drafts_agreed(drafter, [tiny_trajectory(drafter)], version=0)
        >>> drafted > 5, drafted == agreed
        (True, True)
    """
    device = drafter.draft_vocab.device
    batch = pack(trajectories).to(device)
    trees, rounds = TreeIndex.of(batch), batch["rounds"]
    drafted_by = (rounds["policy_version"] == version) & (trees.root[: trees.num_rounds] >= 0)
    row = draft_rows(drafter.draft_vocab, batch["nodes", "tokens"])
    first = (trees.parent < trees.num_rounds) & (row >= 0)
    if (log_probs := batch.get(("nodes", "log_probs"), None)) is not None:
        first &= torch.isfinite(log_probs)
    first &= drafted_by[trees.parent.clamp(max=trees.num_rounds - 1)] if trees.num_rounds else first
    if not bool(first.any()):
        return 0, 0
    of_round = trees.parent[first]
    wanted = torch.zeros(len(trees.depth), dtype=torch.bool, device=device)
    wanted[of_round] = True
    logits = drafter.context_logits(batch, trees, wanted)[(wanted.cumsum(0) - 1)[of_round]]
    better = (logits > logits.gather(1, row[first][:, None])).sum(1)
    siblings = torch.bincount(of_round, minlength=trees.num_rounds)[of_round]
    return len(of_round), int((better < siblings).sum())
