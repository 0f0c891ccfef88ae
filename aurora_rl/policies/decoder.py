"""A target and a drafter, wired to decode requests: engine, environment and policy."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from tensordict import TensorDictBase
from transformers import PreTrainedModel

from aurora_rl.envs import Engine, Request, SpecDecodeEnv, TransformersEngine
from aurora_rl.policies.calibration import measure_rounds
from aurora_rl.policies.drafter import Drafter
from aurora_rl.policies.policy import DrafterPolicy
from aurora_rl.policies.tree_controller import TreeController, observe_round
from aurora_rl.policies.tree_shape import TreeShape


class SpeculativeDecoder:
    """An engine on the target, an environment on its slots, and the drafter's policy.

    Args:
        model: The target. The engine puts it into inference form in place.
        drafter: The drafter. A copy on the target's device and in its dtype serves. None decodes plainly.
        requests: Requests in order, or a function that returns the next one, None if there is none now.
        shape: Trees to draft.
        max_length: Most tokens of a slot, prompt and completion.
        num_slots: Requests decoded at the same time.
        seed: Seed of drafts that are sampled.
        engine: Class of the engine, or a function with its arguments that returns one.
        **settings: Further arguments of :class:`~aurora_rl.envs.SpecDecodeEnv`, such as ``on_completion``
            and ``rule``.

    Attributes:
        engine: The engine.
        env: The environment.
        policy: The drafter's policy; None if there is no drafter.
        controller: Chooses each round's shape; None keeps the policy's. See :meth:`adapt`.

    Raises:
        UnsupportedModelError: The engine cannot serve the target exactly.
        ValueError: An argument is out of range, see the three classes.

    Example:
        >>> from aurora_rl.policies import MedusaDrafter, TargetParts
        >>> from aurora_rl.testing import tiny_target
        >>> target = tiny_target()
        >>> drafter = MedusaDrafter.from_target(TargetParts.of(target), draft_vocab=torch.arange(16))
        >>> requests = [Request(0, torch.tensor([3, 4, 5])), Request(1, torch.tensor([6]))]
        >>> texts = {}
        >>> decoder = SpeculativeDecoder(
        ...     target, drafter, requests, shape=TreeShape(3), max_length=256,
        ...     on_completion=lambda completion: texts.update({completion.request.id: completion.tokens}),
        ... )
        >>> rounds = sum(1 for step in decoder.rounds())
        >>> len(texts[0]), len(texts[1]), rounds < 256
        (128, 128, True)
    """

    def __init__(
        self,
        model: PreTrainedModel,
        drafter: Drafter | None,
        requests: Iterable[Request] | Callable[[], Request | None],
        *,
        shape: TreeShape,
        max_length: int,
        num_slots: int = 1,
        seed: int = 0,
        engine: Callable[..., Engine] = TransformersEngine,
        **settings: Any,
    ) -> None:
        if drafter is not None:
            drafter = drafter.serving_copy(model.dtype, model.device)
        layers = () if drafter is None else drafter.feature_layers
        self.engine = engine(model, num_slots=num_slots, max_length=max_length, feature_layers=layers)
        if not callable(requests):
            waiting = iter(requests)
            requests = lambda: next(waiting, None)  # noqa: E731
        nodes = max(shape.max_nodes, 1)
        self.env = SpecDecodeEnv(self.engine, requests, num_nodes=nodes, draft_mode=shape.mode, **settings)
        self.policy: DrafterPolicy | None = None
        self.controller: TreeController | None = None
        self._processors = settings.get("processors")
        if drafter is not None:
            self.policy = DrafterPolicy(
                drafter,
                self.engine.store,
                num_nodes=nodes,
                shape=shape,
                vocab_size=self.engine.vocab_size,
                generator=torch.Generator(model.device).manual_seed(seed),
            )

    def adapt(self, request: Request) -> None:
        """Choose the shape of each round from now on by measured acceptance and cost, up to the policy's shape.

        Rounds of ``request`` are timed for it, with the policy's drafter, which there must be.

        Raises:
            DrafterError: The drafter failed; the shape stays.
        """
        assert self.policy is not None
        # Not every depth, nor often: the caller waits, and `price` leaves out nodes that do not pay.
        whole = self.policy.shape
        shapes = [s for s in TreeController.candidates(whole) if s.lookup_only or s.depth in (0, whole.depth)]
        costs = measure_rounds(self.engine, self.policy, request, shapes, repeats=3, processors=self._processors)
        self.controller = TreeController(costs)

    def rounds(self) -> Iterator[TensorDictBase]:
        """Decode until no request is left, and yield each round's step, with its results in "next"."""
        td, empty = self.env.reset(), self.env.full_action_spec.zero()["draft"]
        policy = self.policy
        while self.env.num_active:
            occupied = len(self.engine.store.occupied)
            controller = self.controller if occupied else None  # all may still be reading their prompts
            if controller is not None and policy is not None:
                policy.shape = controller.choose(occupied)
                policy.min_path_probability = controller.price(policy.shape, occupied)
            began, prefill = time.perf_counter(), self.engine.prefill_seconds
            action = td.set("draft", empty) if policy is None else policy(td)
            step, td = self.env.step_and_maybe_reset(action)
            if controller is not None and policy is not None:
                seconds = time.perf_counter() - began - (self.engine.prefill_seconds - prefill)
                observe_round(controller, policy, step, occupied, seconds)
            yield step
