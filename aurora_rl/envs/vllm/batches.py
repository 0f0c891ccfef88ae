"""Parts of vLLM's batches as prompts and rounds of the assembler. Pure bookkeeping: nothing here knows vLLM's classes.

A batch mixes requests. Each has some consecutive positions of it: a chunk of its prompt, or its last token and the
drafts after it. Recomputed requests have both at once, and are not recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aurora_rl.envs.remote.assembler import EngineRound, TargetRows, TrajectoryAssembler


@dataclass(frozen=True, slots=True)
class BatchPart:
    """One request's part of a batch."""

    rid: str
    start: int  # position of its first token in this batch
    count: int  # number of its tokens in this batch
    prompt_length: int
    root: int  # token at `start`
    drafts: Sequence[int]  # drafted tokens after it

    @property
    def of_prompt(self) -> bool:
        """Whether it is a chunk of the prompt."""
        return self.start < self.prompt_length

    @property
    def logit_rows(self) -> int:
        """Number of its positions at which the target's head is read: the last of a chunk, or root and drafts."""
        return 1 + len(self.drafts)


@dataclass(frozen=True, slots=True)
class Draft:
    """How the drafts that are verified next were made."""

    version: int  # of the weights that drafted
    joint_log_probs: Tensor | None = None  # of each drafted prefix, [K]; None if the drafter kept none
    # Whether no drafter made them: vLLM verifies tokens 0 where a text of the batch is about as long as it may be.
    filler: bool = False


def places(parts: Sequence[BatchPart]) -> list[tuple[slice, slice]]:
    """Return where each part's rows are among the batch's positions, and among the rows that the head reads.

    Example:
        >>> chunk, round = BatchPart("a", 0, 5, 9, 1, ()), BatchPart("b", 9, 3, 4, 7, (8, 8))
        >>> places([chunk, round])
        [(slice(0, 5, None), slice(0, 1, None)), (slice(5, 8, None), slice(1, 4, None))]
    """
    found, position, row = [], 0, 0
    for part in parts:
        found.append((slice(position, position + part.count), slice(row, row + part.logit_rows)))
        position, row = position + part.count, row + part.logit_rows
    return found


def assemble_part(
    assembler: TrajectoryAssembler,
    part: BatchPart,
    features: Tensor,
    target: TargetRows,
    said: Sequence[int],
    draft: Draft,
    ready: Callable[[], None],
) -> None:
    """Take in a recorded request's part of a batch.

    Args:
        assembler: Assembler that has begun the request.
        part: The part.
        features: Features at its positions, ``[count, F]``.
        target: The target's distribution at the rows that its head read, ``[logit_rows, ...]``.
        said: Tokens that the batch delivered: the accepted drafts and one more; none within a prompt.
        draft: How the part's drafts were made.
        ready: Function to call before anything is read, which waits for copies that are still on their way.
    """
    end = part.start + part.count
    if part.of_prompt:
        if assembler.prefilled(part.rid) != part.start or end > part.prompt_length:  # put back, and run again
            assembler.drop(part.rid, "retracted")
        else:
            assembler.prompt(part.rid, features, target if end == part.prompt_length else None)
        return
    if part.count != part.logit_rows:  # put back, and its text comes from the prefix cache but for its end
        assembler.drop(part.rid, "retracted")
        return

    def chain(step: int, tokens: Sequence[int], path_length: int, joint_log_probs: Tensor | None) -> EngineRound:
        rows = slice(step, step + len(tokens))
        return EngineRound(
            anchor=torch.tensor(part.start + step),
            tokens=torch.tensor(tokens),
            first_child=torch.tensor([*range(1, len(tokens)), -1]),
            next_sibling=torch.full((len(tokens),), -1),
            path=torch.arange(len(tokens)),
            path_length=torch.tensor(path_length),
            joint_log_probs=joint_log_probs if len(tokens) > 1 else torch.zeros(0),
            features=features[rows],
            target={name: values[rows] for name, values in target.items()},
            policy_version=draft.version,
            ready=ready,
        )

    if draft.filler:  # decoded plainly, a token a round
        tokens = [part.root, *said[:-1]]
        assembler.round(part.rid, *(chain(step, [token], 1, None) for step, token in enumerate(tokens)))
    else:
        joint = None if draft.joint_log_probs is None else draft.joint_log_probs[: len(part.drafts)]
        assembler.round(part.rid, chain(0, [part.root, *part.drafts], len(said), joint))
