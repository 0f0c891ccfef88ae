"""TorchRL's collector over an environment of this library, with batches for objectives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tensordict import TensorDict
from torchrl.collectors import Collector
from typing_extensions import override

from aurora_rl.envs.request import Completion
from aurora_rl.envs.spec_decode import SpecDecodeEnv
from aurora_rl.policies.drafter import Drafter
from aurora_rl.policies.policy import DrafterPolicy
from aurora_rl.trajectories import pack


class TrajectoryCollector(Collector):
    """TorchRL's ``Collector`` whose batches are packed trajectories, as objectives take them.

    TorchRL's own yields rounds, of which no objective can learn: a round lacks the prompt, and its request goes on in
    the next batch. This one runs the same rounds, and yields the requests that ended in them, on the drafter's device.
    It yields nothing while none ends, and stops when no request is left, or after ``total_frames``.

    Args:
        env: Environment, made with ``record=True``. Its ``on_completion`` is called as before.
        policy: Policy that drafts for it. Its drafter may be the one that learns, or a serving copy of it.
        frames_per_batch: Rounds of a batch times slots. One frame is a round of one slot.
        total_frames: Frames after which it stops, whatever is in flight; −1 sets no end.

    Raises:
        ValueError: The environment is of another kind, or records nothing.

    Example:
        >>> import torch
        >>> from aurora_rl.envs import Request, SamplingParams, TransformersEngine
        >>> from aurora_rl.objectives import ImitationLoss
        >>> from aurora_rl.policies import Eagle3Drafter, TargetParts, TreeShape
        >>> from aurora_rl.testing import tiny_target
        >>> model = tiny_target(dtype=torch.float32)
        >>> parts = TargetParts.of(model)
        >>> drafter = Eagle3Drafter.from_target(parts, draft_vocab=torch.arange(32))
        >>> engine = TransformersEngine(model, num_slots=2, max_length=64, feature_layers=drafter.feature_layers)
        >>> queue = [Request(i, torch.tensor([3, i]), SamplingParams(max_tokens=8)) for i in range(6)]
        >>> env = SpecDecodeEnv(engine, lambda: queue.pop() if queue else None, num_nodes=3)
        >>> policy = DrafterPolicy(drafter, engine.store, num_nodes=3, shape=TreeShape(3))
        >>> loss_module = ImitationLoss(drafter, parts.head)
        >>> optimizer = torch.optim.AdamW(loss_module.parameters())
        >>> collector = TrajectoryCollector(env, policy, frames_per_batch=16)
        >>> for batch in collector:
        ...     loss_module(batch)["loss_imitation"].backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     collector.update_policy_weights_()
        >>> policy.version > 0
        True
    """

    def __init__(
        self, env: SpecDecodeEnv, policy: DrafterPolicy, *, frames_per_batch: int, total_frames: int = -1
    ) -> None:
        if not isinstance(env, SpecDecodeEnv):
            raise ValueError(f"env is {type(env).__name__}; give a SpecDecodeEnv, which records trajectories")
        if not env.record:
            raise ValueError("the environment records no trajectories; make it by SpecDecodeEnv(..., record=True)")
        self._ended: list[TensorDict] = []
        self._drafts, self._rounds_of, self._on_completion = policy, env, env.on_completion
        env.on_completion = self._take
        super().__init__(env, policy, frames_per_batch=frames_per_batch, total_frames=total_frames)

    @override
    def iterator(self) -> Iterator[TensorDict]:
        device = self._drafts.drafter.draft_vocab.device  # the environment records on the CPU
        for _ in super().iterator():
            if self._ended:
                batch, self._ended = pack(self._ended).to(device), []
                yield batch
            elif not self._rounds_of.num_active:
                return

    @override
    def update_policy_weights_(self, policy_or_weights: Any = None, **settings: Any) -> None:
        """Let the next round draft by new weights, as the next version.

        Args:
            policy_or_weights: The drafter that learned, of which the policy has a serving copy. Or what TorchRL's
                collectors take: a policy, or its weights. None, the default, if the policy's own drafter learned: what
                an optimizer wrote into it counts without this call too.
            settings: See TorchRL's method.

        Raises:
            ValueError: None is given, and the policy's drafter is a copy that does not learn. Or see
                ``DrafterPolicy.stage``.
        """
        if isinstance(policy_or_weights, Drafter):
            self._drafts.install(policy_or_weights.published(), self._drafts.version + 1)
        elif policy_or_weights is not None or settings:
            super().update_policy_weights_(policy_or_weights, **settings)
        elif not any(parameter.requires_grad for parameter in self._drafts.parameters()):
            raise ValueError(
                "the policy's drafter is a serving copy, which does not learn; give the drafter that does: "
                "collector.update_policy_weights_(drafter)"
            )

    def _take(self, completion: Completion) -> None:
        assert completion.trajectory is not None
        if not self.closed:  # another collector may go on with the environment
            self._ended.append(completion.trajectory)
        if self._on_completion is not None:
            self._on_completion(completion)
