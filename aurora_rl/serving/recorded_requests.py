"""Requests served only to record them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from aurora_rl.collectors.dataset import TrajectoryDataset
from aurora_rl.envs import Completion, Request
from aurora_rl.policies import Drafter, TreeShape
from aurora_rl.policies.decoder import SpeculativeDecoder


def record_requests(
    model: PreTrainedModel,
    drafter: Drafter,
    requests: Sequence[Request],
    recording: TrajectoryDataset,
    *,
    shape: TreeShape,
    num_slots: int = 2,
    **settings: Any,
) -> None:
    """Serve requests in this process, and record those that are not there yet.

    Args:
        model: The target; an engine puts it into inference form in place.
        drafter: Drafter of which a copy, in the model's dtype, drafts every round.
        requests: Requests, told apart by their ids.
        recording: Dataset that gets the trajectories, in the order of completion.
        shape: The trees.
        num_slots: Requests decoded at the same time.
        **settings: Further arguments of :class:`SpeculativeDecoder`, such as ``stop_tokens``.
    """
    recorded = set(recording.numbers("request"))
    waiting = [request for request in requests if request.id not in recorded]
    if not waiting:
        return

    def keep(completion: Completion) -> None:
        assert completion.trajectory is not None
        recording.append(completion.trajectory)

    decoder = SpeculativeDecoder(
        model,
        drafter,
        waiting,
        shape=shape,
        max_length=max(len(r.prompt) + r.sampling_params.token_budget for r in waiting),
        num_slots=num_slots,
        on_completion=keep,
        **settings,
    )
    for _ in decoder.rounds():
        pass
