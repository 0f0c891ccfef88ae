"""A draft vocabulary that follows the traffic: tokens that are said take the rows of tokens that are not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from tensordict import TensorDictBase
from torch import Tensor

from aurora_rl.collectors.codec import checksum
from aurora_rl.models.target_head import TargetHead
from aurora_rl.policies.drafter import Drafter, draft_rows
from aurora_rl.storage import CheckpointError
from aurora_rl.training.checkpoint import TrainingState


def vocab_of_traffic(vocab: Tensor, counts: Tensor) -> Tensor:
    """Return the draft vocabulary, as large as ``vocab``, that has the tokens said most often, ``[Vd]`` int64, rising.

    Among tokens said as often those stay that are in ``vocab``, and then those of lower ids: a byte-pair tokenizer
    numbers its merges in the order of frequency.

    Args:
        vocab: Draft vocabulary of before, ``[Vd]`` int64.
        counts: How often each of the target's tokens was said, ``[V]`` int64.

    Example:
        >>> vocab_of_traffic(torch.tensor([0, 1, 5]), torch.tensor([0, 0, 0, 2, 0, 1, 0]))
        tensor([0, 3, 5])
    """
    rank = 2 * counts
    rank[vocab] += 1
    return rank.argsort(descending=True, stable=True)[: len(vocab)].sort().values


def vocab_of_state(state: TrainingState, own: Tensor, *, follows: bool) -> Tensor:
    """Return the draft vocabulary of the weights in a training state, ``[Vd]`` int64.

    Args:
        state: State of a learner, or of ``aurora-rl train``, which has the vocabulary that it started with.
        own: Draft vocabulary of the drafter that takes the weights, ``[Vd]`` int64.
        follows: Whether the drafter may take another one.

    Raises:
        CheckpointError: The state has another one, and the drafter may not take it or the state does not hold it.
    """
    saved = (state.weights("draft_vocab") or {}) if follows else {}
    vocab = saved.get("draft_vocab", own)
    if state.progress.get("draft_vocab") != checksum({"draft_vocab": vocab}):
        raise CheckpointError(
            f"{state.folder} is of another draft vocabulary; set drafter.path to that run's drafter, or, if its "
            "vocabulary followed the traffic, drafter.vocab_follows=true"
        )
    return vocab.to(own)


class MovingVocab:
    """Moves rows of a drafter's tables to the tokens that requests say.

    The draft vocabulary is chosen on day 0, from the first prompts. A token that later traffic says, of another subject
    or another language, may have no row, and a token without a row is never drafted. A token that enters starts as the
    target's own row, as all did on day 0, and with empty optimizer states.

    Args:
        drafter: Drafter in training.
        head: The target's output head.
        optimizers: Optimizers of the drafter's parameters.

    Raises:
        ValueError: The drafter has no :attr:`~aurora_rl.policies.drafter.Drafter.vocab_tables`, or one whose rows are
            not as wide as the target's.

    Example:
        >>> from aurora_rl.testing import tiny_batch
        >>> from aurora_rl.trajectories import unpack
        >>> drafter, head, batch = tiny_batch()
        >>> moving = MovingVocab(drafter, head, [])
        >>> before = set(drafter.draft_vocab.tolist())
        >>> moving.follow(unpack(batch)) == len(set(drafter.draft_vocab.tolist()) - before)
        True
    """

    def __init__(self, drafter: Drafter, head: TargetHead, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        if not drafter.vocab_tables:
            raise ValueError(
                f"{type(drafter).__name__} has no rows that could be another token's; leave drafter.vocab_follows out"
            )
        wanted = (len(drafter.draft_vocab), head.weight.shape[1])
        for table in drafter.vocab_tables:
            if table.shape != wanted:
                raise ValueError(
                    f"a table in vocab_tables of {type(drafter).__name__} is {tuple(table.shape)}, and the target's "
                    f"rows of its draft vocabulary are {wanted}; leave the table out of vocab_tables"
                )
        self._drafter, self._head, self._optimizers = drafter, head, optimizers

    @torch.no_grad()
    def follow(self, trajectories: Iterable[TensorDictBase]) -> int:
        """Take the vocabulary of what these requests say. Return how many tokens entered."""
        answers = [each["sequence", "tokens"][int(each["sequence", "prompt_length"]) :] for each in trajectories]
        if not answers:
            return 0
        old = self._drafter.draft_vocab
        counts = torch.bincount(torch.cat(answers).cpu(), minlength=self._drafter.vocab_size)
        vocab = vocab_of_traffic(old.cpu(), counts).to(old.device)
        row = draft_rows(old, vocab)
        entered, source = row < 0, row.clamp(min=0)
        if not bool(entered.any()):
            return 0
        start = self._head.rows(vocab[entered])
        for table in self._drafter.vocab_tables:
            moved = table[source]
            moved[entered] = start.to(moved)
            table.copy_(moved)
            for optimizer in self._optimizers:
                for value in optimizer.state.get(table, {}).values():
                    if value.shape == table.shape:
                        value.copy_(value[source].masked_fill(entered[:, None], 0.0))
        self._drafter.draft_vocab = vocab
        return int(entered.sum())
