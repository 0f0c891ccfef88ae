"""The time of a round by the shape of its trees, measured before serving starts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from tensordict import TensorDict
from transformers import LogitsProcessorList

from aurora_rl.envs import Engine, Request, SpecDecodeEnv
from aurora_rl.policies.policy import DrafterPolicy
from aurora_rl.policies.tree_shape import TreeShape


class DrafterError(Exception):
    """A drafter failed before there was a request that could go on without it."""


def measure_rounds(
    engine: Engine,
    policy: DrafterPolicy,
    request: Request,
    shapes: Sequence[TreeShape],
    *,
    repeats: int = 11,
    processors: Callable[[Request], LogitsProcessorList] | None = None,
) -> dict[int, dict[TreeShape, float]]:
    """Time whole rounds on this machine, with few and with many slots occupied, before serving starts.

    Shapes take turns, and the median share of a turn counts, which a drifting speed or other work hardly changes.

    Args:
        engine: Engine whose slots are free.
        policy: Policy on it. Its weights do not matter: a round takes as long, whatever is accepted.
        request: Request of each slot, started again whenever it ends.
        shapes: Shapes to measure, within the policy's ``num_nodes``.
        repeats: Number of timings of each shape.
        processors: Logits processors of the environment that will serve; they take time at every node.

    Returns:
        Seconds of a round without prefill, by number of occupied slots (1, 2, 4, ... and all of them) and by shape.

    Raises:
        DrafterError: The drafter failed; the slots are free again.
    """
    kept, slots = policy.shape, engine.num_slots
    counts = (*(2**i for i in range(slots.bit_length())), slots)

    def give_up(slot: int, fault: str) -> None:
        raise DrafterError(fault)

    def time_rounds(count: int) -> dict[TreeShape, float]:
        """Return the seconds of a round of each shape, with so many slots occupied."""
        waiting = [request] * count
        env = SpecDecodeEnv(
            engine,
            lambda: waiting.pop() if waiting else None,
            num_nodes=policy.num_nodes,
            draft_mode=policy.shape.mode,
            processors=processors,
            on_completion=lambda completion: waiting.append(completion.request),
        )
        td = env.reset()
        turns = torch.zeros(repeats, len(shapes), dtype=torch.float64)
        for turn in turns:
            for i, shape in enumerate(shapes):
                policy.shape, prefill = shape, engine.prefill_seconds
                began = time.perf_counter()
                action = policy(td)
                if shape.lookup_only:
                    _fill(action["draft"], shape.num_nodes)
                _, td = env.step_and_maybe_reset(action)
                turn[i] = time.perf_counter() - began - (engine.prefill_seconds - prefill)
        whole = turns.sum(1, keepdim=True)
        seconds = (turns / whole).median(0).values * whole.median()
        for slot in engine.store.occupied.tolist():
            engine.release(slot)
        return dict(zip(shapes, seconds.tolist(), strict=True))

    policy.on_fault = give_up  # until a server takes over
    try:
        seconds = {count: time_rounds(count) for count in counts}
    finally:
        for slot in engine.store.occupied.tolist():
            engine.release(slot)
        policy.shape, policy.on_fault, engine.prefill_seconds = kept, None, 0.0

    def dearer(shape: TreeShape) -> list[TreeShape]:
        if not shape.depth:
            return list(shapes)
        if shape.lookup_only:
            return [s for s in shapes if s.lookup_only and s.num_nodes >= shape.num_nodes]
        return [s for s in shapes if not s.lookup_only and s.depth >= shape.depth and s.width >= shape.width]

    # A round that does more is no cheaper; where it looks so, the one that does less was disturbed.
    return {
        count: {s: min(seconds[c][d] for c in seconds if c >= count for d in dearer(s)) for s in shapes}
        for count in seconds
    }


def cost_table(costs: dict[int, dict[TreeShape, float]]) -> dict[int, dict[str, float]]:
    """Return the result of :func:`measure_rounds` for a log: milliseconds by depth and width, or by nodes looked up.

    Example:
        >>> cost_table({1: {TreeShape(0): 0.02, TreeShape(3, width=2): 0.0312}})
        {1: {'0x1': 20.0, '3x2': 31.2}}
    """
    return {
        count: {shape_name(shape): round(s * 1e3, 3) for shape, s in by_shape.items()}
        for count, by_shape in costs.items()
    }


def shape_name(shape: TreeShape) -> str:
    """Return the name of a shape in tables of costs.

    Example:
        >>> shape_name(TreeShape(3, width=2)), shape_name(TreeShape(3, lookup=4).without_drafter(4))
        ('3x2', 'lookup 4')
    """
    return f"lookup {shape.num_nodes}" if shape.lookup_only else f"{shape.depth}x{shape.width}"


@torch.inference_mode()
def _fill(draft: TensorDict, num_nodes: int) -> None:
    """Put as many nodes into every slot's tree as may be looked up: how many are found depends on the text."""
    nodes = torch.arange(num_nodes, device=draft["tokens"].device)
    draft["tokens"][:, :num_nodes], draft["parents"][:, :num_nodes], draft["mask"][:, :num_nodes] = nodes, -1, True
